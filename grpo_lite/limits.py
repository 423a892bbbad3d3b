"""Deadline: stop training in time to evaluate, merge and verify what there is; the next `train` goes on from there."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from transformers import TrainerCallback

from grpo_lite.recipe import Recipe

Show = Callable[[str], None]

# Reading, rounding, writing and twice verifying a merge, on a slow machine; measured ones of the run itself are used
# as soon as there are any.
MERGE_BYTES_PER_S = 25e6
MERGE_SETUP_S = 30.0
MOST_RESERVED = 0.5  # share of the time: a short limit must still train


class Deadline(TrainerCallback):
    """Ask for a checkpoint and a stop once another step would eat into the time that evaluation and merge need.

    Args:
        begun: `time.monotonic()` at the start of the whole command, whose set-up counts too.
        earlier: run.json, which knows how long evaluation and merge took in an earlier session.
        held_out: prompts that will be evaluated.
        base: folder of the 16-bit base, whose size says how long a merge takes.
    """

    def __init__(
        self, recipe: Recipe, begun: float, earlier: dict[str, Any], held_out: int, base: Path, show: Show
    ) -> None:
        self.recipe, self.begun, self.earlier, self.show = recipe, begun, earlier, show
        self.held_out = min(held_out, recipe.eval.limit or held_out) if recipe.eval.enabled else 0
        self.base_bytes = sum(path.stat().st_size for path in base.glob("*.safetensors"))
        self.limit_s = (recipe.limits.max_minutes or 0.0) * 60
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
        left = self.limit_s - (now - self.begun)
        reserved = min(self.reserve_s((now - self._first_step_at) / self._steps), MOST_RESERVED * self.limit_s)
        if left - reserved < 1.2 * step_s and state.global_step < state.max_steps:
            self.reached = control.should_save = control.should_training_stop = True
            self.show(
                f"limits.max_minutes = {self.recipe.limits.max_minutes:g}: training pauses after step "
                f"{state.global_step} of {state.max_steps}; {reserved / 60:.1f} min are kept for evaluation and merge"
            )

    def reserve_s(self, step_s: float) -> float:
        """Return the seconds that evaluation and merge are expected to take: an estimate, from above."""
        evaluation = self.earlier.get("evaluation_seconds")
        if evaluation is None:
            base_and_trained = 2 * (1 + self.recipe.eval.samples)
            completions = self.held_out * (base_and_trained + (1 if self.recipe.merge else 0))
            evaluation = completions * step_s / max(1, self._completions_per_step())
        merge = self.earlier.get("merge_seconds")
        if merge is None:
            merge = MERGE_SETUP_S + self.base_bytes / MERGE_BYTES_PER_S
        return 1.2 * ((evaluation if self.recipe.eval.enabled else 0.0) + (merge if self.recipe.merge else 0.0))

    def _completions_per_step(self) -> int:
        grpo = self.recipe.grpo
        per_step = int(grpo.get("per_device_train_batch_size", 8)) * int(grpo.get("gradient_accumulation_steps", 1))
        return per_step // max(1, int(grpo.get("num_iterations", 1)))
