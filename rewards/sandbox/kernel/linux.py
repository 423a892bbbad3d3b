"""System calls that Python 3.11 does not wrap, through ctypes: the ground under the Linux layers of the sandbox.

Used by the layers, inside the worker and its children. Importing it is harmless anywhere; calling it is for Linux.
"""

from __future__ import annotations

import ctypes
import os
import struct
import sys

LINUX = sys.platform.startswith("linux")

PR_SET_PDEATHSIG = 1
PR_SET_DUMPABLE = 4
PR_SET_SECCOMP = 22
PR_SET_CHILD_SUBREAPER = 36
PR_SET_NO_NEW_PRIVS = 38

_CAPABILITY_HEADER = struct.pack("=II", 0x20080522, 0)  # version 3, this process
_NO_CAPABILITIES = bytes(24)

_libc = ctypes.CDLL(None, use_errno=True)
if LINUX:
    _libc.prctl.argtypes = (ctypes.c_int, ctypes.c_ulong, ctypes.c_char_p, ctypes.c_ulong, ctypes.c_ulong)


def call(name: str, *args: object) -> int:
    """Call a C library function that returns -1 and sets errno on failure.

    Raises:
        OSError: with the function's name in front, so that a failed layer says which step failed.
    """
    result: int = getattr(_libc, name)(*args)
    if result == -1:
        number = ctypes.get_errno()
        raise OSError(number, f"{name}: {os.strerror(number)}")
    return result


def prctl(option: int, value: int = 0, pointer: bytes | None = None) -> int:
    """Call prctl(2) with one or two arguments; the rest is zero, as the kernel demands."""
    return call("prctl", option, value, pointer, 0, 0)


def syscall(number: int, *args: object) -> int:
    """Call a system call by its number; every integer is passed as a full register."""
    return call("syscall", *(ctypes.c_long(arg) if isinstance(arg, int) else arg for arg in (number, *args)))


def drop_capabilities() -> None:
    """Give up every capability of this process; with no_new_privs none comes back, not even by a set-uid program."""
    call("capset", _CAPABILITY_HEADER, _NO_CAPABILITIES)
