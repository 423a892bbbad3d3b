"""fit_to_device: the budgets a run starts with, by the plan for this very device and these very prompts.

Place in the line: after the prompts are known, before the model is loaded. What the recipe sets stays an upper bound;
what it leaves null is chosen so that nothing about the gradient changes.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any

from grpo_lite.engine.options import EngineOptions
from grpo_lite.engine.out_of_memory import free_memory
from grpo_lite.errors import ModelError, first_line
from grpo_lite.memory.evaluation import evaluation_items, most_rows
from grpo_lite.memory.job import recipe_job
from grpo_lite.memory.phases import CONTEXT_BYTES, FRAGMENTATION, GIB, WORKSPACE_BYTES, Job
from grpo_lite.memory.plan import advice, plan_memory, require_fit
from grpo_lite.memory.warmup import padded_step, warmup_parts, warmup_tokens
from grpo_lite.models.base import Base
from grpo_lite.models.shape import read_shape
from grpo_lite.models.unsloth import uses_unsloth
from grpo_lite.processes import this_process
from grpo_lite.recipe.recipe import Recipe
from grpo_lite.recipe.schedule import share_of_batch
from grpo_lite.units import gib


@dataclass(frozen=True)
class Fit:
    """What the plan decided for a run."""

    options: EngineOptions
    grpo: dict[str, Any] = field(default_factory=dict)  # GRPOConfig keys to set
    advice: str | None = None  # what to change should memory run out all the same


def engine_options(recipe: Recipe) -> EngineOptions:
    """Return what the engine may do differently from plain TRL, as the recipe says."""
    return EngineOptions(
        compute=recipe.compute,
        tokens_per_microbatch=recipe.memory.tokens_per_microbatch,
        warmup_tokens=_warmup_budget(recipe),
        rollout=recipe.rollout,
        rollout_kv_tokens=recipe.memory.rollout_kv_tokens,
        refill=recipe.sampling.refill,
        replay=recipe.sampling.replay,
        length_stages=tuple(sorted(recipe.sampling.length_stages.items())),
        offload_activations=recipe.memory.offload_activations,
        max_skipped_steps=recipe.limits.skipped_steps,
    )


def _warmup_budget(recipe: Recipe) -> int | None:
    if recipe.warmup is None:
        return None
    step, most = padded_step(recipe.warmup.tokens_per_step), recipe.memory.tokens_per_microbatch
    return step if most is None else min(step, most)


def fit_to_device(
    recipe: Recipe, base: Base, prompt_tokens: int, show: Callable[[str], None], warmup_row: int | None = None
) -> Fit:
    """Plan a run's memory, choose its budgets, and say so in a line; on a CPU nothing is planned.

    Args:
        recipe: the recipe.
        base: its base model, and the device where it runs, whose free memory counts.
        prompt_tokens: the longest prompt.
        show: gets lines for people.
        warmup_row: tokens of the longest row of a warm-up that is still to come; None: there is none.

    Raises:
        MemoryBudgetError: it cannot fit; with the cheapest changes that would.
    """
    options, device = engine_options(recipe), base.device
    if not recipe.memory.fit or device.kind != "cuda" or uses_unsloth(recipe.model):
        return Fit(options)
    own = share_of_batch(recipe.grpo, this_process().world)
    recipe = recipe.model_copy(update={"grpo": {**recipe.grpo, **own}})
    try:
        job, _ = recipe_job(recipe, base.shape, prompt=prompt_tokens, bfloat16=device.bfloat16, warmup_row=warmup_row)
        share = math.ceil(job.warmup_step / this_process().world) + job.warmup_row  # rows are dealt out, longest first
        job = replace(job, warmup_step=min(job.warmup_step, share)) if warmup_row else replace(job, warmup_row=0)
    except ModelError as error:  # an architecture that the arithmetic does not know
        show(f"memory: {first_line(error)}")
        return Fit(options)
    available = min(device.memory_bytes, free_bytes() + CONTEXT_BYTES)
    plan = plan_memory(job, available)
    require_fit(plan, f"{recipe.name} on {device.name}")
    job = plan.job
    line = f"memory: {plan.needed / GIB:.1f} of {gib(available)} planned"
    if plan.chosen:
        line += "; chosen: " + ", ".join(f"{key}={value}" for key, value in plan.chosen.items())
    if job.warmup_row and warmup_parts(job) > 1:
        line += f"; a step of the warm-up in {warmup_parts(job)} parts of at most {warmup_tokens(job)} tokens"
    show(line)
    grpo = {key.removeprefix("grpo."): value for key, value in plan.chosen.items() if key.startswith("grpo.")}
    options = replace(
        options,
        tokens_per_microbatch=job.tokens,
        rollout_kv_tokens=job.kv_tokens,
        warmup_tokens=warmup_tokens(job) if job.warmup_row else None,
    )
    return Fit(options, grpo, advice(plan_memory(job, plan.needed * 85 // 100)))


def free_bytes() -> int:
    """Return the memory of the CUDA device that a training can get, after giving back what nothing needs any more.

    In a notebook the same process may have sampled a model before (a probe), and PyTorch's allocator still holds its
    memory.
    """
    import torch

    free_memory()
    return available_bytes(torch.device("cuda")) or 0


def rows_that_fit(model: Any, prompt: int, completion: int, rows: int, shared: bool) -> int:
    """Return how many of `rows` completions the free memory holds at once; all of them where nothing is planned.

    Args:
        model: a loaded model, on any device.
        prompt: the longest prompt, in tokens.
        completion: the cap.
        rows: wanted.
        shared: whether they are decoded by our engine.
    """
    free = available_bytes(model.device)
    if free is None:
        return rows
    try:
        shape = read_shape(model.config.to_dict(), "the model")
    except ModelError:  # an architecture that the arithmetic does not know
        return rows
    job = Job(
        shape,
        load_in="4bit" if getattr(model, "is_quantized", False) else "16bit",
        dtype_bytes=model.dtype.itemsize,
        prompt=prompt,
        rollout="shared" if shared else "generate",
        eval_rows=rows,
        eval_completion=completion,
    )
    spare = free / (1 + FRAGMENTATION) - WORKSPACE_BYTES
    return most_rows(rows, lambda n: sum(size for _, size in evaluation_items(replace(job, eval_rows=n))) <= spare)


def available_bytes(device: Any) -> int | None:
    """Return what a CUDA device can still give to tensors; None on other devices, where nothing is planned.

    What PyTorch's allocator has reserved and no tensor uses counts as free.
    """
    if device.type != "cuda":
        return None
    import torch

    unused = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    return int(torch.cuda.mem_get_info(device)[0]) + unused
