"""open_run: what a run directory needs next, agreed on by all processes of a launch."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

from grpo_lite.commands import hint_run
from grpo_lite.errors import RunDirError
from grpo_lite.processes import agree, this_process
from grpo_lite.recipe.recipe import Recipe
from grpo_lite.runs.provenance import keep_sums
from grpo_lite.runs.remote import fetch_checkpoint
from grpo_lite.runs.run_dir import RunDir
from grpo_lite.screen import Show


def held_by_first(run: RunDir) -> AbstractContextManager[Any]:
    """Lock the run directory in the first process of a launch, which works in it for all of them."""
    return run.locked() if this_process().is_first else nullcontext()


def fetch_if_new(run: RunDir, recipe: Recipe, show: Show) -> None:
    """Fetch a run's checkpoints from elsewhere if it is new on this machine; what was chosen for it comes with them.

    Raises:
        GRPOLiteError: the location cannot be reached.
    """
    if recipe.push_checkpoints and this_process().is_first and not run.recipe_file.is_file():
        with run.locked():
            fetch_checkpoint(run, recipe.push_checkpoints, show)


def open_run(run: RunDir, recipe: Recipe, show: Show) -> tuple[str, Recipe]:
    """Prepare the run directory, fetching its checkpoints from elsewhere if there are newer ones.

    Returns:
        What is left to do: "new", "resume", "finish" (evaluation, merge and report) or "report"; and the recipe, its
        base pinned to the commit that the run started with.

    Raises:
        GRPOLiteError: another recipe's run, a finished run, a location that cannot be reached, or `lora.init_from`
            names the run itself.
    """
    process = this_process()
    refuse_itself(run, recipe)
    if process.is_first and recipe.push_checkpoints:
        fetch_checkpoint(run, recipe.push_checkpoints, show, recipe.warmup is not None)
    state = agree(run.prepare(recipe) if process.is_first else None, process)
    if state == "report":
        return state, recipe
    recipe = run.with_base_commit(recipe)
    if process.is_first:
        keep_sums(run, recipe, state != "new", show)
    return state, recipe


def refuse_itself(run: RunDir, recipe: Recipe) -> None:
    """Refuse a run that would start from its own adapter or checkpoint.

    Raises:
        RunDirError: `lora.init_from` names the run directory or a folder in it.
    """
    if recipe.init_from is None:
        return
    folder, own = Path(recipe.init_from).expanduser().resolve(), run.path.resolve()
    if folder == own or own in folder.parents:
        raise RunDirError(
            f"lora.init_from: {recipe.init_from} is this run's own directory, and a run is not overwritten. Give the "
            f"new run a directory of its own, for example {hint_run(f'{run.path}-2')}."
        )
