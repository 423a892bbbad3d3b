"""Cleanup after a hostile program: end every process it may have started and empty its directory."""

from __future__ import annotations

import contextlib
import fcntl
import os
import signal
import stat
import time

_SWEEP_S = 2.0
_ROOT_NAME = "grpo-lite-sandbox-"
_NEW_S = 60.0  # a younger directory may belong to a worker that has not locked it yet


def end_processes(pids: list[int], *, is_init: bool, uid: int | None, may_fork: bool) -> dict[int, int]:
    """Kill the children and all their descendants, and wait for them.

    Args:
        pids: the children.
        is_init: this process is process 1 of its namespace: one signal reaches everything in it.
        uid: the user of the children, if it is theirs alone.
        may_fork: nothing has forbidden them to start processes.

    Returns:
        Exit code by child; negative for a signal.
    """
    codes = reap(block=False)
    for pid in pids:
        if pid not in codes:
            kill(pid)
    if is_init and os.getpid() == 1:
        kill(-1)
    elif may_fork:
        _kill_user(uid) if uid is not None else _sweep(codes)
    if may_fork or any(pid not in codes for pid in pids):
        codes |= reap(block=True)
    return codes


def reap(*, block: bool) -> dict[int, int]:
    """Collect every child that has ended, or wait until none is left."""
    codes: dict[int, int] = {}
    try:
        while True:
            pid, status = os.waitpid(-1, 0 if block else os.WNOHANG)
            if pid == 0:
                return codes
            codes[pid] = os.waitstatus_to_exitcode(status)
    except ChildProcessError:
        return codes


def kill(pid: int) -> None:
    """Send SIGKILL; nothing happens if the process is gone."""
    with contextlib.suppress(ProcessLookupError, PermissionError):
        os.kill(pid, signal.SIGKILL)


def _kill_user(uid: int) -> None:
    """Kill every process of a user at once, atomically, by becoming that user."""
    helper = os.fork()
    if helper == 0:
        try:
            os.setresuid(uid, uid, uid)
            os.kill(-1, signal.SIGKILL)  # spares itself
        finally:
            os._exit(0)


def _sweep(codes: dict[int, int]) -> None:
    """Kill the descendants generation by generation: as the nearest subreaper, this process inherits the orphans."""
    deadline = time.monotonic() + _SWEEP_S
    while time.monotonic() < deadline:
        try:
            with open(f"/proc/self/task/{os.getpid()}/children", encoding="ascii") as file:
                living = [int(pid) for pid in file.read().split()]
        except OSError:
            return
        if not living:
            return
        for pid in living:
            kill(pid)
        codes |= reap(block=False)


def is_untouched(root: str, directory: str, mode: int) -> bool:
    """Return whether a program has left its directory as it was, empty and alone below the root, as most do."""
    info = os.lstat(directory) if os.path.lexists(directory) else None
    if info is None or info.st_mode != stat.S_IFDIR | mode:
        return False
    return [os.path.join(root, name) for name in os.listdir(root)] == [directory] and not os.listdir(directory)


def empty_directory(directory: str) -> None:
    """Remove everything below a directory.

    Iterative, and never deeper than two levels: a program can nest directories beyond any path or recursion limit.
    """
    top = os.fsencode(directory)
    fresh = os.urandom(8).hex().encode()  # no name that a program could have taken
    serial = 0
    pending = [top]
    while pending:
        current = pending.pop()
        for path in [os.path.join(current, name) for name in os.listdir(current)]:
            if not stat.S_ISDIR(os.lstat(path).st_mode):
                os.unlink(path)
                continue
            os.chmod(path, stat.S_IRWXU)  # the program may have closed it to itself, and so to us
            if current != top:
                path, nested = os.path.join(top, b"%s.%d" % (fresh, serial)), path
                serial += 1
                os.rename(nested, path)
            pending.append(path)
        if current != top:
            os.rmdir(current)


def within_quota(directory: str, most_bytes: int, most_entries: int) -> bool:
    """Return whether the files below a directory stay within the limits, looking at no more entries than allowed."""
    total = seen = 0
    pending = [os.fsencode(directory)]
    while pending:
        with contextlib.suppress(OSError), os.scandir(pending.pop()) as entries:  # gone, or closed: removed at the end
            for entry in entries:
                seen += 1
                with contextlib.suppress(OSError):  # gone while we look: the others still count
                    if entry.is_dir(follow_symlinks=False):
                        pending.append(entry.path)
                    else:
                        total += entry.stat(follow_symlinks=False).st_blocks * 512
                if total > most_bytes or seen > most_entries:
                    return False
    return True


def make_own_root(temporary: str, lowest: int) -> str:
    """Make a worker's directory, and remove those of workers that were killed.

    A worker locks its directory for as long as it lives, so that workers in other containers see it too.

    Args:
        temporary: where it is made.
        lowest: the smallest number for the descriptor that holds the lock.
    """
    for name in os.listdir(temporary):
        if name.startswith(_ROOT_NAME):
            with contextlib.suppress(OSError):  # another worker was quicker
                _remove_if_left(os.path.join(temporary, name))
    root = os.path.join(temporary, f"{_ROOT_NAME}{os.getpid()}-{os.urandom(8).hex()}")
    os.mkdir(root, 0o711)
    opened = os.open(root, os.O_RDONLY | os.O_DIRECTORY)
    fcntl.flock(fcntl.fcntl(opened, fcntl.F_DUPFD_CLOEXEC, lowest), fcntl.LOCK_EX)
    os.close(opened)
    return root


def _remove_if_left(root: str) -> None:
    """Remove a worker's directory if it is this user's, not new, and nobody holds its lock."""
    opened = os.open(root, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW)
    try:
        info = os.fstat(opened)
        if info.st_uid == os.getuid() and time.time() - info.st_mtime > _NEW_S:
            fcntl.flock(opened, fcntl.LOCK_EX | fcntl.LOCK_NB)
            empty_directory(root)
            os.rmdir(root)
    finally:
        os.close(opened)
