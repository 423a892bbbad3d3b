"""The judge process: keeps sympy warm, forks children for the items, kills the ones over their limit.

Run as a script by `rewards.judge`, with the parent's pipe as stdin and stdout, one JSON object a line. This process
itself judges nothing and so cannot hang; each child takes one item at a time. A killed child is replaced by a fork of
the warm parser (a few milliseconds). It ends, with its children, when stdin closes: when the caller is gone.
"""

from __future__ import annotations

import contextlib
import importlib
import json
import os
import resource
import select
import signal
import sys
import time
import types
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

_MOST_CHILDREN = 4
_MEMORY_BYTES = 2 << 30


def serve() -> None:
    """Answer batches until stdin closes."""
    replies = os.dup(1)
    os.dup2(os.open(os.devnull, os.O_WRONLY), 1)  # what a library prints must not reach the caller
    stdin = os.fdopen(0, "rb", closefd=False)
    places = json.loads(stdin.readline())
    sys.path[:] = places["path"]
    rewards = types.ModuleType("rewards")  # the caller's copy, whatever else is called `rewards` on the path
    rewards.__path__ = [places["package"]]
    sys.modules["rewards"] = rewards
    try:
        import math_verify  # noqa: F401  warm before the first fork

        importlib.import_module("rewards.math.symbolic")
    except Exception as error:
        _send(replies, {"error": f"{type(error).__name__}: {error} (pip install math-verify brings what it needs)"})
        return
    _send(replies, {"ready": True})
    pool = _Pool()
    while line := stdin.readline():
        request = json.loads(line)
        if request["kind"] not in TASKS:
            _send(replies, {"error": f"there is no such task; the tasks are {', '.join(TASKS)}"})
            continue
        try:
            reply: dict[str, Any] = {"verdicts": pool.judge(request["kind"], request["items"], request["limit_s"])}
        except ImportError as error:
            reply = {"error": f"{type(error).__name__}: {error}"}
        _send(replies, reply)
    pool.kill_all()


def _send(fd: int, message: dict[str, Any]) -> None:
    data = json.dumps(message).encode() + b"\n"
    while data:
        data = data[os.write(fd, data) :]


def judge_math(gold: str, given: str) -> str:
    """Compare two committed answers with sympy."""
    from rewards.math.symbolic import Undecided, judge

    try:
        return "yes" if judge(gold, given) else "no"
    except Undecided:
        return "undecided"


def judge_math_verify(gold: str, given: str) -> str:
    """Compare two committed answers with math-verify alone, as an independent second opinion."""
    from rewards.math.symbolic import Undecided, judge_by_math_verify

    try:
        return "yes" if judge_by_math_verify(gold, given) else "no"
    except Undecided:
        return "undecided"


def judge_reasoning_gym(given: str, entry: str) -> str:
    """Score an answer with reasoning-gym's own verifier; the number it pays, as text."""
    import reasoning_gym

    row = json.loads(entry)
    try:
        verify = reasoning_gym.get_score_answer_fn(row["metadata"]["source_dataset"])
    except ValueError:
        return "unknown"
    return repr(float(verify(given, row)))


TASKS: dict[str, Callable[..., str]] = {
    "math": judge_math,
    "math_verify": judge_math_verify,
    "reasoning_gym": judge_reasoning_gym,
}


@dataclass
class _Child:
    pid: int
    requests: int  # file descriptor, server to child
    results: int  # file descriptor, child to server
    item: int | None = None
    deadline: float = 0.0


class _Pool:
    """Warm children; each holds at most one item."""

    def __init__(self) -> None:
        self.children: list[_Child] = []
        self.most = min(_MOST_CHILDREN, os.cpu_count() or 1)

    def judge(self, kind: str, items: list[list[str]], limit_s: float) -> list[str]:
        if kind == "reasoning_gym" and "reasoning_gym" not in sys.modules:
            import reasoning_gym  # noqa: F401  before the fork, so that the children have it

            self.kill_all()
        verdicts = [""] * len(items)
        waiting = list(range(len(items)))[::-1]
        while waiting or any(child.item is not None for child in self.children):
            self.hand_out(kind, items, waiting, limit_s)
            busy = [child for child in self.children if child.item is not None]
            patience = max(0.0, min(child.deadline for child in busy) - time.monotonic())
            readable = select.select([0, *(child.results for child in busy)], [], [], patience)[0]
            if 0 in readable:  # the caller sends nothing while it waits: it is gone
                self.kill_all()
                os._exit(0)
            for child in busy:
                item = child.item
                assert item is not None
                if child.results in readable:
                    verdicts[item] = self.collect(child)
                elif time.monotonic() >= child.deadline:
                    verdicts[item] = "timeout"
                    self.kill(child)
        return verdicts

    def hand_out(self, kind: str, items: list[list[str]], waiting: list[int], limit_s: float) -> None:
        idle = [child for child in self.children if child.item is None]
        while waiting and (idle or len(self.children) < self.most):
            child = idle.pop() if idle else self.fork()
            child.item = waiting.pop()
            child.deadline = time.monotonic() + limit_s
            try:
                _send(child.requests, {"kind": kind, "item": items[child.item]})
            except BrokenPipeError:  # it died idle: another takes the item
                waiting.append(child.item)
                self.kill(child)

    def collect(self, child: _Child) -> str:
        data = b""
        while not data.endswith(b"\n"):
            chunk = os.read(child.results, 4096)
            if not chunk:
                self.kill(child)
                return "crash"
            data += chunk
        child.item = None
        return str(json.loads(data)["verdict"])

    def fork(self) -> _Child:
        to_child, from_server = os.pipe()
        to_server, from_child = os.pipe()
        pid = os.fork()
        if pid == 0:
            for fd in (0, from_server, to_server, *(fd for c in self.children for fd in (c.requests, c.results))):
                os.close(fd)
            try:
                _work(to_child, from_child)
            finally:
                os._exit(0)
        os.close(to_child)
        os.close(from_child)
        child = _Child(pid, from_server, to_server)
        self.children.append(child)
        return child

    def kill(self, child: _Child) -> None:
        self.children.remove(child)
        with contextlib.suppress(ProcessLookupError):
            os.kill(child.pid, signal.SIGKILL)
        os.waitpid(child.pid, 0)
        os.close(child.requests)
        os.close(child.results)

    def kill_all(self) -> None:
        for child in list(self.children):
            self.kill(child)


def _work(requests: int, results: int) -> None:
    """Judge items until the pipe closes, with bounded memory."""
    with contextlib.suppress(ValueError, OSError):  # not on macOS
        resource.setrlimit(resource.RLIMIT_AS, (_MEMORY_BYTES, _MEMORY_BYTES))
    with contextlib.suppress(ValueError, OSError):
        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    stream = os.fdopen(requests, "rb")
    while line := stream.readline():
        request = json.loads(line)
        try:
            verdict = TASKS[request["kind"]](*request["item"])
        except Exception:  # sympy fails in every way on nonsense; the caller counts these as metrics
            verdict = "undecided"
        _send(results, {"verdict": verdict})


if __name__ == "__main__":
    serve()
