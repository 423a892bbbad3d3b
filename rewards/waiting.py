"""Rewards that wait for something slow, such as another model: rows are asked concurrently, each with its own limits.

An `async def` reward has TRL's signature and returns one score per completion. `each_row` makes one of a function that
scores one completion; it sees to concurrency, pace, time limits and retries. TRL awaits such rewards, and so does the
guard of grpo_lite, which leaves out only the groups of the rows that failed.

A reward that takes `head_start` may be asked about single rows before its batch is complete (`head_start.py`).
"""

from __future__ import annotations

import asyncio
import functools
import inspect
import time
from collections.abc import Awaitable, Callable, Hashable, Mapping, Sequence
from typing import Any, Generic, TypeVar

from .completion import completion_text
from .gate import frozen
from .head_start import HeadStart, shared

_FIRST_WAIT_S = 0.5  # before the first retry; doubled before each further one
LONGEST_WAIT_S = 60.0
_END_S = 1.0  # what is cancelled may clean up for so long
_NOT_OF_A_ROW = {"trainer_state", "log_extra", "log_metric", "environments"}  # passed by TRL

AsyncReward = Callable[..., Awaitable[list[float | None]]]
Question = TypeVar("Question", bound=Hashable)  # names it, by what is asked


class RowsFailed(Exception):
    """Some rows could not be scored, after all retries.

    Attributes:
        scores: one a row; None for the failed ones.
        rows: the failed ones.
        reason: of the first of them.
    """

    def __init__(self, scores: list[float | None], rows: list[int], reason: str) -> None:
        super().__init__(f"{len(rows)} of {len(scores)} rows could not be scored, the first because {reason}")
        self.scores, self.rows, self.reason = scores, rows, reason


class TryAgain(Exception):
    """Raised by a row's function: this attempt failed, another may not.

    Args:
        reason: what happened.
        after_s: how long the server asks to wait; None: not said.
    """

    def __init__(self, reason: str, after_s: float | None = None) -> None:
        super().__init__(reason)
        self.after_s = after_s


class BudgetSpent(Exception):
    """Raised by a row's function: nothing more may be asked. The rows that are left fail, and the run should stop."""


class Pace:
    """At most so many calls a minute, evenly spaced; no limit for None."""

    def __init__(self, per_minute: float | None) -> None:
        self._gap_s = 60.0 / per_minute if per_minute else 0.0
        self._next = 0.0

    async def turn(self) -> None:
        """Wait until the next call may start."""
        now = time.monotonic()
        start = max(now, self._next)
        self._next = start + self._gap_s
        if start > now:
            await asyncio.sleep(start - now)


def each_row(
    *, concurrency: int = 16, timeout_s: float = 60.0, retries: int = 3, per_minute: float | None = None
) -> Callable[[Callable[..., Awaitable[float | None]]], AsyncReward]:
    """Return a decorator: an `async def` function of one completion becomes a reward of a batch.

    The function gets `completion` as text, and those of the row's columns that it names. Behind a gate it is asked only
    about the rows that pass (`rewards.gated`). It raises `TryAgain` where
    another attempt may succeed; so do an attempt that takes too long and a broken connection (OSError). Any other
    exception is a fault of the function and goes to the caller.

    Args:
        concurrency: most rows that wait at once.
        timeout_s: longest attempt, in seconds.
        retries: further attempts of a row.
        per_minute: most attempts a minute; None: no limit.

    >>> import asyncio
    >>> @each_row(concurrency=2)
    ... async def short(completion, limit):
    ...     return float(len(completion) <= limit)
    >>> asyncio.run(short(completions=["yes", "certainly"], limit=[5, 5]))
    [1.0, 0.0]
    """
    pace = Pace(per_minute)

    def decorate(function: Callable[..., Awaitable[float | None]]) -> AsyncReward:
        parameters = inspect.signature(function).parameters
        names = [name for name in parameters if name != "completion"]

        @functools.wraps(function)
        async def reward(
            completions: list[Any],
            passed_gate: list[bool] | None = None,
            head_start: HeadStart | None = None,
            **columns: Any,
        ) -> list[float | None]:
            texts = [completion_text(completion) for completion in completions]
            named = {name: columns[name] for name in names if name in columns}
            scores: list[float | None] = []
            rows: dict[Hashable, list[int]] = {}
            for row, text in enumerate(texts):
                wanted = passed_gate is None or passed_gate[row]
                scores.append(None if wanted else 0.0)
                if wanted:
                    rows[_question(text, _of_row(named, row), rows)] = [row]

            async def ask(question: Hashable) -> float | None:
                row = rows[question][0]
                return await function(texts[row], **_of_row(named, row))

            def open_session() -> Questions[Hashable]:
                return Questions(concurrency=concurrency, timeout_s=timeout_s, retries=retries, pace=pace)

            async with shared(head_start, open_session) as questions:
                await questions.answer(scores, rows, ask)
            return scores

        named_only = inspect.Parameter.KEYWORD_ONLY
        ours = ["passed_gate", *(["head_start"] if _NOT_OF_A_ROW.isdisjoint(names) else [])]
        signature = inspect.Signature(  # so that a missing column is named
            [
                inspect.Parameter("completions", inspect.Parameter.POSITIONAL_OR_KEYWORD),
                *(inspect.Parameter(name, named_only, default=None) for name in ours),
                *(parameters[name].replace(kind=named_only) for name in names if parameters[name].kind.value in (1, 3)),
            ]
        )
        del vars(reward)["__wrapped__"]
        vars(reward)["__signature__"] = signature
        return reward

    return decorate


def _of_row(columns: Mapping[str, Any], row: int) -> dict[str, Any]:
    """Return a row's values of columns; what is no list is the same for all rows."""
    return {name: value[row] if isinstance(value, list) else value for name, value in columns.items()}


def _question(text: str, values: Mapping[str, Any], before: Mapping[Hashable, Any]) -> Hashable:
    """Return what names the question about a row, by value, so that each of several equal rows is asked about once.

    Args:
        text: the completion.
        values: of its columns.
        before: the questions about the rows before it.
    """
    value = text, *((name, _Same(value) if frozen(value) is None else frozen(value)) for name, value in values.items())
    number = 0
    while (value, number) in before:
        number += 1
    return value, number


class _Same:
    """A value that cannot be compared by what it holds: it is equal to itself only."""

    def __init__(self, value: Any) -> None:
        self.value = value

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _Same) and other.value is self.value

    def __hash__(self) -> int:
        return id(self.value)


class Questions(Generic[Question]):
    """Questions that wait together. Each is asked once, also where several batches of rows ask it.

    Args:
        concurrency, timeout_s, retries: as in `each_row`.
        pace: of the attempts.
    """

    def __init__(self, *, concurrency: int, timeout_s: float, retries: int, pace: Pace) -> None:
        self.timeout_s, self.retries, self.pace = timeout_s, retries, pace
        self._free = asyncio.Semaphore(concurrency)
        self._asked: dict[Question, asyncio.Task[float | _Failed | None]] = {}
        self._spent: BudgetSpent | None = None
        self._fault: Exception | None = None

    def __contains__(self, question: Hashable) -> bool:
        return question in self._asked

    async def answer(
        self,
        scores: list[float | None],
        rows: Mapping[Question, Sequence[int]],
        ask: Callable[[Question], Awaitable[float | None]],
    ) -> None:
        """Write the answer to each question into the scores of its rows; what was asked before is not asked again.

        Args:
            scores: of all rows.
            rows: questions, each with its rows.
            ask: asks a question, once.

        Raises:
            RowsFailed: some rows have no answer after all retries, or `BudgetSpent` (its cause then) was raised.
            Exception: what `ask` raised, where that is neither `TryAgain`, nor `OSError`, nor its time limit.
        """
        if self._fault is not None:
            raise self._fault
        for question in rows:
            if question not in self._asked:
                self._asked[question] = asyncio.create_task(self._tries(question, ask))
        asked = [self._asked[question] for question in rows]
        if asked:
            await asyncio.wait(asked)
        if self._fault is not None:  # the others have been cancelled
            raise self._fault
        reasons: dict[int, str] = {}
        for task, members in zip(asked, rows.values(), strict=True):
            outcome = task.result()
            for row in members:
                if isinstance(outcome, _Failed):
                    reasons[row] = outcome.reason
                else:
                    scores[row] = outcome
        if reasons:
            first = str(self._spent) if self._spent else reasons[min(reasons)]
            raise RowsFailed(scores, sorted(reasons), first) from self._spent

    async def _tries(
        self, question: Question, ask: Callable[[Question], Awaitable[float | None]]
    ) -> float | _Failed | None:
        reason = ""
        for attempt in range(self.retries + 1):
            async with self._free:
                if self._spent:
                    return _Failed(str(self._spent))
                await self.pace.turn()
                wait_s = min(_FIRST_WAIT_S * 2**attempt, LONGEST_WAIT_S)
                try:
                    return await asyncio.wait_for(ask(question), self.timeout_s)
                except BudgetSpent as error:
                    self._spent = error
                    return _Failed(str(error))
                except TryAgain as error:
                    reason = str(error)
                    wait_s = wait_s if error.after_s is None else min(error.after_s, LONGEST_WAIT_S)
                except TimeoutError:  # an OSError too: so before it
                    reason = f"it took longer than timeout_s = {self.timeout_s:g} s"
                except OSError as error:
                    reason = f"{type(error).__name__}: {error}"
                except Exception as error:
                    self._fault = self._fault or error
                    self.cancel()
                    return _Failed(str(error))
            if attempt < self.retries:
                await asyncio.sleep(wait_s)
        return _Failed(reason)

    def cancel(self) -> None:
        """Stop asking."""
        for task in self._asked.values():
            if task is not asyncio.current_task(task.get_loop()):
                task.cancel()

    async def close(self) -> None:
        """Stop asking, and wait until nothing is under way."""
        self.cancel()
        if self._asked:
            await asyncio.wait(self._asked.values(), timeout=_END_S)


class _Failed:
    """No answer, after all retries."""

    def __init__(self, reason: str) -> None:
        self.reason = reason
