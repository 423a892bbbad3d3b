"""Overrides that the doctor and the probe advise where several values of a recipe have to change together."""

from __future__ import annotations

import math

from grpo_lite.recipe.recipe import Recipe


def twice_the_cap(recipe: Recipe) -> str:
    """Return the override for completions twice as long, also for the rewards that take the cap as an argument."""
    cap = recipe.max_completion_length
    rewards = [
        f" rewards[{index}].kwargs.max_completion_length={2 * cap}"
        for index, section in enumerate(recipe.rewards)
        if section.kwargs.get("max_completion_length") == cap
    ]
    return f"grpo.max_completion_length={2 * cap}" + "".join(rewards)


def twice_the_group(recipe: Recipe) -> str:
    """Return the override for twice as many completions a prompt, with a round that holds whole groups."""
    group, batch, rows = 2 * recipe.schedule.group, recipe.schedule.batch, recipe.schedule.rows
    larger = f"grpo.num_generations={group}"
    if batch % group == 0:
        return larger
    if recipe.grpo.get("generation_batch_size"):
        return f"{larger} grpo.generation_batch_size={-(-batch // group) * group}"
    key = "steps_per_generation" if recipe.grpo.get("steps_per_generation") else "gradient_accumulation_steps"
    least = math.lcm(rows, group) // rows  # micro-steps that hold whole groups
    return f"{larger} grpo.{key}={-(-batch // (rows * least)) * least}"
