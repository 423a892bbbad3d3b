"""exact_match_reward, choice_reward and countdown_reward: right, wrong, empty, malformed and hacked completions."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from rewards import choice_reward, countdown_reward, exact_match_reward

EXACT = [
    ("<answer>Eiffel Tower</answer>", "Eiffel Tower", 1.0),
    ("<answer>the eiffel tower.</answer>", "Eiffel Tower", 1.0),
    ("The answer is **Eiffel  Tower**.", "Eiffel Tower", 1.0),
    ("<answer>Ｅｉｆｆｅｌ Tower</answer>", "Eiffel Tower", 1.0),
    ("<answer>Louvre</answer>", "Eiffel Tower", 0.0),
    ("<answer>Eiffel Tower or Louvre</answer>", "Eiffel Tower", 0.0),
    ("It is the Eiffel Tower", "Eiffel Tower", 0.0),
    ("<think><answer>Eiffel Tower</answer></think>", "Eiffel Tower", 0.0),
    ("<answer>Eiffel Tower", "Eiffel Tower", 0.0),
    ("", "Eiffel Tower", 0.0),
    ("<answer></answer>", "Eiffel Tower", 0.0),
    ("<answer>the</answer>", "the", 1.0),
    ("<answer>5</answer>", 5, 1.0),
    ("<answer>x</answer>", None, None),
    ("<answer>x</answer>", " ", None),
    ("<answer>x</answer>", "...", None),
]


def wrong_rows(reward: Callable[..., list[float | None]], table: list[Any]) -> list[Any]:
    """Return the rows (completion, gold, wanted score) of a table that the reward scores otherwise."""
    scores = reward([text for text, _, _ in table], [gold for _, gold, _ in table])
    return [(row, score) for row, score in zip(table, scores, strict=True) if score != row[2]]


def test_exact_match_compares_normalised_text() -> None:
    assert wrong_rows(exact_match_reward, EXACT) == []


def test_exact_match_can_compare_the_whole_visible_text_and_be_strict() -> None:
    assert exact_match_reward(["<think>a</think>Yes."], ["yes"], extract=None) == [1.0]
    assert exact_match_reward(["Yes"], ["yes"], extract=None, ignore_case=False) == [0.0]
    assert exact_match_reward(["yes."], ["yes"], extract=None, ignore_punctuation=False) == [0.0]


CHOICES = [
    ("<answer>B</answer>", "B", 1.0),
    ("<answer>(B)</answer>", "B", 1.0),
    ("<answer>b</answer>", "B", 1.0),
    ("<answer>B.</answer>", "B", 1.0),
    ("<answer>B) 42 km</answer>", "B", 1.0),
    ("<answer>B: a car</answer>", "B", 1.0),
    ("The answer is B.", "(B)", 1.0),
    ("The answer is option B.", "B", 1.0),
    ("\\boxed{\\text{(B)}}", "B", 1.0),
    ("\\boxed{B}", 1, 1.0),
    ("<answer>A</answer>", "B", 0.0),
    ("<answer>A or B</answer>", "B", 0.0),
    ("<answer>A, B</answer>", "B", 0.0),
    ("<answer>B) or A)</answer>", "B", 0.0),
    ("<answer>ABCDE</answer>", "B", 0.0),
    ("<answer>A B C D E</answer>", "B", 0.0),
    ("<answer>Both</answer>", "B", 0.0),
    ("<answer>F</answer>", "B", 0.0),
    ("<answer></answer>", "B", 0.0),
    ("B", "B", 0.0),
    ("<think><answer>B</answer></think>", "B", 0.0),
    ("", "B", 0.0),
    ("<answer>B</answer>", None, None),
    ("<answer>B</answer>", "Z", None),
    ("<answer>B</answer>", 9, None),
    ("<answer>B</answer>", "", None),
]


def test_a_choice_is_one_committed_letter() -> None:
    assert wrong_rows(choice_reward, CHOICES) == []


def test_choices_on_offer_can_be_set() -> None:
    assert choice_reward(["<answer>F</answer>"], ["F"], choices="ABCDEF") == [1.0]
    assert choice_reward(["<answer>F</answer>"], [5], choices="ABCDEF") == [1.0]


COUNTDOWN = [
    ("20-16", 1.0),
    ("(20 - 16)", 1.0),
    ("20 - 16 = 4", 1.0),
    ("20−16", 1.0),
    ("$20 - 16$", 1.0),
    ("\\left(20 - 16\\right)", 1.0),
    ("16-20", 0.0),
    ("20-16 = 5", 0.0),
    ("4", 0.0),
    ("4 = 4", 0.0),
    ("20-16+0", 0.0),
    ("20-16-16+16", 0.0),
    ("(20-16)*1", 0.0),
    ("20-16*16/16", 0.0),
    ("20--16-32", 0.0),
    ("20-16.0", 0.0),
    ("20-1_6", 0.0),
    ("20-0x10", 0.0),
    ("20 if 1 else 4", 0.0),
    ("__import__('os').getpid()", 0.0),
    ("20**1-16", 0.0),
    ("20//5", 0.0),
    ("abs(16-20)", 0.0),
    ("20-16 or 5", 0.0),
    ("20-16, 16-20", 0.0),
    ("20/0", 0.0),
    ("", 0.0),
    ("(" * 5000 + "20-16" + ")" * 5000, 0.0),
    ("20" + "-16+16" * 100_000, 0.0),
    ("True+19-16", 0.0),
    ("20-16 = 4 = 4", 0.0),
]


def test_countdown_reads_arithmetic_on_the_given_numbers_only() -> None:
    count = len(COUNTDOWN)
    scores = countdown_reward([f"<answer>{text}</answer>" for text, _ in COUNTDOWN], [[20, 16]] * count, [4] * count)
    assert [text[:30] for (text, want), score in zip(COUNTDOWN, scores, strict=True) if score != want] == []


def test_countdown_is_exact_and_counts_each_number() -> None:
    table: list[tuple[str, list[int], int, float]] = [
        ("3 * 4 / 2", [2, 3, 4], 6, 1.0),
        ("7 / 2 * 4", [2, 4, 7], 14, 1.0),  # exact through a fraction
        ("1 / 3 * 3", [1, 3, 3], 1, 1.0),
        ("2 × 3", [2, 3], 6, 1.0),
        ("2 x 3", [2, 3], 6, 1.0),
        ("2 \\times 3", [2, 3], 6, 1.0),
        ("\\frac{6}{3}", [6, 3], 2, 1.0),
        ("6 ÷ 3", [6, 3], 2, 1.0),
        ("5 + 5", [5], 10, 0.0),
        ("5 + 5", [5, 5], 10, 1.0),
        ("5", [5, 3], 5, 1.0),
        ("-3 + 8", [3, 8], 5, 1.0),
    ]
    texts, nums, targets, wanted = zip(*table, strict=True)
    scores = countdown_reward([f"\\boxed{{{text}}}" for text in texts], nums, targets)
    assert [row for row, score, want in zip(table, scores, wanted, strict=True) if score != want] == []


def test_countdown_can_ask_for_every_number_and_pay_for_the_right_kind_of_try() -> None:
    assert countdown_reward(["<answer>5</answer>"], [[5, 3]], [5], use_all=True) == [0.0]
    tries = ["<answer>16-20</answer>", "<answer>7-3</answer>", "<answer>20-16</answer>"]
    assert countdown_reward(tries, [[20, 16]] * 3, [4] * 3, partial_credit=0.1) == [0.1, 0.0, 1.0]
    with pytest.raises(ValueError, match=r"partial_credit is 0.9; allowed: 0 to 0.5"):
        countdown_reward(tries, [[20, 16]] * 3, [4] * 3, partial_credit=0.9)


def test_a_row_that_states_no_problem_gives_none() -> None:
    rows: list[tuple[Any, Any]] = [(None, 4), ([], 4), ([20, "x"], 4), ([20, 16], None), ([20, 16], 4.5)]
    scores = countdown_reward(["<answer>20-16</answer>"] * 5, [nums for nums, _ in rows], [goal for _, goal in rows])
    assert scores == [None] * 5


def test_countdown_outside_thinking_only_and_in_a_few_shot_line() -> None:
    assert countdown_reward(["<think><answer>20-16</answer></think>"], [[20, 16]], [4]) == [0.0]
    assert countdown_reward(["20-16\n3-1"], [[20, 16]], [4], extract=["first_line"]) == [1.0]


@pytest.mark.parametrize("name", ["easy_train", "easy_test", "3to4_train", "3to4_test"])
def test_every_example_solution_is_paid_and_a_neighbour_s_is_not(name: str, shared_data: Path) -> None:
    rows = [json.loads(line) for line in (shared_data / f"countdown_{name}.jsonl").read_text().splitlines()]
    texts = [f"<answer>{row['example_solution']}</answer>" for row in rows]
    columns = {"nums": [row["nums"] for row in rows], "target": [row["target"] for row in rows]}
    assert set(countdown_reward(texts, **columns)) == {1.0}
    shifted = countdown_reward(texts[1:] + texts[:1], **columns)
    paid = [i for i, score in enumerate(shifted) if score]
    assert all(sorted(rows[i]["nums"]) == sorted(rows[(i + 1) % len(rows)]["nums"]) for i in paid)
