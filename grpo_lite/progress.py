"""What is seen and kept while training: one progress line a step, sample completions, metrics.jsonl, clean stops."""

from __future__ import annotations

import json
import signal
import time
from collections.abc import Callable
from pathlib import Path
from types import FrameType
from typing import Any

from transformers import TrainerCallback

from grpo_lite.hardware import Device, peak_memory_bytes
from grpo_lite.run_dir import RunDir

Show = Callable[[str], None]


class MetricsFile(TrainerCallback):
    """Append every log record, with TRL's keys, to metrics.jsonl; a resume drops records after its checkpoint."""

    def __init__(self, run: RunDir) -> None:
        self.path = run.metrics_file

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if self.path.is_file():
            kept = [line for line in self.path.read_text(encoding="utf-8").splitlines() if _step(line) is not None]
            kept = [line for line in kept if (_step(line) or 0) <= state.global_step]
            self.path.write_text("".join(line + "\n" for line in kept), encoding="utf-8")

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, Any] | None = None, **kwargs: Any) -> None:
        if logs and "train_runtime" not in logs:
            with self.path.open("a", encoding="utf-8") as file:
                file.write(json.dumps({"step": state.global_step, **logs}) + "\n")


def _step(line: str) -> int | None:
    try:
        return int(json.loads(line)["step"])
    except (ValueError, KeyError, TypeError):
        return None  # a line cut by a kill


def read_metrics(run: RunDir) -> list[dict[str, Any]]:
    """Return the records of metrics.jsonl, a cut last line left out."""
    if not run.metrics_file.is_file():
        return []
    lines = run.metrics_file.read_text(encoding="utf-8").splitlines()
    return [json.loads(line) for line in lines if _step(line) is not None]


class ProgressLine(TrainerCallback):
    """Show step, mean reward, time left and peak memory, once a log."""

    def __init__(self, show: Show, device: Device) -> None:
        self.show, self.device = show, device
        self._begun, self._first = 0.0, 0

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._begun, self._first = time.monotonic(), state.global_step

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, Any] | None = None, **kwargs: Any) -> None:
        if not logs or "reward" not in logs:
            return
        done = state.global_step - self._first
        left = (time.monotonic() - self._begun) / max(done, 1) * (state.max_steps - state.global_step)
        truncated = logs.get("completions/clipped_ratio")
        parts = [
            f"step {state.global_step}/{state.max_steps}",
            f"reward {logs['reward']:.3f} ± {logs.get('reward_std', 0.0):.3f}",
            f"length {logs.get('completions/mean_length', 0.0):.0f} tokens",
            f"truncated {truncated:.0%}" if truncated else "",
            f"ETA {format_seconds(left)}",
            f"peak {peak_memory_bytes(self.device) / 2**30:.1f} GiB",
        ]
        self.show(" · ".join(part for part in parts if part))


class Completions(TrainerCallback):
    """Keep every completion with its rewards under completions/, and show one prompt's best and worst now and then.

    Args:
        latest: returns the last generation batch as rows (see trainer.latest_completions).
    """

    def __init__(self, run: RunDir, show: Show, every: int, latest: Callable[[], list[dict[str, Any]]]) -> None:
        self.folder, self.show, self.every, self.latest = run.path / "completions", show, every, latest

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, Any] | None = None, **kwargs: Any) -> None:
        rows = self.latest()
        if not rows or not logs or "reward" not in logs:
            return
        self.folder.mkdir(exist_ok=True)
        path = self.folder / f"step_{state.global_step:06d}.jsonl"
        path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
        if self.every and (state.global_step % self.every == 0 or state.global_step == 1):
            self.show(describe_sample(rows))


def describe_sample(rows: list[dict[str, Any]]) -> str:
    """Return the last prompt with its best and worst completion, as lines for people."""
    prompt = rows[-1]["prompt"]
    group = [row for row in rows if row["prompt"] == prompt]
    best, worst = (pick(group, key=lambda row: row["reward"]) for pick in (max, min))
    lines = [f"  prompt {_short(_text(prompt), tail=True)}"]
    lines += [f"  {name} ({row['reward']:+.2f}) {_short(row['completion'])}" for name, row in _pairs(best, worst)]
    return "\n".join(lines)


def _pairs(best: dict[str, Any], worst: dict[str, Any]) -> list[tuple[str, dict[str, Any]]]:
    return [("best  ", best), ("worst ", worst)] if best["reward"] != worst["reward"] else [("all   ", best)]


def _text(prompt: Any) -> str:
    return prompt if isinstance(prompt, str) else str(prompt[-1]["content"])


def _short(text: str, tail: bool = False, width: int = 160) -> str:
    shown = text if len(text) <= width else "…" + text[-width:] if tail else text[:width] + "…"
    return json.dumps(shown, ensure_ascii=False)


def format_seconds(seconds: float) -> str:
    """Return `m:ss`, or `h:mm:ss` from an hour on."""
    minutes, secs = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{secs:02d}" if hours else f"{minutes}:{secs:02d}"


class StopCleanly(TrainerCallback):
    """On SIGINT, SIGTERM or SIGHUP: finish the step, save a checkpoint, stop. A second Ctrl-C stops at once."""

    def __init__(self, show: Show) -> None:
        self.show = show
        self.signal_name: str | None = None
        self._previous: dict[int, Any] = {}

    def __enter__(self) -> StopCleanly:
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
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
        self.show("stopping: a checkpoint is saved at the end of this step (Ctrl-C again stops at once, without one)")

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if self.signal_name is not None:
            control.should_save = True
            control.should_training_stop = True


def latest_checkpoint_step(checkpoint: Path | None) -> int:
    """Return the step of a checkpoint folder, 0 for none."""
    return int(checkpoint.name.rpartition("-")[2]) if checkpoint else 0
