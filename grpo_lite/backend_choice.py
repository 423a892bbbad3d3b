"""Which backend `model.backend: auto` takes on a card: what a short race of the two found for the recipe's shape.

Torch-free: each backend runs a few steps of the recipe in a process of its own, since Unsloth patches the process it is
imported into. Unsloth's models train by its own trainer, which has no exact resume, recovers from no lack of memory and
skips no broken step; so it has to be `WORTH` times as fast, or the only one that runs.
"""

from __future__ import annotations

import contextlib
import hashlib
import importlib.metadata
import importlib.util
import json
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import yaml

from grpo_lite.base_model import cache_dir
from grpo_lite.errors import GRPOLiteError
from grpo_lite.ranks import this_process
from grpo_lite.recipe import Recipe
from grpo_lite.run_dir import RunDir, dump_recipe, now, write_atomic

BACKENDS = ("hf", "unsloth")
STEPS = 4  # of each; the first compiles, and does not count
LIMIT_S = 300.0  # of each
LEAST_RUN = 100  # steps of a run that is worth a race
WORTH = 1.25

Show = Callable[[str], None]


def with_chosen_backend(recipe: Recipe, run: RunDir, show: Show) -> Recipe:
    """Return the recipe with `auto` settled where there is a choice: CUDA, Unsloth, and one process.

    A run that was begun keeps what it was begun with. A shape that was never raced on this card is raced now if the run
    is long, else it is `hf`.
    """
    if recipe.model.backend != "auto":
        return recipe
    if run.recipe_file.is_file():
        with contextlib.suppress(OSError, ValueError, KeyError, TypeError, yaml.YAMLError):
            return _with(recipe, yaml.safe_load(run.recipe_file.read_text(encoding="utf-8"))["model"]["backend"])
        return recipe
    card = card_of_a_choice()
    if card is None:
        return recipe
    found = kept_race(recipe, card)
    if found is None and 0 < recipe.grpo.get("max_steps", -1) < LEAST_RUN:
        show(f"backend: hf; the two were never raced here for this shape (grpo-lite backends {recipe.name})")
        return _with(recipe, "hf")
    if found is None:
        show(
            f"backend: {STEPS} steps of each are raced first, once for this shape and card, "
            f"at most {2 * LIMIT_S / 60:g} minutes (model.backend=hf leaves it out)"
        )
        found = race(recipe, show)
        keep_race(recipe, card, found)
    show(f"backend: {found['chosen']}; {found['why']}")
    return _with(recipe, found["chosen"])


def _with(recipe: Recipe, backend: str) -> Recipe:
    return recipe.model_copy(update={"model": recipe.model.model_copy(update={"backend": backend})})


def card_of_a_choice() -> str | None:
    """Return the CUDA device's name where both backends could train in this process; None where there is no choice."""
    if this_process().world > 1 or importlib.util.find_spec("unsloth") is None:
        return None
    import torch

    return torch.cuda.get_device_name(0) if torch.cuda.is_available() else None


def race(recipe: Recipe, show: Show, steps: int = STEPS, limit_s: float = LIMIT_S) -> dict[str, Any]:
    """Train some steps by each backend, in processes of their own and scratch folders.

    Args:
        recipe: its shape, model, data and rewards are used; nothing is evaluated, merged or kept.
        show: gets a line a backend.
        steps: optimizer steps of each, 2 or more; the first does not count.
        limit_s: seconds of each; what was logged until then counts.

    Returns:
        For each backend `token_s` (seconds for one token of every completion of a step: a step's seconds over the mean
        completion length), `step_s`, `peak_memory_bytes`, or `fault`; and `chosen`, `why`, `at`.
    """
    found: dict[str, Any] = {}
    for backend in BACKENDS:
        with tempfile.TemporaryDirectory(prefix="grpo_lite_race_", ignore_cleanup_errors=True) as folder:
            found[backend] = _run(recipe, backend, Path(folder), steps, limit_s)
        show(f"  {backend}: {describe(found[backend])}")
    chosen, why = verdict(found["hf"], found["unsloth"])
    return {**found, "chosen": chosen, "why": why, "at": now()}


def verdict(ours: dict[str, Any], other: dict[str, Any]) -> tuple[str, str]:
    """Return the backend to take, and why, from what a race found of each."""
    if "fault" in other:
        return "hf", "unsloth did not run" + (", nor did hf" if "fault" in ours else "")
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
    return (
        f"{measured['step_s']:.3g} s a step, {1000 * measured['token_s']:.3g} ms a token, "
        f"peak {measured['peak_memory_bytes'] / 2**30:.2f} GiB"
    )


def _run(recipe: Recipe, backend: str, folder: Path, steps: int, limit_s: float) -> dict[str, Any]:
    file, run = folder / f"{recipe.name}.yaml", RunDir(folder / "run")
    file.write_text(dump_recipe(recipe), encoding="utf-8")
    command = [sys.executable, "-m", "grpo_lite.cli", "train", str(file), "--run", str(run.path), "--plain"]
    command += ["--trust-remote-code"] if recipe.model.trust_remote_code else []
    command += [f"model.backend={backend}", f"grpo.max_steps={steps}", "grpo.logging_steps=1", "grpo.report_to=none"]
    command += ["eval.every=0", "eval.enabled=false", "merge=false", "check.enabled=false", "log.preflight=false"]
    command += ["limits.max_minutes=null", "push_checkpoints=null"]
    try:
        done = subprocess.run(command, stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=limit_s)
        said = [line for line in (done.stdout + done.stderr).splitlines() if line.strip()]
    except subprocess.TimeoutExpired:
        said = [f"it took more than {limit_s:g} s"]
    logged = list(_steps(run))[1:]
    tokens = sum(step["completions/mean_length"] for step in logged)
    if not logged or not tokens:
        return {"fault": said[-1] if said else "it said nothing"}
    peak = run.read_run().get("peak_memory_bytes") or 0
    times = [step["step_time"] for step in logged]
    return {"step_s": statistics.median(times), "token_s": sum(times) / tokens, "peak_memory_bytes": peak}


def _steps(run: RunDir) -> Iterator[dict[str, Any]]:
    with contextlib.suppress(OSError, ValueError):
        for line in run.metrics_file.read_text(encoding="utf-8").splitlines():
            step = json.loads(line)
            if "step_time" in step and "completions/mean_length" in step:
                yield step


def keep_race(recipe: Recipe, card: str, found: dict[str, Any]) -> None:
    """Keep a race's outcome in the cache, unless nothing ran; a cache that cannot be written costs nothing."""
    if all("fault" in found[backend] for backend in BACKENDS):
        return
    with contextlib.suppress(OSError, GRPOLiteError):
        file = _file(recipe, card)
        file.parent.mkdir(parents=True, exist_ok=True)
        write_atomic(file, json.dumps(found, indent=2) + "\n")


def kept_race(recipe: Recipe, card: str) -> dict[str, Any] | None:
    """Return what a race found for this shape, card and these versions; None if there was none."""
    with contextlib.suppress(OSError, ValueError, GRPOLiteError):
        found = json.loads(_file(recipe, card).read_text(encoding="utf-8"))
        if isinstance(found, dict) and found.get("chosen") in BACKENDS:
            return {"why": "raced here before", **found}
    return None


def _file(recipe: Recipe, card: str) -> Path:
    shape = ("num_generations", "max_completion_length", "per_device_train_batch_size", "gradient_accumulation_steps",
             "num_iterations", "beta")  # fmt: skip
    settings = {
        "card": card,
        "model": recipe.model.model_dump(mode="json", exclude={"backend"}),
        "lora": recipe.lora,
        "grpo": {key: recipe.grpo.get(key) for key in shape},
        "engine": [recipe.compute, recipe.rollout, recipe.data.max_prompt_tokens],
        "versions": [_version(name) for name in ("grpo-lite", "torch", "transformers", "trl", "unsloth")],
    }
    text = json.dumps(settings, sort_keys=True, default=str)
    return cache_dir() / "backends" / f"{hashlib.sha256(text.encode()).hexdigest()[:20]}.json"


def _version(name: str) -> str | None:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None
