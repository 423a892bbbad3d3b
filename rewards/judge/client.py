"""The client of the judge: a separate, killable process for verdicts that may take forever (`rewards.judge.server`).

`ask` sends a batch and gets one verdict per item. The process is started on first use with a clean interpreter (never
forked from this one, which may hold CUDA or threads), stays warm, and ends with this process. It works from any thread,
in daemonic workers and in notebooks; a fork of this process starts its own. The only module state is that process:
verdicts do not depend on it.
"""

from __future__ import annotations

import atexit
import contextlib
import json
import os
import select
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Sequence
from pathlib import Path

YES, NO, TIMEOUT, UNDECIDED, CRASH, UNKNOWN = "yes", "no", "timeout", "undecided", "crash", "unknown"

_SERVER = Path(__file__).with_name("server.py")
_PACKAGE = Path(__file__).resolve().parent.parent
_START_LIMIT_S = 120.0
_SLACK_S = 30.0
_LONGEST_REPLY_BYTES = 1 << 26
_KEPT_ENVIRONMENT = ("PATH", "LD_LIBRARY_PATH", "DYLD_LIBRARY_PATH", "SYSTEMROOT", "TMPDIR")


class JudgeError(RuntimeError):
    """The judge process cannot be started, or broke down twice on one batch: no verdict, so no reward."""


def ask(kind: str, items: Sequence[Sequence[str]], limit_s: float) -> list[str]:
    """Return one verdict per item: yes, no, timeout, undecided, crash, unknown, or a number where the task scores.

    Args:
        kind: a task of `rewards.judge.server`.
        items: the task's text arguments, per item.
        limit_s: wall-clock limit per item, in seconds; an item over it is killed and the others still judged.

    Raises:
        JudgeError: there is no working judge.
    """
    if not items:
        return []
    return _judge.ask(kind, items, limit_s)


class _Judge:
    """One judge process and its two pipes."""

    def __init__(self) -> None:
        self.lock = threading.Lock()
        self.process: subprocess.Popen[bytes] | None = None

    def ask(self, kind: str, items: Sequence[Sequence[str]], limit_s: float) -> list[str]:
        request = (
            json.dumps({"kind": kind, "items": [list(item) for item in items], "limit_s": limit_s}).encode() + b"\n"
        )
        patience = len(items) * limit_s + _SLACK_S
        with self.lock:
            for attempt in (1, 2):
                try:
                    reply = self.exchange(request, patience)
                except (OSError, EOFError, TimeoutError) as error:
                    self.stop()
                    if attempt == 2:
                        raise JudgeError(f"the judge process broke down twice on one batch: {error}") from error
                    continue
                except BaseException:  # interrupted half way: the pipes are out of step
                    self.stop()
                    raise
                if "error" in reply:
                    raise JudgeError(f"the judge cannot do {kind!r}: {reply['error']}")
                return [str(verdict) for verdict in reply["verdicts"]]
        raise AssertionError("unreachable")

    def exchange(self, request: bytes, patience_s: float) -> dict[str, list[str]]:
        if self.process is None or self.process.poll() is not None:
            self.start()
        deadline = time.monotonic() + patience_s
        self.write(request, deadline)
        return json.loads(self.read_line(deadline))

    def start(self) -> None:
        self.stop()
        if not sys.executable:
            raise JudgeError("the judge needs a Python interpreter to start, but sys.executable is empty")
        environment = {name: os.environ[name] for name in _KEPT_ENVIRONMENT if name in os.environ}
        self.process = subprocess.Popen(
            [sys.executable, "-I", "-B", str(_SERVER)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            env=environment,
            bufsize=0,
            start_new_session=True,
        )
        deadline = time.monotonic() + _START_LIMIT_S
        places = {"package": str(_PACKAGE), "path": [entry for entry in sys.path if entry]}
        try:
            self.write(json.dumps(places).encode() + b"\n", deadline)
            hello = json.loads(self.read_line(deadline))
        except (OSError, EOFError, TimeoutError) as error:
            self.stop()
            raise JudgeError(f"the judge process does not start ({sys.executable} {_SERVER.name}): {error}") from error
        if "error" in hello:
            self.stop()
            raise JudgeError(f"the judge process does not start: {hello['error']}")

    def write(self, data: bytes, deadline: float) -> None:
        assert self.process is not None
        assert self.process.stdin is not None
        fd, view = self.process.stdin.fileno(), memoryview(data)
        os.set_blocking(fd, False)
        while view:
            if not select.select([], [fd], [], max(0.0, deadline - time.monotonic()))[1]:
                raise TimeoutError("it does not read")
            with contextlib.suppress(BlockingIOError):
                view = view[os.write(fd, view) :]

    def read_line(self, deadline: float) -> bytes:
        assert self.process is not None
        assert self.process.stdout is not None
        fd, buffer = self.process.stdout.fileno(), bytearray()
        while not buffer.endswith(b"\n"):
            if not select.select([fd], [], [], max(0.0, deadline - time.monotonic()))[0]:
                raise TimeoutError("it does not answer")
            chunk = os.read(fd, 1 << 16)
            if not chunk:
                raise EOFError("it ended")
            buffer += chunk
            if len(buffer) > _LONGEST_REPLY_BYTES:
                raise EOFError("its answer is too long")
        return bytes(buffer)

    def stop(self) -> None:
        """End the process and all it started, and close the pipes."""
        process, self.process = self.process, None
        if process is None:
            return
        if process.poll() is None:
            with contextlib.suppress(ProcessLookupError, PermissionError):
                os.killpg(process.pid, signal.SIGKILL)
            process.kill()
        process.wait()
        for pipe in (process.stdin, process.stdout):
            if pipe is not None:
                pipe.close()

    def forget(self) -> None:
        """Drop the parent's process in a forked child: close the copies of its pipes and do not wait for it."""
        process, self.process = self.process, None
        self.lock = threading.Lock()
        if process is None:
            return
        for pipe in (process.stdin, process.stdout):
            if pipe is not None:
                pipe.close()
        process.returncode = 0  # not this process's child: Popen must neither wait for it nor warn of it


_judge = _Judge()


def stop_judge() -> None:
    """End the judge process now; the next verdict that needs one starts another."""
    with _judge.lock:
        _judge.stop()


atexit.register(_judge.stop)
if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_judge.forget)
