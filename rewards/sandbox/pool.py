"""The parent's side of the workers: start them, lend each to one program at a time, replace and end them.

A worker is started by exec with an empty environment, so that neither a CUDA context nor a lock, an open file or a
token of the trainer is in it; this works from any thread, from worker processes and from notebooks.
"""

from __future__ import annotations

import atexit
import json
import os
import queue
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, TypeVar

from .inside.cleanup import empty_directory

Item = TypeVar("Item")
Result = TypeVar("Result")

_MOST_WORKERS = 8
_START_S = 60.0  # an interpreter starts in 0.05 s; a loaded machine may need far longer
_REPLY_S = 30.0  # beyond what a worker was asked to wait for
_REMOVE_TRIES, _REMOVE_PAUSE_S = 20, 0.05

# The worker's modules are those of this package, without running the `__init__` of `rewards` and `rewards.sandbox`.
# Hooks that modules of the library run after every fork are left out: they are for processes with several threads, and
# cost a fifth of a program's time.
_BOOTSTRAP = """
import importlib, json, os, sys, types
os.register_at_fork = lambda **hooks: None
for name, folder in ("rewards", sys.argv[1]), ("rewards.sandbox", sys.argv[1] + "/sandbox"):
    sys.modules[name] = types.ModuleType(name)
    sys.modules[name].__path__ = [folder]
importlib.import_module(sys.argv[2]).main(int(sys.argv[3]), json.loads(sys.argv[4]))
"""


class SandboxError(RuntimeError):
    """The sandbox itself failed; says nothing about the program."""


class WorkerLostError(SandboxError):
    """A worker died or does not answer in the middle of a session: a program may have done that."""


class Worker:
    """A worker process and the socket to it."""

    def __init__(self, module: str, options: dict[str, Any], prefix: Sequence[str] = ()) -> None:
        """Start `rewards.sandbox.<module>.main(socket, options)`, under the command `prefix` if there is one."""
        self.control, theirs = socket.socketpair()
        package = str(Path(__file__).resolve().parent.parent)
        interpreter = os.path.realpath(sys.executable) if prefix else sys.executable
        flags = ["-P", "-s", "-S", "-B", "-X", "utf8", "-c", _BOOTSTRAP]
        arguments = [package, f"rewards.sandbox.{module}", str(theirs.fileno()), json.dumps(options)]
        try:
            self.process = subprocess.Popen(
                [*prefix, interpreter, *flags, *arguments],
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                stderr=subprocess.PIPE,
                env={"PYTHONHASHSEED": "0"},  # sets of strings in the same order in every worker
                pass_fds=[theirs.fileno()],
                start_new_session=True,
                cwd="/",
            )
        except OSError as error:
            self.control.close()
            raise SandboxError(f"the sandbox cannot start the interpreter {interpreter!r}: {error}") from error
        finally:
            theirs.close()
        self.directory = ""

    def request(self, message: dict[str, Any], wait_s: float = 0.0) -> dict[str, Any]:
        """Send a message and return the reply.

        Raises:
            WorkerLostError: the worker died or does not answer.
        """
        self.tell(message)
        return self.reply(wait_s + _REPLY_S)

    def tell(self, message: dict[str, Any], descriptors: Sequence[int] = ()) -> None:
        """Send a message with descriptors; nothing is answered.

        Raises:
            WorkerLostError: the worker died or does not read.
        """
        try:
            data = json.dumps({**message, "descriptors": len(descriptors)}).encode("ascii") + b"\n"
            self.control.settimeout(_REPLY_S)
            socket.send_fds(self.control, [data], descriptors)
        except OSError as error:
            raise WorkerLostError(f"a sandbox worker is gone: {error}") from error

    def reply(self, timeout_s: float) -> dict[str, Any]:
        """Wait for the worker's next message."""
        deadline = time.monotonic() + timeout_s
        data = b""
        try:
            while not data.endswith(b"\n"):
                self.control.settimeout(max(0.001, deadline - time.monotonic()))
                part = self.control.recv(1 << 16)
                if not part:
                    raise WorkerLostError(f"a sandbox worker ended: {self._start_errors()}")
                data += part
        except OSError as error:
            raise WorkerLostError(f"a sandbox worker does not answer: {error}") from error
        reply: dict[str, Any] = json.loads(data)
        return reply

    def _start_errors(self) -> str:
        """Return what the interpreter wrote before it ended."""
        try:
            _, errors = self.process.communicate(timeout=1.0)
        except (subprocess.TimeoutExpired, ValueError):
            return "no message"
        return errors.decode(errors="replace").strip()[-1000:] or f"exit code {self.process.returncode}"

    def started(self, directory: str) -> None:
        """Record the worker's directory; it has started, so nobody will read its start-up errors."""
        self.directory = directory
        if self.process.stderr:
            self.process.stderr.close()

    def close(self) -> None:
        """Close the socket, which ends the worker and its programs; kill it if that does not."""
        self.control.close()
        try:
            self.process.wait(timeout=5.0)
        except subprocess.TimeoutExpired:
            self.kill()

    def kill(self) -> None:
        """End a worker that does not answer, and remove its directory in its place."""
        self.control.close()
        self.process.kill()
        self.process.wait()
        if self.process.stderr:
            self.process.stderr.close()
        for _ in range(_REMOVE_TRIES):  # its last program may take a moment to die
            if not self.directory or not os.path.isdir(self.directory):
                return
            with suppress(OSError):
                empty_directory(self.directory)
                os.rmdir(self.directory)
                return
            time.sleep(_REMOVE_PAUSE_S)

    def forget(self) -> None:
        """Release a worker that belongs to the process this one was forked from."""
        self.control.close()
        if self.process.stderr:
            self.process.stderr.close()
        self.process.returncode = 0  # not our child: nothing to wait for


class Pool:
    """Workers with the same layers, started as needed."""

    def __init__(self, layers: Sequence[str], prefix: Sequence[str] = ()) -> None:
        self.layers = list(layers)
        self.prefix = prefix
        cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
        self.size = min(_MOST_WORKERS, cores + 1)  # one more, since each waits now and then
        self.workers: set[Worker] = set()
        self.idle: queue.LifoQueue[Worker | None] = queue.LifoQueue()
        for _ in range(self.size):
            self.idle.put(None)

    @contextmanager
    def borrow(self) -> Iterator[Worker]:
        """Lend a worker; one whose session failed is not lent again."""
        worker = self.idle.get()
        try:
            if worker is None:
                worker = self._start()
            yield worker
        except BaseException:
            if worker is not None:
                self.workers.discard(worker)
                worker.kill()
            worker = None
            raise
        finally:
            self.idle.put(worker)

    def _start(self) -> Worker:
        worker = Worker("inside.worker", {"layers": self.layers, "temporary": tempfile.gettempdir()}, self.prefix)
        try:
            hello = worker.reply(_START_S)
        except WorkerLostError as error:
            worker.kill()
            raise SandboxError(str(error)) from error
        if "failed" in hello:
            worker.kill()
            raise SandboxError(f"a sandbox worker cannot put on its layers {self.layers}: {hello['failed']}")
        worker.started(hello["ready"])
        self.workers.add(worker)
        return worker

    def map(self, function: Callable[[Item], Result], items: Sequence[Item]) -> list[Result]:
        """Apply a function that borrows a worker to every item, as many at a time as there are workers."""
        if len(items) < 2 or self.size == 1:
            return [function(item) for item in items]
        with ThreadPoolExecutor(min(self.size, len(items)), thread_name_prefix="sandbox") as executor:
            try:
                return list(executor.map(function, items))
            except BaseException:
                executor.shutdown(wait=False, cancel_futures=True)
                raise

    def close(self) -> None:
        """End all workers that are idle."""
        for _ in range(self.size):
            try:
                worker = self.idle.get_nowait()
            except queue.Empty:
                return
            if worker is not None:
                self.workers.discard(worker)
                worker.close()

    def forget(self) -> None:
        """Release all workers in a forked process; the queue's lock may be held forever there."""
        for worker in self.workers:
            worker.forget()


_pools: dict[tuple[str, ...], Pool] = {}
_lock = threading.Lock()


def pool_for(layers: Sequence[str], prefix: Sequence[str]) -> Pool:
    """Return this process's pool with these layers."""
    with _lock:
        return _pools.setdefault((*layers, "|", *prefix), Pool(layers, prefix))


def close_all() -> None:
    """End all idle workers of this process; the next program starts new ones."""
    with _lock:
        pools = list(_pools.values())
        _pools.clear()
    for pool in pools:
        pool.close()


def _forget_all() -> None:
    global _lock
    _lock = threading.Lock()
    for pool in _pools.values():
        pool.forget()
    _pools.clear()


atexit.register(close_all)
if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_forget_all)
