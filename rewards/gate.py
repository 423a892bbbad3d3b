"""Composition: let a side reward count only where the answer is correct, so that no sum of side rewards can replace it.

TRL adds rewards with fixed weights. A format reward of weight 1 then pays a wrong answer as much as correctness pays a
shapeless one. `gated(format_reward, by=accuracy_reward)` pays for form only where the accuracy is at its top. Share one
`memoised(accuracy_reward)` between the trainer and the gates, and correctness is judged once per batch.
"""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from .facts import Reward, pass_on


def gated(reward: Reward, by: Reward, threshold: float = 1.0) -> Reward:
    """Return `reward`, counting only where `by` reaches `threshold`: elsewhere 0, and None where `by` says None.

    The result has TRL's signature and keeps the reward's name (TRL's metric keys). Where `by` is not memoised it is
    asked on every call. A reward with an argument `passed_gate`, such as `judge_reward`, gets which completions count,
    so that it does not ask anyone about the others. Where `by` states `by_row` (`rewards.facts`), such a reward may
    `begin` with single rows that pass (`rewards.head_start`).

    >>> from functools import partial
    >>> from rewards import accuracy_reward, format_reward
    >>> shape = gated(format_reward, by=accuracy_reward)
    >>> texts = ["<think>x</think><answer>4</answer>", "<think>x</think><answer>5</answer>", "#### 4"]
    >>> shape(completions=texts, answer=["4", "4", "4"])
    [1.0, 0.0, 0.0]
    """
    judge = by if isinstance(by, _Memo) else memoised(by)
    takes_passed_gate = _takes(reward, "passed_gate")

    def gated_reward(completions: Any, head_start: Any = None, **kwargs: Any) -> list[float | None]:
        tops = judge(completions=completions, **{**kwargs, "log_metric": None, "log_extra": None})
        passed = [top is not None and top >= threshold for top in tops]
        told = {"passed_gate": passed} if takes_passed_gate else {}
        if head_start is not None:
            told["head_start"] = head_start
        values = reward(completions=completions, **kwargs, **told)
        return [
            None if top is None or value is None else value if counts else 0.0
            for top, value, counts in zip(tops, values, passed, strict=True)
        ]

    def begin(completions: Any, head_start: Any, **kwargs: Any) -> None:
        top = by(completions=completions, **kwargs)[0]
        if top is not None and top >= threshold:
            reward.begin(completions=completions, head_start=head_start, **kwargs)  # type: ignore[attr-defined]

    pass_on(reward, gated_reward)
    if takes_passed_gate and hasattr(reward, "begin") and getattr(by, "by_row", False):
        vars(gated_reward)["begin"] = begin
    gated_reward.__name__ = reward_name(reward)
    gated_reward.__doc__ = f"{reward_name(reward)}, counting only where {reward_name(by)} >= {threshold}."
    return gated_reward


def memoised(reward: Reward) -> Reward:
    """Return `reward` remembering its last batch, so that several gates and the trainer share one judgement.

    A batch is recognised by the *values* of all its columns and completions, never by identity: changed input is always
    judged anew, and nothing is kept but the last batch, inside the returned object. The reward must depend on nothing
    else (not on `trainer_state`).

    >>> asked = []
    >>> def count(completions, **kwargs):
    ...     asked.append(len(completions))
    ...     return [1.0] * len(completions)
    >>> shared = memoised(count)
    >>> shared(completions=["a"]), shared(completions=["a"]), shared(completions=["b"]), asked
    ([1.0], [1.0], [1.0], [1, 1])
    """
    return reward if isinstance(reward, _Memo) else _Memo(reward)


@dataclass(frozen=True)
class Part:
    """One reward of a weighted sum: its range, and whether it is the judge of correctness or gated by it."""

    weight: float
    low: float
    high: float
    gated: bool = False
    judges: bool = False


def composition_margin(parts: Sequence[Part]) -> float:
    """Return by how much the worst correct completion beats the best wrong one; at or below 0 the sum can be gamed.

    Formula: min(Σ w·r | correct) − max(Σ w·r | wrong), where the judge pays `high` if correct and `low` if wrong, a
    gated reward pays 0 if wrong, and every other one may pay anything in its range in both cases.

    >>> accuracy, shape = Part(1.0, 0.0, 1.0, judges=True), Part(1.0, 0.0, 1.0)
    >>> composition_margin([accuracy, shape]), composition_margin([accuracy, Part(1.0, 0.0, 1.0, gated=True)])
    (0.0, 1.0)
    """
    correct = sum(p.weight * p.high if p.judges else min(p.weight * p.low, p.weight * p.high) for p in parts)
    wrong = 0.0
    for part in parts:
        if part.judges:
            wrong += part.weight * part.low
        elif not part.gated:
            wrong += max(part.weight * part.low, part.weight * part.high)
    return correct - wrong


def _takes(reward: Reward, argument: str) -> bool:
    try:
        return argument in inspect.signature(reward).parameters
    except (TypeError, ValueError):
        return False


def reward_name(reward: Reward) -> str:
    """Return the name a reward goes by in metrics, also for a `functools.partial` or an object."""
    inner = getattr(reward, "func", reward)
    return str(getattr(inner, "__name__", type(inner).__name__))


class _Memo:
    """A reward with its last batch; callable, and named like the reward for TRL."""

    def __init__(self, reward: Reward) -> None:
        self.reward = reward
        pass_on(reward, self)
        if hasattr(reward, "begin"):
            self.begin = reward.begin
        self.__name__ = reward_name(reward)
        self._last: tuple[Any, list[float | None]] | None = None

    def __call__(self, completions: Any, **kwargs: Any) -> list[float | None]:
        key = frozen(
            {name: v for name, v in kwargs.items() if isinstance(v, list | tuple)} | {"completions": completions}
        )
        last = self._last
        if key is not None and last is not None and last[0] == key:
            return list(last[1])
        values = self.reward(completions=completions, **kwargs)
        self._last = None if key is None else (key, list(values))
        return values


def frozen(value: Any) -> Any:
    """Return an immutable copy that compares by value, or None if there is something in it that cannot be compared."""
    if isinstance(value, str | int | float | bool | type(None)):
        return value
    if isinstance(value, list | tuple):
        if value and isinstance(value[0], int | float):  # token ids: one pass
            return tuple(value)
        items = [frozen(item) for item in value]
        return None if any(a is None and b is not None for a, b in zip(items, value, strict=True)) else tuple(items)
    if isinstance(value, dict):
        return frozen([[str(name), item] for name, item in value.items()])
    return None
