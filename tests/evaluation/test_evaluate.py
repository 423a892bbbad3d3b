"""Base against trained: paired, strict and lenient apart, unusable golds left out, pass@k from the samples."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import get_peft_model
from transformers import AutoModelForCausalLM

from grpo_lite.engine.generate import generate_completions
from grpo_lite.errors import EvaluationError, MemoryBudgetError, ModelError
from grpo_lite.evaluation.evaluate import compare, evaluate_run, score_model
from grpo_lite.evaluation.scoring import score_completions
from grpo_lite.files.manifest import sha256_of, write_manifest
from grpo_lite.models.base import Base
from grpo_lite.models.load import load_tokenizer, load_trained, lora_config
from grpo_lite.models.reference import hold_reference
from grpo_lite.recipe.load import load_recipe
from grpo_lite.recipe.recipe import Recipe
from grpo_lite.report.summary import run_summary, score_lines
from grpo_lite.runs.run_dir import SCORE_COLUMNS, RunDir, dump_recipe
from grpo_lite.task.prompts import load_prompts
from grpo_lite.task.rewards import load_rewards
from grpo_lite.train import train_run
from tests.overflows import OTHERS, OVERFLOWS


@pytest.fixture
def recipe(root: Path) -> Recipe:
    return load_recipe("smoke", ["eval.samples=4"])


def record(lenient: bool | None, strict: bool | None = None, right: int = 0) -> dict[str, Any]:
    return {"lenient": lenient, "strict": lenient if strict is None else strict, "samples_right": right}


def test_a_clear_gain_is_called_one(recipe: Recipe) -> None:
    base = [record(i < 10) for i in range(100)]
    trained = [record(i < 60) for i in range(100)]
    result = compare(recipe, {"base": base, "trained": trained})
    assert result["lenient"]["difference"]["difference"] == pytest.approx(0.5)
    assert result["lenient"]["mcnemar"]["c"] == 50
    assert result["lenient"]["verdict"]["label"] == "significant gain"
    assert score_lines(result)[0].endswith("significant gain.")


def test_no_gain_is_said_to_be_none(recipe: Recipe) -> None:
    base = [record(i % 2 == 0) for i in range(40)]
    trained = [record(i % 2 == 0 or i == 1) for i in range(40)]
    assert compare(recipe, {"base": base, "trained": trained})["lenient"]["verdict"]["label"] == "no significant gain"


def test_strict_and_lenient_stand_apart(recipe: Recipe) -> None:
    base = [record(True, False) for _ in range(30)]
    trained = [record(True, True) for _ in range(30)]
    result = compare(recipe, {"base": base, "trained": trained})
    assert result["lenient"]["difference"]["difference"] == 0
    assert result["strict"]["difference"]["difference"] == 1
    assert len([line for line in score_lines(result) if "score" in line]) == 2


def test_unusable_golds_are_left_out_and_counted(recipe: Recipe) -> None:
    base = [record(None), record(False), record(True)]
    result = compare(recipe, {"base": base, "trained": [record(None), record(True), record(True)]})
    assert (result["n"], result["unusable_golds"]) == (2, 1)
    with pytest.raises(EvaluationError, match="no held-out row has a usable gold"):
        compare(recipe, {"base": [record(None)], "trained": [record(None)]})


def test_pass_at_k_is_the_unbiased_estimate(recipe: Recipe) -> None:
    # 4 samples, 2 right: pass@1 = 1/2, pass@2 = 1 - C(2,2)/C(4,2) = 5/6, pass@4 = 1
    result = compare(recipe, {"base": [record(False, right=2)] * 3, "trained": [record(False, right=4)] * 3})
    assert result["pass_at_k"]["pass@1"]["base"] == pytest.approx(0.5)
    assert result["pass_at_k"]["pass@2"]["base"] == pytest.approx(5 / 6)
    assert result["pass_at_k"]["pass@4"] == {"base": pytest.approx(1.0), "trained": pytest.approx(1.0)}


def test_the_result_is_plain_json(recipe: Recipe) -> None:
    json.dumps(compare(recipe, {"base": [record(False)], "trained": [record(True)]}), allow_nan=False)


def test_format_is_required_for_strict_only(root: Path, tiny_dir: Path) -> None:
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(tiny_dir)
    recipe = load_recipe("gsm8k")
    rows = [{"prompt": [{"role": "user", "content": "q"}], "answer": "so #### 72"}] * 3
    texts = ["<think>\nx\n</think>\n<answer>\n72\n</answer>", "The answer is 72.", "<answer>71</answer>"]
    ids = [tokenizer(text, add_special_tokens=False)["input_ids"] for text in texts]
    lenient, strict = score_completions(tokenizer, recipe, rows, ids)
    assert lenient == [True, True, False]
    assert strict == [True, False, False]


@pytest.fixture(scope="module")
def tiny(tiny_dir: Path) -> tuple[Any, Any]:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    return AutoModelForCausalLM.from_pretrained(tiny_dir), AutoTokenizer.from_pretrained(tiny_dir, padding_side="left")


@pytest.mark.parametrize("function", ["rewards.accuracy_reward", "rewards.accuracy.accuracy_reward", "{file}:right"])
def test_every_spelling_of_a_reward_gets_its_second_opinion(
    function: str, root: Path, tiny: tuple[Any, Any], tmp_path: Path
) -> None:
    (tmp_path / "mine.py").write_text("from rewards import accuracy_reward as right\n")
    recipe = load_recipe(
        "smoke",
        [f"rewards[0].function={function.format(file=tmp_path / 'mine.py')}", "eval.lenient=null", "eval.samples=0"],
    )
    assert recipe.rewards[0].kwargs == {"extract": ["first_line"]}
    rows = [{"prompt": "2+2=", "answer": "4"}, {"prompt": "?", "answer": None}]
    records = score_model(*tiny, recipe, rows, lambda line: None, "base")
    assert [record["honest"] for record in records] == [False, None]
    rewards, _ = load_rewards(recipe, ["answer"])
    logged: dict[str, float] = {}
    rewards[0](completions=["4\n#### 5", "5"], answer=["4", "4"], log_metric=logged.__setitem__)
    assert logged["honest_accuracy"] == 0.5  # reads the first line, as the reward does


def test_a_reward_without_a_second_opinion_gets_none(root: Path, tiny: tuple[Any, Any]) -> None:
    recipe = load_recipe("countdown", ["eval.samples=0", "eval.max_new_tokens=4"])
    rows = [{"prompt": "?", "nums": [4, 9], "target": 4}]
    assert "honest" not in score_model(*tiny, recipe, rows, lambda line: None, "base")[0]


def test_a_first_reward_that_evaluation_replaces_is_not_asked_for_its_columns(
    root: Path, tiny: tuple[Any, Any], tmp_path: Path
) -> None:
    (tmp_path / "mine.py").write_text("def mine(completions, tests, **kwargs): return [1.0] * len(completions)\n")
    mine = f"rewards=[{{function: '{tmp_path / 'mine.py'}:mine'}}]"
    recipe = load_recipe("smoke", [mine, "eval.samples=0", "eval.lenient={function: rewards.accuracy_reward}"])
    rows = [{"prompt": "2+2=", "answer": "4"}]  # without the column that training's rows have
    assert score_model(*tiny, recipe, rows, lambda line: None, "base")[0]["lenient"] is False


def test_a_second_opinion_that_fails_costs_its_metric_and_no_reward(root: Path, tmp_path: Path) -> None:
    (tmp_path / "mine.py").write_text(
        "def other(completions, **kwargs): raise ValueError('broken')\n"
        "def mine(completions, **kwargs): return [1.0] * len(completions)\n"
        "mine.second_opinion = other\n"
    )
    recipe = load_recipe("smoke", [f"rewards=[{{function: '{tmp_path / 'mine.py'}:mine'}}]"])
    rewards, _ = load_rewards(recipe, ["answer"])
    logged: dict[str, float] = {}
    assert rewards[0](completions=["4"], answer=["4"], log_metric=logged.__setitem__) == [1.0]
    assert logged == {}


def test_greedy_answers_do_not_depend_on_the_batch(tiny: tuple[Any, Any]) -> None:
    model, tokenizer = tiny
    prompts = [tokenizer("x" * n)["input_ids"] for n in (3, 9, 5, 1, 7)]
    alone = [generate_completions(model, tokenizer, [p], max_new_tokens=6)[0] for p in prompts]
    assert generate_completions(model, tokenizer, prompts, max_new_tokens=6, batch_size=2) == alone


def test_sharing_the_prompt_changes_no_greedy_answer(tiny_dir: Path) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from grpo_lite.engine import attention

    model = AutoModelForCausalLM.from_pretrained(tiny_dir, dtype="float32")
    tokenizer = AutoTokenizer.from_pretrained(tiny_dir, padding_side="left")
    prompts = [tokenizer("ab" * n)["input_ids"] for n in (3, 9, 5)]
    plain = generate_completions(model, tokenizer, prompts, max_new_tokens=12)
    attention.install(model)
    assert generate_completions(model, tokenizer, prompts, max_new_tokens=12) == plain
    assert [len(group) for group in generate_completions(model, tokenizer, prompts, max_new_tokens=4, samples=3)] == [
        3
    ] * 3


def test_answers_across_a_border_of_longrope_are_those_of_generate_and_it_is_said_once(
    caplog: pytest.LogCaptureFixture,
) -> None:
    from grpo_lite.engine import attention
    from tests.engine.test_families import FAMILIES
    from tests.tiny import tiny_tokenizer

    model = FAMILIES["Phi 3 and 4 (longrope)"](dtype=torch.float32, sliding_window=None, vocab_size=300)
    prompts, settings = [[5] * 60, [6, 7] * 30], {"max_new_tokens": 8}
    expected = generate_completions(model, tiny_tokenizer(), prompts, **settings)
    attention.install(model)
    for _ in range(2):
        assert generate_completions(model, tiny_tokenizer(), prompts, **settings) == expected
    (line,) = [record.message for record in caplog.records if record.name.startswith("grpo_lite")]
    assert "Phi3ForCausalLM changes its rotary frequencies at 64" in line


def test_samples_repeat_with_their_seed_and_leave_the_caller_s_randomness_alone(tiny: tuple[Any, Any]) -> None:
    import torch

    model, tokenizer = tiny
    prompts = [tokenizer("ab")["input_ids"], tokenizer("abcd")["input_ids"]]
    state = torch.random.get_rng_state()
    first = generate_completions(model, tokenizer, prompts, max_new_tokens=5, samples=3, seed=1)
    assert torch.equal(torch.random.get_rng_state(), state)
    assert [len(group) for group in first] == [3, 3]
    assert generate_completions(model, tokenizer, prompts, max_new_tokens=5, samples=3, seed=1) == first
    assert generate_completions(model, tokenizer, prompts, max_new_tokens=5, samples=3, seed=2) != first


def holds(rows: int, model: Any, monkeypatch: pytest.MonkeyPatch, kind: str = "allocator") -> list[int]:
    """Pretend a card that generates no more than so many sequences at once, and notices late; returns what it tried."""
    error = {**OVERFLOWS, **OTHERS}[kind]

    tried: list[int] = []
    real = model.generate

    def generate(**given: Any) -> Any:
        out = real(**given)  # random numbers are drawn before the overflow
        tried.append(len(given["input_ids"]))
        if tried[-1] > rows:
            raise type(error)(*error.args)
        return out

    monkeypatch.setattr(model, "generate", generate)
    return tried


@pytest.mark.parametrize("shared", [False, True], ids=["generate", "shared"])
def test_out_of_memory_while_evaluating_is_redone_in_halves(
    shared: bool, tiny_dir: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from grpo_lite.engine import attention

    model = AutoModelForCausalLM.from_pretrained(tiny_dir, dtype="float32")
    tokenizer = AutoTokenizer.from_pretrained(tiny_dir, padding_side="left")
    if shared:
        attention.install(model)
    prompts = [tokenizer("ab" * n)["input_ids"] for n in (3, 9, 5, 1, 7, 2)]
    greedy = generate_completions(model, tokenizer, prompts, max_new_tokens=6)
    settings: dict[str, Any] = {"max_new_tokens": 6, "samples": 2, "seed": 3}
    sampled = generate_completions(model, tokenizer, prompts, batch_size=3, **settings)  # 2 at once from the start
    seen: list[tuple[int, int]] = []
    tried = holds(3, model, monkeypatch)
    assert generate_completions(model, tokenizer, prompts, max_new_tokens=6, progress=lambda *at: seen.append(at)) == (
        greedy
    )
    assert tried == [6, 3, 3]
    assert seen == [(3, 6), (6, 6)]
    assert "6 completions at once: now 3 (eval.batch_size)" in caplog.text
    tried.clear()
    assert generate_completions(model, tokenizer, prompts, batch_size=4, **settings) == sampled
    assert tried == [4, 2, 2, 2, 2, 2, 2]


def test_out_of_memory_in_other_words_is_redone_and_another_error_is_not(
    tiny: tuple[Any, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    model, tokenizer = tiny
    prompts = [tokenizer("ab" * n)["input_ids"] for n in (3, 9, 5, 1)]
    greedy = generate_completions(model, tokenizer, prompts, max_new_tokens=3)
    for kind in ("driver", "cublas", "triton"):
        with monkeypatch.context() as patched:
            tried = holds(2, model, patched, kind)
            assert generate_completions(model, tokenizer, prompts, max_new_tokens=3) == greedy
            assert tried == [4, 2, 2]
    tried = holds(2, model, monkeypatch, "shapes")
    with pytest.raises(RuntimeError, match="mat1 and mat2"):
        generate_completions(model, tokenizer, prompts, max_new_tokens=3)
    assert tried == [4]


def test_the_samples_of_one_prompt_are_divided_too(tiny_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model = AutoModelForCausalLM.from_pretrained(tiny_dir, dtype="float32")
    tokenizer = AutoTokenizer.from_pretrained(tiny_dir, padding_side="left")
    tried = holds(2, model, monkeypatch)
    groups = generate_completions(model, tokenizer, [[5, 6], [7, 8, 9]], max_new_tokens=3, samples=5, batch_size=1)
    assert [len(group) for group in groups] == [5, 5]
    assert tried == [5, 2, 2, 2, 2, 2]


def test_a_single_completion_too_many_says_what_to_lower(tiny_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model = AutoModelForCausalLM.from_pretrained(tiny_dir, dtype="float32").train()
    tokenizer = AutoTokenizer.from_pretrained(tiny_dir, padding_side="left")
    holds(0, model, monkeypatch)
    with pytest.raises(MemoryBudgetError, match=r"a single completion of up to 3 tokens\. Lower grpo\.max_completion"):
        generate_completions(model, tokenizer, [[5, 6], [7]], max_new_tokens=3)
    assert model.training


def test_a_warm_up_gets_its_column_and_each_stage_its_own_gain(recipe: Recipe) -> None:
    base = [record(i < 10, right=0) for i in range(100)]
    warm = [record(i < 60, right=1) for i in range(100)]
    trained = [record(i < 62, right=4) for i in range(100)]
    result = compare(recipe, {"base": base, "warm": warm, "trained": trained}, cause="Warm-up and GRPO together")
    part = result["lenient"]
    assert [part[name]["successes"] for name in ("base", "warm", "trained")] == [10, 60, 62]
    assert part["difference"]["difference"] == pytest.approx(0.52)  # base -> trained, as always
    assert part["warmup"]["difference"]["difference"] == pytest.approx(0.5)
    assert part["grpo"]["difference"]["difference"] == pytest.approx(0.02)
    assert part["grpo"]["mcnemar"]["c"] == 2
    assert part["warmup"]["verdict"]["sentence"].startswith("Warm-up (SFT): the held-out lenient score rose from 0.100")
    assert part["grpo"]["verdict"]["sentence"].startswith("GRPO alone: the held-out lenient score went from 0.600 to")
    assert part["grpo"]["verdict"]["label"] == "no significant gain"  # the sum would be one
    assert part["verdict"]["sentence"].startswith("Warm-up and GRPO together: the held-out lenient score rose from 0.1")
    assert result["pass_at_k"]["pass@1"] == {"base": 0.0, "warm": 0.25, "trained": 1.0}
    alone = compare(recipe, {"base": base, "trained": trained})
    assert alone["lenient"].keys() == {"base", "trained", "difference", "mcnemar", "verdict"}
    assert alone["lenient"]["verdict"]["sentence"].startswith("The held-out lenient score rose")


def test_completions_cut_off_by_the_cap_are_counted(recipe: Recipe, tiny: tuple[Any, Any]) -> None:
    rows = [{"prompt": "2+2=", "answer": "4"}]
    (cut,) = score_model(*tiny, recipe, rows, lambda line: None, "base")
    assert cut["truncated"] is True  # a random model does not end within 16 tokens
    ended = {**cut, "truncated": False}
    result = compare(recipe, {"base": [cut, ended], "trained": [ended, ended]})
    assert result["truncated"] == {"base": 0.5, "trained": 0.0}


@pytest.fixture
def warmed(root: Path, tmp_path: Path) -> RunDir:
    """A trained run with a warm-up: two adapters far from zero and from each other."""
    also = "eval.also={larger: {generator: sums, kwargs: {low: 20, high: 29}, limit: 3}}"
    recipe = load_recipe("smoke", ["data.holdout=6", "eval.samples=2", "warmup={source: self}", also])
    run = RunDir(tmp_path / "run")
    run.path.mkdir()
    run.recipe_file.write_text(dump_recipe(recipe))
    for folder, seed in ((run.warm_adapter, 1), (run.adapter, 2)):
        torch.manual_seed(seed)
        base = AutoModelForCausalLM.from_pretrained(Base.resolve(recipe.model).weights)
        model = get_peft_model(base, lora_config(recipe))
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.data = torch.randn_like(parameter)
        model.save_pretrained(folder)
        write_manifest(folder)
    return run


def test_three_models_are_scored_on_the_same_rows_and_the_trained_one_stays(warmed: RunDir) -> None:
    kept = {"lenient": {"rate": 0.5, "low": 0.2, "high": 0.8}}
    warmed.write_scores({"merged": kept, "merged_onto_original": kept})
    result = evaluate_run(warmed, lambda line: None)
    assert result.get("merged_onto_original") == kept  # that merge is gone, and cannot be scored again
    assert "merged" not in result
    lines = (warmed.evaluation / "records.jsonl").read_text().splitlines()
    rows = [json.loads(line) for line in lines]
    assert len(rows) == 6
    for row in rows:
        assert len({row[name]["completion"] for name in ("base", "warm", "trained")}) == 3
    assert result["truncated"].keys() == {"base", "warm", "trained"}
    assert result["also"]["larger"]["n"] == 3
    assert result["also"]["larger"]["strict"]["grpo"]["verdict"]["sentence"].startswith(
        "GRPO alone: the strict score on"
    )
    assert "pass_at_k" not in result["also"]["larger"]
    further = [json.loads(line) for line in (warmed.evaluation / "also.jsonl").read_text().splitlines()]
    assert [row["set"] for row in further] == ["larger"] * 3
    # Each column is what that adapter alone answers.
    recipe = warmed.load_recipe()
    prompts = load_prompts(recipe, load_tokenizer(Base.resolve(recipe.model)))
    for name, folder in (("warm", warmed.warm_adapter), ("trained", warmed.adapter)):
        model = load_trained(Base.resolve(recipe.model), recipe.rollout, folder)
        alone = score_model(model, prompts.tokenizer, recipe, prompts.eval, lambda line: None, name)
        assert [row[name] for row in rows] == alone


def test_the_model_of_the_training_is_as_it_was_after_its_evaluation(warmed: RunDir) -> None:
    recipe = warmed.load_recipe()
    base = Base.resolve(recipe.model)
    model = load_trained(base, recipe.rollout, warmed.adapter)
    hold_reference(model)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    evaluate_run(warmed, lambda line: None, model, load_prompts(recipe, load_tokenizer(base)))
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


def test_a_damaged_warm_up_is_refused_before_anything_is_scored(warmed: RunDir) -> None:
    weights = warmed.warm_adapter / "adapter_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-4])
    shown: list[str] = []
    with pytest.raises(ModelError, match=r"warmup/adapter: the adapter is damaged: .*truncated.* It is the warm-up's"):
        evaluate_run(warmed, shown.append)
    assert not shown
    assert not warmed.scores_file.exists()


@pytest.mark.parametrize("record, cause", [({"paused_at": "now"}, "Warm-up (SFT), paused before its end, without GRPO"),
                                           ({"done_at": "then"}, "Warm-up and GRPO together")])  # fmt: skip
def test_without_the_warm_adapter_the_verdict_says_what_trained_means(
    warmed: RunDir, record: dict[str, str], cause: str
) -> None:
    shutil.rmtree(warmed.warm_adapter)
    warmed.update_run(warmup=record)
    part = evaluate_run(warmed, lambda line: None)["lenient"]
    assert "warm" not in part
    assert part["verdict"]["sentence"].startswith(f"{cause}: the held-out lenient score ")


@pytest.mark.slow
def test_a_run_of_both_stages_scores_from_disk_as_it_did_after_training(root: Path, tmp_path: Path) -> None:
    data = "data: {generator: sums, kwargs: {low: 1, high: 9}}, completion: '{answer}'"
    settings = [f"warmup={{{data}, steps: 2, learning_rate: 0.003, tokens_per_step: 200}}", "grpo.max_steps=2"]
    rates = ["grpo.learning_rate=0.003", "eval.samples=2", "reference=start", "grpo.beta=0.01", "merge=false"]
    reward = tmp_path / "reward.py"  # random completions differ in it, so that there is a gradient
    reward.write_text("def odd(completions, **kwargs): return [float(len(str(c)) % 2) for c in completions]\n")
    recipe = load_recipe(
        "smoke", [*settings, *rates, f"rewards=[{{function: '{reward}:odd'}}]", "check.enabled=false", "eval.limit=4"]
    )
    run = RunDir(tmp_path / "run")
    train_run(recipe, run, lambda line: None)
    first = (run.evaluation / "records.jsonl").read_text()
    assert all(row.keys() >= set(SCORE_COLUMNS) for row in map(json.loads, first.splitlines()))
    warm, trained = (sha256_of(folder / "adapter_model.safetensors") for folder in (run.warm_adapter, run.adapter))
    assert warm != trained
    evaluate_run(run, lambda line: None)
    assert (run.evaluation / "records.jsonl").read_text() == first
    assert "GRPO alone: the held-out lenient score" in run_summary(run)
