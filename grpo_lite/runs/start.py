"""open_run: what a run directory needs next, agreed on by all processes of a launch."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import Any

from grpo_lite.processes import agree, this_process
from grpo_lite.recipe.recipe import Recipe
from grpo_lite.runs.provenance import keep_sums
from grpo_lite.runs.run_dir import RunDir
from grpo_lite.screen import Show


def held_by_first(run: RunDir) -> AbstractContextManager[Any]:
    """Lock the run directory in the first process of a launch, which works in it for all of them."""
    return run.locked() if this_process().is_first else nullcontext()


def open_run(run: RunDir, recipe: Recipe, show: Show) -> tuple[str, Recipe]:
    """Prepare the run directory, fetching its checkpoints from elsewhere if there are newer ones.

    Returns:
        What is left to do: "new", "resume", "finish" (evaluation, merge and report) or "report"; and the recipe, its
        base pinned to the commit that the run started with.

    Raises:
        GRPOLiteError: another recipe's run, a finished run, or a location that cannot be reached.
    """
    process = this_process()
    if process.is_first and recipe.push_checkpoints:
        from grpo_lite.runs.remote import fetch_checkpoint

        fetch_checkpoint(run, recipe.push_checkpoints, show)
    state = agree(run.prepare(recipe) if process.is_first else None, process)
    if state == "report":
        return state, recipe
    recipe = run.with_base_commit(recipe)
    if process.is_first:
        keep_sums(run, recipe, state != "new", show)
    return state, recipe
