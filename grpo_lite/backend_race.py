"""A short race of the two backends on a recipe's own shape: what each needs for a token, and which one is worth taking.

Torch-free: each backend runs a few steps of the recipe in a process of its own, since Unsloth patches the process it is
imported into. Unsloth's models train by its own trainer, which resumes, though not exactly, and recovers from no lack
of memory; so it has to be `WORTH` times as fast, or the only one that runs.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from types import FrameType
from typing import Any

from grpo_lite.base_model import resolve_base
from grpo_lite.recipe import EMBEDDED_MODEL, TINY_MODEL, Recipe
from grpo_lite.run_dir import RunDir, dump_recipe, now
from grpo_lite.trust import trusts_remote_code

BACKENDS = ("hf", "unsloth")
STEPS = 4  # of each; those of the first round compile, and do not count
LIMIT_S = 300.0  # of each
WORTH = 1.25

Show = Callable[[str], None]

# The process of a backend. It ends with the one that started it, which alone knows its time limit; a parent that was
# killed before the call is noticed by its number. The line of overrides comes as arguments.
_CHILD = """
import os, sys
parent = int(sys.argv.pop(1))
if sys.platform.startswith("linux"):
    from rewards import _sandbox_linux as linux
    try:
        linux.prctl(linux.PR_SET_PDEATHSIG, 9)
    except OSError:
        pass
if os.getppid() != parent:
    sys.exit(1)
from grpo_lite.cli import main
main()
"""


def race(recipe: Recipe, show: Show, steps: int = STEPS, limit_s: float = LIMIT_S) -> dict[str, Any]:
    """Train some steps by each backend, in processes of their own and scratch folders.

    Args:
        recipe: its shape, model, data and rewards are used; nothing is evaluated, merged or kept.
        show: gets a line a backend.
        steps: optimizer steps of each, 2 or more; those of the first round do not count. More are taken where a round
            is trained on in several steps, so that a whole one counts.
        limit_s: seconds of each; what was logged until then counts. The base is fetched before.

    Returns:
        For each backend `token_s` (seconds for one token of every completion of a round: its steps' seconds over the
        mean completion length), `step_s`, `peak_memory_bytes` (None if it was ended by the limit), or `fault`, with
        `slow` if the limit came first; and `chosen`, `why`, `at`.

    Raises:
        GRPOLiteError: the base cannot be had, or code that comes with it is not confirmed.
    """
    trusts_remote_code(recipe.model)
    if recipe.model.id not in (EMBEDDED_MODEL, TINY_MODEL):  # both made in seconds, by libraries that Unsloth patches
        resolve_base(recipe.model.id, recipe.model.revision)
    found: dict[str, Any] = {}
    with _stopped_by_signals():
        for backend in BACKENDS:
            found[backend] = _measured(recipe, backend, steps, limit_s)
            show(f"  {backend}: {describe(found[backend])}")
    chosen, why = verdict(found["hf"], found["unsloth"])
    return {**found, "chosen": chosen, "why": why, "at": now()}


def verdict(ours: dict[str, Any], other: dict[str, Any]) -> tuple[str, str]:
    """Return the backend to take, and why, from what a race found of each."""
    if "fault" in other:
        return "hf", "unsloth did not run" + (", nor did hf" if "fault" in ours else "")
    if ours.get("slow"):  # it came first, and fetched the data too
        return "hf", "it was not done in time, so nothing is known (grpo-lite backends --minutes measures longer)"
    if "fault" in ours:
        return "unsloth", "hf did not run"
    ratio = ours["token_s"] / other["token_s"]
    if ratio >= WORTH:
        return "unsloth", f"it took {1 / ratio:.2f} of hf's time (no exact resume, no recovery from lack of memory)"
    return "hf", f"unsloth was {ratio:.2f}x as fast; {WORTH:g}x would outweigh exact resume and recovery"


def describe(measured: dict[str, Any]) -> str:
    """Return one line on what a race found of a backend."""
    if "fault" in measured:
        return f"did not run: {measured['fault']}"
    peak = measured["peak_memory_bytes"]
    return f"{measured['step_s']:.3g} s a step, {1000 * measured['token_s']:.3g} ms a token, " + (
        f"peak {peak / 2**30:.2f} GiB" if peak else "ended by the limit before its peak was known"
    )


def round_steps(recipe: Recipe) -> int:
    """Return how many optimizer steps train on one round of completions."""
    micro_steps = recipe.generation_batch // max(1, int(recipe.grpo.get("per_device_train_batch_size", 8)))
    micro_steps *= int(recipe.grpo.get("num_iterations") or 1)
    return max(1, -(-micro_steps // max(1, int(recipe.grpo.get("gradient_accumulation_steps", 1)))))


def _measured(recipe: Recipe, backend: str, steps: int, limit_s: float) -> dict[str, Any]:
    try:
        with tempfile.TemporaryDirectory(prefix="grpo_lite_race_", ignore_cleanup_errors=True) as folder:
            return _run(recipe, backend, Path(folder), steps, limit_s)
    except OSError as error:  # a full disk: an outcome, not the end of the run
        return {"fault": f"{error.strerror}: {error.filename or ''}"}


def _run(recipe: Recipe, backend: str, folder: Path, steps: int, limit_s: float) -> dict[str, Any]:
    file, run, per_round = folder / f"{recipe.name}.yaml", RunDir(folder / "run"), round_steps(recipe)
    file.write_text(dump_recipe(recipe), encoding="utf-8")
    steps = per_round * max(2, -(-steps // per_round))
    command = [sys.executable, *_own_path(), "-c", _CHILD, str(os.getpid())]
    command += ["train", str(file), "--run", str(run.path), "--plain"]
    command += [f"model.backend={backend}", f"grpo.max_steps={steps}", "grpo.logging_steps=1", "grpo.report_to=none"]
    command += ["eval.every=0", "eval.enabled=false", "merge=false", "check.enabled=false", "log.preflight=false"]
    command += ["limits.max_minutes=null", "push_checkpoints=null"]
    said, slow = [f"it took more than {limit_s:g} s"], True
    with contextlib.suppress(subprocess.TimeoutExpired):
        said, slow = [line for line in _output(command, limit_s).splitlines() if line.strip()], False
    logged = list(_steps(run))[per_round:]
    logged = logged[: len(logged) // per_round * per_round]
    tokens = sum(step.get("completions/mean_length", 0.0) for step in logged)
    if not tokens:
        errors = [line for line in said if line.startswith("error: ")]
        fault = (errors or said or ["it said nothing"])[-1]
        return {"fault": fault, "slow": True} if slow else {"fault": fault}
    peak = None if slow else run.read_run().get("peak_memory_bytes")
    times = [step["step_time"] for step in logged]
    return {"step_s": statistics.median(times), "token_s": sum(times) / tokens, "peak_memory_bytes": peak}


def _own_path() -> list[str]:
    """Return Python's `-P` where this process does not import from the working directory either."""
    return [] if "" in sys.path or os.getcwd() in sys.path else ["-P"]


def _output(command: list[str], limit_s: float) -> str:
    """Run a command and return what it says; it and what it started end with the wait for it, however that ends.

    Raises:
        subprocess.TimeoutExpired: it took longer.
    """
    with subprocess.Popen(
        command, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, start_new_session=True
    ) as process:
        try:
            said, _ = process.communicate(timeout=limit_s)
        except BaseException:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            raise
    return said.decode("utf-8", errors="replace")


@contextlib.contextmanager
def _stopped_by_signals() -> Iterator[None]:
    """Let SIGTERM and SIGHUP stop as Ctrl-C does, so that nothing is left behind; nohup's SIGHUP stays ignored."""

    def stop(number: int, frame: FrameType | None) -> None:
        raise KeyboardInterrupt

    before: dict[int, Any] = {}
    for number in (signal.SIGTERM, signal.SIGHUP):
        if signal.getsignal(number) is not signal.SIG_IGN:
            with contextlib.suppress(ValueError):  # not the main thread: signals stay as they are
                before[number] = signal.signal(number, stop)
    try:
        yield
    finally:
        for which, handler in before.items():
            signal.signal(which, handler)


def _steps(run: RunDir) -> Iterator[dict[str, Any]]:
    with contextlib.suppress(OSError, ValueError):
        for line in run.metrics_file.read_text(encoding="utf-8").splitlines():
            step = json.loads(line)
            if "step_time" in step:
                yield step
