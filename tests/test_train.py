"""The straight line on the tiny model: trained, evaluated, merged; bad input met with one clear message."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file
from transformers import AutoTokenizer

from grpo_lite.models.base import resolve_base
from grpo_lite.recipe.recipe import TINY_MODEL
from grpo_lite.runs.run_dir import RunDir
from tests.command_line import grpo_lite, in_process
from tests.models.tiny_multimodal import save_multimodal
from tests.tiny import tiny_model, tiny_tokenizer


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    run = tmp_path_factory.mktemp("runs") / "smoke"
    return run, grpo_lite("train", "smoke", "--run", str(run))


def test_a_run_ends_with_everything_in_its_directory(finished: tuple[Path, str]) -> None:
    run, _ = finished
    names = {path.name for path in run.iterdir()}
    assert names >= {
        "recipe.yaml", "run.json", "metrics.jsonl", "metrics.json", "completions", "evaluation", "adapter", "merged",
        "checkpoint-2", "checkpoint-3",
    }  # fmt: skip
    assert (run / "merged" / "model.safetensors").is_file()
    assert (run / "adapter" / "adapter_model.safetensors").is_file()
    # TRL's and PEFT's cards: "license: license", a base of None or a path of this machine. `push` writes the real one.
    assert not [*run.glob("README.md"), *run.glob("*/README.md")]


def test_no_form_to_be_filled_in_is_left_as_a_model_card(finished: tuple[Path, str]) -> None:
    """TRL's and PEFT's cards hold placeholders and paths of this machine; `push` writes one that holds neither."""
    assert not list(finished[0].rglob("README.md"))


def test_the_screen_shows_progress_a_sample_and_the_result(finished: tuple[Path, str]) -> None:
    text = finished[1]
    assert "step 3/3 · reward" in text
    assert "peak" in text
    assert "prompt " in text
    assert "held-out lenient score" in text
    assert "verified on 8 held-out prompts" in text
    assert str(finished[0] / "merged") in text
    assert "merged 16-bit model, on the same prompts: " in text
    assert "ask base and trained model side by side" in text
    assert "Warning" not in text
    assert "\r" not in text


def test_metrics_keep_trl_s_keys_one_record_a_step(finished: tuple[Path, str]) -> None:
    records = [json.loads(line) for line in (finished[0] / "metrics.jsonl").read_text().splitlines()]
    assert [record["step"] for record in records] == [1, 2, 3]
    assert set(records[0]) >= {
        "reward", "reward_std", "loss", "grad_norm", "kl", "completions/mean_length", "completions/clipped_ratio",
        "rewards/accuracy_reward/mean", "rewards/soft_overlong_punishment/mean", "frac_reward_zero_std",
    }  # fmt: skip


def test_run_json_says_with_what_and_on_what_it_ran(finished: tuple[Path, str]) -> None:
    record = RunDir(finished[0]).read_run()
    assert set(record["versions"]) >= {"torch", "transformers", "trl", "peft", "bitsandbytes", "datasets"}
    assert record["device"]["kind"] in ("cpu", "cuda")
    assert record["seed"] == 42
    assert record["steps"] == 3
    assert record["peak_memory_bytes"] > 1 << 20
    assert record["merge"]["passed"] is True
    assert record["command"][1] == "train"
    assert record["started_at"] <= record["trained_at"] <= record["finished_at"]


def test_every_completion_is_kept_with_its_rewards(finished: tuple[Path, str]) -> None:
    rows = [json.loads(line) for line in (finished[0] / "completions" / "step_000001.jsonl").read_text().splitlines()]
    assert len(rows) == 8
    for row in rows:
        assert set(row["rewards"]) == {"accuracy_reward", "soft_overlong_punishment"}
        expected = row["rewards"]["accuracy_reward"] + 0.1 * row["rewards"]["soft_overlong_punishment"]
        assert row["reward"] == pytest.approx(expected)


def test_held_out_records_pair_base_and_trained(finished: tuple[Path, str]) -> None:
    rows = [json.loads(line) for line in (finished[0] / "evaluation" / "records.jsonl").read_text().splitlines()]
    assert len(rows) == 8
    assert all(isinstance(row[name]["completion"], str) for row in rows for name in ("base", "trained"))
    trained_on = [
        str(json.loads(line)["prompt"])  # messages, or what TRL 1.14 makes of them
        for path in (finished[0] / "completions").glob("*.jsonl")
        for line in path.read_text().splitlines()
    ]
    assert trained_on
    held = {row["prompt"][-1]["content"] for row in rows}
    assert not [text for text in trained_on if any(question in text for question in held)]


def test_a_finished_run_is_left_alone(finished: tuple[Path, str]) -> None:
    before = (finished[0] / "adapter" / "adapter_model.safetensors").read_bytes()
    text = grpo_lite("train", "smoke", "--run", str(finished[0]), expect=1)
    assert "holds a finished run, and it is not overwritten" in text
    assert (finished[0] / "adapter" / "adapter_model.safetensors").read_bytes() == before


def test_a_changed_recipe_shows_the_difference(finished: tuple[Path, str]) -> None:
    text = grpo_lite("train", "smoke", "grpo.beta=0.2", "--run", str(finished[0]), expect=1)
    assert "-  beta: 0.01" in text
    assert "+  beta: 0.2" in text


def test_eval_alone_measures_the_same_again(finished: tuple[Path, str]) -> None:
    before = json.loads((finished[0] / "metrics.json").read_text())
    text = grpo_lite("eval", str(finished[0]))
    after = json.loads((finished[0] / "metrics.json").read_text())
    assert "held-out lenient score" in text
    assert after["n"] == before["n"] == 8
    for kind in ("lenient", "strict", "honest"):
        assert after[kind]["base"] == before[kind]["base"]
    assert after["merged"] == before["merged"]


def test_merge_alone_asks_before_replacing(finished: tuple[Path, str]) -> None:
    assert "overwrite" in grpo_lite("merge", str(finished[0]), expect=1)
    scores = finished[0] / "metrics.json"
    before = json.loads(scores.read_text())
    scores.write_text(json.dumps({key: value for key, value in before.items() if key != "merged"}))
    assert "top-1 agreement" in grpo_lite("merge", str(finished[0]), "--overwrite")
    assert json.loads(scores.read_text())["merged"] == before["merged"]  # scored again


def test_export_checks_every_file(finished: tuple[Path, str], tmp_path: Path) -> None:
    assert "files intact" in grpo_lite("export", str(finished[0]))


def test_export_in_four_bits_is_measured_and_kept(finished: tuple[Path, str]) -> None:
    run = finished[0]
    text = grpo_lite("export", str(run), "--nf4")
    assert "mean KL" in text
    assert "held-out score in 4 bits" in text
    assert 0 < json.loads((run / "run.json").read_text())["nf4"]["agreement"]["top1_agreement"] <= 1
    assert "lenient" in json.loads((run / "metrics.json").read_text())["merged_nf4"]
    assert "is there already, of this merge" in grpo_lite("export", str(run), "--nf4")


def test_every_folder_of_a_run_verifies_until_a_byte_changes(finished: tuple[Path, str]) -> None:
    for name in ("adapter", "merged"):
        assert "files intact" in grpo_lite("verify", str(finished[0] / name))
    weights = finished[0] / "adapter" / "adapter_model.safetensors"
    right = weights.read_bytes()
    try:
        weights.write_bytes(right[:-1] + bytes([right[-1] ^ 1]))
        for command in (("verify", str(weights.parent)), ("merge", str(finished[0]), "--overwrite")):
            assert "adapter_model.safetensors" in grpo_lite(*command, expect=1)
    finally:
        weights.write_bytes(right)


def test_a_run_in_which_no_reward_ever_differed_says_so_and_merges_nothing(tmp_path: Path) -> None:
    (tmp_path / "flat.py").write_text("def flat(completions, **kwargs):\n    return [0.5 for _ in completions]\n")
    text = grpo_lite(
        "train", "smoke", "--run", str(tmp_path / "run"), "grpo.max_steps=1", "eval.samples=0",
        f"rewards=[{{function: '{tmp_path / 'flat.py'}:flat'}}]", "check.enabled=false",
    )  # fmt: skip
    assert "not merged: the adapter is zero" in text
    assert not (tmp_path / "run" / "merged").exists()


BAD_INPUT: list[tuple[list[str], str]] = [
    (["train", "gsm9k"], "did you mean 'gsm8k'"),
    (["train", "smoke", "grpo.num_generation=4"], "TRL's name is num_generations"),
    (["train", "smoke", "grpo.num_generations=3"], "num_generations may be 2, 4, 8"),
    (["train", "smoke", "data.train.path=nowhere.jsonl"], "there is no such file"),
    (["train", "smoke", "data.prompt={q}="], "has no column 'q'. It has: question, answer"),
    (["train", "smoke", "rewards[0].function=rewards.acuracy_reward"], "did you mean 'accuracy_reward'"),
    (["train", "smoke", "rewards[0].function=no_module.f"], "does not import"),
    (["train", "smoke", "model.id=./nowhere"], "there is no such folder"),
    (["train", "smoke", "model.id=nobody/nothing"], "is not in the local cache and HF_HUB_OFFLINE is set"),
    (["train", "smoke", "model.dtype=float16"], "a CPU cannot train in it"),
    (["train", "smoke", "lora.target_modules=[nothing_here]"], "nothing_here"),
    (["train", "smoke", "grpo.save_strategy=best"], "grpo"),
    (["train", "smoke", "grpo.report_to=nonsense"], "nonsense is not supported"),
    (["eval", "no/such/run"], "is not a run"),
    (["merge", "recipes"], "is not a run"),
    (["show", "smoke", "seed"], "write key.path=value"),
    (["check", "smoke", "model.id=./nowhere"], "there is no such folder"),
]


@pytest.mark.parametrize("arguments, expected", BAD_INPUT, ids=[" ".join(a) for a, _ in BAD_INPUT])
def test_bad_input_gets_one_clear_error(root: Path, tmp_path: Path, arguments: list[str], expected: str) -> None:
    run = ["--run", str(tmp_path / "run")] if arguments[0] == "train" else []
    assert expected in in_process(*arguments, *run, expect=1)


def test_an_unwritable_output_folder_is_named(root: Path, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    assert "not writable" in in_process("train", "smoke", "--run", str(tmp_path / "file" / "run"), expect=1)


def test_a_reward_that_breaks_its_contract_stops_with_its_name(root: Path, tmp_path: Path) -> None:
    (tmp_path / "mine.py").write_text("def short(completions, **kwargs):\n    return [1.0]\n")
    reference = f"rewards[0].function={tmp_path / 'mine.py'}:short"
    text = in_process(
        "train",
        "smoke",
        "check.enabled=false",
        reference,
        "rewards[0].kwargs={}",
        "--run",
        str(tmp_path / "r"),
        expect=1,
    )
    assert "returned 1 rewards for 8 completions" in text


def test_check_shows_prompts_lengths_and_what_gold_earns(root: Path) -> None:
    text = in_process("check", "smoke")
    assert text.count("prompt: <|user|>") == 3
    assert "prompt tokens: p50" in text
    assert "accuracy_reward: gold completions earn 1.000" in text


def test_recipes_lists_every_recipe_on_one_line(root: Path) -> None:
    lines = in_process("recipes").splitlines()
    assert [line.split()[0] for line in lines[1 : lines.index("")]] == sorted(
        path.stem for path in Path("recipes").glob("*.yaml")
    )


def test_help_lists_the_commands() -> None:
    text = in_process("--help")
    assert all(f"  {verb} " in text for verb in ("train", "eval", "merge", "export", "recipes", "show", "check"))


@pytest.mark.slow
@pytest.mark.weights
def test_gsm8k_runs_on_a_cpu_with_model_and_data_overridden(
    shared_data: Path, smollm2_dir: Path, tmp_path: Path
) -> None:
    text = grpo_lite(
        "train", "gsm8k", "--run", str(tmp_path / "gsm8k"),
        "model.id=embedded/SmolLM2-135M-Instruct",
        f"data.train.path={shared_data / 'gsm8k_train.jsonl'}",
        "grpo.max_steps=2", "grpo.gradient_accumulation_steps=2", "grpo.max_completion_length=24",
        "eval.limit=4", "eval.samples=0",
    )  # fmt: skip
    assert "data: 6725 training prompts, 748 held out" in text  # 7,473 rows, a tenth held out
    assert "step 2/2" in text
    record: dict[str, Any] = RunDir(tmp_path / "gsm8k").read_run()
    assert record["finished_at"]
    # two steps of a model that solves none of it: merged and verified, or an update too small to merge
    assert record["merge"].get("passed") is True or "skipped" in record["merge"]


@pytest.mark.slow
def test_a_hybrid_with_short_convolutions_trains_and_its_merge_is_proven(root: Path, tmp_path: Path) -> None:
    model = tiny_model("lfm2")
    model.save_pretrained(tmp_path / "model")
    tiny_tokenizer().save_pretrained(tmp_path / "model")
    (tmp_path / "mine.py").write_text(
        "def parity(completions, **kwargs):\n    return [float(sum(map(ord, text)) % 2) for text in completions]\n"
    )
    text = grpo_lite(
        *("train", "lfm2.5-1.2b", "--run", str(tmp_path / "run"), "warmup=null", "check.enabled=false"),
        *(f"model.id={tmp_path / 'model'}", "model.load_in=32bit", "data.format=text", "data.prompt='{question}='"),
        *("data.train={generator: sums, kwargs: {high: 9}}", "data.holdout=8", "data.answer=answer"),
        f"rewards=[{{function: '{tmp_path / 'mine.py'}:parity'}}]",
        *("grpo.max_completion_length=8", "grpo.max_steps=2", "grpo.learning_rate=1e-2", "grpo.optim=adamw_torch"),
        *("eval.lenient=null", "eval.strict=[]", "eval.samples=0"),
    )
    assert "Packed compute and shared rollouts are off" not in text
    assert "verified on 8 held-out prompts" in text
    with safe_open(tmp_path / "run" / "adapter" / "adapter_model.safetensors", "np") as adapter:
        weights = {name: abs(adapter.get_tensor(name)).max() for name in adapter.keys()}  # noqa: SIM118
    kinds = {name.split(".")[-3] for name, largest in weights.items() if "lora_B" in name and largest > 0}
    assert kinds == {"in_proj", "out_proj", "q_proj", "k_proj", "v_proj", "w1", "w2", "w3"}


@pytest.mark.slow
@pytest.mark.parametrize(
    "model", ["tiny/random-llama", pytest.param("embedded/SmolLM2-135M-Instruct", marks=pytest.mark.weights)]
)
def test_the_code_recipe_trains_on_unit_tests_run_in_the_sandbox(
    shared_data: Path, request: pytest.FixtureRequest, tmp_path: Path, model: str
) -> None:
    if model.startswith("embedded/"):
        request.getfixturevalue("smollm2_dir")
    run = tmp_path / "code"
    text = grpo_lite(
        "train", "code", "--run", str(run), f"model.id={model}", "data.max_prompt_tokens=null",
        f"data.train.path={shared_data / 'mbpp_train.jsonl'}", "data.train.limit=40",
        "grpo.max_steps=2", "grpo.gradient_accumulation_steps=2", "grpo.max_completion_length=48",
        "rewards[0].kwargs.allow_weak_isolation=true", "check.rows=4", "eval.limit=4", "eval.samples=0",
    )  # fmt: skip
    assert "rewards: gold completions earn 1" in text
    assert "step 2/2" in text
    record: dict[str, Any] = RunDir(run).read_run()
    assert record["sandbox"]["layers"]["process"] is True
    assert record["sandbox"]["allow_weak_isolation"] is True


def test_doctor_names_device_versions_and_every_layer_of_isolation(root: Path) -> None:
    text = in_process("doctor")
    assert "device: " in text
    assert "trl 1." in text
    for layer in ("process", "rlimits", "landlock", "seccomp", "namespaces"):
        assert layer in text


@pytest.mark.slow
def test_a_multimodal_base_runs_the_whole_line_and_keeps_its_vision_tower(tmp_path: Path) -> None:
    base = tmp_path / "gemma"
    save_multimodal(base, dtype=torch.bfloat16)
    AutoTokenizer.from_pretrained(resolve_base(TINY_MODEL)).save_pretrained(base)
    # A random model earns no reward of the recipe's own, and without a difference in a group no gradient flows.
    (tmp_path / "varied.py").write_text(
        "def varied(completion_ids, **kwargs):\n    return [sum(ids) % 7 for ids in completion_ids]\n"
    )
    settings = [
        "model.load_in=4bit",
        "grpo.max_steps=2",
        "grpo.learning_rate=1e-2",
        "check.enabled=false",
        f"rewards[0].function={tmp_path / 'varied.py'}:varied",
        "rewards[0].kwargs={}",
    ]
    text = grpo_lite("train", "smoke", f"model.id={base}", *settings, "--run", str(tmp_path / "run"))
    assert "34 tensors beside the text tower are copied unchanged (multi_modal_projector 2, vision_tower 32)" in text
    assert "verified on 8 held-out prompts" in text
    assert "held-out lenient score" in text
    before, after = (load_file(folder / "model.safetensors") for folder in (base, tmp_path / "run" / "merged"))
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    assert 10 < len(changed) <= 14  # seven linear layers in each of two blocks
    assert all(name.startswith("language_model.model.layers.") for name in changed)
    assert RunDir(tmp_path / "run").read_run()["merge"]["other_towers"]["vision_tower"] == 32
