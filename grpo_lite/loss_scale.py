"""LossScale: with float16, optimizer steps that the grad scaler skips are said to be that, and not "no learning"."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from transformers import TrainerCallback


class LossScale(TrainerCallback):
    """Counts skipped steps and shows the first and every tenth.

    Args:
        scaler: Returns the trainer's GradScaler, or None without float16.
        show: Gets the lines.
    """

    def __init__(self, scaler: Callable[[], Any], show: Callable[[str], None]) -> None:
        self.scaler, self.show = scaler, show
        self.skipped = 0
        self._before = 0.0

    def metrics(self) -> dict[str, float]:
        """Return what to log; nothing without float16."""
        scaler = self.scaler()
        if scaler is None:
            return {}
        return {"loss_scale": float(scaler.get_scale()), "optimizer_steps_skipped": float(self.skipped)}

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if (scaler := self.scaler()) is not None:
            self._before = float(scaler.get_scale())

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        # A scale that falls is a step not taken. accelerate 1.x tells by whether `step` was called, which a fused
        # optimizer always is.
        scaler = self.scaler()
        if scaler is None or float(scaler.get_scale()) >= self._before:
            return
        self.skipped += 1
        if self.skipped == 1 or self.skipped % 10 == 0:
            self.show(
                f"step {state.global_step}: no update, the gradients overflowed float16 at this loss scale; it is "
                f"lowered to {scaler.get_scale():g} ({self.skipped} so far; a few at the start are normal)"
            )
