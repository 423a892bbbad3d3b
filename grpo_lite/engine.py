"""What trains a recipe here: our trainer on a base loaded by transformers, or Unsloth's on one loaded by Unsloth."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from grpo_lite.budgets import Fit
from grpo_lite.hardware import Device
from grpo_lite.model import compute_dtype, load_model, lora_config, lora_to_float32
from grpo_lite.ranks import this_process
from grpo_lite.recipe import Recipe
from grpo_lite.unsloth_backend import uses_unsloth


def device_line(recipe: Recipe, device: Device) -> str:
    """Return one line on the device, and what about it is not used or not possible."""
    line = f"device: {device.describe()}"
    if device.count > this_process().world:
        line += f"; 1 of {device.count} is used (all: make train GPUS={device.count})"
    if recipe.model.dtype == "auto" and compute_dtype(recipe.model, device) != device.best_dtype:
        line += f"; {recipe.model.id} overflows in float16 and runs in float32"
    return line


def load_base(recipe: Recipe, device: Device, prompt_tokens: int) -> Any:
    """Return the base to train; the backend unsloth has put the adapter on it already.

    Raises:
        ModelError: it cannot be loaded here.
    """
    if not uses_unsloth(recipe.model):
        return load_model(recipe, device)
    import torch

    from grpo_lite.base_model import resolve_base
    from grpo_lite.unsloth_backend import load_with_unsloth

    base = resolve_base(recipe.model.id, recipe.model.revision)
    dtype = getattr(torch, compute_dtype(recipe.model, device))
    return load_with_unsloth(recipe, base, prompt_tokens + recipe.max_completion_length, dtype)


def make_trainer(
    recipe: Recipe, fit: Fit, device: Device, longest: list[int], show: Callable[[str], None], **arguments: Any
) -> Any:
    """Return the trainer, its adapter in float32.

    Args:
        recipe: the recipe.
        fit: what the plan decided.
        device: where it trains.
        longest: ids of the longest prompt; on CUDA it is rehearsed before the first step.
        show: gets lines for people.
        arguments: of TRL's GRPOTrainer.
    """
    if uses_unsloth(recipe.model):
        from trl import GRPOTrainer

        from grpo_lite.trainer_sealed import sealed

        return sealed(GRPOTrainer, recipe.limits.skipped_steps)(**arguments)
    from transformers import set_seed

    from grpo_lite.trainer_memory import FittingGRPOTrainer

    set_seed(recipe.seed)  # TRL 1.14 makes the adapter before it seeds
    trainer = FittingGRPOTrainer(
        options=fit.options,
        show=show,
        advice=fit.advice,
        recover=recipe.memory.fit,
        rehearsal=longest if recipe.memory.fit and device.kind == "cuda" else None,
        peft_config=lora_config(recipe),
        **arguments,
    )
    lora_to_float32(trainer.model)
    return trainer
