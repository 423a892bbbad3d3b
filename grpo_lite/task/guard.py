"""guard: a reward that raises, hangs or breaks its contract costs its groups, not the run, unless it keeps failing.

The batch is scored again, group by group, so that one bad completion costs one group. A group that fails again is left
out of the step: its rewards are None, `excluded` names the rows, and the trainer gives those groups no advantage. A
failure is never turned into a number, because that would be a training signal.

A reward that waits may begin with single rows of the next batch while the others are still being generated (`begin`).

TRL calls the guarded rewards (`_calculate_rewards`). Whatever a reward raises arrives here as a RewardError with its
name, because `task.rewards` wraps every reward when it loads it. Checks, probe and evaluation use `limited` instead.
"""

from __future__ import annotations

import asyncio
import contextlib
import functools
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from grpo_lite.errors import RewardError
from grpo_lite.recipe.recipe import LimitsSection
from grpo_lite.rewards.head_start import HeadStart
from grpo_lite.screen import Show
from grpo_lite.task.rewards import Reward, UnscoredRows
from grpo_lite.task.time_limit import TimeLimitExceeded, call_within, wait_for

_LOGGERS = ("log_extra", "log_metric")  # a second call must not log twice
_END_S = 3.0  # a head start that has not ended by then is left behind


@dataclass
class GuardedReward:
    """A reward that survives its own faults.

    Attributes:
        excluded: rows of the last batch whose group could not be scored.
        failures: batches of the whole run in which something failed.
        in_a_row: batches in a row of which more than half could not be scored.
        spent: why nothing more can be scored, so that the run should stop; None: it can.
    """

    function: Reward
    group_size: int
    limits: LimitsSection
    show: Show

    def __post_init__(self) -> None:
        self.timeout_s = self.limits.reward_timeout_s
        self.__name__ = self.function.__name__  # TRL logs rewards/<name>/mean
        self.excluded: tuple[int, ...] = ()
        self.spent: str | None = None
        self.failures = self.in_a_row = 0
        self.can_begin = hasattr(self.function, "begin")
        self._head_start: HeadStart | None = None
        self._warned_slow = False

    def __call__(self, completions: list[Any], **columns: Any) -> list[float | None]:
        """Return one reward a completion, None for those of excluded groups.

        Raises:
            RewardError: most of the batch could not be scored, `limits.reward_failures` times in a row.
        """
        self.excluded = ()
        start = time.monotonic()
        try:
            scores = self._whole(completions, columns)
        except UnscoredRows as error:  # it has tried again itself, row by row
            scores = self._whole_groups(error)
            if error.spent is None:
                self._count(self._describe(error), len(completions))
            else:
                self._stop(error.spent, len(completions))
        except (RewardError, TimeLimitExceeded) as error:
            reason = self._describe(error)
            scores = self._by_group(completions, columns)
            self._count(reason, len(completions))
        else:
            self.in_a_row = 0
            self._warn_if_slow(time.monotonic() - start)
        return scores

    def begin(self, completions: list[Any], **columns: Any) -> None:
        """Begin with one row of the next batch. A failure is not counted here: the batch meets it."""
        self._head_start = head_start = self._head_start or HeadStart()
        if head_start.is_off:
            return
        try:
            call_within(
                self.timeout_s,
                lambda: self.function.begin(completions, head_start, **columns),  # type: ignore[attr-defined]
            )
        except (RewardError, TimeLimitExceeded):  # of the gate
            head_start.is_off = True

    def end_head_start(self) -> None:
        """End what was begun and is still under way; the next batch knows nothing of it."""
        head_start, self._head_start = self._head_start, None
        if head_start is not None:
            with contextlib.suppress(TimeLimitExceeded, asyncio.CancelledError):
                call_within(_END_S, lambda: wait_for(head_start.close()))

    def _whole(self, completions: list[Any], columns: dict[str, Any]) -> list[float | None]:
        """Score the batch, with what was begun."""
        if self._head_start is None:
            return self._call(completions, columns, self.timeout_s)
        try:
            return self._call(completions, {**columns, "head_start": self._head_start}, self.timeout_s)
        finally:
            self.end_head_start()

    def _call(self, completions: list[Any], columns: dict[str, Any], seconds: float | None) -> list[float | None]:
        scores: list[float | None] = call_within(seconds, lambda: self.function(completions=completions, **columns))
        return scores

    def _by_group(self, completions: list[Any], columns: dict[str, Any]) -> list[float | None]:
        """Score each group by itself, all together within the time limit of one call."""
        total, size = len(completions), self.group_size
        quiet = {key: value for key, value in columns.items() if key not in _LOGGERS}
        quiet |= {key: _ignore for key in _LOGGERS if key in columns}
        end = None if self.timeout_s is None else time.monotonic() + self.timeout_s
        scores: list[float | None] = [None] * total
        excluded: list[int] = []
        for start in range(0, total, size):
            rows = slice(start, start + size)
            part = {key: value[rows] if _is_column(value, total) else value for key, value in quiet.items()}
            remaining = None if end is None else end - time.monotonic()
            try:
                if remaining is not None and remaining <= 0:
                    raise TimeLimitExceeded
                scores[rows] = self._call(completions[rows], part, remaining)
            except (RewardError, TimeLimitExceeded):
                excluded += range(start, min(start + size, total))
        self.excluded = tuple(excluded)
        return scores

    def _whole_groups(self, error: UnscoredRows) -> list[float | None]:
        """Return the scores, without those of groups in which a row has none."""
        failed, size = {row // self.group_size for row in error.rows}, self.group_size
        rows = range(len(error.scores))
        self.excluded = tuple(row for row in rows if row // size in failed)
        return [None if row // size in failed else error.scores[row] for row in rows]

    def _stop(self, reason: str, rows: int) -> None:
        if self.spent is None:
            left_out, groups = len(self.excluded), -(-rows // self.group_size)
            self.show(
                f"{self.__name__}: {reason}; {-(-left_out // self.group_size)} of {groups} groups are left out of this "
                "step, and the run stops after it"
            )
        self.spent = reason

    def _warn_if_slow(self, seconds: float) -> None:
        if not self._warned_slow and self.timeout_s is not None and seconds > self.timeout_s / 2:
            self._warned_slow = True
            self.show(
                f"reward slow: {self.__name__} took {seconds:.1f} s for a batch, more than half of "
                f"limits.reward_timeout_s = {self.timeout_s:g} s"
            )

    def _describe(self, error: BaseException) -> str:
        if isinstance(error, TimeLimitExceeded):
            return f"{self.__name__} took longer than limits.reward_timeout_s = {self.timeout_s:g} s"
        return str(error).rstrip(".")

    def _count(self, reason: str, rows: int) -> None:
        self.failures += 1
        groups, unscored = -(-rows // self.group_size), -(-len(self.excluded) // self.group_size)
        self.in_a_row = self.in_a_row + 1 if 2 * unscored > groups else 0
        if self.in_a_row >= self.limits.reward_failures:
            raise RewardError(
                f"{reason}. It has now failed in {self.in_a_row} batches in a row (limits.reward_failures), so the run "
                "stops; what was saved is kept. Fix the reward, then run the same command again."
            )
        self.show(f"reward failed: {reason}; {unscored} of {groups} groups are left out of this step")


def awaited(guard: GuardedReward) -> Callable[..., Any]:
    """Return an async reward as TRL awaits it, together with the other async ones; each waits in a thread of its own.

    The guard itself is the function's attribute `guard`.
    """

    async def reward(completions: list[Any], **columns: Any) -> list[float | None]:
        return await asyncio.to_thread(guard, completions, **columns)

    reward.__name__ = guard.__name__
    vars(reward)["guard"] = guard
    return reward


def limited(function: Reward, seconds: float | None, where: str) -> Reward:
    """Return the reward with its time limit, for checks and scores, where a group cannot just be left out.

    Raises:
        RewardError: (when called) it took longer.
    """

    @functools.wraps(function)
    def reward(completions: list[Any], **columns: Any) -> list[float | None]:
        try:
            scores: list[float | None] = call_within(seconds, lambda: function(completions=completions, **columns))
        except TimeLimitExceeded:
            raise RewardError(
                f"{where}: {function.__name__} took longer than limits.reward_timeout_s = {seconds:g} s on "
                f"{len(completions)} completions. Fix it, or raise the limit."
            ) from None
        return scores

    return reward


def _is_column(value: Any, length: int) -> bool:
    return isinstance(value, list | tuple) and len(value) == length


def _ignore(*_: Any) -> None:
    """Log nothing."""
