"""fit_to_device: the budgets a run starts with, by the plan for this very device and these very prompts.

Place in the line: after the prompts are known, before the model is loaded. What the recipe sets stays an upper bound;
what it leaves null is chosen so that nothing about the gradient changes.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from grpo_lite.engine_options import EngineOptions
from grpo_lite.errors import ModelError
from grpo_lite.hardware import Device
from grpo_lite.memory import CONTEXT_BYTES, GIB
from grpo_lite.memory_plan import advice, plan_memory, require_fit
from grpo_lite.ranks import share_of_batch, this_process
from grpo_lite.recipe import Recipe
from grpo_lite.recipe_job import recipe_job
from grpo_lite.unsloth_backend import uses_unsloth


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
        rollout=recipe.rollout,
        rollout_kv_tokens=recipe.memory.rollout_kv_tokens,
        refill=recipe.sampling.refill,
        difficulty=recipe.sampling.difficulty,
        offload_activations=recipe.memory.offload_activations,
        max_skipped_steps=recipe.limits.skipped_steps,
    )


def fit_to_device(recipe: Recipe, device: Device, prompt_tokens: int, show: Callable[[str], None]) -> Fit:
    """Plan a run's memory, choose its budgets, and say so in a line; on a CPU nothing is planned.

    Args:
        recipe: the recipe.
        device: where it runs; its free memory counts.
        prompt_tokens: the longest prompt.
        show: gets lines for people.

    Raises:
        MemoryBudgetError: it cannot fit; with the cheapest changes that would.
    """
    options = engine_options(recipe)
    if not recipe.memory.fit or device.kind != "cuda" or uses_unsloth(recipe.model):
        return Fit(options)
    own = share_of_batch(recipe, this_process().world)
    recipe = recipe.model_copy(update={"grpo": {**recipe.grpo, **own}})
    try:
        job, _ = recipe_job(recipe, prompt=prompt_tokens, bfloat16=device.bfloat16)
    except ModelError as error:  # an architecture that the arithmetic does not know
        show(f"memory: {str(error).splitlines()[0]}")
        return Fit(options)
    available = min(device.memory_bytes, free_bytes() + CONTEXT_BYTES)
    plan = plan_memory(job, available)
    require_fit(plan, f"{recipe.name} on {device.name}")
    job = plan.job
    line = f"memory: {plan.needed / GIB:.1f} of {available / GIB:.1f} GiB planned"
    if plan.chosen:
        line += "; chosen: " + ", ".join(f"{key}={value}" for key, value in plan.chosen.items())
    show(line)
    grpo = {key.removeprefix("grpo."): value for key, value in plan.chosen.items() if key.startswith("grpo.")}
    options = replace(options, tokens_per_microbatch=job.tokens, rollout_kv_tokens=job.kv_tokens)
    return Fit(options, grpo, advice(plan_memory(job, plan.needed * 85 // 100)))


def free_bytes() -> int:
    """Return the memory of the CUDA device that no process has taken."""
    import torch

    return int(torch.cuda.mem_get_info()[0])


def longest_prompt(prompts: Sequence[dict[str, Any]], tokenizer: Any, recipe: Recipe, most: int = 5000) -> list[int]:
    """Return the ids of the longest prompt, in tokens, among the first `most` (those of most characters first)."""
    from grpo_lite.data import prompt_ids

    kwargs = recipe.grpo.get("chat_template_kwargs")
    by_length = sorted(prompts[:most], key=lambda row: -len(str(row["prompt"])))[:64]
    return max((prompt_ids(row["prompt"], tokenizer, kwargs) for row in by_length), key=len)
