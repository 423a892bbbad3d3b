"""accuracy_reward on real data, the shared cases, hostile completions, and in the shapes TRL passes."""

from __future__ import annotations

import json
from collections.abc import Callable
from decimal import Decimal
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy
import pytest

from rewards import accuracy_reward, honest_accuracy
from rewards.accuracy import gold_answer
from rewards.math.notation import same_spelling

HANGING, HANGING_GOLD = "\\boxed{\\prod_{n=2}^{10^{8}} n}", "\\prod_{n=1}^{10^{8}} n"
CASES = Path(__file__).resolve().parents[3] / "shared" / "cases"


def rows(path: Path) -> list[dict[str, Any]]:
    if not path.is_file():
        pytest.skip(f"{path.parent.name}/{path.name} is not here")
    return [json.loads(line) for line in path.read_text(encoding="utf-8").split("\n") if line]


@pytest.mark.parametrize("name", ["math_equiv.jsonl", "math_hostile.jsonl"])
def test_every_shared_case_is_judged_as_expected(name: str) -> None:
    cases = [row for row in rows(CASES / name) if row["expect"] is not None]
    scores = accuracy_reward([row["completion"] for row in cases], [row["gold"] for row in cases])
    wrong = [row.get("name", row["note"]) for row, score in zip(cases, scores, strict=True) if score != row["expect"]]
    assert wrong == []


@pytest.mark.parametrize("split", ["train", "test"])
def test_every_gsm8k_solution_earns_its_own_gold(split: str, shared_data: Path) -> None:
    data = rows(shared_data / f"gsm8k_{split}.jsonl")
    solutions = [row["answer"] for row in data]
    assert set(accuracy_reward(solutions, solutions)) == {1.0}
    assert set(accuracy_reward(solutions, [row["final"] for row in data])) == {1.0}
    assert set(honest_accuracy(solutions, solutions)) == {1.0}


@pytest.mark.parametrize(
    "name", ["math500_test.jsonl", pytest.param("math_train_answers.jsonl", marks=pytest.mark.slow)]
)
def test_every_math_gold_answers_itself(name: str, shared_data: Path) -> None:
    golds = [row["answer"] for row in rows(shared_data / name)]
    for form in ("so $\\boxed{{{0}}}$.", "<think>hm</think><answer>{0}</answer>", "The answer is ${0}$."):
        scores = accuracy_reward([form.format(gold) for gold in golds], golds)
        assert [gold for gold, score in zip(golds, scores, strict=True) if score != 1.0] == [], form


def test_every_math500_solution_earns_its_gold(shared_data: Path) -> None:
    data = rows(shared_data / "math500_test.jsonl")
    assert set(accuracy_reward([row["solution"] for row in data], [row["answer"] for row in data])) == {1.0}


def test_a_neighbour_s_gold_is_paid_only_where_it_is_the_same_answer(shared_data: Path) -> None:
    golds = [row["answer"] for row in rows(shared_data / "math500_test.jsonl")]
    shifted = golds[1:] + golds[:1]
    scores = accuracy_reward([f"\\boxed{{{other}}}" for other in shifted], golds)
    paid = [(g, o) for g, o, score in zip(golds, shifted, scores, strict=True) if score and not same_spelling(g, o)]
    assert paid == [("5", "x=5")]  # policy: a bare 5 answers x = 5


def test_a_chat_completion_is_judged_like_text() -> None:
    messages = [[{"role": "assistant", "content": "<think>41?</think>It is \\boxed{42}."}]]
    assert accuracy_reward(messages, [42], prompts=[[{"role": "user", "content": "?"}]]) == [1.0]


def test_an_answer_inside_thinking_that_the_prompt_opened_does_not_count() -> None:
    texts = ["so \\boxed{42}", "so \\boxed{41}</think>\\boxed{42}"]
    assert accuracy_reward(texts, [42, 42], prompts=["2?<think>\n", "2?<think>\n"]) == [0.0, 1.0]
    assert accuracy_reward(texts, [42, 42], prefilled=True) == [0.0, 1.0]
    assert accuracy_reward(texts, [42, 42], prompts=["2?", "2?"]) == [1.0, 1.0]


def test_an_unusable_gold_gives_none_and_is_counted() -> None:
    golds: list[Any] = [
        None, "", "   ", float("nan"), float("inf"), [], ["42"], {"a": 1}, True, "#### ", "\\boxed{}",
        "\\frac{1}{", "}{",
    ]  # fmt: skip
    for gold in golds:
        seen: dict[str, float] = {}
        scores = accuracy_reward(["\\boxed{42}", "\\boxed{1}"], [gold, 1], log_metric=seen.__setitem__)
        assert (scores, seen["accuracy_reward/unusable_gold"]) == ([None, 1.0], 0.5), gold


def test_a_gold_may_be_a_number_latex_or_a_solution() -> None:
    table: list[tuple[Any, str]] = [
        (72, "72"),
        (-3, "-3"),
        (0.1, "0.1"),
        (1e-7, "1e-07"),
        (Fraction(1, 3), "1/3"),
        (Decimal("2.50"), "2.50"),
        (numpy.int64(72), "72"),
        (numpy.float64(0.5), "0.5"),
        ("72", "72"),
        ("a\n#### 1,000", "1,000"),
        ("so $x = \\boxed{\\frac12}$", "\\frac12"),
        ("$\\frac12$", "$\\frac12$"),
    ]
    golds, answers = [gold for gold, _ in table], [answer for _, answer in table]
    assert [gold_answer(gold) for gold in golds] == answers
    assert accuracy_reward([f"\\boxed{{{answer}}}" for answer in answers], golds) == [1.0] * len(table)


def test_metrics_say_why_completions_were_not_paid() -> None:
    seen: dict[str, float] = {}
    completions = ["no idea", "\\boxed{42 (mod 5)}", HANGING, "\\boxed{42}"]
    scores = accuracy_reward(completions, [42, 42, HANGING_GOLD, 42], timeout_s=0.2, log_metric=seen.__setitem__)
    assert scores == [0.0, 0.0, 0.0, 1.0]
    assert seen == {
        "accuracy_reward/no_answer": 0.25,
        "accuracy_reward/unparsed": 0.25,
        "accuracy_reward/timeout": 0.25,
        "accuracy_reward/unusable_gold": 0.0,
    }


@pytest.mark.parametrize(
    ("verdict", "metric"),
    [("timeout", "timeout"), ("undecided", "unparsed"), ("crash", "unparsed"), ("no", None), ("yes", None)],
)
def test_each_verdict_of_the_judge_is_counted_as_what_it_is(
    verdict: str, metric: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("rewards.judge.ask", lambda kind, items, limit_s: [verdict] * len(items))
    seen: dict[str, float] = {}
    scores = accuracy_reward(["\\boxed{\\sqrt{12}}"], ["2\\sqrt{3}"], log_metric=seen.__setitem__)
    assert scores == [float(verdict == "yes")]
    assert {name for name, share in seen.items() if share} == ({f"accuracy_reward/{metric}"} if metric else set())


def test_a_hanging_answer_does_not_take_its_batch_with_it() -> None:
    good, gold = "\\boxed{\\sqrt{12}}", "2\\sqrt{3}"
    golds = [gold, HANGING_GOLD, gold, HANGING_GOLD, gold]
    # The default limit, so that a busy machine has time for the right answers; the two hanging ones wait side by side.
    scores = accuracy_reward([good, HANGING, good, HANGING + " ", good], golds)
    assert scores == [1.0, 0.0, 1.0, 0.0, 1.0]


def test_an_unknown_extraction_method_is_refused_with_the_allowed_ones() -> None:
    with pytest.raises(ValueError, match=r"bocks.*list of answer_tag, boxed, hash, phrase, first_line, last_number"):
        accuracy_reward(["\\boxed{1}"], [1], extract=["bocks"])


def test_columns_of_different_lengths_are_refused() -> None:
    with pytest.raises(ValueError, match="2 completions, but 1 answers"):
        accuracy_reward(["1", "2"], ["1"])


def test_an_empty_batch_gives_an_empty_list() -> None:
    assert accuracy_reward([], [], log_metric=lambda name, value: None) == []


def test_what_trl_passes_besides_is_ignored() -> None:
    scores = accuracy_reward(
        completions=["\\boxed{4}"],
        prompts=["2+2?"],
        completion_ids=[[1, 2]],
        answer=["4"],
        trainer_state=object(),
        log_extra=lambda name, values: None,
        log_metric=lambda name, value: None,
        question=["2+2?"],
    )
    assert scores == [1.0]


HONEST = [
    ("so\n#### 72", "72", 1.0),
    ("\\boxed{72}", "#### 72", 1.0),
    ("\\boxed{\\frac{1}{2}}", "0.5", 1.0),
    ("\\boxed{\\sqrt{12}}", "2\\sqrt{3}", 1.0),
    ("<think>\\boxed{72}</think>", "72", 0.0),
    ("\\boxed{41} then the answer is 72.", "72", 1.0),
    ("\\boxed{72} then the answer is 41.", "72", 0.0),
    ("\\boxed{71, 72}", "72", 0.0),
    ("\\boxed{71=72}", "72", 0.0),
    ("\\boxed{71}, \\boxed{72}", "72", 0.0),
    ("First \\boxed{71}. Then \\boxed{72}", "72", 1.0),
    ("\\boxed{70+2}", "72", 0.0),
    ("\\boxed{0.0000001}", "0.0000002", 0.0),
    ("", "72", 0.0),
    ("\\boxed{72", "72", 0.0),
    ("\\boxed{x+1}", "1+x", 1.0),
    ("\\boxed{72}", None, None),
]


def test_the_honest_metric_judges_the_last_commitment_strictly() -> None:
    scores = honest_accuracy([text for text, _, _ in HONEST], [gold for _, gold, _ in HONEST])
    assert [row for row, score in zip(HONEST, scores, strict=True) if score != row[2]] == []


def test_the_honest_metric_looks_outside_thinking_that_the_prompt_opened() -> None:
    texts = ["so \\boxed{42}", "so \\boxed{41}</think>\\boxed{42}"]
    assert honest_accuracy(texts, [42, 42], prompts=["2?<think>\n"] * 2) == [0.0, 1.0]
    assert honest_accuracy(texts, [42, 42], prefilled=True) == [0.0, 1.0]
    assert honest_accuracy(texts, [42, 42]) == [1.0, 1.0]


def test_the_honest_metric_knows_the_first_line_contract() -> None:
    assert honest_accuracy(["15\n4+4=8"], [15], extract=["first_line"]) == [1.0]


def test_the_honest_metric_agrees_on_the_shared_cases_except_for_its_strictness() -> None:
    """Where the two opinions differ, the honest one is the stricter."""
    cases = [row for row in rows(CASES / "math_equiv.jsonl") if "hack" in row["tags"] or row["expect"] is False]
    scores = honest_accuracy([row["completion"] for row in cases], [row["gold"] for row in cases])
    paid = [row["completion"] for row, score in zip(cases, scores, strict=True) if score and not row["expect"]]
    assert paid == []


@pytest.mark.parametrize("reward", [accuracy_reward, honest_accuracy])
def test_golds_may_come_as_solution_and_answer_counts_where_both_are_given(reward: Callable[..., list[float]]) -> None:
    call = {"prompts": ["?", "?"], "completion_ids": [[1], [2]], "trainer_state": None}  # as TRL calls it
    texts = ["#### 4", "#### 5"]
    assert reward(completions=texts, solution=["4", "4"], **call) == [1.0, 0.0]
    assert reward(completions=texts, answer=["5", "5"], solution=["4", "4"], **call) == [0.0, 1.0]
    with pytest.raises(ValueError, match="no golds: the dataset needs a column `answer` or `solution`"):
        reward(completions=texts, **call)
