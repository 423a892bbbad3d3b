"""Overrides as a user types them: how a value is written, and those that change several values together."""

from __future__ import annotations

import math
from typing import Any

from grpo_lite.recipe.recipe import Recipe

_DIGITS = (1, 2, 3, 5, 10)


def yaml_text(value: Any) -> str:
    """Return a value as YAML writes it.

    >>> yaml_text(None), yaml_text(True), yaml_text(0.5)
    ('null', 'true', '0.5')
    """
    return "null" if value is None else str(value).lower() if isinstance(value, bool) else str(value)


def round_value(value: float) -> float:
    """Return the nearest value above 0 that one would type: 1, 2, 3 or 5 times a power of ten.

    >>> round_value(0.0833), round_value(0.00033), round_value(24.0)
    (0.1, 0.0003, 20.0)
    """
    power = 10.0 ** math.floor(math.log10(value))
    return min((digit * power for digit in _DIGITS), key=lambda near: abs(math.log(near / value)))


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
