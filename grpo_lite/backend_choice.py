"""Which backend `model.backend: auto` takes on a card: what a short race of the two found for the recipe's shape.

Torch-free until a card is asked for, and free of what Unsloth has to be imported before.
"""

from __future__ import annotations

import contextlib
import importlib.util
from collections.abc import Callable
from pathlib import Path
from typing import Any

import yaml

from grpo_lite.backend_race import BACKENDS, LIMIT_S, STEPS, race
from grpo_lite.cached_record import keep_record, kept_record
from grpo_lite.environment import version_of
from grpo_lite.errors import GRPOLiteError
from grpo_lite.generators import generate_rows
from grpo_lite.ranks import this_process
from grpo_lite.recipe import Recipe, SourceSection
from grpo_lite.run_dir import RunDir
from grpo_lite.unsloth_backend import imported_before, lacks

LEAST_RUN = 100  # steps of a run that is worth a race
LEAST_MINUTES = 60.0  # of a session that is

Show = Callable[[str], None]


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
        from grpo_lite.remote_checkpoints import fetch_checkpoint

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
