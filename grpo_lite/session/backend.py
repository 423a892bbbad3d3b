"""What `model.backend: auto` means: `hf`, unless `grpo-lite backends` has measured Unsloth to be faster on this card.

The measurement trains a few steps with each backend. It starts one process for each, through the public command line,
because Unsloth patches the process that imports it. Torch is imported only for the card's name. Not yet run on a GPU.
"""

from __future__ import annotations

import contextlib
import importlib.util
import os
import signal
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import yaml

from grpo_lite.commands import hint
from grpo_lite.files.cache import keep_record, kept_record
from grpo_lite.files.records import read_json_lines
from grpo_lite.models.unsloth import imported_before, lacks
from grpo_lite.processes import this_process
from grpo_lite.recipe.recipe import Recipe
from grpo_lite.runs.run_dir import RunDir, dump_recipe
from grpo_lite.runs.start import fetch_if_new
from grpo_lite.screen import Show
from grpo_lite.units import duration, now

BACKENDS = ("hf", "unsloth")
WORTH = 1.25  # how many times faster Unsloth must be: its trainer lacks exact resume and recovery from out of memory


def with_chosen_backend(recipe: Recipe, run: RunDir, show: Show) -> Recipe:
    """Return the recipe with `auto` settled; a run keeps the backend that it started with, on every machine.

    Raises:
        GRPOLiteError: the checkpoints' remote location cannot be reached.
    """
    if recipe.model.backend != "auto":
        return recipe
    fetch_if_new(run, recipe, show)
    if run.recipe_file.is_file():
        return recipe.with_section("model", backend=_first_backend(run))
    card = card_with_both()
    if card is None:
        return recipe
    outcome = stored_outcome(recipe, card)
    backend = outcome.get("chosen", "hf")
    reason = outcome.get("why", f"nothing was measured on this card yet ({hint('backends', recipe=recipe.name)})")
    if backend == "unsloth" and (obstacle := _obstacle(recipe)):
        backend, reason = "hf", obstacle
    show(f"backend: {backend}; {reason}")
    return recipe.with_section("model", backend=backend)


def card_with_both() -> str | None:
    """Return the CUDA device's name where both backends could train; None where there is no choice."""
    if this_process().world > 1 or importlib.util.find_spec("unsloth") is None:
        return None
    import torch

    return torch.cuda.get_device_name(0) if torch.cuda.is_available() else None


def measure_backends(recipe: Recipe, card: str, show: Show, steps: int, limit_s: float) -> dict[str, Any]:
    """Train `steps` steps with each backend and store which one `auto` takes on this card for this model.

    Args:
        recipe: its model, data, rewards and lengths are used; nothing is evaluated, merged or kept.
        card: the CUDA device's name.
        show: gets two lines for each backend, before and after.
        steps: optimizer steps of each, 2 or more; rounded up to whole rounds, of which the first is not counted.
        limit_s: seconds of each.

    Returns:
        `chosen`, `why`, `measured_at`, and for each backend `step_s` (mean) or `fault`.
    """
    results = {}
    for backend in BACKENDS:
        show(f"  {backend}: training {steps} steps, within {duration(limit_s)}")
        figures = results[backend] = _measure(recipe, backend, steps, limit_s)
        show(f"  {backend}: " + (f"{figures['step_s']:.3g} s a step" if "step_s" in figures else figures["fault"]))
    best, why = choose(results["hf"], results["unsloth"])
    outcome = {**results, "chosen": best, "why": why, "measured_at": now()}
    if any("step_s" in figures for figures in results.values()):
        keep_record("backends", _key(recipe, card), outcome)
    return outcome


def choose(hf: dict[str, Any], unsloth: dict[str, Any]) -> tuple[str, str]:
    """Return the backend to take and why, from each one's figures."""
    if "step_s" not in unsloth:
        return "hf", "unsloth did not train here"
    if "step_s" not in hf:
        return "unsloth", "hf did not train here"
    ratio = hf["step_s"] / unsloth["step_s"]
    line = f"unsloth measured {ratio:.2f}x as fast as hf, and is taken from {WORTH:g}x on: it lacks exact resume"
    return ("unsloth" if ratio >= WORTH else "hf"), line


def stored_outcome(recipe: Recipe, card: str) -> dict[str, Any]:
    """Return what `measure_backends` stored for this card and model; an empty mapping if nothing usable."""
    outcome = kept_record("backends", _key(recipe, card))
    return outcome if outcome.get("chosen") in BACKENDS else {}


def _key(recipe: Recipe, card: str) -> dict[str, Any]:
    return {"card": card, "model": recipe.model.id, "load_in": recipe.model.load_in}


def _obstacle(recipe: Recipe) -> str | None:
    if early := imported_before():
        return f"unsloth must be imported before {', '.join(early)}, imported here already (restart the notebook)"
    return lacks(recipe)


def _first_backend(run: RunDir) -> str:
    """Return the backend in a run's recipe; an unreadable recipe is refused later, as a whole."""
    with contextlib.suppress(OSError, ValueError, KeyError, TypeError, yaml.YAMLError):
        backend = yaml.safe_load(run.recipe_file.read_text(encoding="utf-8"))["model"]["backend"]
        if backend in BACKENDS:
            return str(backend)
    return "auto"


def _measure(recipe: Recipe, backend: str, steps: int, limit_s: float) -> dict[str, Any]:
    """Train some steps through the command line in a temporary folder; return `step_s` or `fault`."""
    with tempfile.TemporaryDirectory(prefix="grpo_lite_backends_", ignore_cleanup_errors=True) as folder:
        file, run = Path(folder) / f"{recipe.name}.yaml", RunDir(Path(folder) / "run")
        file.write_text(dump_recipe(recipe), encoding="utf-8")
        per_round = recipe.schedule.steps_per_round
        steps = per_round * max(2, -(-steps // per_round))
        command = [sys.executable, "-m", "grpo_lite.cli", "train", str(file), "--run", str(run.path), "--plain"]
        command += [f"model.backend={backend}", f"grpo.max_steps={steps}", "grpo.logging_steps=1"]
        command += ["grpo.report_to=none", "eval.every=0", "eval.enabled=false", "merge=false", "check.enabled=false"]
        command += ["log.preflight=false", "limits.max_minutes=null", "push_checkpoints=null"]
        output = _output(command, limit_s)
        if output is None:
            return {"fault": f"not done within {limit_s:g} s (--minutes allows more)"}
        times = [step["step_time"] for step in read_json_lines(run.metrics_file) if "step_time" in step][per_round:]
        if not times:
            lines = [line for line in output.splitlines() if line.strip()] or ["it printed nothing"]
            return {"fault": next((line for line in reversed(lines) if line.startswith("error: ")), lines[-1])}
    return {"step_s": statistics.fmean(times)}


def _output(command: list[str], limit_s: float) -> str | None:
    """Return what a command prints, None where it takes longer; nothing that it started outlives this call."""
    with subprocess.Popen(
        command, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, start_new_session=True
    ) as process:
        try:
            return process.communicate(timeout=limit_s)[0].decode("utf-8", errors="replace")
        except subprocess.TimeoutExpired:
            return None
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
