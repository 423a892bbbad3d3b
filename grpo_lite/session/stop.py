"""Why training stops before its last step: a signal, the clock, or another process."""

from __future__ import annotations

import contextlib
import signal
import time
from collections.abc import Sequence
from pathlib import Path
from types import FrameType
from typing import Any

import torch
from transformers import TrainerCallback

from grpo_lite.memory.times import merge_seconds
from grpo_lite.models.base import weights_bytes
from grpo_lite.recipe.recipe import Recipe
from grpo_lite.screen import Show
from grpo_lite.task.traces import Trace

# Generating a token of an evaluation takes no longer than training on so many.
TRAINED_PER_GENERATED = 3.0
SPENT = "a spent budget"  # the reason in place of a signal's name
_SPENT_NUMBER = 1000  # above every signal's
MOST_RESERVED = 0.5  # share of the time: a short limit must still train


class Deadline(TrainerCallback):
    """Ask for a checkpoint and a stop once another step would eat into the time that evaluation and merge need.

    Args:
        begun: `time.monotonic()` at the start of the whole command, whose set-up counts too.
        earlier: run.json, which knows how long evaluation and merge took in an earlier session.
        held_out: prompts that will be evaluated.
        base: folder of the 16-bit base, whose size says how long a merge takes.
        stage: what is trained, for the message.
        sampled_per_step: completions of the evaluation's length whose generation takes as long as a step.
    """

    def __init__(
        self,
        recipe: Recipe,
        begun: float,
        earlier: dict[str, Any],
        held_out: int,
        base: Path,
        show: Show,
        stage: str = "training",
        sampled_per_step: float | None = None,
    ) -> None:
        self.recipe, self.begun, self.earlier, self.show, self.stage = recipe, begun, earlier, show, stage
        self.held_out = recipe.evaluated_rows(held_out)
        self.base_bytes = weights_bytes(base)
        self.limit_s = (recipe.limits.max_minutes or 0.0) * 60
        self.sampled_per_step = recipe.schedule.sampled_per_step if sampled_per_step is None else sampled_per_step
        self.reached = False
        self._first_step_at = 0.0
        self._last_step_at = 0.0
        self._steps = 0

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._first_step_at = self._last_step_at = time.monotonic()

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        now = time.monotonic()
        self._steps += 1
        step_s = max(now - self._last_step_at, (now - self._first_step_at) / self._steps)
        self._last_step_at = now
        remaining_s = self.limit_s - (now - self.begun)
        reserved_s = min(self.reserve_s((now - self._first_step_at) / self._steps), MOST_RESERVED * self.limit_s)
        if remaining_s - reserved_s < 1.2 * step_s and state.global_step < state.max_steps:
            self.reached = control.should_save = control.should_training_stop = True
            self.show(
                f"limits.max_minutes = {self.recipe.limits.max_minutes:g}: {self.stage} pauses after step "
                f"{state.global_step} of {state.max_steps}; {reserved_s / 60:.1f} min are kept for evaluation and merge"
            )

    def reserve_s(self, step_s: float) -> float:
        """Return the seconds that evaluation and merge are expected to take: an estimate, from above.

        Measured in an earlier session, or planned for a budget, or else by the steps until now.
        """
        planned = self.earlier.get("budget") or {}
        evaluation = self.earlier.get("evaluation_seconds", planned.get("evaluation_s"))
        if evaluation is None:
            completions = self.recipe.evaluated_completions(self.held_out)
            completions += self.held_out * self.recipe.most_merges
            evaluation = completions * step_s / self.sampled_per_step
        merge = self.earlier.get("merge_seconds")
        if merge is None:
            merge = merge_seconds(self.base_bytes) * self.recipe.most_merges
        return 1.2 * ((evaluation if self.recipe.eval.enabled else 0.0) + (merge if self.recipe.merge else 0.0))


def sampled_per_warmup_step(recipe: Recipe, rows: Sequence[Trace]) -> float:
    """Return how many completions of the evaluation's cap are generated in the time of a warm-up step, from below.

    A step of the warm-up generates nothing, so the time is estimated from the tokens that it trains on.
    """
    assert recipe.warmup is not None
    trained = min(recipe.warmup.tokens_per_step, sum(map(len, rows))) or 1
    return trained / (TRAINED_PER_GENERATED * recipe.eval_completion_length)


class StopCleanly(TrainerCallback):
    """On SIGINT, SIGTERM or SIGHUP: finish the step, save a checkpoint, stop. A second Ctrl-C stops at once."""

    def __init__(self, show: Show) -> None:
        self.show = show
        self.signal_name: str | None = None
        self._previous: dict[int, Any] = {}

    def __enter__(self) -> StopCleanly:
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
            if number == signal.SIGHUP and signal.getsignal(number) is signal.SIG_IGN:
                continue  # nohup: the run continues when its terminal closes
            try:
                self._previous[number] = signal.signal(number, self._on_signal)
            except ValueError:  # not the main thread (a notebook's worker): signals stay as they are
                break
        return self

    def __exit__(self, *exc: object) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)

    def _on_signal(self, number: int, frame: FrameType | None) -> None:
        if self.signal_name is not None and number == signal.SIGINT:
            raise KeyboardInterrupt
        self.signal_name = signal.Signals(number).name
        with contextlib.suppress(RuntimeError):  # the signal came in the middle of another line's writing
            self.show(
                "stopping: a checkpoint is saved at the end of this step (Ctrl-C again stops at once, without it)"
            )

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if self.signal_name is not None:
            control.should_save = True
            control.should_training_stop = True


class StopWhenSpent(TrainerCallback):
    """Save a checkpoint and stop after the step in which the budget of a reward is spent.

    Args:
        stop: a `StopCleanly`, whose reason it sets.
        rewards: the trainer's reward functions.
    """

    def __init__(self, stop: StopCleanly, rewards: Sequence[Any]) -> None:
        self.stop = stop
        self.guards = [getattr(reward, "guard", reward) for reward in rewards]

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if any(getattr(guard, "spent", None) for guard in self.guards):
            self.stop.signal_name = self.stop.signal_name or SPENT
            control.should_save = control.should_training_stop = True


class StopTogether(TrainerCallback):
    """Let all processes stop after the same step: a signal or a clock reaches each at its own time.

    Comes after the callbacks that stop: one that asks for it stops all, for its reason.

    Args:
        stop: a `StopCleanly`.
        deadline: a `Deadline`, or None.
    """

    def __init__(self, stop: Any, deadline: Any) -> None:
        self.stop, self.deadline = stop, deadline

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        reasons = [_number_of(self.stop.signal_name), int(bool(self.deadline and self.deadline.reached))]
        largest = torch.tensor(reasons, device=args.device)
        torch.distributed.all_reduce(largest, torch.distributed.ReduceOp.MAX)
        number, paused = largest.tolist()
        if number:
            self.stop.signal_name = SPENT if number == _SPENT_NUMBER else signal.Signals(number).name
        if paused:
            self.deadline.reached = True
        if number or paused:
            control.should_save = control.should_training_stop = True


def _number_of(reason: str | None) -> int:
    """Return a reason to stop as a number that processes can compare; 0 for none."""
    return 0 if reason is None else _SPENT_NUMBER if reason == SPENT else int(signal.Signals[reason])
