"""Locks of folders: one process works in one, and the kernel frees the lock when that process ends, however it ends.

Not the `filelock` package (4.3): its lock names no holder, treats a drive without locks as an error (or leaves a marker
file there), and cannot lock a folder itself, which an export needs because its folder is renamed while it is locked.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import logging
import os
import platform
from collections.abc import Iterator
from pathlib import Path
from typing import TextIO

from grpo_lite.commands import hint_run
from grpo_lite.errors import RunDirError

LOCK_NAME = ".lock"
_HELD = (errno.EWOULDBLOCK, errno.EACCES)  # another process holds the lock
_descriptors: set[int] = set()  # of the locks that this process holds

logger = logging.getLogger(__name__)


@contextlib.contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Hold a run directory's lock, a file in it that names this process; create the folder if necessary.

    Raises:
        RunDirError: another process holds it, or the folder is not writable.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        file = (folder / LOCK_NAME).open("a+", encoding="utf-8")
    except OSError as error:
        raise RunDirError(
            f"run directory {folder}: not writable ({error.strerror}). Choose another with {hint_run()}."
        ) from None
    with file:
        if not _take(file.fileno(), folder):
            raise RunDirError(
                f"run directory {folder}: another process is working in it{_holder(file)}. Wait for it, or "
                f"choose another with {hint_run()}"
            )
        with contextlib.suppress(OSError):  # a full disk: the message above then says less
            os.ftruncate(file.fileno(), 0)
            os.write(file.fileno(), f"{os.getpid()} {platform.node()}\n".encode())
        with _kept_from_children(file.fileno()):
            yield


@contextlib.contextmanager
def locked_itself(folder: Path) -> Iterator[None]:
    """Hold a lock on an existing folder itself: it leaves no file, and stays held when the folder is renamed.

    Raises:
        BlockingIOError: another process holds it.
    """
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW)
    try:
        if not _take(descriptor, folder):
            raise BlockingIOError(errno.EWOULDBLOCK, "another process holds its lock", str(folder))
        with _kept_from_children(descriptor):
            yield
    finally:
        os.close(descriptor)


def in_use(folder: Path) -> bool | None:
    """Return whether a process of this machine works in a run directory; None where there is no lock to tell."""
    try:
        with (folder / LOCK_NAME).open() as file:
            fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except OSError as error:
        return True if error.errno in _HELD else None
    return False


def _take(descriptor: int, folder: Path) -> bool:
    """Take a lock; return False where another process holds it."""
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        if error.errno in _HELD:
            return False
        logger.info("%s cannot be locked: %s", folder, error)  # Google Drive and some network disks have no locks
    return True


@contextlib.contextmanager
def _kept_from_children(descriptor: int) -> Iterator[None]:
    _descriptors.add(descriptor)
    try:
        yield
    finally:
        _descriptors.discard(descriptor)


def _holder(file: TextIO) -> str:
    """Return which process holds the lock, as far as its file says."""
    try:
        file.seek(0)
        process, _, machine = file.read(200).strip().partition(" ")
    except (OSError, ValueError):
        return ""
    return f" (process {process} on {machine})" if process.isdecimal() else ""


def _release_in_child() -> None:
    """Give up the parent's locks in a forked child.

    A lock lives as long as any process has its file open, and a reward's worker processes may outlive a killed run.
    """
    nowhere = os.open(os.devnull, os.O_RDWR)
    for descriptor in _descriptors:
        os.dup2(nowhere, descriptor, inheritable=False)
    os.close(nowhere)
    _descriptors.clear()


os.register_at_fork(after_in_child=_release_in_child)
