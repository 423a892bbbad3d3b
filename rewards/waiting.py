"""Rewards that wait for something slow, such as another model: rows are asked concurrently, each with its own limits.

An `async def` reward has TRL's signature and returns one score per completion. `each_row` makes one of a function that
scores one completion; it sees to concurrency, pace, time limits and retries. TRL awaits such rewards, and so does the
guard of grpo_lite, which leaves out only the groups of the rows that failed.
"""

from __future__ import annotations

import asyncio
import functools
import inspect
import time
from collections.abc import Awaitable, Callable, Sequence
from typing import Any

from .completion import completion_text

_FIRST_WAIT_S = 0.5  # before the first retry; doubled before each further one
LONGEST_WAIT_S = 60.0

AsyncReward = Callable[..., Awaitable[list[float | None]]]


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
            completions: list[Any], passed_gate: list[bool] | None = None, **columns: Any
        ) -> list[float | None]:
            named = {name: columns[name] for name in names if name in columns}

            async def ask(row: int) -> float | None:
                values = {name: value[row] if isinstance(value, list) else value for name, value in named.items()}
                return await function(completion_text(completions[row]), **values)

            return await ask_rows(
                ask, len(completions), passed_gate,
                concurrency=concurrency, timeout_s=timeout_s, retries=retries, pace=pace,
            )  # fmt: skip

        named_only = inspect.Parameter.KEYWORD_ONLY
        signature = inspect.Signature(  # so that a missing column is named
            [
                inspect.Parameter("completions", inspect.Parameter.POSITIONAL_OR_KEYWORD),
                inspect.Parameter("passed_gate", named_only, default=None),
                *(parameters[name].replace(kind=named_only) for name in names if parameters[name].kind.value in (1, 3)),
            ]
        )
        del vars(reward)["__wrapped__"]
        vars(reward)["__signature__"] = signature
        return reward

    return decorate


async def ask_rows(
    ask: Callable[[int], Awaitable[float | None]],
    rows: int,
    wanted: Sequence[bool] | None = None,
    *,
    concurrency: int,
    timeout_s: float,
    retries: int,
    pace: Pace,
) -> list[float | None]:
    """Return the score of each row, asked for concurrently.

    Args:
        ask: asks for the score of one row, once.
        rows: how many there are.
        wanted: which of them to ask about; the others get 0. None: all.
        concurrency, timeout_s, retries: as in `each_row`.
        pace: of the attempts.

    Raises:
        RowsFailed: some rows have no answer after all retries, or `BudgetSpent` (its cause then) was raised.
        Exception: what `ask` raised, where that is neither `TryAgain`, nor `OSError`, nor its time limit.
    """
    free = asyncio.Semaphore(concurrency)
    asks = [wanted is None or wanted[row] for row in range(rows)]
    scores: list[float | None] = [None if asked else 0.0 for asked in asks]
    reasons: dict[int, str] = {}
    spent: list[BudgetSpent] = []

    async def one(row: int) -> None:
        for attempt in range(retries + 1):
            async with free:
                if spent:
                    reasons[row] = str(spent[0])
                    return
                await pace.turn()
                wait_s = min(_FIRST_WAIT_S * 2**attempt, LONGEST_WAIT_S)
                try:
                    scores[row] = await asyncio.wait_for(ask(row), timeout_s)
                    reasons.pop(row, None)
                    return
                except BudgetSpent as error:
                    spent.append(error)
                    reasons[row] = str(error)
                    return
                except TryAgain as error:
                    reasons[row] = str(error)
                    wait_s = wait_s if error.after_s is None else min(error.after_s, LONGEST_WAIT_S)
                except TimeoutError:  # an OSError too: so before it
                    reasons[row] = f"it took longer than timeout_s = {timeout_s:g} s"
                except OSError as error:
                    reasons[row] = f"{type(error).__name__}: {error}"
            if attempt < retries:
                await asyncio.sleep(wait_s)

    try:
        async with asyncio.TaskGroup() as tasks:
            for row, asked in enumerate(asks):
                if asked:
                    tasks.create_task(one(row))
    except ExceptionGroup as group:  # the others are cancelled by now
        raise group.exceptions[0] from None
    if reasons:
        first = str(spent[0]) if spent else reasons[min(reasons)]
        raise RowsFailed(scores, sorted(reasons), first) from (spent[0] if spent else None)
    return scores
