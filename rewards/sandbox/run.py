"""Run untrusted Python against tests; neither the machine nor the score depends on the program's good will.

    >>> from rewards.sandbox import Calls, Call, run_tests
    >>> tests = Calls((Call("add", [1, 2], 3), Call("add", [2, 2], 4)))
    >>> [outcome.fraction for outcome in run_tests(["def add(a, b): return a + b", "def add(a, b): return 3"], tests)]
    [1.0, 0.5]

Isolation is a stack of layers, each found by trying it (`layers`). A program runs only where files and network are out
of its reach, or where the caller accepts weak isolation. What each layer covers and does not:
docs/sandbox.md.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import NamedTuple

from .forms import Tests
from .kernel.library import library_files
from .kernel.namespaces import bubblewrap_command
from .pool import Pool, SandboxError, Worker, WorkerLostError, pool_for
from .programs import Outcome, run_program

TIMEOUT_S = 10.0  # the slowest reference solution of MBPP needs 4 s
WITHOUT = "GRPO_LITE_SANDBOX_WITHOUT"  # layers to leave out, with commas between: for tests and for measuring
_PROBE_S = 120.0


class IsolationError(SandboxError):
    """This machine cannot keep a program away from files and network, and the caller has not accepted that."""


class Layer(NamedTuple):
    """One layer of isolation on this machine."""

    name: str
    available: bool
    why: str  # what it does, or why it is not available


class Isolation(NamedTuple):
    """What the available layers keep a program away from."""

    layers: tuple[str, ...]
    files: bool
    network: bool

    @property
    def weak(self) -> bool:
        """Whether files or network are within a program's reach."""
        return not (self.files and self.network)


_PURPOSE = {
    "process": "own session, empty environment and directory, no inherited descriptors, killed at the time limit",
    "rlimits": "bounds on memory, CPU time, file size, open files and processes",
    "uid": "programs run as a user of their own",
    "landlock": "no files but the standard library and an own directory; no TCP",
    "seccomp": "no processes, no programs, no sockets, no signals to others, no change of file modes or owners",
    "namespaces": "own file system, network, processes and IPC",
    "bubblewrap": "own file system, network, processes and IPC, through the bwrap program",
}


def layers() -> list[Layer]:
    """List the layers in the order they are put on, each with whether trying it here succeeded and why not."""
    reasons = _probe(_without())
    return [Layer(name, not reasons[name], reasons[name] or purpose) for name, purpose in _PURPOSE.items()]


def isolation() -> Isolation:
    """Return which layers programs run under here, and what that keeps them away from; for a run's record.

    Landlock alone leaves modes, times and datagrams open, seccomp alone leaves files open: files need both, or a file
    system of their own.
    """
    available = {layer.name for layer in layers() if layer.available}
    if "namespaces" in available:
        available.discard("bubblewrap")  # the same layer, set up by another program
    own_world = bool({"namespaces", "bubblewrap"} & available)
    return Isolation(
        layers=tuple(name for name in _PURPOSE if name in available),
        files=own_world or {"landlock", "seccomp"} <= available,
        network=own_world or "seccomp" in available,
    )


def run_tests(
    programs: Sequence[str],
    tests: Tests | Sequence[Tests],
    *,
    timeout_s: float = TIMEOUT_S,
    allow_weak_isolation: bool = False,
) -> list[Outcome]:
    """Run every program against its tests, several at a time.

    Args:
        programs: Python source.
        tests: one for all programs, or one each.
        timeout_s: wall-clock seconds for a program and all its tests together.
        allow_weak_isolation: run even where files or network are within reach of the programs.

    Raises:
        IsolationError: they are, and that was not allowed.
        SandboxError: the sandbox failed; there is no verdict.
    """
    each = list(tests) if isinstance(tests, Sequence) else [tests] * len(programs)
    pool = _pool(allow_weak_isolation)

    def run_one(pair: tuple[str, Tests]) -> Outcome:
        for _ in range(2):
            try:
                with pool.borrow() as worker:
                    return run_program(worker, *pair, timeout_s)
            except WorkerLostError as error:
                lost = str(error)
        return Outcome(passed=(False,), error=f"two workers were lost with it: {lost}")

    return pool.map(run_one, list(zip(programs, each, strict=True)))


def _pool(allow_weak_isolation: bool) -> Pool:
    """Return the workers with all layers there are, if they suffice."""
    stack = isolation()
    if stack.weak and not allow_weak_isolation:
        reach = " and ".join(what for what, safe in (("files", stack.files), ("network", stack.network)) if not safe)
        missing = "; ".join(f"{layer.name}: {layer.why}" for layer in layers() if not layer.available)
        raise IsolationError(
            f"rewards.sandbox: programs written by the model could reach this machine's {reach}. It takes "
            f"landlock and seccomp, or namespaces, or bubblewrap to prevent that. Not available: {missing}. Run on "
            "another machine, enable one of them, or set allow_weak_isolation: true if nothing here needs protection."
        )
    return pool_for(stack.layers, _bubblewrap() if "bubblewrap" in stack.layers else ())


def _without() -> frozenset[str]:
    return frozenset(name.strip() for name in os.environ.get(WITHOUT, "").split(",") if name.strip())


@cache
def _probe(without: frozenset[str]) -> dict[str, str]:
    """Return for each layer why it is not available, "" if it is. Tried once per process."""
    reasons = {"process": "", **_ask_probe({}, ())}
    missing = {name for name, why in reasons.items() if why} | without
    if reasons["uid"].startswith("user ") and ("namespaces" not in missing or missing & {"landlock", "seccomp"}):
        # Inside the namespaces the library lies where any user may read it. And where nothing else keeps root's
        # programs from files and processes, being another user is worth more than importing the whole library.
        reasons["uid"] = ""
    bwrap = _bubblewrap()
    try:
        reasons |= _ask_probe({"inside": True}, bwrap) if bwrap else {"bubblewrap": "bwrap is not installed"}
    except SandboxError as error:
        reasons["bubblewrap"] = str(error)
    return reasons | dict.fromkeys(without, f"left out by {WITHOUT}")


def _ask_probe(options: dict[str, bool], prefix: Sequence[str]) -> dict[str, str]:
    worker = Worker("kernel.probe", options, prefix)
    try:
        return {str(name): str(why) for name, why in worker.reply(_PROBE_S).items()}
    finally:
        worker.kill()


@cache
def _bubblewrap() -> tuple[str, ...]:
    """Return the command to start a worker with, () where bubblewrap is not installed."""
    bwrap = shutil.which("bwrap")
    return (*bubblewrap_command(bwrap, library_files(), str(Path(__file__).resolve().parent.parent)),) if bwrap else ()
