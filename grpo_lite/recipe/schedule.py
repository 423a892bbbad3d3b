"""What a recipe means in rows, groups, micro-steps and steps; torch-free."""

from __future__ import annotations

import math
from dataclasses import dataclass

from grpo_lite.errors import GRPOLiteError
from grpo_lite.recipe.recipe import Recipe


def round_steps(recipe: Recipe) -> int:
    """Return how many optimizer steps train on one round of completions."""
    micro_steps = recipe.generation_batch // max(1, int(recipe.grpo.get("per_device_train_batch_size", 8)))
    micro_steps *= int(recipe.grpo.get("num_iterations") or 1)
    return max(1, -(-micro_steps // max(1, int(recipe.grpo.get("gradient_accumulation_steps", 1)))))


def share_of_batch(recipe: Recipe, world: int) -> dict[str, int]:
    """Return GRPOConfig's batch keys for one of `world` processes, so that all together train the recipe's batch.

    Raises:
        GRPOLiteError: the recipe's batch cannot be divided into whole groups.
    """
    rows = int(recipe.grpo.get("per_device_train_batch_size", 8))
    accumulation = int(recipe.grpo.get("gradient_accumulation_steps", 1))
    if world == 1:
        return {}
    local = recipe.generation_batch // world
    whole = recipe.generation_batch % world == 0 and local % recipe.num_generations == 0
    keys = ("generation_batch_size", "steps_per_generation")
    if not whole or any(recipe.grpo.get(key) for key in keys):
        raise GRPOLiteError(
            f"GPUS={world}: a round of {recipe.generation_batch} completions (per_device_train_batch_size × "
            f"gradient_accumulation_steps) has to be whole groups of {recipe.num_generations} for each process, "
            f"without {' or '.join(keys)}. Set grpo.gradient_accumulation_steps to a multiple of {world}."
        )
    if accumulation % world == 0:
        return {"gradient_accumulation_steps": accumulation // world}
    if rows % world == 0:
        return {"per_device_train_batch_size": rows // world}
    raise GRPOLiteError(
        f"GPUS={world}: neither gradient_accumulation_steps={accumulation} nor per_device_train_batch_size={rows} is a "
        f"multiple of {world}, so the batch cannot be shared. Change one of them."
    )


@dataclass(frozen=True)
class Schedule:
    """How many optimizer steps a run takes, and how many completions each of them costs."""

    steps: int
    sampled: float  # completions generated a step: rounds that are trained on several times cost less
    trained: int  # completions that go through forward and backward a step


def schedule(recipe: Recipe, rows: int) -> Schedule:
    """Return a recipe's schedule over so many training rows, counted as transformers and TRL 1.16 do."""
    grpo = recipe.grpo
    per_device = int(grpo.get("per_device_train_batch_size", 8))
    accumulation = int(grpo.get("gradient_accumulation_steps", 1))
    iterations = int(grpo.get("num_iterations") or 1)
    trained = per_device * accumulation
    sampled = trained / iterations
    if grpo.get("max_steps", -1) > 0:
        return Schedule(int(grpo["max_steps"]), sampled, trained)
    rounds = max(1, rows // max(1, recipe.generation_batch // recipe.num_generations))
    micro_steps = rounds * iterations * max(1, recipe.generation_batch // per_device)
    epoch = max(1, math.ceil(micro_steps / accumulation))
    return Schedule(math.ceil(float(grpo.get("num_train_epochs", 3)) * epoch), sampled, trained)
