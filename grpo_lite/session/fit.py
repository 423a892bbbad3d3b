"""fit: the training itself, from the last whole checkpoint to the saved adapter, within its limits."""

from __future__ import annotations

import re
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from grpo_lite.errors import RunDirError, TrainingError, first_line
from grpo_lite.models.base import Base, weights_bytes
from grpo_lite.models.reference import REFERENCE_NAME
from grpo_lite.processes import agree, this_process
from grpo_lite.recipe.recipe import Recipe
from grpo_lite.runs.checkpoints import (
    disk_full,
    is_disk_full,
    last_usable,
    processes_of,
    publishing,
    require_room,
    step_of,
)
from grpo_lite.runs.run_dir import RunDir
from grpo_lite.screen import Show
from grpo_lite.session.views import View
from grpo_lite.task.prompts import Prompts
from grpo_lite.task.traces import Traces
from grpo_lite.units import now

_LOST_PEER = re.compile("Connection (closed|reset) by peer|remote process has terminated|NCCL.*(remote|abort)", re.I)


@dataclass(frozen=True)
class TrainResult:
    """How a training run ended."""

    run: RunDir
    steps: int
    stopped_by: str | None = None  # the signal's name when it was interrupted
    paused: bool = False  # limits.max_minutes came first: evaluated and merged as it is; `train` resumes it


def require_room_for(recipe: Recipe, run: RunDir, base: Base, trainer: Any) -> None:
    """Refuse to begin where checkpoints, adapter and merged model would not fit on the disk.

    Raises:
        TrainingError: they would not.
    """
    merged = weights_bytes(base.weights) if recipe.merge else 0
    trained = sum(p.numel() for p in trainer.model.parameters() if p.requires_grad)
    frozen = trained if recipe.holds_reference else 0
    require_room(run.path, trained, (recipe.grpo.get("save_total_limit") or 1) + 1, merged, frozen)


def deadline_of(
    recipe: Recipe, run: RunDir, base: Base, show: Show, prompts: Prompts, begun: float, traces: Traces | None = None
) -> Any:
    """Return the callback that keeps `limits.max_minutes`, or None without such a limit.

    Args:
        recipe, run, base, prompts: of this training.
        show: gets the line when training pauses.
        begun: `time.monotonic()` when the time began to count.
        traces: rows of the warm-up, where that is trained.
    """
    from grpo_lite.session.stop import Deadline, sampled_per_warmup_step

    if recipe.limits.max_minutes is None:
        return None
    stage: dict[str, Any] = {}
    if traces is not None:
        stage = {"stage": "the warm-up", "sampled_per_step": sampled_per_warmup_step(recipe, traces.rows)}
    return Deadline(recipe, begun, run.read_run(), len(prompts.eval), base.weights, show, **stage)


def fit(run: RunDir, view: View, trainer: Any, deadline: Any = None) -> TrainResult:
    """Train from the last whole checkpoint on, and save the adapter unless a signal came.

    Raises:
        TrainingError: the disk is full, or what was trained is not finite.
    """
    from grpo_lite.report.evidence import read_metrics

    signal_name = train_to_stop(run.path, view, trainer, deadline)
    steps = trainer.state.global_step
    paused = bool(deadline and deadline.reached)
    if signal_name and steps < trainer.state.max_steps:
        return TrainResult(run, steps, signal_name)
    if not this_process().is_first:
        return TrainResult(run, steps)
    save_adapter(run.adapter, trainer)
    rewards = [record["reward"] for record in read_metrics(run) if record.get("reward") is not None]
    first, last = (rewards[0], rewards[-1]) if rewards else (None, None)
    run.update_run(
        **({} if paused else {"trained_at": now()}), steps=steps,
        training_seconds=round(trainer.journal.seconds_trained, 1),
        reward_first=first, reward_last=last, faults=dict(trainer.faults.counts),
    )  # fmt: skip
    return TrainResult(run, steps, signal_name, paused=paused)  # a signal in the last step: evaluation can wait


def train_to_stop(folder: Path, view: View, trainer: Any, deadline: Any = None) -> str | None:
    """Train from the folder's last whole checkpoint to the last step, or until a signal or the deadline stops it.

    Args:
        folder: where the trainer's checkpoints are.
        view: follows it.
        trainer: with `journal` and `faults`.
        deadline: a `Deadline`, or None.

    Returns:
        The signal's name, if one came.

    Raises:
        TrainingError: the disk is full, or what was trained is not finite.
    """
    from grpo_lite.session.stop import StopCleanly, StopWhenSpent

    checkpoint = _common_checkpoint(_last_checkpoint(folder, view.show), folder)
    with view, StopCleanly(view.show) as stop:
        trainer.add_callback(stop)
        trainer.add_callback(StopWhenSpent(stop, getattr(trainer, "reward_funcs", ())))  # the warm-up has none
        if deadline:
            trainer.add_callback(deadline)
        if this_process().world > 1:
            from grpo_lite.session.stop import StopTogether

            trainer.add_callback(StopTogether(stop, deadline))
        try:
            trainer.train(resume_from_checkpoint=str(checkpoint) if checkpoint else None)
        except Exception as error:
            if advice := _advice(error, checkpoint, folder):
                raise TrainingError(f"{folder}: {advice}") from error
            raise
    return stop.signal_name


def _advice(error: Exception, checkpoint: Path | None, folder: Path) -> str | None:
    """Return what to do about an error of a library below, where that is known."""
    if is_disk_full(error, folder) and not isinstance(error, TrainingError):  # metrics, completions, run.json
        return disk_full(folder, "training stopped").partition(": ")[2]
    if this_process().world > 1 and _LOST_PEER.search(str(error)):
        return lost_peer()
    if type(error).__name__ == "UnpicklingError" and checkpoint:
        return (
            f"{checkpoint.name} holds a file with more than numbers in it. Such files can run code, so none is loaded. "
            f"({first_line(error)}) Remove {checkpoint} to resume from the one before, and find out who wrote it."
        )
    return None


def lost_peer() -> str:
    """Return what a process says when it stops because another one has."""
    return (
        f"another of the {this_process().world} processes has ended, so this one stops; see its message above. "
        "What was saved is kept: the same command resumes from there."
    )


def _last_checkpoint(folder: Path, show: Show) -> Path | None:
    """Return the newest checkpoint that is whole, and say which ones are skipped."""
    newest = last_usable(folder)
    for fault in newest.skipped:
        show(f"skipped a damaged checkpoint: {fault}")
    if newest.folder:
        show(f"resuming from step {step_of(newest.folder)} ({newest.folder})")
        if (before := processes_of(newest.folder)) != this_process().world:
            show(f"it was saved with GPUS={before}: the random states differ now, so this is not an exact resume")
    elif newest.skipped:
        show("no checkpoint is usable: training starts from the beginning")
    return newest.folder


def _common_checkpoint(checkpoint: Path | None, folder: Path) -> Path | None:
    """Return the first process's checkpoint: processes that began at different steps would train apart.

    Raises:
        RunDirError: it is not on this machine.
    """
    name = agree(checkpoint.name if checkpoint else None, this_process())
    if name is None:
        return None
    if not (folder / name).is_dir():
        raise RunDirError(
            f"{folder}: the first process resumes from {name}, which is not here. With several machines put the run "
            "directory on a disk that all of them see, or start a new run."
        )
    return folder / name


def save_adapter(folder: Path, trainer: Any) -> None:
    """Write the trained adapter whole or not at all, and never with NaN in it."""
    from grpo_lite.trainer.finite import require_finite_adapter

    require_finite_adapter(trainer)
    with publishing(folder) as scratch:
        trainer.save_model(str(scratch))
        shutil.rmtree(scratch / REFERENCE_NAME, ignore_errors=True)  # only the trained adapter is a result
