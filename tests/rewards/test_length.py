"""Length rewards: the published values, their limits, and that none lets a wrong short answer beat a right long one."""

from __future__ import annotations

import math
from functools import partial
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from rewards import (
    accuracy_reward,
    concise_reward,
    cosine_length_reward,
    gated,
    memoised,
    repetition_penalty_reward,
    soft_overlong_punishment,
)

LIMIT = 100
RIGHT, WRONG = "#### 4", "#### 5"
group_of = st.lists(st.tuples(st.booleans(), st.integers(0, 130)), min_size=2, max_size=8)


def batch(group: list[tuple[bool, int]]) -> dict[str, Any]:
    return {
        "completions": [RIGHT if right else WRONG for right, _ in group],
        "completion_ids": [[7] * length for _, length in group],
        "answer": ["4"] * len(group),
        "prompts": ["2+2?"] * len(group),
    }


def wrong_never_beats_right(group: list[tuple[bool, int]], totals: list[float]) -> bool:
    right = [total for (is_right, _), total in zip(group, totals, strict=True) if is_right]
    wrong = [total for (is_right, _), total in zip(group, totals, strict=True) if not is_right]
    return not right or not wrong or max(wrong) <= min(right)


@given(group_of)
def test_cosine_never_lets_a_wrong_answer_beat_a_right_one(group: list[tuple[bool, int]]) -> None:
    scores = cosine_length_reward(**batch(group), max_completion_length=LIMIT)
    assert wrong_never_beats_right(group, [score or 0.0 for score in scores])


@given(group_of)
def test_concise_never_lets_a_wrong_answer_beat_a_right_one(group: list[tuple[bool, int]]) -> None:
    scores = concise_reward(**batch(group))
    assert wrong_never_beats_right(group, [score or 0.0 for score in scores])
    assert all(0.0 <= (score or 0.0) <= 1.0 for score in scores)


@given(group_of, st.floats(0.0, 1.0))
def test_overlong_beside_accuracy_never_lets_a_wrong_answer_beat_a_right_one(
    group: list[tuple[bool, int]], weight: float
) -> None:
    columns = batch(group)
    length = soft_overlong_punishment(**columns, max_completion_length=LIMIT, cache_length=20)
    totals = [(a or 0.0) + weight * (b or 0.0) for a, b in zip(accuracy_reward(**columns), length, strict=True)]
    assert wrong_never_beats_right(group, totals)


@given(group_of)
def test_gated_length_rewards_together_stay_under_correctness(group: list[tuple[bool, int]]) -> None:
    """Weights 1 and ½, ½: the worst right completion gets 1 − ½ − ½ = 0, the best wrong one 0."""
    columns = batch(group)
    judge = memoised(accuracy_reward)
    overlong = gated(partial(soft_overlong_punishment, max_completion_length=LIMIT, cache_length=20), by=judge)
    repeated = gated(repetition_penalty_reward, by=judge)
    parts = [judge(**columns), overlong(**columns), repeated(**columns)]
    totals = [(a or 0.0) + 0.5 * (b or 0.0) + 0.5 * (c or 0.0) for a, b, c in zip(*parts, strict=True)]
    assert wrong_never_beats_right(group, totals)


def test_overlong_is_equation_13_of_dapo() -> None:
    wanted = {0: 0.0, 80: 0.0, 81: -0.05, 90: -0.5, 100: -1.0, 101: -1.0, 1000: -1.0}  # by length
    ids = [[0] * length for length in wanted]
    scores = soft_overlong_punishment([""] * 7, ids, max_completion_length=LIMIT, cache_length=20)
    assert dict(zip(wanted, scores, strict=True)) == wanted


@given(st.integers(0, 300), st.integers(1, 100))
def test_overlong_grows_with_length_and_stays_in_its_range(length: int, cache: int) -> None:
    shorter, longer = soft_overlong_punishment(
        ["", ""], [[0] * length, [0] * (length + 1)], max_completion_length=LIMIT, cache_length=cache
    )
    assert shorter is not None
    assert longer is not None
    assert -1.0 <= longer <= shorter <= 0.0


def test_an_overlong_cache_outside_the_limit_is_refused() -> None:
    for cache in (0, -1, 101):
        with pytest.raises(ValueError, match=f"cache_length is {cache}; allowed: 1 to max_completion_length"):
            soft_overlong_punishment([""], [[0]], max_completion_length=LIMIT, cache_length=cache)


def test_cosine_has_open_r1_s_values_and_is_clamped() -> None:
    lengths = [0, 50, 100, 200]  # unclamped, cos(2π) would pay a right answer of 200 tokens the full 1.0 again
    columns = batch([(True, n) for n in lengths] + [(False, n) for n in lengths])
    scores = cosine_length_reward(**columns, max_completion_length=LIMIT)
    assert scores == pytest.approx([1.0, 0.75, 0.5, 0.5, -1.0, -0.75, -0.5, -0.5])


def test_cosine_follows_its_formula_in_between() -> None:
    scores = cosine_length_reward(**batch([(True, 25)]), max_completion_length=LIMIT)
    assert scores == pytest.approx([0.5 + 0.25 * (1 + math.cos(math.pi / 4))])


def test_cosine_passes_an_unusable_gold_on() -> None:
    columns = batch([(True, 5), (True, 5)]) | {"answer": [None, "4"]}
    assert cosine_length_reward(**columns, max_completion_length=LIMIT)[0] is None


def test_cosine_ranges_that_overlap_are_refused() -> None:
    with pytest.raises(ValueError, match="max_wrong <= min_correct"):
        cosine_length_reward(**batch([(True, 5)]), max_completion_length=LIMIT, max_wrong=0.6)


def test_repetition_is_the_share_of_repeated_ngrams() -> None:
    table: list[tuple[list[int], float]] = [
        ([], 0.0),
        ([1], 0.0),  # shorter than a 2-gram
        ([1, 2, 3], 0.0),
        ([7, 7, 7, 7, 7], -0.75),  # 4 two-grams, 1 distinct
        ([1, 2, 1, 2, 1], -0.5),  # 4 two-grams, 2 distinct
    ]
    scores = repetition_penalty_reward([""] * 5, [ids for ids, _ in table], ngram_size=2)
    assert scores == [want for _, want in table]


def test_repetition_counts_words_without_token_ids() -> None:
    assert repetition_penalty_reward(["a b a b a", "a b c"], ngram_size=2) == [-0.5, 0.0]


@given(st.lists(st.integers(0, 3), max_size=50), st.integers(1, 5))
def test_repetition_stays_in_its_range(ids: list[int], size: int) -> None:
    score = repetition_penalty_reward([""], [ids], ngram_size=size, max_penalty=-0.5)[0]
    assert score is not None
    assert -0.5 <= score <= 0.0


def test_repetition_options_that_would_pay_are_refused() -> None:
    options: list[dict[str, Any]] = [{"max_penalty": 1.0}, {"ngram_size": 0}]
    for kwargs in options:
        with pytest.raises(ValueError, match="repetition_penalty_reward"):
            repetition_penalty_reward([""], [[1]], **kwargs)


def test_concise_compares_right_completions_of_one_group_only() -> None:
    columns = batch([(True, 10), (True, 30), (False, 1), (True, 20), (True, 90), (True, 80)])
    columns["prompts"] = ["a"] * 4 + ["b"] * 2
    assert concise_reward(**columns) == [1.0, 0.0, 0.0, 0.5, 0.0, 1.0]


def test_concise_pays_nothing_for_equal_lengths_or_a_single_right_answer() -> None:
    assert concise_reward(**batch([(True, 10), (True, 10)])) == [0.0, 0.0]
    assert concise_reward(**batch([(True, 10), (False, 5)])) == [0.0, 0.0]


def test_concise_takes_groups_from_their_size_without_prompts() -> None:
    columns = batch([(True, 1), (True, 2), (True, 30), (True, 40)])
    del columns["prompts"]
    assert concise_reward(**columns, num_generations=2) == [1.0, 0.0, 1.0, 0.0]
    with pytest.raises(ValueError, match=r"prompts .* or num_generations"):
        concise_reward(**columns)


def test_concise_takes_chat_prompts_and_passes_an_unusable_gold_on() -> None:
    columns = batch([(True, 1), (True, 2)]) | {
        "prompts": [[{"role": "user", "content": "2+2?"}]] * 2,
        "answer": [None, "4"],
    }
    assert concise_reward(**columns) == [None, 0.0]


def test_length_rewards_take_another_judge_of_correctness() -> None:
    def always(completions: list[str], **kwargs: Any) -> list[float | None]:
        return [1.0] * len(completions)

    assert concise_reward(["", ""], [[1], [1, 2]], num_generations=2, correct=always) == [1.0, 0.0]
    assert cosine_length_reward([""], [[]], max_completion_length=10, correct=always) == [1.0]
