"""The lock of a run directory: one process works in it; the kernel lets go with the process, however it ends."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import platform
from collections.abc import Iterator
from pathlib import Path
from typing import TextIO

from grpo_lite.errors import RunDirError

LOCK_NAME = ".lock"
_HELD = (errno.EWOULDBLOCK, errno.EACCES)  # a lock that another process holds
_descriptors: set[int] = set()  # of the locks that this process holds


@contextlib.contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Hold a folder's lock; make the folder if need be.

    Raises:
        RunDirError: another process holds it, or the folder is not writable.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        file = (folder / LOCK_NAME).open("a+", encoding="utf-8")
    except OSError as error:
        raise RunDirError(
            f"run directory {folder}: not writable ({error.strerror}). Choose another with RUN=… (make) or "
            "--run … (grpo-lite)."
        ) from None
    with file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            if error.errno in _HELD:
                raise RunDirError(
                    f"run directory {folder}: another process is working in it{_holder(file)}. Wait for it, or "
                    "choose another with RUN=…"
                ) from None
            # Anything else: a mounted folder without locks (Google Drive, some network disks). Go on without.
        with contextlib.suppress(OSError):  # a full disk: the refusal above then says less
            os.ftruncate(file.fileno(), 0)
            os.write(file.fileno(), f"{os.getpid()} {platform.node()}\n".encode())
        _descriptors.add(file.fileno())
        try:
            yield
        finally:
            _descriptors.discard(file.fileno())


def in_use(folder: Path) -> bool | None:
    """Tell whether a process of this machine works in a folder; None where no lock says so."""
    try:
        with (folder / LOCK_NAME).open() as file:
            fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except OSError as error:
        return True if error.errno in _HELD else None
    return False


def _holder(lock: TextIO) -> str:
    """Return which process says that it holds the lock, as far as that can be read."""
    try:
        lock.seek(0)
        process, _, machine = lock.read(200).strip().partition(" ")
    except (OSError, ValueError):
        return ""
    return f" (process {process} on {machine})" if process.isdecimal() else ""


def _let_go() -> None:
    """In a forked child: give the locks up, which the parent keeps.

    A lock lives as long as any process has it open, and a reward's own workers may outlive a killed run.
    """
    nowhere = os.open(os.devnull, os.O_RDWR)
    for descriptor in _descriptors:
        os.dup2(nowhere, descriptor, inheritable=False)
    os.close(nowhere)
    _descriptors.clear()


os.register_at_fork(after_in_child=_let_go)
