"""The seccomp layer: which system calls a program may make, enforced by the kernel without root (Linux >= 3.17).

An allow list: what Python needs to compute, to read its library, to use files below its directory, threads, pipes and
timers. Everything else (processes, programs, sockets, mounts, tracing, modes and owners of files, kernel keys,
io_uring, ...) fails with EPERM, and a call newer than this table with ENOSYS, as on an older kernel, so that libraries
fall back.
"""

from __future__ import annotations

import ctypes
import errno
import os
import platform
import struct
import sys
from collections.abc import Iterator, Sequence

from . import linux

# name: (x86_64, aarch64); None where the architecture has no such call. Source: asm/unistd_64.h and
# asm-generic/unistd.h of Linux 6.1; tests compare them with the headers of the machine.
_ALLOWED: dict[str, tuple[int | None, int | None]] = {
    # memory and time
    "mmap": (9, 222), "mprotect": (10, 226), "munmap": (11, 215), "brk": (12, 214), "mremap": (25, 216),
    "madvise": (28, 233), "gettimeofday": (96, 169), "time": (201, None), "times": (100, 153),
    "clock_gettime": (228, 113), "clock_getres": (229, 114), "nanosleep": (35, 101), "clock_nanosleep": (230, 115),
    "getitimer": (36, 102), "setitimer": (38, 103), "alarm": (37, None), "pause": (34, None),
    "timer_create": (222, 107), "timer_settime": (223, 110), "timer_gettime": (224, 108),
    "timer_getoverrun": (225, 109), "timer_delete": (226, 111), "timerfd_create": (283, 85),
    "timerfd_settime": (286, 86), "timerfd_gettime": (287, 87),
    # open descriptors
    "read": (0, 63), "write": (1, 64), "close": (3, 57), "close_range": (436, 436), "lseek": (8, 62),
    "pread64": (17, 67), "pwrite64": (18, 68), "readv": (19, 65), "writev": (20, 66), "preadv": (295, 69),
    "pwritev": (296, 70), "preadv2": (327, 286), "pwritev2": (328, 287), "dup": (32, 23), "dup2": (33, None),
    "dup3": (292, 24), "pipe": (22, None), "pipe2": (293, 59), "select": (23, None), "pselect6": (270, 72),
    "poll": (7, None), "ppoll": (271, 73), "epoll_create": (213, None), "epoll_create1": (291, 20),
    "epoll_ctl": (233, 21), "epoll_wait": (232, None), "epoll_pwait": (281, 22), "epoll_pwait2": (441, 441),
    "eventfd": (284, None), "eventfd2": (290, 19), "signalfd": (282, None), "signalfd4": (289, 74),
    "fsync": (74, 82), "fdatasync": (75, 83), "ftruncate": (77, 46), "fallocate": (285, 47), "fadvise64": (221, 223),
    "flock": (73, 32), "sendfile": (40, 71), "copy_file_range": (326, 285), "fstat": (5, 80), "fstatfs": (138, 44),
    "getdents": (78, None), "getdents64": (217, 61), "fchdir": (81, 50),
    # paths (where they lead is Landlock's and the mount namespace's matter)
    "open": (2, None), "openat": (257, 56), "creat": (85, None), "stat": (4, None), "lstat": (6, None),
    "newfstatat": (262, 79), "statx": (332, 291), "statfs": (137, 43), "access": (21, None), "faccessat": (269, 48),
    "faccessat2": (439, 439), "readlink": (89, None), "readlinkat": (267, 78), "getcwd": (79, 17), "chdir": (80, 49),
    "rename": (82, None), "renameat": (264, 38), "renameat2": (316, 276), "mkdir": (83, None), "mkdirat": (258, 34),
    "rmdir": (84, None), "unlink": (87, None), "unlinkat": (263, 35), "link": (86, None), "linkat": (265, 37),
    "symlink": (88, None), "symlinkat": (266, 36), "umask": (95, 166),
    # what sockets of socketpair need (asyncio wakes its loop with one)
    "recvfrom": (45, 207), "shutdown": (48, 210), "getsockname": (51, 204), "getpeername": (52, 205),
    "getsockopt": (55, 209),
    # this process and its threads
    "getpid": (39, 172), "gettid": (186, 178), "getppid": (110, 173), "getuid": (102, 174), "geteuid": (107, 175),
    "getgid": (104, 176), "getegid": (108, 177), "getresuid": (118, 148), "getresgid": (120, 150),
    "getgroups": (115, 158), "getpgrp": (111, None), "getpgid": (121, 155), "getsid": (124, 156),
    "getrusage": (98, 165), "getrlimit": (97, 163), "getpriority": (140, 141), "sysinfo": (99, 179),
    "uname": (63, 160), "sched_yield": (24, 124), "sched_getaffinity": (204, 123), "sched_getparam": (143, 121),
    "sched_getscheduler": (145, 120), "getcpu": (309, 168), "capget": (125, 90), "getrandom": (318, 278),
    "futex": (202, 98), "set_robust_list": (273, 99), "set_tid_address": (218, 96), "rseq": (334, 293),
    "membarrier": (324, 283), "arch_prctl": (158, None), "rt_sigaction": (13, 134), "rt_sigprocmask": (14, 135),
    "rt_sigreturn": (15, 139), "rt_sigpending": (127, 136), "rt_sigtimedwait": (128, 137), "rt_sigsuspend": (130, 133),
    "sigaltstack": (131, 132), "restart_syscall": (219, 128), "wait4": (61, 260), "waitid": (247, 95),
    "exit": (60, 93), "exit_group": (231, 94),
}  # fmt: skip

# Allowed with some arguments only; see build_filter.
_CHECKED: dict[str, tuple[int | None, int | None]] = {
    "kill": (62, 129), "tgkill": (234, 131), "clone": (56, 220), "clone3": (435, 435), "fcntl": (72, 25),
    "ioctl": (16, 29), "socketpair": (53, 199), "sendto": (44, 206), "prlimit64": (302, 261),
}  # fmt: skip
_NEWEST_KNOWN = 462  # mseal, Linux 6.10: a later number is answered as an older kernel would

# machine: (column of the tables, AUDIT_ARCH_*, first number of a foreign calling convention)
_MACHINES = {"x86_64": (0, 0xC000003E, 0x40000000), "aarch64": (1, 0xC00000B7, None)}

_NUMBER, _ARCH = 0, 4  # offsets in struct seccomp_data
_SECCOMP_MODE_FILTER = 2
_LOAD, _LOAD_VALUE, _TO_X, _AND, _SHIFT_RIGHT, _SHIFT_RIGHT_BY_X = 0x20, 0x00, 0x07, 0x54, 0x74, 0x7C
_JUMP, _JUMP_EQ, _JUMP_GE, _JUMP_GT, _JUMP_SET, _RETURN = 0x05, 0x15, 0x35, 0x25, 0x45, 0x06
_ALLOW, _KILL_PROCESS, _ERRNO = 0x7FFF0000, 0x80000000, 0x00050000
_EPERM, _ENOSYS = _ERRNO | errno.EPERM, _ERRNO | errno.ENOSYS

_PID_HERE = b"\xffPID"  # no process has a number this large

_CLONE_THREAD, _CLONE_NEW = 0x00010000, 0x7E020000  # a thread of this process; any new namespace
_AF_UNIX, _SOCK_STREAM, _SOCK_TYPE_MASK = 1, 1, 0xF
# F_SETOWN, F_SETSIG and F_SETLEASE are absent: with them the kernel signals any process of the same user for a program;
# so is F_SETPIPE_SZ, whose memory is counted for the user.
_FCNTL = (0, 1, 2, 3, 4, 5, 6, 7, 36, 37, 38, 1030, 1032)  # dup, flags, locks, pipe size
_IOCTL = (0x5401, 0x5413, 0x541B, 0x5421, 0x5450, 0x5451)  # TCGETS, TIOCGWINSZ, FIONREAD, FIONBIO, FIONCLEX, FIOCLEX


def machine_is_known() -> bool:
    """Return whether the tables hold this machine's system call numbers (64-bit x86 and ARM)."""
    return platform.machine() in _MACHINES and sys.maxsize > 2**32


class Filter:
    """The filter, ready to be put on by any process forked from here."""

    def __init__(self) -> None:
        program = _template(platform.machine())
        self._buffer = ctypes.create_string_buffer(program, len(program))
        self._sock_fprog = struct.pack("=H6xQ", len(program) // 8, ctypes.addressof(self._buffer))
        self._places = [place for place in range(len(program)) if program.startswith(_PID_HERE, place)]

    def restrict_self(self) -> None:
        """Put this process, and all that it starts, under the filter for good (needs no_new_privs)."""
        pid = os.getpid()
        for place in self._places:
            struct.pack_into("<I", self._buffer, place, pid)
        linux.prctl(linux.PR_SET_SECCOMP, _SECCOMP_MODE_FILTER, self._sock_fprog)


def build_filter(machine: str, pid: int) -> bytes:
    """Return the filter of a process as BPF instructions of 8 bytes each.

    First the allowed calls, by a bit each (a short filter: it is installed for every program); then one block for every
    call whose arguments are checked; then the refusal.
    """
    return _template(machine).replace(_PID_HERE, pid.to_bytes(4, "little"))


def _template(machine: str) -> bytes:
    """Return the filter with a mark where the process id belongs."""
    _, arch, foreign = _MACHINES[machine]
    head = _op(_LOAD, _ARCH) + _op(_JUMP_EQ, arch, 1, 0) + _op(_RETURN, _KILL_PROCESS) + _op(_LOAD, _NUMBER)
    if foreign is not None:
        head += _op(_JUMP_GE, foreign, 0, 1) + _op(_RETURN, _KILL_PROCESS)
    unknown = _op(_JUMP_GT, _NEWEST_KNOWN, 0, 1) + _op(_RETURN, _ENOSYS)
    refusal = _op(_RETURN, _EPERM)
    return head + unknown + _allowed_bits(machine) + b"".join(_checked_blocks(machine)) + refusal


def _allowed_bits(machine: str) -> bytes:
    """Return instructions that allow the calls of the first table and leave the number loaded for all others."""
    column = _MACHINES[machine][0]
    words = [0] * (_NEWEST_KNOWN // 32 + 1)
    for row in _ALLOWED.values():
        if (number := row[column]) is not None:
            words[number // 32] |= 1 << number % 32
    start = _op(_AND, 31) + _op(_TO_X, 0) + _op(_LOAD, _NUMBER) + _op(_SHIFT_RIGHT, 5)
    choose = [_op(_JUMP_EQ, place, 0, 2) + _op(_LOAD_VALUE, word) for place, word in enumerate(words)]
    left = len(choose)
    table = b""
    for block in choose:
        left -= 1
        table += block + _op(_JUMP, 3 * left + 1)
    otherwise = _op(_LOAD_VALUE, 0)
    test = _op(_SHIFT_RIGHT_BY_X, 0) + _op(_JUMP_SET, 1, 0, 1) + _op(_RETURN, _ALLOW)
    return start + table + otherwise + test + _op(_LOAD, _NUMBER)


def _checked_blocks(machine: str) -> Iterator[bytes]:
    """Yield the blocks of the calls whose arguments are checked (their low 32 bits, which is all the kernel reads)."""
    column = _MACHINES[machine][0]
    own_pid = int.from_bytes(_PID_HERE, "little")
    rules = {
        "kill": _argument_in(0, [own_pid]),  # itself only, not even its group
        "tgkill": _argument_in(0, [own_pid]),
        "clone": _op(_LOAD, _argument(0))
        + _op(_JUMP_SET, _CLONE_NEW, 2, 0)
        + _op(_JUMP_SET, _CLONE_THREAD, 0, 1)
        + _op(_RETURN, _ALLOW)
        + _op(_RETURN, _EPERM),
        "clone3": _op(_RETURN, _ENOSYS),  # its flags lie in memory, out of the filter's sight: the C library uses clone
        "fcntl": _argument_in(1, _FCNTL),
        "ioctl": _argument_in(1, _IOCTL),
        # Datagram sockets could address any socket on the machine by its path.
        "socketpair": _op(_LOAD, _argument(1))
        + _op(_AND, _SOCK_TYPE_MASK)
        + _op(_JUMP_EQ, _SOCK_STREAM, 1, 0)
        + _op(_RETURN, _EPERM)
        + _argument_in(0, [_AF_UNIX]),
        "sendto": _argument_in(4, [0]),  # no address: the peer of the pair
        "prlimit64": _argument_in(0, [0]),  # its own limits, which it can only lower
    }
    for name, body in rules.items():
        number = _CHECKED[name][column]
        if number is not None:
            yield _block(number, body)


def _block(number: int, body: bytes) -> bytes:
    """Return instructions that run `body` for one system call and skip it for all others."""
    return _op(_JUMP_EQ, number, 0, len(body) // 8) + body


def _argument_in(index: int, values: Sequence[int]) -> bytes:
    """Return instructions that allow a call whose argument is one of the values, and refuse it otherwise."""
    tests = b"".join(_op(_JUMP_EQ, value, len(values) - place, 0) for place, value in enumerate(values))
    return _op(_LOAD, _argument(index)) + tests + _op(_RETURN, _EPERM) + _op(_RETURN, _ALLOW)


def _argument(index: int) -> int:
    """Return the offset of an argument's low half in struct seccomp_data (both machines are little-endian)."""
    return 16 + 8 * index


def _op(code: int, value: int, if_true: int = 0, if_false: int = 0) -> bytes:
    """Return one BPF instruction."""
    return struct.pack("=HBBI", code, if_true, if_false, value)
