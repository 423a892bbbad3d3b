"""The recipes that stand beside a published result: listed, planned, and their rewards pay the gold and no cheat."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from grpo_lite.memory.report import least_card_gb, plan_recipe
from grpo_lite.models.device import find_card
from grpo_lite.recipe.find import anchor_names
from grpo_lite.recipe.load import load_recipe
from grpo_lite.recipe.recipe import Recipe
from grpo_lite.report.expected import changed_keys
from grpo_lite.task.check import NO_GOLD, check_recipe_rewards, gold_rewards, require_paid_gold
from grpo_lite.task.prompts import load_prompts
from tests.command_line import in_process

ANCHORS = [
    "lora-rank1-8b",
    "qerl-gsm8k-7b",
    "simplerl-0.5b",
    "simplerl-1.5b",
    "tina-1.5b",
    "tinker-sums",
    "tinyzero-3b",
    "verl-gsm8k-0.5b",
    "verl-gsm8k-1.5b",
    "verl-gsm8k-3b",
    "verl-math-0.5b",
    "verl-math-1.5b",
    "verl-math-3b",
]
WORDS = [
    {"question": "A box has 6 rows of 8 eggs. How many eggs?", "answer": "6 * 8 = <<6*8=48>>48 eggs.\n#### 48"},
    {
        "question": "Ann has 20 cents and gets 52 more. How many?",
        "answer": "She has 20 + 52 = <<20+52=72>>72 cents.\n#### 72",
    },
    {
        "question": "A bag costs 1,200 and a hat 34. What is the sum?",
        "answer": "Both cost 1,200 + 34 = 1,234 in all.\n#### 1,234",
    },
    {"question": "Of 9 cats 4 sleep. How many are awake?", "answer": "9 - 4 = <<9-4=5>>5 cats.\n#### 5"},
]
SOLVED = [("What is $2^5$?", "32"), ("Solve $3x = 2$.", r"\frac{2}{3}"), ("Expand $(x+1)^2$.", "x^2 + 2x + 1"),
          ("Which point is 3 above the origin?", "(0, 3)")]  # fmt: skip
ROWS: dict[str, list[dict[str, Any]]] = {  # in the columns of each data set
    "openai/gsm8k": WORDS,
    "knoveleng/open-rs": [{"problem": q, "answer": a, "solution": f"${a}$"} for q, a in SOLVED],
    "DigitalLearningGmbH/MATH-lighteval": [
        {"problem": q, "solution": rf"So it is $\boxed{{{a}}}$."} for q, a in SOLVED
    ],
    "hkust-nlp/SimpleRL-Zoo-Data": [{"question": q, "answer": a, "gt_answer": a} for q, a in SOLVED],
    "Jiayi-Pan/Countdown-Tasks-3to4": [
        {"nums": [31, 76, 70], "target": 25, "solved": "70 + (31 - 76)"},
        {"nums": [48, 78, 61, 81], "target": 16, "solved": "(61 + 81) - (48 + 78)"},
        {"nums": [78, 2, 61], "target": 22, "solved": "61 - 78 / 2"},
        {"nums": [3, 5, 4], "target": 60, "solved": "3 * 4 * 5"},
    ],
}


def test_the_anchors_are_those_named_here_with_source_figure_and_deviations(root: Path) -> None:
    assert anchor_names() == [f"anchors/{name}" for name in ANCHORS]
    for name in anchor_names():
        loaded = load_recipe(name)
        assert loaded.expected is not None
        assert loaded.expected.link
        assert loaded.expected.published
        assert loaded.expected.deviations
        assert list(changed_keys(loaded)) == []
        text = Path("recipes", f"{name}.yaml").read_text(encoding="utf-8")
        assert len(text.splitlines()) <= 60
        assert text.startswith("# yaml-language-server: $schema=../schema.json\n")


def test_recipes_lists_the_anchors_in_a_section_of_their_own_with_the_published_figure() -> None:
    ours, _, beside = in_process("recipes").partition("\nBESIDE A PUBLISHED RESULT")
    assert "anchors/" not in ours
    for name in anchor_names():
        recipe = load_recipe(name)
        line = next(line for line in beside.splitlines() if line.startswith(f"{name} "))
        assert recipe.model.id in line
        assert recipe.expected is not None
        assert str(recipe.expected.published) in line


@pytest.mark.parametrize("name", ["verl-gsm8k-3", "tina", "anchors/tina-1.5"])
def test_a_name_without_its_end_is_answered_with_the_anchor(name: str) -> None:
    said = in_process("plan", name, "--gpu", "h100", expect=1)
    assert f"did you mean 'anchors/{name.removeprefix('anchors/')}" in said
    assert "Beside a published result: anchors/" in said


def test_the_command_that_a_plan_names_finds_the_anchor() -> None:
    said = in_process("plan", "anchors/verl-gsm8k-0.5b", "--gpu", "h100")
    assert "make probe RECIPE=verl-gsm8k-0.5b" in said
    assert load_recipe("verl-gsm8k-0.5b") == load_recipe("anchors/verl-gsm8k-0.5b")


@pytest.mark.parametrize("name", ANCHORS)
def test_the_plan_names_the_smallest_gpu_of_an_anchor(name: str) -> None:
    recipe = load_recipe(f"anchors/{name}")
    named, least = recipe.least_gpu.partition(";")[0], least_card_gb(recipe)
    assert named == (f"{least} GB" if least else "24 GB, divided")  # no card holds thousands of long answers at once
    assert least or plan_recipe(recipe, find_card("rtx4090")).fits
    assert "to spare" in in_process("plan", f"anchors/{name}", "--gpu", "h100")


def with_rows(name: str, folder: Path) -> Recipe:
    """Return an anchor with rows from here in the place of the Hub's."""
    source = load_recipe(f"anchors/{name}").data.train
    given = []
    if source.hub:
        path = folder / "rows.jsonl"
        path.write_text("".join(json.dumps(row) + "\n" for row in ROWS[source.hub]), encoding="utf-8")
        given = [f"data.train.path={path}", "data.eval=null", "data.holdout=1", "eval.also={}"]
    if name == "tinyzero-3b":
        given.append("data.gold_completion=working</think>\n<answer>{solved}</answer>")
    return load_recipe(f"anchors/{name}", given)


@pytest.mark.parametrize(("name", "lead_in"), [*((name, "") for name in ANCHORS), ("tina-1.5b", "<think>\n")])
def test_an_anchor_pays_its_gold_in_full_and_no_cheat(name: str, lead_in: str, tmp_path: Path) -> None:
    """With `lead_in` as the chat template of Tina's model leaves it: the thinking is open already."""
    recipe = with_rows(name, tmp_path)
    report = check_recipe_rewards(recipe, replace(load_prompts(recipe), lead_in=lead_in))
    assert report.ok, report.table()


def test_without_a_gold_the_rewards_are_not_tried_and_this_is_said() -> None:
    """TinyZero's data have problems without solutions."""
    recipe = load_recipe("smoke", ["data.gold_completion=null"])
    prompts, said = load_prompts(recipe), list[str]()
    require_paid_gold(recipe, prompts, said.append)
    assert said == ["rewards: not checked, data.gold_completion is null: the rows hold no right answer"]
    assert list(gold_rewards(recipe, prompts)) == [f"{NO_GOLD}, so the rewards are not tried"]
    assert "data.gold_completion is null" in in_process(
        "rewards", "check", "smoke", "data.gold_completion=null", expect=1
    )
    assert load_recipe("anchors/tinyzero-3b").data.gold_completion is None


def test_the_published_intervals_are_those_of_their_test_sets(root: Path) -> None:
    def interval(score: float, problems: int) -> list[float]:
        margin = 1.96 * (score * (1 - score) / problems) ** 0.5
        return [pytest.approx(score - margin, abs=6e-4), pytest.approx(score + margin, abs=6e-4)]

    published = {
        "verl-gsm8k-0.5b": (0.543, 1319), "verl-gsm8k-1.5b": (0.779, 1319), "verl-gsm8k-3b": (0.861, 1319),
        "verl-math-0.5b": (0.3175, 4998), "verl-math-1.5b": (0.4836, 4998), "verl-math-3b": (0.5642, 4998),
        "simplerl-0.5b": (0.495, 1319), "simplerl-1.5b": (0.744, 1319), "tinyzero-3b": (0.535, 200),
    }  # fmt: skip
    for name, (score, problems) in published.items():
        expected = load_recipe(f"anchors/{name}").expected
        assert expected is not None
        assert list(expected.points[-1][1:]) == interval(score, problems), name
        assert f"{100 * score:.1f} %" in str(expected.published)
