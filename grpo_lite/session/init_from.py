"""Which adapter a training starts from (`lora.init_from`): none, unless it begins at step 0."""

from __future__ import annotations

from grpo_lite.errors import ModelError
from grpo_lite.models.adapter import SavedAdapter, read_adapter
from grpo_lite.models.base import Base
from grpo_lite.processes import agree, this_process
from grpo_lite.recipe.recipe import Recipe
from grpo_lite.runs.checkpoints import last_usable
from grpo_lite.runs.run_dir import RunDir
from grpo_lite.screen import Show


def adapter_to_start_from(recipe: Recipe, run: RunDir, base: Base, show: Show) -> SavedAdapter | None:
    """Return the recipe's adapter where training begins at step 0; a run that resumes has its weights in a checkpoint.

    Raises:
        ModelError: it is missing, damaged or does not fit; or it is another one than the run began with.
    """
    process = this_process()
    if recipe.init_from is None:
        if recipe.reference == "start" and not recipe.holds_reference:
            show("reference: start without lora.init_from: a fresh adapter equals the base, so KL is that to the base")
        return None
    if agree(last_usable(run.path).folder is not None if process.is_first else None, process):
        return None
    adapter = read_adapter(recipe, base)
    if agree(adapter.sha256, process) != adapter.sha256:
        raise ModelError(
            f"lora.init_from: {adapter.address} holds other weights here than in the first process. With several "
            "machines put it on a disk that all of them see."
        )
    began_with = (run.read_run().get("init_from") or {}).get("sha256")
    if began_with and began_with != adapter.sha256 and process.is_first:
        show(
            f"lora.init_from: {adapter.address} has changed since this run began (sha256 {began_with[:12]} then, "
            f"{adapter.sha256[:12]} now); it had saved no checkpoint, so it starts again from the new one"
        )
    show(adapter.line)
    return adapter
