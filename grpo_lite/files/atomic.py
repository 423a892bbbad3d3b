"""A file or a folder is written whole or not at all, and survives a kill in the middle of being replaced."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import json
import logging
import os
import shutil
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from grpo_lite.errors import ExportError
from grpo_lite.files.manifest import MANIFEST_NAME

ASIDE = ".replaced-"


def publish(folder: Path, target: Path) -> None:
    """Give a complete folder its name, replacing what lies there."""
    aside = target.with_name(f"{ASIDE}{target.name}")
    if target.exists():
        shutil.rmtree(aside, ignore_errors=True)
        os.rename(target, aside)
    os.rename(folder, target)
    sync(target.parent)
    shutil.rmtree(aside, ignore_errors=True)


def sync(path: Path) -> None:
    """Flush a file or folder to disk; some mounted drives cannot flush folders."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError as error:
        if not path.is_dir() or error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EIO):
            raise
    finally:
        os.close(descriptor)


def read_record(path: Path) -> dict[str, Any]:
    """Return an export's JSON record, or an empty mapping where it is missing or no JSON object."""
    try:
        return dict(json.loads(path.read_text(encoding="utf-8")))
    except (OSError, ValueError, TypeError):
        return {}


def write_atomic(path: Path, text: str) -> None:
    """Write a file so that a reader sees the old or the new content, never a part."""
    scratch = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with scratch.open("w", encoding="utf-8") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        scratch.replace(path)
    except BaseException:
        scratch.unlink(missing_ok=True)
        raise


logger = logging.getLogger(__name__)


@contextlib.contextmanager
def replacing_folder(
    out_dir: Path, need_bytes: int, overwrite: bool = False, protected: Sequence[Path] = ()
) -> Iterator[Path]:
    """Give a `<out_dir>.partial` folder to fill; on success it takes out_dir's name, on any exception it is removed.

    A process killed in between leaves only the partial folder, which the next call clears. What lay under the name
    before stays until the new folder is complete and on disk.

    Args:
        need_bytes: what will be written; refused before it starts when the disk has less.
        overwrite: replace a folder that grpo_lite made (it has a manifest). Other folders are never replaced.
        protected: folders that must not be, hold, or lie in `out_dir`.

    Raises:
        ExportError: the name is taken, not writable, in use by another process, or the disk is or becomes full.
    """
    _check_name(out_dir, overwrite, protected)
    partial = out_dir.with_name(f"{out_dir.name}.partial")
    try:
        out_dir.parent.mkdir(parents=True, exist_ok=True)
        partial.mkdir(exist_ok=True)
        lock = os.open(partial, os.O_RDONLY)
    except OSError as error:
        raise ExportError(
            f"{out_dir}: cannot be written: {error.strerror}. Give a folder on a disk and with rights to write."
        ) from None
    try:
        _lock(lock, partial)
        _clear(partial)
        _check_space(partial, need_bytes)
        try:
            yield partial
            _sync(partial)
            _swap(partial, out_dir)
        except OSError as error:
            raise ExportError(
                f"{out_dir}: the export failed: {error}. The partial result was removed: have {_gib(need_bytes)} free, "
                "and run again."
            ) from error
    except BaseException:
        if not _locked_by_other(lock):
            shutil.rmtree(partial, ignore_errors=True)
        raise
    finally:
        os.close(lock)


def clear_leftovers(out_dir: Path) -> None:
    """Remove what an export left that was killed while it replaced a whole `out_dir`, unless a process is at it."""
    partial = out_dir.with_name(f"{out_dir.name}.partial")
    if out_dir.is_dir() and (_previous(out_dir) / MANIFEST_NAME).is_file():
        shutil.rmtree(_previous(out_dir), ignore_errors=True)
    if partial.is_symlink() or not partial.is_dir():
        return
    lock = os.open(partial, os.O_RDONLY)
    try:
        if not _locked_by_other(lock):
            shutil.rmtree(partial, ignore_errors=True)
    finally:
        os.close(lock)


def _check_name(out_dir: Path, overwrite: bool, protected: Sequence[Path]) -> None:
    target = out_dir.resolve()
    for path in protected:
        other = path.resolve()
        if target == other or target in other.parents or (other in target.parents and (other / "config.json").exists()):
            raise ExportError(f"{out_dir}: is, holds or lies in {path}, which is read. Give another output folder.")
    previous = _previous(out_dir)
    if previous.exists() and not (previous / MANIFEST_NAME).is_file():
        raise ExportError(f"{previous}: is in the way (it is not grpo_lite's). Move it, or give another output folder.")
    if previous.exists() and not out_dir.exists():  # killed between the two renames of _swap
        os.rename(previous, out_dir)
    if not (out_dir.exists() or out_dir.is_symlink()):
        return
    if not overwrite:
        raise ExportError(f"{out_dir}: is already there. Give another output folder, or ask for it to be overwritten.")
    empty = out_dir.is_dir() and not any(out_dir.iterdir())
    if out_dir.is_symlink() or not (empty or (out_dir / MANIFEST_NAME).is_file()):
        raise ExportError(
            f"{out_dir}: was not exported by grpo_lite (it has no {MANIFEST_NAME}), so it is not overwritten. Give "
            "another output folder, or remove it yourself."
        )


def _lock(descriptor: int, partial: Path) -> None:
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise ExportError(f"{partial}: another process writes there. Wait for it, or give another folder.") from None
    except OSError as error:  # some network file systems have no locks
        logger.info("%s cannot be locked: %s", partial, error)


def _locked_by_other(descriptor: int) -> bool:
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    except OSError:
        return False
    return False


def _clear(folder: Path) -> None:
    for path in folder.iterdir():
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path)
        else:
            path.unlink()


def _check_space(folder: Path, need_bytes: int) -> None:
    free = shutil.disk_usage(folder).free
    if free < need_bytes:
        raise ExportError(
            f"{folder}: the export needs {_gib(need_bytes)} of disk, {_gib(free)} are free there. Free "
            f"{_gib(need_bytes - free)}, or give an output folder on another disk."
        )


def _sync(folder: Path) -> None:
    for path in [*(path for path in folder.rglob("*")), folder]:
        descriptor = os.open(path, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def _swap(partial: Path, out_dir: Path) -> None:
    previous = _previous(out_dir)
    if out_dir.exists():
        if previous.exists():
            shutil.rmtree(previous)
        os.rename(out_dir, previous)
    try:
        os.rename(partial, out_dir)
    except BaseException:
        if previous.exists():
            os.rename(previous, out_dir)
        raise
    descriptor = os.open(out_dir.parent, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
    shutil.rmtree(previous, ignore_errors=True)


def _previous(out_dir: Path) -> Path:
    return out_dir.with_name(f"{out_dir.name}.previous")


def _gib(size: int) -> str:
    return f"{size / 2**30:.2f} GiB" if size >= 2**28 else f"{size / 2**20:.0f} MiB"
