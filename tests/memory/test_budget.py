"""--budget: a time is read, what fits into it is chosen, and a longer time never means less."""

from __future__ import annotations

import itertools
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from grpo_lite.errors import GRPOLiteError
from grpo_lite.memory.budget import RESERVE, brief, budget_lines, choose, plan_budget, read_duration
from grpo_lite.memory.report import plan_recipe
from grpo_lite.memory.times import TEST_ROWS, Times, held_out_rows, keep_times, measured_times
from grpo_lite.models.device import CARDS, find_card, published_speed
from grpo_lite.recipe.load import load_recipe
from grpo_lite.recipe.recipe import Recipe
from tests.command_line import in_process

TIMES = Times(step_s=40.0, completion_s=0.5, merge_s=120.0, source="made for a test", is_estimate=False,
              range=(0.8, 1.25))  # fmt: skip
WHOLE, ROWS = 300, 500


def recipe(*overrides: str) -> Recipe:
    """Return gsm8k with one merge: `auto` may make a second one."""
    settings = ["eval.limit=500", "eval.samples=4", "eval.every=0", "merge_onto=original"]
    return load_recipe("gsm8k", [*settings, *overrides])


@pytest.mark.parametrize(
    "text, seconds",
    [("3h", 10800), ("90m", 5400), ("2h30m", 9000), ("45s", 45), ("1.5h", 5400), ("2H 30 min", 9000), ("1h1s", 3601)],
)
def test_a_duration_is_read(text: str, seconds: float) -> None:
    assert read_duration(text) == seconds


@pytest.mark.parametrize("text", ["", "3", "h", "-3h", "0h", "3d", "1h30", "30m1h", "nan", "9999h", "1e3h"])
def test_what_is_no_duration_is_refused(text: str) -> None:
    with pytest.raises(GRPOLiteError, match=r"not a time above 0 and up to 30 days\. Write hours"):
        read_duration(text)


@given(st.integers(1, 2_000_000))
def test_a_brief_time_reads_as_no_less(seconds: int) -> None:
    assert seconds <= read_duration(brief(seconds)) < seconds + 60


def test_a_budget_that_holds_the_whole_recipe_changes_nothing_but_the_limit() -> None:
    # 60 + 120 + 300 × 40 + (2 × 500 × 5 + 500) × 0.5 s = 14,930 s, and a fifth in reserve: 17,916 s
    whole = choose(recipe(), TIMES, 17_920, WHOLE, ROWS)
    assert whole.overrides == ("limits.max_minutes=298.667",)
    assert whole.expected_s == whole.whole_s == 14_930
    assert choose(recipe(), TIMES, 17_910, WHOLE, ROWS).steps < WHOLE


def test_three_quarters_go_to_training_and_a_quarter_to_evaluation() -> None:
    """Of 3 h a reserve and 180 s are off: 8,820 s, of which 6,615 s are 165 steps.

    2,205 s hold 1,470 rows greedily (base, trained, merged), so all 500, but not with 4 samples each (2,750 s).
    """
    budget = choose(recipe(), TIMES, 10_800, WHOLE, ROWS)
    assert budget.overrides == ("grpo.max_steps=165", "eval.samples=0", "limits.max_minutes=180")
    assert (budget.steps, budget.rows) == (165, 500)
    less = choose(recipe(), TIMES, 3600, WHOLE, ROWS)  # 2,820 s: 2,115 s are 52 steps; 705 s are 470 rows
    assert less.overrides == ("grpo.max_steps=52", "eval.samples=0", "eval.limit=470", "limits.max_minutes=60")


def test_what_evaluation_does_not_need_goes_to_training() -> None:
    cheap = replace(TIMES, completion_s=0.01)  # 55 s for everything
    budget = choose(recipe(), cheap, 10_800, WHOLE, ROWS)
    assert budget.steps == int((10_800 / RESERVE - 180 - 55) / 40)
    assert (budget.rows, "eval.samples=0" in budget.overrides) == (500, False)


TIME = st.floats(0.01, 3000)
PLANNED = recipe()


@settings(max_examples=100, deadline=None)
@given(
    step=TIME,
    completion=st.floats(0.001, 30),
    budgets=st.lists(st.floats(60, 1e6), min_size=2, max_size=5),
    rows=st.integers(0, 3000),
    samples=st.integers(0, 4),
    every=st.sampled_from([0, 10]),
    whole=st.integers(1, 2000),
)
def test_more_time_never_means_fewer_steps_or_problems_and_the_plan_is_within_it(
    step: float, completion: float, budgets: list[float], rows: int, samples: int, every: int, whole: int
) -> None:
    section = PLANNED.eval.model_copy(update={"samples": samples, "limit": max(1, rows), "every": every})
    planned = PLANNED.model_copy(update={"eval": section})
    times = replace(TIMES, step_s=step, completion_s=completion)
    chosen = []
    for limit in sorted(budgets):
        try:
            budget = choose(planned, times, limit, whole, rows)
        except GRPOLiteError as error:
            assert not chosen, "a longer budget is refused"
            least = read_duration(str(error).rpartition("The least is ")[2].split()[0].partition("=")[2].rstrip("."))
            assert least > limit
            choose(planned, times, least, whole, rows)  # is then enough
            continue
        assert budget.expected_s * RESERVE <= limit * (1 + 1e-9)
        assert 1 <= budget.steps <= whole
        assert min(rows, 50) <= budget.rows <= rows
        chosen.append(budget)
    for shorter, longer in itertools.pairwise(chosen):
        assert longer.steps >= shorter.steps
        assert longer.rows >= shorter.rows


def test_a_budget_that_is_too_small_names_the_least() -> None:
    """1.2 × (180 + 40 + 50 problems × 3 × 0.5 s) = 354 s."""
    with pytest.raises(
        GRPOLiteError, match=r"BUDGET=5m: too little for gsm8k. One step takes 40 s.* least is BUDGET=6m"
    ):
        choose(recipe(), TIMES, 300, WHOLE, ROWS)
    assert choose(recipe(), TIMES, 360, WHOLE, ROWS).steps == 1


def test_what_is_spent_already_counts() -> None:
    spent = choose(recipe(), TIMES, 10_800, WHOLE, ROWS, spent_s=1200)
    assert spent.steps == 146  # (8000 - 180) × 0.75 / 40
    assert any(line.endswith("; 20 min 00 s of the budget have passed") for line in budget_lines(recipe(), spent))
    with pytest.raises(GRPOLiteError, match="too little"):
        choose(recipe(), TIMES, 360, WHOLE, ROWS, spent_s=30)


def test_what_is_given_wins_and_is_said() -> None:
    given_steps = choose(recipe(), TIMES, 3600, 200, ROWS, given={"grpo.max_steps", "lora.r"})
    assert given_steps.steps == 200
    assert not any(text.startswith("grpo.max_steps") for text in given_steps.overrides)
    assert "given, so not chosen: grpo.max_steps" in given_steps.notes
    assert any("more than the budget, so training will pause" in note for note in given_steps.notes)
    given_rows = choose(recipe(), TIMES, 3600, WHOLE, ROWS, given={"eval.limit", "eval.samples"})
    assert given_rows.rows == 500
    assert not any(text.startswith("eval.") for text in given_rows.overrides)
    shorter = choose(recipe("limits.max_minutes=30"), TIMES, 3600, WHOLE, ROWS)
    assert not any(text.startswith("limits.") for text in shorter.overrides)


@pytest.mark.parametrize(
    "kind, words",
    [
        ("constant", "constant: this is the first part of the whole run"),
        ("constant_with_warmup", "rises over the first 0.04 of the steps"),
        ("cosine", r"learning rate (cosine) falls to its end over these steps (52)"),
    ],
)
def test_what_fewer_steps_do_to_the_learning_rate_is_said(kind: str, words: str) -> None:
    budget = choose(recipe(f"grpo.lr_scheduler_type={kind}"), TIMES, 3600, WHOLE, ROWS)
    assert any(words in note for note in budget.notes)


def test_the_cap_is_halved_only_where_hardly_a_probed_completion_needs_it() -> None:
    for share, halved in ((0.01, True), (0.05, False)):
        times = replace(TIMES, truncated=((128, 0.5), (256, share), (512, 0.0)))
        texts = choose(recipe(), times, 3600, WHOLE, ROWS).overrides
        assert ("grpo.max_completion_length=256" in texts) is halved
    times = replace(TIMES, truncated=((256, 0.0),))
    assert "grpo.max_completion_length=256" not in choose(recipe(), times, 1e6, WHOLE, ROWS).overrides  # all fits
    kept = choose(recipe(), times, 3600, WHOLE, ROWS, given={"grpo.max_completion_length"})
    assert "grpo.max_completion_length=256" not in kept.overrides


def test_held_out_scores_between_steps_take_a_tenth_of_the_training() -> None:
    times = replace(TIMES, completion_s=2.0)  # 64 rows take 128 s, as long as 3.2 steps: a tenth is each 32nd step
    assert "eval.every=32" in choose(recipe("eval.every=5"), times, 3600, WHOLE, ROWS).overrides
    assert not any("every" in text for text in choose(recipe("eval.every=50"), times, 3600, WHOLE, ROWS).overrides)


def test_a_plan_takes_the_probed_speed_of_this_card_and_else_an_estimate(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("GRPO_LITE_CACHE", str(tmp_path))
    planned, card = recipe(), find_card("t4")
    memory = plan_recipe(planned, card)
    estimated = plan_budget(planned, 7200, (), card, memory)
    assert estimated.times.is_estimate
    assert "not measured on a GPU" in next(budget_lines(planned, estimated))
    figures = {"step_s": 40.0, "steps": 9, "completion_s": 0.5, "held_out": 1319,
               "token_s": 0.001, "truncated": {256: 0.5, 512: 0.1}}  # fmt: skip
    keep_times(planned, "Tesla T4", figures)
    measured = plan_budget(planned, 7200, (), card, memory)
    assert measured.times.step_s == 40
    assert "measured by the probe on Tesla T4" in next(budget_lines(planned, measured))
    assert plan_budget(planned, 7200, (), find_card("l4"), plan_recipe(planned, find_card("l4"))).times.is_estimate
    # What a budget chooses is no other speed: the kept figures are found again.
    changed = recipe("grpo.max_steps=7", "eval.limit=50", "eval.samples=0", "limits.max_minutes=60")
    assert measured_times(changed, "Tesla T4", 0) == measured_times(planned, "Tesla T4", 0)
    assert measured_times(changed, "NVIDIA L4", 0) is None
    assert measured_times(recipe("grpo.num_generations=16"), None, 0) is None
    without = plan_budget(planned, 7200, (), None, None)  # on a machine without a GPU: what was probed there
    assert without.times.step_s == 40


def test_a_merge_that_may_be_made_twice_is_planned_twice_with_its_score() -> None:
    one, two = recipe(), recipe("merge_onto=auto")
    assert TIMES.fixed_s(two) - TIMES.fixed_s(one) == TIMES.merge_s
    assert TIMES.evaluation_s(two, 100) - TIMES.evaluation_s(one, 100) == pytest.approx(100 * TIMES.completion_s)
    for never in ("model.load_in=16bit", "model.backend=unsloth"):
        assert TIMES.fixed_s(recipe("merge_onto=auto", never)) == TIMES.fixed_s(one)
    assert TIMES.fixed_s(recipe("merge_onto=auto", "eval.enabled=false")) == TIMES.fixed_s(one)


def test_a_warm_up_counts_by_its_tokens_and_by_what_it_samples(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GRPO_LITE_CACHE", str(tmp_path))
    figures = {"step_s": 1.0, "completion_s": 0.5, "token_s": 0.01, "truncated": {}}
    for warmup, tokens, rows, seconds in (
        ("{data: {path: x.jsonl}, steps: 5, tokens_per_step: 100}", None, 0, 5.0),
        ("{data: {path: x.jsonl}, epochs: 2}", 3000, 0, 30.0),
        ("{data: {path: x.jsonl}, epochs: 2}", None, 0, 0.0),  # said: not counted
        ("{source: self, samples: 4, prompts: 10, steps: 1, tokens_per_step: 100}", None, 90, 21.0),
        ("{source: self, samples: 4}", None, 90, 180.0),
    ):
        planned = recipe(f"warmup={warmup}")
        keep_times(planned, "it", figures)
        times = measured_times(planned, "it", 0, tokens, rows)
        assert times is not None
        assert times.warmup_s == pytest.approx(seconds)
        said = "\n".join(budget_lines(planned, choose(planned, times, 1e5, 10, 100)))
        assert ("(the warm-up is not counted)" in said) is (seconds == 0)


def test_without_any_speed_a_plan_says_how_to_measure_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GRPO_LITE_CACHE", str(tmp_path))
    for arguments, why in (
        (["gsm8k"], "Name a card for an estimate (GPU=t4)"),
        (["qwen3.5-2b", "--gpu", "t4"], "not estimated for models with recurrent layers"),
        (["search", "--gpu", "t4"], "not estimated for recipes with tools"),
        (["gsm8k", "--gpu", "11GiB"], "not estimated for a card whose speed is not in our table"),
    ):
        text = in_process("plan", *arguments, "--budget", "3h", expect=1)
        assert why in text
        assert f"make probe RECIPE={arguments[0]} measures it, and so does make train" in text
    for wrong in ("3x", "0", ""):
        said = in_process("plan", "gsm8k", "--gpu", "t4", "--budget", wrong, expect=1)
        assert f"BUDGET={wrong}: not a time" in said


def test_a_plan_that_may_take_longer_than_the_budget_says_what_happens_then() -> None:
    pauses = "budget: should it not fit after all, training pauses in time to evaluate and merge"
    assert pauses in in_process("plan", "gsm8k", "--gpu", "t4", "--budget", "3h")
    assert pauses not in in_process("plan", "gsm8k", "--gpu", "t4", "--budget", "24h")


def test_the_command_says_what_fits_and_what_it_can_find(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GRPO_LITE_CACHE", str(tmp_path))
    text = in_process("plan", "math", "--gpu", "t4", "--budget", "1h", "lora.r=8")
    lines = [line for line in text.splitlines() if line.startswith("budget: ")]
    assert lines[0].startswith("budget: 1h for everything")
    chosen = next(line for line in lines if "chosen: " in line)
    assert "grpo.max_steps=" in chosen
    assert "limits.max_minutes=60" in chosen
    assert "problems a gain of 5 points is found in" in text


@pytest.mark.parametrize(
    "name, expected",
    [("gsm8k", ("openai/gsm8k", "test")), ("math", ("HuggingFaceH4/MATH-500", "test"))],
)
def test_the_rows_of_a_known_test_set_are_known(name: str, expected: Any) -> None:
    assert held_out_rows(load_recipe(name, ["eval.limit=null"])) == TEST_ROWS[expected]
    assert held_out_rows(load_recipe(name, ["eval.limit=30"])) == 30
    assert held_out_rows(load_recipe(name, ["eval.enabled=false"])) == 0
    assert held_out_rows(load_recipe(name, ["data.eval.path=x.jsonl", "eval.limit=null"])) is None


@pytest.mark.parametrize(
    "anchor, rows", [("tina-1.5b", 30), ("verl-math-0.5b", 5000), ("tinyzero-3b", 1024), ("verl-gsm8k-3b", 1319)]
)
def test_the_problems_of_an_anchor_s_test_set_are_known(anchor: str, rows: int) -> None:
    assert held_out_rows(load_recipe(f"anchors/{anchor}")) == rows
    assert held_out_rows(load_recipe(f"anchors/{anchor}", ["data.eval.split=test[10%:]"])) is None


def test_a_number_of_problems_that_nothing_says_is_named_as_assumed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("GRPO_LITE_CACHE", str(tmp_path))
    card = find_card("t4")
    own = recipe("data.eval.path=x.jsonl", "eval.limit=null")
    said = "\n".join(budget_lines(own, plan_budget(own, 1e6, (), card, plan_recipe(own, card))))
    assert "evaluation: 200 problems" in said
    assert "200 held-out problems are assumed, since the data is not read here" in said
    known = "\n".join(budget_lines(recipe(), plan_budget(recipe(), 1e6, (), card, plan_recipe(recipe(), card))))
    assert "assumed" not in known


@pytest.mark.parametrize(
    "name, card",
    [
        ("Tesla T4", "t4"), ("NVIDIA L4", "l4"), ("NVIDIA A10", "a10"), ("NVIDIA A100-SXM4-40GB", "a100-40"),
        ("NVIDIA H100 80GB HBM3", "h100"), ("NVIDIA GeForce RTX 4070 Ti SUPER", "rtx4070ti-16"),
        ("NVIDIA GeForce RTX 3060", "rtx3060-12"), *((card.name, key) for key, card in CARDS.items()),
    ],
)  # fmt: skip
def test_a_device_s_published_speed_is_found_by_its_name(name: str, card: str) -> None:
    assert published_speed(name) == (CARDS[card].tflops, CARDS[card].gb_per_s)


@pytest.mark.parametrize(
    "name", ["NVIDIA A10G", "NVIDIA GeForce RTX 4060 Ti", "NVIDIA GeForce RTX 4060 Laptop GPU", ""]
)
def test_another_device_s_speed_is_not_known(name: str) -> None:
    assert published_speed(name) == (0.0, 0.0)
