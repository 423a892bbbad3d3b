"""The portable layers: resource limits, and another user. The child sets them on itself before the program runs."""

from __future__ import annotations

import math
import os
import resource

from . import linux

MEMORY_BYTES = 512 << 20  # address space, so that a bomb fails to allocate long before the machine swaps
FILE_BYTES = 8 << 20
DISK_BYTES = 64 << 20  # all files of one program together
DISK_ENTRIES = 1000
OPEN_FILES = 64
TASKS = 64  # processes and threads

_FIRST_SANDBOX_UID = 1_900_000_000  # far above the ids that systems, users and containers hand out
NOBODY = 65534  # shared with other services


def set_shared_limits() -> None:
    """Lower the limits that are the same for every program; the worker does it once, and its children inherit them."""
    limits = {
        "RLIMIT_AS": MEMORY_BYTES,
        "RLIMIT_CORE": 0,
        "RLIMIT_FSIZE": FILE_BYTES,
        "RLIMIT_MEMLOCK": 0,
        "RLIMIT_MSGQUEUE": 0,
        "RLIMIT_NOFILE": OPEN_FILES,
        "RLIMIT_SIGPENDING": TASKS,  # timers and queued signals are counted per user: leave the trainer its share
    }
    for name, value in limits.items():
        if hasattr(resource, name):
            lower(name, value)


def set_own_limits(timeout_s: float, tasks: int | None) -> None:
    """Lower the limits of one program.

    Args:
        timeout_s: its wall-clock limit; its CPU time may exceed it by at most two seconds.
        tasks: processes and threads of the user; None leaves the limit (it would count the whole user's).
    """
    lower("RLIMIT_CPU", math.ceil(timeout_s) + 1)
    if tasks is not None:
        lower("RLIMIT_NPROC", tasks)


def lower(name: str, value: int) -> None:
    """Set soft and hard limit, never above the hard limit in force."""
    number = getattr(resource, name)
    _, hard = resource.getrlimit(number)
    if hard != resource.RLIM_INFINITY:
        value = min(value, hard)
    try:
        resource.setrlimit(number, (value, value))
    except (ValueError, OSError):
        if linux.LINUX:
            raise  # macOS refuses some limits (address space): there they are simply not covered


def sandbox_uid() -> int:
    """Return a user id for this worker's programs alone, so that task limits and a kill by user concern no one else.

    A container may map only the first 65,536 ids; then it is nobody's.
    """
    uid = _FIRST_SANDBOX_UID + os.getpid() % 1_000_000 * 100
    try:
        with open("/proc/self/uid_map", encoding="ascii") as mapping:
            rows = [[int(number) for number in line.split()] for line in mapping]
    except OSError:
        return uid
    return uid if any(first <= uid < first + count for first, _, count in rows) else NOBODY


def become(uid: int) -> None:
    """Become an unprivileged user without groups; only root can."""
    os.setgroups([])
    if hasattr(os, "setresgid"):
        os.setresgid(uid, uid, uid)
        os.setresuid(uid, uid, uid)
    else:  # macOS
        os.setgid(uid)
        os.setuid(uid)
