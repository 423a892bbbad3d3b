"""Copies of a run's checkpoints in a mounted folder or a private bucket on the Hub, and how a new machine fetches them.

The disk of a free GPU is lost when its session ends. With `push_checkpoints` every checkpoint is copied once it is
saved; on a new machine the same command finds the copy, checks its sums and resumes. A copy that fails is reported and
does not stop training; the next checkpoint is copied as usual.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import tempfile
from collections.abc import Iterable
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING, Protocol

from grpo_lite.errors import RunDirError, TrainingError
from grpo_lite.files.atomic import publish, write_atomic
from grpo_lite.files.hub import hub_message
from grpo_lite.files.manifest import MANIFEST_NAME, verify_manifest
from grpo_lite.runs.checkpoints import (
    PREFIX,
    checkpoint_folders,
    fault_of,
    last_usable,
    publishing,
    remove,
    seal,
    step_of,
)
from grpo_lite.runs.run_dir import RunDir
from grpo_lite.screen import Show

if TYPE_CHECKING:
    from huggingface_hub import BucketFile

# What a run needs beside its checkpoint; the last where the base samples the warm-up's rows itself.
_RUN_FILES = ("recipe.yaml", "run.json", "metrics.jsonl", "warmup/traces.jsonl")
_BEGINNING = (
    "grpo_lite", "git_commit", "python", "platform", "versions", "command", "started_at", "resumed_at", "recipe",
    "seed", "device", "base_revision", "files", "changed_files", "evaluation_seconds", "merge_seconds", "preflight",
    "sandbox", "warmup",
)  # fmt: skip
_FETCHING = ".saving-fetched"
WARMUP = "warmup"  # the stage whose checkpoints lie in the run directory's folder of this name


def fetch_checkpoint(run: RunDir, address: str, show: Show, has_warmup: bool = False) -> None:
    """Fetch the newest usable copy of this run's checkpoints where the run directory has no checkpoint of its own.

    With a warm-up its newest one too: where GRPO has begun it holds the adapter that GRPO is compared with.

    Raises:
        RunDirError: the place does not answer. Training from the beginning would replace the copies there.
    """
    has_grpo = last_usable(run.path).folder is not None
    if run.read_run().get("trained_at") or (has_grpo and (not has_warmup or run.last_of_warmup())):
        return
    remote = remote_of(address, run)
    try:
        if not has_grpo:
            _fetch(run, remote, show)
        if has_warmup and not run.last_of_warmup():
            _fetch(run, remote_of(address, run, WARMUP), show)
    except Exception as error:
        reason = hub_message(error, remote.name) or f"{type(error).__name__}: {error}"
        raise RunDirError(
            f"push_checkpoints: {remote.name} cannot be asked for checkpoints of this run: {reason} To train without "
            "it, set push_checkpoints=null."
        ) from None


def remote_of(address: str, run: RunDir, stage: str = "") -> Remote:
    """Return the place that `push_checkpoints` names for a run.

    Args:
        address: a path (`/…`, `./…`, `~/…`) or a bucket's `user/name`.
        run: the run.
        stage: the folder of the stage's checkpoints in the run directory; "": GRPO's lie in it.
    """
    if address.startswith(("/", ".", "~")):
        return FolderRemote(Path(address).expanduser() / run.path.resolve().name, stage)
    return HubRemote(address, run.path.resolve().name, stage)


class Remote(Protocol):
    """A place that keeps the checkpoints of one stage of a run."""

    name: str
    stage: str

    def steps(self) -> list[int]:
        """Return the steps of the checkpoints there."""

    def push(self, run: RunDir, checkpoint: Path, keep: list[int]) -> None:
        """Copy a checkpoint and the run's files there; remove checkpoints whose step is not in `keep`."""

    def fetch(self, step: int, target: Path) -> None:
        """Copy a checkpoint into the empty folder `target`."""

    def read(self, name: str) -> str | None:
        """Return the content of one of the run's files, None where there is none."""


class FolderRemote:
    """A folder, for example on a mounted drive."""

    def __init__(self, folder: Path, stage: str = "") -> None:
        self.folder, self.name, self.stage = folder, str(folder), stage
        self.checkpoints = folder / stage

    def steps(self) -> list[int]:
        return [step_of(path) for path in checkpoint_folders(self.checkpoints)]

    def push(self, run: RunDir, checkpoint: Path, keep: list[int]) -> None:
        self.checkpoints.mkdir(parents=True, exist_ok=True)
        try:
            self._publish(checkpoint)
        except TrainingError:  # the drive is full: remove the copies that are no longer kept here, but the newest
            if not self._remove_stale([*keep, *self.steps()[-1:]]):
                raise
            self._publish(checkpoint)
        for name in _RUN_FILES:
            if (run.path / name).is_file():
                (self.folder / name).parent.mkdir(exist_ok=True)
                write_atomic(self.folder / name, (run.path / name).read_text(encoding="utf-8"))
        self._remove_stale(keep)

    def _publish(self, checkpoint: Path) -> None:
        with publishing(self.checkpoints / checkpoint.name) as scratch:
            _copy(checkpoint, scratch)
            verify_manifest(scratch)

    def _remove_stale(self, keep: list[int]) -> int:
        stale = [folder for folder in checkpoint_folders(self.checkpoints) if step_of(folder) not in keep]
        for folder in stale:
            remove(folder)
        return len(stale)

    def fetch(self, step: int, target: Path) -> None:
        _copy(self.checkpoints / f"{PREFIX}{step}", target)

    def read(self, name: str) -> str | None:
        path = self.folder / name
        return path.read_text(encoding="utf-8") if path.is_file() else None


class HubRemote:
    """A private bucket on the Hub, with one folder for each run.

    A bucket keeps no history, so a removed checkpoint frees its space; a repository would keep it in its commits.
    """

    def __init__(self, bucket_id: str, folder: str, stage: str = "") -> None:
        self.bucket_id, self.folder, self.name, self.stage = bucket_id, folder, f"{bucket_id} on the Hub", stage
        self.prefix = f"{stage}/{PREFIX}" if stage else PREFIX

    def steps(self) -> list[int]:
        return self._steps(self._files())

    def push(self, run: RunDir, checkpoint: Path, keep: list[int]) -> None:
        """Send a checkpoint, its manifest last, and remove old ones only once all of it is there.

        A bucket has no transactions: whoever fetches meanwhile checks the manifest, and takes the one before.
        """
        from huggingface_hub import HfApi

        api = HfApi()
        api.create_bucket(self.bucket_id, private=True, exist_ok=True)
        if not api.bucket_info(self.bucket_id).private:
            raise RunDirError("it exists and is public, and checkpoints hold your data's prompts. Make it private.")
        files = [run.path / name for name in _RUN_FILES] + sorted(checkpoint.rglob("*"), key=_is_manifest)
        api.batch_bucket_files(
            self.bucket_id,
            add=[(f, f"{self.folder}/{f.relative_to(run.path).as_posix()}") for f in files if f.is_file()],
        )
        there = self._files()
        stale = tuple(f"{self.prefix}{step}/" for step in self._steps(there) if step not in keep)
        if removed := [file.path for name, file in there.items() if name.startswith(stale)]:
            api.batch_bucket_files(self.bucket_id, delete=removed)

    def fetch(self, step: int, target: Path) -> None:
        folder = f"{self.prefix}{step}/"
        files = {name.removeprefix(folder): file for name, file in self._files().items() if name.startswith(folder)}
        self._download({target / name: file for name, file in files.items() if _stays_inside(name)})

    def read(self, name: str) -> str | None:
        file = self._files().get(name)
        if file is None:
            return None
        with tempfile.TemporaryDirectory() as scratch:
            copy = Path(scratch, "file")
            self._download({copy: file})
            return copy.read_text(encoding="utf-8")

    def _download(self, files: dict[Path, BucketFile]) -> None:
        from huggingface_hub import HfApi

        HfApi().download_bucket_files(self.bucket_id, [(file, path) for path, file in files.items()])

    def _steps(self, names: Iterable[str]) -> list[int]:
        pattern = re.compile(rf"{self.prefix}(\d+)/{re.escape(MANIFEST_NAME)}")
        return sorted(int(match[1]) for name in names if (match := pattern.fullmatch(name)))

    def _files(self) -> dict[str, BucketFile]:
        """Return the run's files there by their names relative to its folder."""
        from huggingface_hub import BucketFile, HfApi
        from huggingface_hub.errors import BucketNotFoundError

        folder = f"{self.folder}/"
        try:
            files = list(HfApi().list_bucket_tree(self.bucket_id, prefix=self.folder, recursive=True))
        except BucketNotFoundError:
            return {}
        return {
            file.path.removeprefix(folder): file
            for file in files
            if isinstance(file, BucketFile) and file.path.startswith(folder)  # the prefix finds "run2" for "run" too
        }


def _is_manifest(path: Path) -> bool:
    return path.name == MANIFEST_NAME


def _stays_inside(name: str) -> bool:
    """Return whether a name from the Hub stays below the folder that it is written to."""
    path = PurePosixPath(name)
    return not path.is_absolute() and ".." not in path.parts and "\\" not in name


def _fetch(run: RunDir, remote: Remote, show: Show) -> None:
    for step in sorted(remote.steps(), reverse=True):
        run.path.mkdir(parents=True, exist_ok=True)
        scratch = run.path / _FETCHING
        shutil.rmtree(scratch, ignore_errors=True)
        folder = scratch / f"{PREFIX}{step}"
        folder.mkdir(parents=True)
        remote.fetch(step, folder)
        if fault := fault_of(folder):
            show(f"push_checkpoints: {PREFIX}{step} of {remote.name} is skipped, as it is damaged: {fault}")
            shutil.rmtree(scratch)
            continue
        for name in _RUN_FILES:  # recipe.yaml first: after a kill from here on, the run asks again
            text = remote.read(name)
            if text is not None:
                (run.path / name).parent.mkdir(exist_ok=True)
                write_atomic(run.path / name, _beginning(text) if name == "run.json" else text)
        seal(folder)
        (run.path / remote.stage).mkdir(exist_ok=True)
        publish(folder, run.path / remote.stage / folder.name)
        os.rmdir(scratch)
        show(f"push_checkpoints: fetched {Path(remote.stage, folder.name)} from {remote.name}")
        return


def _beginning(text: str) -> str:
    """Return of a fetched run.json only what a resumed run starts from, so that others cannot steer the run by it.

    Whether the run is trained or merged is decided here; a base's commit must be hexadecimal, and a list a list.
    """
    try:
        record = json.loads(text)
    except (ValueError, RecursionError):
        return "{}\n"
    kept = {key: record[key] for key in _BEGINNING if key in record} if isinstance(record, dict) else {}
    for key in ("resumed_at", "changed_files"):
        if not isinstance(kept.get(key, []), list) or not all(isinstance(line, str) for line in kept.get(key, [])):
            del kept[key]
    if "warmup" in kept:
        kept["warmup"] = _plain_warmup(kept["warmup"])
    for key in ("evaluation_seconds", "merge_seconds"):
        if not isinstance(kept.get(key, 0), int | float):
            del kept[key]
    if not re.fullmatch(r"[0-9a-f]{7,64}", str(kept.get("base_revision"))):
        kept.pop("base_revision", None)
    return json.dumps(kept, indent=2) + "\n"


def _plain_warmup(record: object) -> dict[str, object]:
    """Return the figures and times of a fetched record of the warm-up, of the kinds that are written here."""
    items = record.items() if isinstance(record, dict) else ()
    kinds: dict[str, tuple[type, ...]] = {
        **dict.fromkeys(("steps", "max_steps", "rows", "held", "metrics_bytes"), (int,)),
        **dict.fromkeys(("seconds", "epochs", "loss_first", "loss_last"), (int, float)),
        **dict.fromkeys(("heldout_loss_first", "heldout_loss_last"), (int, float)),
        **dict.fromkeys(("began_at", "done_at", "traces_of"), (str,)),
    }
    return {
        key: value
        for key, value in items
        if type(value) in kinds.get(key, ()) and not (key == "metrics_bytes" and value < 0)
    }


def _copy(source: Path, target: Path) -> None:
    """Copy the files of a folder, without the rights and times that some mounted drives refuse to set.

    Links are left out, so that the manifest misses their files: on a shared drive they could lead to any file of this
    machine.
    """
    for path in source.rglob("*"):
        if path.is_file() and not path.is_symlink():
            copy = target / path.relative_to(source)
            copy.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(path, copy)
