"""Which adapter a stage starts from: `lora.init_from`, GRPO after a warm-up the warm-up's; none where it resumes."""

from __future__ import annotations

from typing import Literal

from grpo_lite.errors import ModelError
from grpo_lite.models.adapter import SavedAdapter, read_adapter, read_own_adapter
from grpo_lite.models.base import Base
from grpo_lite.processes import agree, this_process
from grpo_lite.recipe.recipe import Recipe
from grpo_lite.runs.checkpoints import last_usable
from grpo_lite.runs.run_dir import RunDir
from grpo_lite.screen import Show


def adapter_to_start_from(
    recipe: Recipe, run: RunDir, base: Base, show: Show, stage: Literal["warmup", "grpo"] = "grpo"
) -> SavedAdapter | None:
    """Return the adapter where a stage begins at its step 0; one that resumes has its weights in a checkpoint.

    Raises:
        ModelError: it is missing, damaged or does not fit; or it is another one than the run began with.
    """
    process = this_process()
    after_warmup = stage == "grpo" and recipe.warmup is not None
    if not after_warmup and recipe.init_from is None:
        if recipe.reference == "start" and not recipe.holds_reference:
            show("reference: start has no effect here: a fresh adapter equals the base, and KL is measured against it")
        return None
    folder = run.warmup if stage == "warmup" else run.path
    if agree(last_usable(folder).folder is not None if process.is_first else None, process):
        return None
    if after_warmup:
        adapter = read_own_adapter(run.warm_adapter, base)
        show(f"GRPO starts from the warm-up's adapter (sha256 {adapter.sha256[:12]})")
        return adapter
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
