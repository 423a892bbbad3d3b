"""Composition: side rewards count only where the answer is right, judged once, and never from a stale memory."""

from __future__ import annotations

from functools import partial
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from rewards import accuracy_reward, format_reward, gated, memoised
from rewards.gate import Part, composition_margin, reward_name

SHAPED = "<think>x</think><answer>{0}</answer>"


class Counting:
    """A judge that pays what its `score` column says and counts its calls."""

    def __init__(self) -> None:
        self.calls = 0

    def __call__(self, completions: list[Any], score: list[float | None], **kwargs: Any) -> list[float | None]:
        self.calls += 1
        return list(score)


def ones(completions: list[Any], **kwargs: Any) -> list[float | None]:
    return [1.0] * len(completions)


def test_a_gated_reward_counts_only_at_the_top_of_its_gate() -> None:
    shape = gated(format_reward, by=accuracy_reward)
    texts = [SHAPED.format(4), SHAPED.format(5), "#### 4", SHAPED.format(4)]
    assert shape(completions=texts, answer=["4", "4", "4", None]) == [1.0, 0.0, 0.0, None]


def test_a_fraction_of_the_top_does_not_open_the_gate() -> None:
    judge = Counting()
    assert gated(ones, by=judge)(completions=["a", "b"], score=[0.99, 1.0]) == [0.0, 1.0]
    assert gated(ones, by=judge, threshold=0.5)(completions=["a", "b"], score=[0.4, 0.6]) == [0.0, 1.0]


def test_a_penalty_is_gated_to_nothing() -> None:
    def penalty(completions: list[Any], **kwargs: Any) -> list[float | None]:
        return [-1.0] * len(completions)

    assert gated(penalty, by=Counting())(completions=["a", "b"], score=[0.0, 1.0]) == [0.0, -1.0]


def test_a_shared_judge_is_asked_once_per_batch() -> None:
    judge = Counting()
    shared = memoised(judge)
    first, second = gated(ones, by=shared), gated(ones, by=shared)
    columns: dict[str, Any] = {"completions": ["a", "b"], "score": [0.0, 1.0], "prompts": ["p", "p"]}
    state, log = object(), lambda name, value: None
    assert shared(**columns, trainer_state=state, log_metric=log) == [0.0, 1.0]
    assert first(**columns, trainer_state=state, log_metric=log) == [0.0, 1.0]
    assert second(**columns, trainer_state=state, log_metric=log) == [0.0, 1.0]
    assert judge.calls == 1


def test_changed_input_is_judged_anew_even_in_the_same_list() -> None:
    judge = Counting()
    shared = memoised(judge)
    completions: list[Any] = ["a", "b"]
    score = [0.0, 1.0]
    assert shared(completions=completions, score=score) == [0.0, 1.0]
    score[0] = 1.0
    assert shared(completions=completions, score=score) == [1.0, 1.0]
    completions[0] = "changed"
    shared(completions=completions, score=score)
    assert judge.calls == 3
    shared(completions=list(completions), score=list(score))
    assert judge.calls == 3


def test_a_message_changed_in_place_is_judged_anew() -> None:
    message = {"role": "assistant", "content": "#### 4"}
    shared = memoised(accuracy_reward)
    assert shared(completions=[[message]], answer=["4"]) == [1.0]
    message["content"] = "#### 5"
    assert shared(completions=[[message]], answer=["4"]) == [0.0]


def test_a_memory_cannot_be_changed_through_what_it_returned() -> None:
    shared = memoised(Counting())
    first = shared(completions=["a"], score=[1.0])
    first[0] = -5.0
    assert shared(completions=["a"], score=[1.0]) == [1.0]


def test_columns_that_cannot_be_compared_are_judged_every_time() -> None:
    judge = Counting()
    shared = memoised(judge)
    for _ in range(2):
        shared(completions=["a"], score=[1.0], image=[object()])
    assert judge.calls == 2


def test_a_gate_logs_no_metric_twice() -> None:
    seen: list[str] = []

    def log(name: str, value: float) -> None:
        seen.append(name)

    shape = gated(format_reward, by=accuracy_reward)
    shape(completions=["#### 4"], answer=["4"], log_metric=log)
    assert seen == []


def test_names_are_kept_for_trl_s_metrics() -> None:
    assert gated(format_reward, by=accuracy_reward).__name__ == "format_reward"
    assert memoised(partial(accuracy_reward, timeout_s=1.0)).__name__ == "accuracy_reward"
    assert reward_name(Counting()) == "Counting"
    shared = memoised(accuracy_reward)
    assert memoised(shared) is shared


def test_an_exception_of_the_judge_is_not_swallowed() -> None:
    def broken(completions: list[Any], **kwargs: Any) -> list[float | None]:
        raise RuntimeError("broken")

    with pytest.raises(RuntimeError, match="broken"):
        gated(ones, by=broken)(completions=["a"])


parts = st.builds(
    Part,
    weight=st.floats(0.0, 2.0),
    low=st.floats(-1.0, 0.0),
    high=st.floats(0.0, 1.0),
    gated=st.booleans(),
)


@given(st.lists(parts, max_size=4), st.data())
def test_the_margin_is_the_least_lead_of_a_right_completion(sides: list[Part], data: st.DataObject) -> None:
    judge = Part(1.0, 0.0, 1.0, judges=True)
    margin = composition_margin([judge, *sides])
    values = [[data.draw(st.floats(part.low, part.high)) for part in sides] for _ in range(2)]
    right = 1.0 + sum(part.weight * value for part, value in zip(sides, values[0], strict=True))
    wrong = sum(0.0 if p.gated else p.weight * value for p, value in zip(sides, values[1], strict=True))
    assert right - wrong >= margin - 1e-9


@given(st.lists(st.tuples(st.floats(0.0, 3.0), st.booleans(), st.booleans()), min_size=1, max_size=8))
def test_no_weight_of_gated_bonuses_lets_a_wrong_answer_win(group: list[tuple[float, bool, bool]]) -> None:
    weight = group[0][0]
    texts = [(SHAPED if shaped else "#### {0}").format(4 if right else 5) for _, right, shaped in group]
    answers = ["4"] * len(group)
    accuracy = memoised(accuracy_reward)
    shape = gated(format_reward, by=accuracy)
    totals = [
        (a or 0.0) + weight * (f or 0.0)
        for a, f in zip(
            accuracy(completions=texts, answer=answers), shape(completions=texts, answer=answers), strict=True
        )
    ]
    right = [total for total, (_, is_right, _) in zip(totals, group, strict=True) if is_right]
    wrong = [total for total, (_, is_right, _) in zip(totals, group, strict=True) if not is_right]
    assert not right or not wrong or max(wrong) < min(right)
