"""What a probe measured of time, kept in the cache for `plan`, which loads nothing. Torch-free."""

from __future__ import annotations

from typing import Any

from grpo_lite.board import format_seconds
from grpo_lite.cached_record import keep_record, kept_record
from grpo_lite.recipe import Recipe
from grpo_lite.run_dir import now

# What a step's time and the number of steps depend on.
_TIMED = {"model", "lora", "data", "rewards", "grpo", "compute", "rollout", "memory", "sampling", "eval", "seed"}
_KEPT = ("step_s", "steps", "eta_s", "evaluation_s", "tokens_per_s")


def keep_times(recipe: Recipe, device: str, probe: dict[str, Any]) -> None:
    """Keep a probe's figures for `plan`; a cache that cannot be written costs nothing."""
    record = {**{key: probe[key] for key in _KEPT}, "device": device, "measured_at": now()}
    keep_record("probes", _settings(recipe), record)


def time_line(recipe: Recipe) -> str:
    """Return how long a step and the run take by the last probe of this very recipe, or how to find out."""
    try:
        kept = kept_record("probes", _settings(recipe))
        return (
            f"time: a step about {kept['step_s']:.3g} s, {kept['steps']} steps about {format_seconds(kept['eta_s'])}, "
            f"evaluation about {format_seconds(kept['evaluation_s'])}; probed on {kept['device']} {kept['measured_at']}"
        )
    except (ValueError, KeyError, TypeError):
        return f"time: not probed yet; on the machine that will train: grpo-lite probe {recipe.name} (minutes)"


def _settings(recipe: Recipe) -> dict[str, Any]:
    return recipe.model_dump(mode="json", include=_TIMED)
