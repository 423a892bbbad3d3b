"""latest_completions: read the last generation batch out of TRL's trainer.

`TimedGRPOTrainer`: where TRL's GRPOTrainer spends its time, beside its metrics.

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

from grpo_lite.models.device import detect_device, peak_memory_bytes

_EXTRA = {"tokens": "completion_tokens", "truncated": "completion_truncated", "answer": "gold"}


def latest_completions(trainer: Any) -> list[dict[str, Any]]:
    """Return the last batch's completions with the reward of each part.

    Reads `GRPOTrainer._logs`, which TRL 1.14-1.16 fill whether or not `log_completions` is set (contract-tested).

    Returns:
        Rows `{step, prompt, completion, rewards: {name: value}, reward, advantage, tokens, truncated, answer}`.
        A reward that was None, and the sum where all were, is None.
    """
    logs = trainer._logs
    names = list(logs["rewards"])
    weights = dict(zip(trainer.reward_func_names, trainer.reward_weights.tolist(), strict=True))
    extra = {ours: logs["extra"].get(theirs, ()) for ours, theirs in _EXTRA.items()}
    rows = []
    for i, (prompt, completion) in enumerate(zip(logs["prompt"], logs["completion"], strict=True)):
        parts = {name: _number(logs["rewards"][name][i]) for name in names}
        paid = [weights.get(name, 1.0) * value for name, value in parts.items() if value is not None]
        rows.append(
            {
                "step": trainer.state.global_step,
                "prompt": prompt,
                "completion": completion if isinstance(completion, str) else completion[-1]["content"],
                "rewards": parts,
                "reward": sum(paid) if paid else None,
                "advantage": _number(logs["advantages"][i]),
                **{name: column[i] for name, column in extra.items() if i < len(column)},
            }
        )
    return rows


def _number(value: Any) -> float | None:
    number = float(value)
    return number if number == number else None  # NaN: the reward was None


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
