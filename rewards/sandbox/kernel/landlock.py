"""The Landlock layer: which files a program may touch, enforced by the kernel without root (Linux >= 5.13).

The worker builds the rule set once; every child only applies it. Landlock does not govern chmod, chown, utime, xattr,
stat, readlink, UDP or path-named Unix sockets: the seccomp layer closes the ones that change something.
"""

from __future__ import annotations

import ctypes
import os
import struct
from collections.abc import Iterable
from typing import NamedTuple

from . import linux
from .library import LibraryFiles

# The same numbers on every architecture.
_CREATE_RULESET, _ADD_RULE, _RESTRICT_SELF = 444, 445, 446
_VERSION_FLAG = 1
_RULE_PATH_BENEATH = 1

_READ_FILE, _READ_DIR, _IOCTL_DEV = 1 << 2, 1 << 3, 1 << 15
_WRITE_FILE, _TRUNCATE = 1 << 1, 1 << 14
_MAKE_CHAR, _MAKE_SOCK, _MAKE_BLOCK, _EXECUTE = 1 << 6, 1 << 9, 1 << 11, 1 << 0
_ON_FILES = _EXECUTE | _WRITE_FILE | _READ_FILE | _TRUNCATE | _IOCTL_DEV  # the rights a rule on a file may carry

_RIGHTS_BY_ABI = {1: 13, 2: 14, 3: 15, 4: 15, 5: 16}  # number of file rights the kernel knows
_ALL_TCP = 0b11  # bind and connect, ABI >= 4
_NO_LOG = 1  # denials are not written to the audit log, ABI >= 7: a program could flood it
_ALL_SCOPES = 0b11  # abstract Unix sockets and signals to processes outside, ABI >= 6


def abi_version() -> int:
    """Return the kernel's Landlock version.

    Raises:
        OSError: ENOSYS (kernel without Landlock), EOPNOTSUPP (switched off at boot) or EPERM (a container forbids it).
    """
    return linux.syscall(_CREATE_RULESET, None, 0, _VERSION_FLAG)


class Ruleset(NamedTuple):
    """Rules ready to be put on by any process forked from here."""

    descriptor: int
    flags: int

    def restrict_self(self) -> None:
        """Put this process, and all that it starts, under the rules for good (needs no_new_privs)."""
        linux.syscall(_RESTRICT_SELF, self.descriptor, self.flags)


def build_ruleset(library: LibraryFiles, devices: Iterable[str], writable: str | None) -> Ruleset:
    """Return a rule set that denies every file but the given ones, all TCP and outside signals.

    Args:
        library: what may be read and listed.
        devices: files that may be read and written (`/dev/null`).
        writable: a directory in which files and directories may be made, changed and removed; None for none.
    """
    abi = abi_version()
    handled = (1 << _RIGHTS_BY_ABI.get(abi, 16)) - 1
    size = 8 if abi < 4 else 16 if abi < 6 else 24  # bytes of struct landlock_ruleset_attr this kernel knows
    attributes = struct.pack("=QQQ", handled, _ALL_TCP, _ALL_SCOPES)[:size]
    ruleset = linux.syscall(_CREATE_RULESET, attributes, size, 0)
    for path in library.readable:
        _allow(ruleset, path, _READ_FILE | _READ_DIR)
    for path in library.listable:
        _allow(ruleset, path, _READ_DIR)
    for path in devices:
        _allow(ruleset, path, _READ_FILE | _WRITE_FILE)
    if writable is not None:
        forbidden = _MAKE_CHAR | _MAKE_BLOCK | _MAKE_SOCK | _EXECUTE | _IOCTL_DEV
        _allow(ruleset, writable, handled & ~forbidden)
    return Ruleset(ruleset, _NO_LOG if abi >= 7 else 0)


def _allow(ruleset: int, path: str, rights: int) -> None:
    """Allow rights on a path and what lies below; a path that does not exist is left out."""
    try:
        parent = os.open(path, getattr(os, "O_PATH", 0) | os.O_CLOEXEC)
    except OSError:
        return
    try:
        if not os.path.isdir(path):
            rights &= _ON_FILES
        rule = ctypes.create_string_buffer(struct.pack("=Qi", rights, parent))
        linux.syscall(_ADD_RULE, ruleset, _RULE_PATH_BENEATH, rule, 0)
    finally:
        os.close(parent)
