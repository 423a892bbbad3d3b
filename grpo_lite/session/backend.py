"""Which backend `model.backend: auto` takes on a card: what a short race of the two found for the recipe's shape.

Torch-free until a card is asked for, and free of what Unsloth has to be imported before.

A short race of the two backends on a recipe's own shape: what each needs for a token, and which one is worth taking.

Torch-free: each backend runs a few steps of the recipe in a process of its own, since Unsloth patches the process it is
imported into. Unsloth's models train by its own trainer, which resumes, though not exactly, and recovers from no lack
of memory; so it has to be `WORTH` times as fast, or the only one that runs.
"""

from __future__ import annotations

import contextlib
import importlib.util
import json
import os
import signal
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from types import FrameType
from typing import Any

import yaml

from grpo_lite.errors import GRPOLiteError
from grpo_lite.files.cache import keep_record, kept_record
from grpo_lite.models.base import resolve_base, trusts_remote_code
from grpo_lite.models.unsloth import imported_before, lacks
from grpo_lite.processes import this_process
from grpo_lite.recipe.recipe import EMBEDDED_MODEL, TINY_MODEL, Recipe, SourceSection
from grpo_lite.recipe.schedule import round_steps
from grpo_lite.runs.provenance import version_of
from grpo_lite.runs.run_dir import RunDir, dump_recipe
from grpo_lite.screen import Show
from grpo_lite.task.generators import generate_rows
from grpo_lite.units import now

LEAST_RUN = 100  # steps of a run that is worth a race
LEAST_MINUTES = 60.0  # of a session that is


def with_chosen_backend(recipe: Recipe, run: RunDir, show: Show) -> Recipe:
    """Return the recipe with `auto` settled where there is a choice: CUDA, Unsloth, and one process.

    A run that was begun keeps what it was begun with, also one whose checkpoints are elsewhere. A shape that was never
    raced on this card is raced now if the run is long, else it is `hf`.

    Raises:
        GRPOLiteError: the base to race with cannot be had, or the place of the checkpoints cannot be asked.
    """
    if recipe.model.backend != "auto":
        return recipe
    if recipe.push_checkpoints and this_process().is_first and not run.recipe_file.is_file():
        from grpo_lite.runs.remote import fetch_checkpoint

        with run.locked():
            fetch_checkpoint(run, recipe.push_checkpoints, show)
    if run.recipe_file.is_file():
        return _with(recipe, _begun_with(run))
    card = card_of_a_choice()
    if card is None:
        return recipe
    why_not = lacks(recipe)
    if early := imported_before():
        why_not = f"unsloth comes before {', '.join(early)}, imported here already (restart the notebook to race it)"
    if why_not:
        show(f"backend: hf; {why_not}")
        return _with(recipe, "hf")
    found = kept_race(recipe, card)
    if found is None and not is_long(recipe):
        show(f"backend: hf; the two were never raced here for this shape (grpo-lite backends {recipe.name})")
        return _with(recipe, "hf")
    if found is None:
        show(
            f"backend: {STEPS} steps of each are raced first, once for this shape and card, "
            f"at most {2 * LIMIT_S / 60:g} minutes (model.backend=hf leaves it out)"
        )
        with run.locked():  # a directory that cannot be had is refused before, not after
            found = race(recipe, show)
        keep_race(recipe, card, found)
    show(f"backend: {found['chosen']}; {found['why']}")
    return _with(recipe, found["chosen"])


def _begun_with(run: RunDir) -> str:
    """Return the backend in a run's recipe; what cannot be read is refused later, with the whole recipe."""
    with contextlib.suppress(OSError, ValueError, KeyError, TypeError, yaml.YAMLError):
        begun = yaml.safe_load(run.recipe_file.read_text(encoding="utf-8"))["model"]["backend"]
        if begun in BACKENDS:
            return str(begun)
    return "auto"


def _with(recipe: Recipe, backend: str) -> Recipe:
    return recipe.model_copy(update={"model": recipe.model.model_copy(update={"backend": backend})})


def is_long(recipe: Recipe) -> bool:
    """Return whether a run is worth a race, by its steps, or its epochs where its rows can be counted, and its time."""
    grpo = recipe.grpo
    if recipe.limits.max_minutes is not None and recipe.limits.max_minutes < LEAST_MINUTES:
        return False
    if (grpo.get("max_steps") or -1) > 0:
        return bool(grpo["max_steps"] >= LEAST_RUN)
    rows = _rows(recipe.data.train, recipe.seed)
    if rows is None:
        return True
    sampled = int(grpo.get("per_device_train_batch_size", 8)) * int(grpo.get("gradient_accumulation_steps", 1))
    trained = rows * recipe.num_generations * int(grpo.get("num_iterations") or 1)
    return float(grpo.get("num_train_epochs", 3) or 3) * trained / max(1, sampled) >= LEAST_RUN


def _rows(source: SourceSection, seed: int) -> int | None:
    """Return a source's rows at most, where that is known without the libraries that read it."""
    rows = None
    with contextlib.suppress(OSError, ValueError, RuntimeError, GRPOLiteError):  # data.py names what is wrong
        if source.path and source.path.endswith((".jsonl", ".csv")):
            with Path(source.path).expanduser().open("rb") as file:
                rows = sum(1 for _ in file)
        elif source.generator and source.generator != "reasoning_gym":
            rows = len(generate_rows(source.generator, source.kwargs, seed))
    return min((count for count in (rows, source.limit) if count is not None), default=None)


def card_of_a_choice() -> str | None:
    """Return the CUDA device's name where both backends could train in this process; None where there is no choice."""
    if this_process().world > 1 or importlib.util.find_spec("unsloth") is None:
        return None
    import torch

    return torch.cuda.get_device_name(0) if torch.cuda.is_available() else None


def keep_race(recipe: Recipe, card: str, found: dict[str, Any]) -> None:
    """Keep a race's outcome in the cache if it says something; a cache that cannot be written costs nothing."""
    if "fault" in found["hf"] and ("fault" in found["unsloth"] or found["hf"].get("slow")):
        return
    keep_record("backends", _settings(recipe, card), found)


def kept_race(recipe: Recipe, card: str) -> dict[str, Any] | None:
    """Return what a race found for this shape, card and these versions; None if there was none."""
    found = kept_record("backends", _settings(recipe, card))
    return {"why": "raced here before", **found} if found.get("chosen") in BACKENDS else None


def _settings(recipe: Recipe, card: str) -> dict[str, Any]:
    shape = ("num_generations", "max_completion_length", "per_device_train_batch_size", "gradient_accumulation_steps",
             "steps_per_generation", "generation_batch_size", "num_iterations", "beta", "gradient_checkpointing",
             "optim", "use_vllm")  # fmt: skip
    return {
        "card": card,
        "model": recipe.model.model_dump(mode="json", exclude={"backend"}),
        "lora": recipe.lora,
        "grpo": {key: recipe.grpo.get(key) for key in shape},
        "engine": [recipe.compute, recipe.rollout, recipe.memory.model_dump(), recipe.data.max_prompt_tokens],
        "versions": [version_of(name) for name in ("grpo-lite", "torch", "transformers", "trl", "unsloth")],
    }


BACKENDS = ("hf", "unsloth")
STEPS = 4  # of each; those of the first round compile, and do not count
LIMIT_S = 300.0  # of each
WORTH = 1.25

# The process of a backend. It ends with the one that started it, which alone knows its time limit; a parent that was
# killed before the call is noticed by its number. The line of overrides comes as arguments.
_CHILD = """
import os, sys
parent = int(sys.argv.pop(1))
if sys.platform.startswith("linux"):
    from rewards.sandbox.kernel import linux
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
