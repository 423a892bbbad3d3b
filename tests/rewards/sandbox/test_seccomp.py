"""The system call filter lets pass what it says and nothing else: interpreted here, for both machines."""

from __future__ import annotations

import errno
import re
import struct
from pathlib import Path

import pytest

from rewards.sandbox.kernel import seccomp

_ARCH = {"x86_64": 0xC000003E, "aarch64": 0xC00000B7}
_ALLOW, _KILL = 0x7FFF0000, 0x80000000
_EPERM, _ENOSYS = 0x00050000 | errno.EPERM, 0x00050000 | errno.ENOSYS
_PID = 4711


def run_filter(machine: str, number: int, args: tuple[int, ...] = (), arch: int | None = None) -> int:
    """Interpret the filter as the kernel would; return its answer."""
    program = seccomp.build_filter(machine, _PID)
    code = [struct.unpack("=HBBI", program[i : i + 8]) for i in range(0, len(program), 8)]
    data = struct.pack("=IIQ6Q", number, arch or _ARCH[machine], 0, *(*args, 0, 0, 0, 0, 0, 0)[:6])
    accumulator = index = place = 0
    while True:
        operation, if_true, if_false, value = code[place]
        place += 1
        match operation:
            case 0x20:
                (accumulator,) = struct.unpack_from("=I", data, value)
            case 0x00:
                accumulator = value
            case 0x07:
                index = accumulator
            case 0x54:
                accumulator &= value
            case 0x74:
                accumulator >>= value
            case 0x7C:
                accumulator >>= index
            case 0x05:
                place += value
            case 0x15 | 0x25 | 0x35 | 0x45:
                tests = {0x15: accumulator == value, 0x25: accumulator > value, 0x35: accumulator >= value}
                place += if_true if tests.get(operation, bool(accumulator & value)) else if_false
            case 0x06:
                return value
            case _:
                raise AssertionError(f"an instruction seccomp does not know: {operation:#x}")


@pytest.fixture(params=["x86_64", "aarch64"])
def machine(request: pytest.FixtureRequest) -> str:
    return str(request.param)


def _numbers(machine: str, table: dict[str, tuple[int | None, int | None]]) -> dict[str, int]:
    column = ["x86_64", "aarch64"].index(machine)
    return {name: number for name, row in table.items() if (number := row[column]) is not None}


def test_every_call_of_the_table_passes(machine: str) -> None:
    for name, number in _numbers(machine, seccomp._ALLOWED).items():
        assert run_filter(machine, number) == _ALLOW, name


def test_every_other_call_is_refused_as_not_permitted_or_unknown(machine: str) -> None:
    named = {*_numbers(machine, seccomp._ALLOWED).values(), *_numbers(machine, seccomp._CHECKED).values()}
    for number in set(range(600)) - named:
        assert run_filter(machine, number) == (_ENOSYS if number > 462 else _EPERM), number


def test_another_calling_convention_ends_the_process(machine: str) -> None:
    assert run_filter(machine, 1, arch=0x40000003) == _KILL  # i386
    if machine == "x86_64":
        assert run_filter(machine, 0x40000000 + 41) == _KILL  # x32


_OTHER = 4712
_THREAD = 0x003D0F00  # the flags pthread_create passes
_FORK = 17


def test_arguments_are_checked(machine: str) -> None:
    table: list[tuple[str, tuple[int, ...], int]] = [
        ("kill", (_PID, 9), _ALLOW),
        ("kill", (_OTHER, 9), _EPERM),
        ("kill", (0, 9), _EPERM),
        ("kill", (0xFFFFFFFF, 9), _EPERM),  # -1: everyone
        ("tgkill", (_PID, _PID, 6), _ALLOW),
        ("tgkill", (_OTHER, _PID, 6), _EPERM),
        ("clone", (_THREAD,), _ALLOW),
        ("clone", (_FORK,), _EPERM),
        ("clone", (0,), _EPERM),
        ("clone", (_THREAD | 0x10000000,), _EPERM),  # with a user namespace
        ("clone", (_THREAD | 0x00020000,), _EPERM),  # with a mount namespace
        ("clone", (_THREAD | 0x40000000,), _EPERM),  # with a network namespace
        ("clone3", (0, 88), _ENOSYS),
        ("fcntl", (0, 1), _ALLOW),
        ("fcntl", (0, 4), _ALLOW),
        ("fcntl", (0, 1030), _ALLOW),
        ("fcntl", (0, 8), _EPERM),  # F_SETOWN
        ("fcntl", (0, 10), _EPERM),  # F_SETSIG
        ("fcntl", (0, 15), _EPERM),  # F_SETOWN_EX
        ("fcntl", (0, 1024), _EPERM),  # F_SETLEASE
        ("fcntl", (0, 1026), _EPERM),  # F_NOTIFY
        ("fcntl", (0, 1031), _EPERM),  # F_SETPIPE_SZ
        ("ioctl", (0, 0x5401), _ALLOW),
        ("ioctl", (0, 0x5412), _EPERM),  # TIOCSTI types into the terminal
        ("ioctl", (0, 0x8901), _EPERM),  # FIOSETOWN
        ("ioctl", (0, 0x40086602), _EPERM),  # FS_IOC_SETFLAGS
        ("socketpair", (1, 1, 0), _ALLOW),
        ("socketpair", (1, 1 | 0x80000 | 0x800, 0), _ALLOW),  # close-on-exec, non-blocking
        ("socketpair", (1, 2, 0), _EPERM),  # datagrams have addresses
        ("socketpair", (1, 5, 0), _EPERM),
        ("socketpair", (2, 1, 0), _EPERM),
        ("sendto", (3, 0, 0, 0, 0), _ALLOW),
        ("sendto", (3, 0, 0, 0, 0x7FFF0000), _EPERM),
        ("prlimit64", (0, 7), _ALLOW),
        ("prlimit64", (_OTHER, 7), _EPERM),
    ]
    numbers = _numbers(machine, seccomp._CHECKED)
    assert [row for row in table if run_filter(machine, numbers[row[0]], row[1]) != row[2]] == []


def test_nothing_dangerous_is_in_the_table() -> None:
    dangerous = (
        "socket connect bind listen accept accept4 sendmsg recvmsg sendmmsg fork vfork "
        "execve execveat ptrace process_vm_readv "
        "process_vm_writev pidfd_open pidfd_send_signal pidfd_getfd tkill rt_sigqueueinfo rt_tgsigqueueinfo setuid "
        "setresuid setgid setgroups capset chmod fchmod fchmodat chown fchown lchown fchownat utime utimes utimensat "
        "futimesat setxattr fsetxattr lsetxattr removexattr truncate mknod mknodat mount umount2 pivot_root chroot "
        "setns unshare prctl seccomp landlock_restrict_self bpf perf_event_open userfaultfd io_uring_setup keyctl "
        "add_key memfd_create memfd_secret shmget semget msgget mq_open setpriority sched_setscheduler "
        "sched_setaffinity ioprio_set mlock mlockall personality name_to_handle_at open_by_handle_at kcmp swapon "
        "reboot init_module finit_module kexec_load sethostname settimeofday clock_settime iopl ioperm setsid setpgid"
    )
    assert not set(dangerous.split()) & (set(seccomp._ALLOWED) | set(seccomp._CHECKED))


@pytest.mark.parametrize(
    ("column", "header", "pattern"),
    [
        (0, "/usr/include/x86_64-linux-gnu/asm/unistd_64.h", r"#define __NR_(\w+)\s+(\d+)"),
        (1, "/usr/include/asm-generic/unistd.h", r"#define __NR(?:3264)?_(\w+)\s+(\d+)"),
    ],
    ids=["x86_64", "aarch64"],
)
def test_numbers_are_those_of_the_kernel_headers(column: int, header: str, pattern: str) -> None:
    if not Path(header).exists():
        pytest.skip(f"{header} is not installed")
    numbers = {name: int(number) for name, number in re.findall(pattern, Path(header).read_text(encoding="utf-8"))}
    aliases = {"newfstatat": "fstatat"}  # the generic table's name
    for name, row in {**seccomp._ALLOWED, **seccomp._CHECKED}.items():
        known = numbers.get(name, numbers.get(aliases.get(name, "")))
        assert row[column] == known, name
