"""`TimedGRPOTrainer`: where TRL's GRPOTrainer spends its time, beside its metrics.

The part of the seam to TRL (`trainer.py`) that only looks on: seconds spent generating and computing rewards so far,
peak memory, and figures of our callbacks, all under TRL's own log. Read in trl 1.14.0 and 1.16.0.
"""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from trl import GRPOTrainer

from grpo_lite.hardware import detect_device, peak_memory_bytes


class TimedGRPOTrainer(GRPOTrainer):
    """GRPOTrainer that logs `time/rollout_s`, `time/reward_s` (both of the run so far) and `memory/peak_gib`."""

    # TRL's own attribute that we also write
    _metrics: dict[str, dict[str, list[float]]]

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        self._spent_s: dict[str, float] = defaultdict(float)
        self._device_record = detect_device()
        super().__init__(*args, **kwargs)

    def log_with_step(self, name: str, value: float) -> None:
        """Log a figure with the metrics of the current step."""
        self._metrics["train"][name].append(value)

    @contextmanager
    def spending(self, phase: str) -> Iterator[None]:
        """Count the time spent inside as a phase's; it is logged as `time/<phase>_s`."""
        begun = time.perf_counter()
        try:
            yield
        finally:
            self._spent_s[phase] += time.perf_counter() - begun

    def _generate(self, *args: Any, **kwargs: Any) -> Any:
        with self.spending("rollout"):
            return super()._generate(*args, **kwargs)

    def _calculate_rewards(self, *args: Any, **kwargs: Any) -> Any:
        with self.spending("reward"):
            return super()._calculate_rewards(*args, **kwargs)

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Log TRL's metrics and ours."""
        if self.model.training:
            for phase, seconds in self._spent_s.items():
                self._metrics["train"][f"time/{phase}_s"] = [seconds]
            self._metrics["train"]["memory/peak_gib"] = [peak_memory_bytes(self._device_record) / 2**30]
        super().log(logs, start_time)
