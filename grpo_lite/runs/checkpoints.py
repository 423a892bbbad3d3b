"""Checkpoint folders of a run: whole under their name or not there at all, checksummed; and the last usable one.

A checkpoint is written to a scratch folder, sealed with MANIFEST.sha256, flushed to disk and renamed. A kill, a full
disk or a power cut therefore leaves the previous checkpoint untouched.
"""

from __future__ import annotations

import contextlib
import errno
import json
import math
import os
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from grpo_lite.commands import hint_run
from grpo_lite.errors import TrainingError
from grpo_lite.files.atomic import ASIDE, publish, restore
from grpo_lite.files.manifest import MANIFEST_NAME, fault_in, write_manifest
from grpo_lite.units import gib

PREFIX = "checkpoint-"
FACTS_FILE = "grpo_lite.json"  # step, mean training reward since the checkpoint before, seconds trained
_FACTS = ("step", "processes", "reward", "seconds_trained", "faults", "budget")
_SCRATCH = ".saving-"

_SPARE_BYTES = 16 << 20  # for the logs and completions that are written beside a checkpoint
# transformers writes a pickle that is never loaded here; PEFT writes a card without licence or scores, which names a
# folder of this machine as the base (`grpo-lite push` writes the real card).
_NEVER_KEPT = ("training_args.bin", "README.md")


@dataclass(frozen=True)
class LastUsable:
    """The newest usable checkpoint, and why newer ones were passed over."""

    folder: Path | None
    skipped: tuple[str, ...]


def step_of(folder: Path) -> int:
    """Return the step of a checkpoint folder."""
    return int(folder.name.rpartition("-")[2])


def checkpoint_folders(run: Path) -> list[Path]:
    """Return the checkpoint folders of a run by step, usable or not."""
    folders = [path for path in run.glob(f"{PREFIX}*") if path.name.removeprefix(PREFIX).isdecimal() and path.is_dir()]
    return sorted(folders, key=step_of)


def last_usable(run: Path) -> LastUsable:
    """Return the newest checkpoint whose files are all as they were written, and the fault of each newer one."""
    skipped: list[str] = []
    for folder in reversed(checkpoint_folders(run)):
        fault = fault_of(folder)
        if fault is None:
            return LastUsable(folder, tuple(skipped))
        skipped.append(f"{folder.name}: {fault}")
    return LastUsable(None, tuple(skipped))


def fault_of(folder: Path) -> str | None:
    """Return what is wrong with a checkpoint's files, or None."""
    if not (folder / MANIFEST_NAME).is_file():
        return f"it has no {MANIFEST_NAME}, so it was never completed"
    if fault := fault_in(folder):
        return fault
    if (step := read_facts(folder).get("step")) != step_of(folder):
        return f"it holds step {step}: it was renamed or copied"
    return None


def read_facts(folder: Path) -> dict[str, Any]:
    """Return the facts that grpo_lite noted in a checkpoint; values of another kind than it writes are left out."""
    try:
        record = json.loads((folder / FACTS_FILE).read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return {}
    items = record.items() if isinstance(record, dict) else ()
    return {key: value for key, value in items if key in _FACTS and _is_as_written(key, value)}


def _is_as_written(key: str, value: Any) -> bool:
    if key == "faults":
        return isinstance(value, dict) and all(type(count) is int and count >= 0 for count in value.values())
    if key == "budget":
        return isinstance(value, dict) and all(n is None or (type(n) is int and n > 0) for n in value.values())
    if key in ("step", "processes"):
        return type(value) is int and value > 0
    number = isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
    return number or (key == "reward" and value is None)


def processes_of(folder: Path) -> int:
    """Return how many processes wrote a checkpoint together."""
    return int(read_facts(folder).get("processes") or 1)


@contextlib.contextmanager
def saving(run: Path, step: int) -> Iterator[Path]:
    """Yield a scratch folder for the folder `checkpoint-<step>`, which is published when the block succeeds.

    Raises:
        TrainingError: the disk is full; earlier checkpoints are untouched.
    """
    clear_scratch(run)
    scratch, name = run / f"{_SCRATCH}{os.getpid()}", f"{PREFIX}{step}"
    try:
        _require_space(run)
        scratch.mkdir()
        yield scratch
        seal(scratch / name)
        publish(scratch / name, run / name)
    except BaseException as error:
        shutil.rmtree(scratch, ignore_errors=True)
        if is_disk_full(error, run):
            raise TrainingError(disk_full(run, f"{name} was not saved")) from error
        raise
    shutil.rmtree(scratch, ignore_errors=True)


@contextlib.contextmanager
def publishing(target: Path) -> Iterator[Path]:
    """Yield a scratch folder to fill; when the block succeeds it is sealed and takes the target's name.

    Raises:
        TrainingError: the disk is full; the folder of that name before is untouched.
    """
    run = target.parent
    clear_scratch(run)
    scratch = run / f"{_SCRATCH}{target.name}"
    try:
        scratch.mkdir()
        yield scratch
        seal(scratch)
        publish(scratch, target)
    except BaseException as error:
        shutil.rmtree(scratch, ignore_errors=True)
        if is_disk_full(error, run):
            raise TrainingError(disk_full(run, f"{target.name}/ was not saved")) from error
        raise


def seal(folder: Path) -> None:
    """Remove what must not travel, and write the manifest."""
    for name in _NEVER_KEPT:
        (folder / name).unlink(missing_ok=True)
    write_manifest(folder)


def clear_scratch(run: Path) -> None:
    """Remove what a killed save left; a folder that was set aside and never replaced gets its name back."""
    for path in run.glob(f"{ASIDE}*"):
        restore(run / path.name.removeprefix(ASIDE))
    for path in run.glob(f"{_SCRATCH}*"):
        shutil.rmtree(path, ignore_errors=True)


def rotate(run: Path, limit: int | None, saved: int) -> None:
    """Keep the newest `limit` checkpoints up to the step just saved, and the one with the best training reward.

    Later ones are damaged and were passed over. They are neither counted nor removed until training replaces them.
    """
    folders = [f for f in checkpoint_folders(run) if step_of(f) <= saved and (f / MANIFEST_NAME).is_file()]
    if not limit or len(folders) <= limit:
        return
    best = best_checkpoint(folders)
    for folder in folders[:-limit]:
        if folder != best:
            remove(folder)


def remove(folder: Path) -> None:
    """Remove a checkpoint; a kill in between leaves no half of it under its name."""
    doomed = folder.with_name(f"{_SCRATCH}{folder.name}")
    os.rename(folder, doomed)
    shutil.rmtree(doomed, ignore_errors=True)


def best_checkpoint(folders: list[Path]) -> Path | None:
    """Return the checkpoint with the highest mean training reward since its predecessor; among equals the newest."""
    scored = [(facts["reward"], step_of(f), f) for f in folders if (facts := read_facts(f)).get("reward") is not None]
    return max(scored)[2] if scored else None


def require_room(run: Path, trained: int, kept: int, merge_bytes: int, frozen: int = 0) -> None:
    """Refuse to start a training whose results would not fit on the disk.

    Args:
        trained: trained parameters; a checkpoint holds each with Adam's two moments, 12 bytes.
        kept: checkpoints that are kept at once; the next one is written beside them.
        merge_bytes: what the merged model takes, 0 without a merge.
        frozen: parameters of an adapter that is saved beside the trained one, 4 bytes each.

    Raises:
        TrainingError: too little is free; the message shows the arithmetic.
    """
    there = sum(size_bytes(folder) for folder in checkpoint_folders(run))
    one = 12 * trained + 4 * frozen + _SPARE_BYTES
    need = max(0, (kept + 1) * one - there) + 4 * trained + merge_bytes
    free = shutil.disk_usage(run).free
    if free < need:
        raise TrainingError(
            f"{run}: {gib(free, 2)} of disk are free, and this run needs {gib(need, 2)}: {kept + 1} "
            f"checkpoints of {gib(one, 2)}, the adapter, and {gib(merge_bytes, 2)} for the merged "
            f"model. Free some space, choose another disk with {hint_run()}, or set merge=false or "
            "grpo.save_total_limit=1."
        )


def is_disk_full(error: BaseException, folder: Path) -> bool:
    """Return whether a full disk caused an error; safetensors and torch hide the errno in their messages."""
    if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
        return True
    text = str(error)
    if "No space left" in text or "Disk quota exceeded" in text:
        return True
    return "PytorchStreamWriter" in text and shutil.disk_usage(folder).free < _SPARE_BYTES


def _require_space(run: Path) -> None:
    """Raise the disk-full error before anything is written, judging by the size of the last checkpoint."""
    folders = checkpoint_folders(run)
    if not folders:
        return
    need = size_bytes(folders[-1]) + min(_SPARE_BYTES, size_bytes(folders[-1]))
    if shutil.disk_usage(run).free < need:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(run))


def size_bytes(folder: Path) -> int:
    """Return the size of all files below a folder."""
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())


def disk_full(run: Path, what: str) -> str:
    """Return the message for a full disk: what was lost, what is whole, what to do."""
    usable = last_usable(run).folder
    kept = f"{usable} is whole, and nothing before it is lost" if usable else "no checkpoint had been saved before"
    free = shutil.disk_usage(run).free / 2**20
    return (
        f"{run}: the disk is full ({free:.0f} MiB free): {what}. {kept}. Free some space "
        "(older runs, grpo.save_total_limit), then run the same command again to resume from there."
    )
