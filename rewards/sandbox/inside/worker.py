"""The worker: a clean process, started by exec, that forks one confined child per program and leaves nothing behind.

It never sees a program, an input or an expected value: those travel on sockets that it hands to its children unread. It
serves one session at a time: `spawn` messages, then an `end`, which kills what is left, empties the directory and
answers how each child ended. When its socket closes, the trainer is gone, and the worker ends as well.
"""

from __future__ import annotations

import _sitebuiltins
import builtins
import contextlib
import fcntl
import gc
import importlib
import json
import os
import random
import select
import socket
import time
from typing import Any, NamedTuple, NoReturn

from ..kernel import landlock, limits, linux, seccomp
from ..kernel.library import DEVICES, library_files
from ..kernel.namespaces import WORK_ROOT, enter_namespaces
from . import child, cleanup

_COMMON = "bisect collections copy datetime functools heapq itertools math operator re string typing"
_GRACE_S = 1.0  # the parent ends a session in time; the worker steps in if the parent is stuck
_WATCH_S = 0.025  # how often a running program's threads and files are counted
_TICK_S = 0.002  # how often to look for a child's end where the kernel cannot announce it
_MESSAGE_BYTES = 4096
_DIRECTORY_MODE = 0o700
_DESCRIPTORS = 3


class Setting(NamedTuple):
    """What holds for every session of a worker."""

    root: str  # the only place where programs may write
    is_init: bool
    may_fork: bool
    confinement: dict[str, child.Confinement]  # by kind of child


class Child(NamedTuple):
    """A child that has been started."""

    kind: str
    pid: int
    deadline: float
    setup: int  # a pipe that the child writes to when one of its layers fails


def main(descriptor: int, options: dict[str, Any]) -> NoReturn:
    """Serve sessions on a socket until it closes.

    Args:
        descriptor: the socket.
        options: `layers` to put on, and `temporary`, the directory for files where no namespace holds them.
    """
    control = socket.socket(fileno=fcntl.fcntl(descriptor, fcntl.F_DUPFD_CLOEXEC, child.HIGH))
    os.close(descriptor)
    os.environ.clear()
    os.umask(0o022)
    try:
        setting = prepare(set(options["layers"]), options["temporary"])
        _prepare_interpreter()
    except BaseException as error:
        _send(control, {"failed": f"{type(error).__name__}: {error}"})
        os._exit(1)
    os.dup2(0, 2)  # from the parent's pipe for start-up errors to /dev/null
    gc.collect()
    gc.freeze()  # keeps the children's collector from copying the worker's pages
    _send(control, {"ready": "" if setting.is_init else setting.root})
    try:
        while Session(control, setting).serve():
            pass
    finally:
        if not setting.is_init:
            cleanup.empty_directory(setting.root)
            os.rmdir(setting.root)
        os._exit(0)


def prepare(layers: set[str], temporary: str) -> Setting:
    """Enter the layers that hold for all children, and ready those that each child puts on itself.

    Raises:
        OSError: a layer that was there when it was probed is not there now.
    """
    library = library_files()
    uid = limits.sandbox_uid() if "uid" in layers else None
    own_user = "bubblewrap" in layers or ("namespaces" in layers and enter_namespaces(library))
    is_init = bool({"namespaces", "bubblewrap"} & layers)
    if linux.LINUX:
        linux.prctl(linux.PR_SET_NO_NEW_PRIVS, 1)
        linux.prctl(linux.PR_SET_CHILD_SUBREAPER, 1)
    root = WORK_ROOT if is_init else cleanup.make_own_root(temporary, child.HIGH)
    rules: dict[str, landlock.Ruleset | None] = {"program": None, "grader": None}
    if "landlock" in layers:
        for kind, writable in (("program", root), ("grader", None)):
            ruleset = landlock.build_ruleset(library, DEVICES, writable)
            high = fcntl.fcntl(ruleset.descriptor, fcntl.F_DUPFD_CLOEXEC, child.HIGH)
            os.close(ruleset.descriptor)
            rules[kind] = ruleset._replace(descriptor=high)
    if "rlimits" in layers:
        limits.set_shared_limits()
    private_count = own_user or uid not in (None, limits.NOBODY)
    program = child.Confinement(
        uid=uid,
        limited="rlimits" in layers,
        tasks=limits.TASKS if private_count else None if "seccomp" in layers else 0,
        ruleset=rules["program"],
        filter=seccomp.Filter() if "seccomp" in layers else None,
        directory=os.path.join(root, "work"),
    )
    grader = program._replace(uid=None if uid is None else uid - 1, ruleset=rules["grader"], directory="/")
    make_directory(program)
    confinement = {"calls": program, "program": program, "grader": grader}
    return Setting(root, is_init, "seccomp" not in layers, confinement)


def make_directory(own: child.Confinement) -> None:
    """Make the directory that programs start in."""
    os.mkdir(own.directory, _DIRECTORY_MODE)
    if own.uid is not None:
        os.chown(own.directory, own.uid, own.uid)


def _prepare_interpreter() -> None:
    """Load what programs import most, and make what is random or left out by `-S` the same for all children."""
    for name in _COMMON.split():
        importlib.import_module(name)
    random.seed(0)
    vars(builtins)["exit"] = vars(builtins)["quit"] = _sitebuiltins.Quitter("exit", "exit()")


class Session:
    """The programs of one session, and what became of them."""

    def __init__(self, control: socket.socket, setting: Setting) -> None:
        self.control = control
        self.setting = setting
        self.children: list[Child] = []
        self.codes: dict[int, int] = {}
        self.stopped: dict[int, str] = {}
        self.failed = ""  # the first layer that failed
        self.buffer = b""
        self.descriptors: list[int] = []

    def serve(self) -> bool:
        """Serve until the parent ends the session; return whether there is still a parent."""
        while (message := self._receive()) and message["do"] == "spawn":
            self._spawn(message)
        if message:
            self._await_ends(message["wait_s"])
        self._finish()
        if message:
            ends = [[one.kind, self.codes.get(one.pid), self.stopped.get(one.pid)] for one in self.children]
            _send(self.control, {"ends": ends, "failed": self.failed})
        return bool(message)

    def _receive(self) -> dict[str, Any] | None:
        """Wait for a message, watching the children meanwhile; None when the parent is gone."""
        while b"\n" not in self.buffer:
            while not select.select([self.control], [], [], _WATCH_S if self.children else None)[0]:
                self._watch()
            try:
                data, descriptors, _, _ = socket.recv_fds(self.control, _MESSAGE_BYTES, _DESCRIPTORS)
            except ConnectionError:
                return None
            if not data:
                return None
            self.buffer += data
            self.descriptors += descriptors
        line, _, self.buffer = self.buffer.partition(b"\n")
        message: dict[str, Any] = json.loads(line)
        return message

    def _spawn(self, message: dict[str, Any]) -> None:
        """Fork a child; whether its layers are on is asked at the end."""
        kind, timeout_s, count = message["kind"], message["timeout_s"], message["descriptors"]
        descriptors, self.descriptors = self.descriptors[:count], self.descriptors[count:]
        ours, theirs = os.pipe()
        pid = os.fork()
        if pid == 0:
            self.control.close()
            child.run(kind, self.setting.confinement[kind], descriptors, theirs, timeout_s)
        for descriptor in (*descriptors, theirs):
            os.close(descriptor)
        self.children.append(Child(kind, pid, time.monotonic() + timeout_s + _GRACE_S, ours))

    def _watch(self) -> None:
        """Kill the children that use up more than their share."""
        for one in self.children:
            if time.monotonic() > one.deadline:
                self._stop(one, "time")
            elif self.setting.confinement[one.kind].tasks is None and _threads(one.pid) > limits.TASKS:
                self._stop(one, "threads")
        if not self.setting.is_init and not cleanup.within_quota(
            self.setting.root, limits.DISK_BYTES, limits.DISK_ENTRIES
        ):
            for one in self.children:
                self._stop(one, "disk")

    def _stop(self, one: Child, why: str) -> None:
        if one.pid not in self.codes:  # else the number may be another process's by now
            self.stopped.setdefault(one.pid, why)
            cleanup.kill(one.pid)

    def _await_ends(self, wait_s: float) -> None:
        """Wait for the children to end by themselves, for so long at most."""
        deadline = time.monotonic() + wait_s
        while len(self.codes) < len(self.children) and (left := deadline - time.monotonic()) > 0:
            running = [one.pid for one in self.children if one.pid not in self.codes]
            _wait_for_one(running, min(left, _WATCH_S))
            self.codes |= cleanup.reap(block=False)
            self._watch()

    def _finish(self) -> None:
        """Kill what is left and empty the directory."""
        if not self.children:
            return
        uid = self.setting.confinement["program"].uid
        pids = [one.pid for one in self.children if one.pid not in self.codes]
        self.codes |= cleanup.end_processes(
            pids,
            is_init=self.setting.is_init,
            uid=uid if uid != limits.NOBODY else None,
            may_fork=self.setting.may_fork,
        )
        for one in self.children:
            self.failed = self.failed or os.read(one.setup, _MESSAGE_BYTES).decode(errors="replace")
            os.close(one.setup)
        own = self.setting.confinement["program"]
        if not cleanup.is_untouched(self.setting.root, own.directory, _DIRECTORY_MODE):
            cleanup.empty_directory(self.setting.root)
            make_directory(own)


def _wait_for_one(pids: list[int], timeout_s: float) -> None:
    """Wait until one of the children ends, or the time is over."""
    try:
        watched = [os.pidfd_open(pid) for pid in pids]
    except (AttributeError, OSError):
        time.sleep(_TICK_S)
        return
    select.select(watched, [], [], timeout_s)
    for descriptor in watched:
        os.close(descriptor)


def _threads(pid: int) -> int:
    """Count a process's threads; 0 where the system does not tell."""
    try:
        with open(f"/proc/{pid}/stat", "rb") as file:
            return int(file.read().rpartition(b")")[2].split()[17])
    except (OSError, IndexError):
        return 0


def _send(control: socket.socket, message: dict[str, Any]) -> None:
    with contextlib.suppress(ConnectionError):  # the parent is gone: the next read says so
        control.sendall(json.dumps(message).encode("ascii") + b"\n")
