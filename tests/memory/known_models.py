"""Jobs and bases of models in the built-in table, which need no weights here."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from grpo_lite.memory.job import recipe_job
from grpo_lite.memory.phases import Job
from grpo_lite.models.base import Base
from grpo_lite.models.config import known_config, model_shape
from grpo_lite.models.device import Device
from grpo_lite.recipe.recipe import Recipe


def job_of(recipe: Recipe, **settings: Any) -> Job:
    """Return a recipe's job, as `plan` makes it."""
    return recipe_job(recipe, model_shape(recipe.model.id)[0], **settings)[0]


def known_base(recipe: Recipe, device: Device, folder: Path) -> Base:
    """Return a recipe's base with nothing but its config.json in the folder."""
    (folder / "config.json").write_text(json.dumps(known_config(recipe.model.id)), encoding="utf-8")
    return Base(recipe.model, device, folder)
