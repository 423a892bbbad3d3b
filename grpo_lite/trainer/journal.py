"""`Journal`: what a trainer notes beside TRL's metrics: seconds by phase, peak memory, rewards, the last completions.

A plain object that our trainer and the backend unsloth's (`unsloth.py`) both have as `trainer.journal`.
"""

from __future__ import annotations

import math
import time
from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from grpo_lite.models.device import detect_device, peak_memory_bytes

_EXTRA = {"tokens": "completion_tokens", "truncated": "completion_truncated", "answer": "gold"}


class Journal:
    """Logs `time/<phase>_s` (of the run so far) and `memory/peak_gib` with TRL's metrics, and counts training time."""

    def __init__(self, trainer: Any) -> None:
        self.trainer = trainer
        self.spent_s: dict[str, float] = defaultdict(float)  # by phase, over the whole run
        self.seconds_before = 0.0  # trained by the processes before this one
        self.rewards_since_save: list[float] = []
        self._begun = time.monotonic()
        self._device = detect_device()

    def start(self) -> None:
        """Count training time from now."""
        self._begun = time.monotonic()

    @property
    def seconds_trained(self) -> float:
        """Seconds of training in this process and in those that it resumed."""
        return self.seconds_before + time.monotonic() - self._begun

    @contextmanager
    def spending(self, phase: str) -> Iterator[None]:
        """Add the time spent inside to a phase; it is logged as `time/<phase>_s`."""
        begun = time.perf_counter()
        try:
            yield
        finally:
            self.spent_s[phase] += time.perf_counter() - begun

    def log_with_step(self, name: str, value: float) -> None:
        """Log a figure with the metrics of the current step."""
        self.trainer._metrics["train"][name].append(value)

    def write_figures(self) -> None:
        """Add the seconds and the peak memory to TRL's metrics, just before TRL logs them."""
        if not self.trainer.model.training:
            return
        metrics = self.trainer._metrics["train"]
        for phase, seconds in self.spent_s.items():
            metrics[f"time/{phase}_s"] = [seconds]
        metrics["memory/peak_gib"] = [peak_memory_bytes(self._device) / 2**30]

    def note_reward(self) -> None:
        """Keep the mean reward that was just logged; a checkpoint records the mean since the one before."""
        history = self.trainer.state.log_history
        reward = history[-1].get("reward") if history else None
        if reward is not None and math.isfinite(reward):
            self.rewards_since_save.append(float(reward))

    def note_completions(
        self,
        inputs: list[dict[str, Any]],
        completions: list[Any],
        completion_ids: list[list[int]],
        tool_mask: list[list[int]] | None = None,
    ) -> None:
        """Keep each completion's length, whether the cap cut it off, and its gold beside TRL's logged completions.

        The length of an episode counts what the model wrote (`tool_mask` 1), not the results of tools. Its messages
        are kept too: TRL 1.14 logs its text in one piece.
        """
        log = self.trainer._log_completion_extra
        ends = {self.trainer._tokenizer.eos_token_id, self.trainer._tokenizer.pad_token_id}
        log(
            "completion_tokens",
            [len(ids) for ids in completion_ids] if tool_mask is None else list(map(sum, tool_mask)),
        )
        log("completion_truncated", [not ids or ids[-1] not in ends for ids in completion_ids])
        log("gold", [row.get("answer") for row in inputs])
        if tool_mask is not None:
            log("turns", completions)

    def latest_completions(self) -> list[dict[str, Any]]:
        """Return the last generation batch's completions with the reward of each part.

        Reads `GRPOTrainer._logs`, which TRL 1.14-1.16 fill whether or not `log_completions` is set (contract-tested).

        Returns:
            Rows `{step, prompt, completion, rewards: {name: value}, reward, advantage, tokens, truncated, answer}`.
            A reward that was None, and the sum where all were, is None. An episode of several messages has them all
            under `turns`, and its last one as `completion`.
        """
        logs = self.trainer._logs
        names = list(logs["rewards"])
        weights = dict(zip(self.trainer.reward_func_names, self.trainer.reward_weights.tolist(), strict=True))
        extra = {ours: logs["extra"].get(theirs, ()) for ours, theirs in _EXTRA.items()}
        turns = logs["extra"].get("turns", ())
        rows = []
        for i, (prompt, text) in enumerate(zip(logs["prompt"], logs["completion"], strict=True)):
            completion = turns[i] if i < len(turns) else text
            parts = {name: _number(logs["rewards"][name][i]) for name in names}
            paid = [weights.get(name, 1.0) * value for name, value in parts.items() if value is not None]
            rows.append(
                {
                    "step": self.trainer.state.global_step,
                    "prompt": prompt,
                    "completion": completion if isinstance(completion, str) else _last_text(completion),
                    **({"turns": completion} if _is_episode(completion) else {}),
                    "rewards": parts,
                    "reward": sum(paid) if paid else None,
                    "advantage": _number(logs["advantages"][i]),
                    **{name: column[i] for name, column in extra.items() if i < len(column)},
                }
            )
        return rows


def _is_episode(completion: Any) -> bool:
    return not isinstance(completion, str) and (len(completion) > 1 or "tool_calls" in completion[0])


def _last_text(messages: list[dict[str, Any]]) -> str:
    """Return what the model said last; an episode that was cut off may end with a call or a tool's result."""
    written = [message for message in messages if message.get("role") != "tool"]
    return str((written or messages)[-1].get("content") or "")


def _number(value: Any) -> float | None:
    number = float(value)
    return number if number == number else None  # NaN: the reward was None
