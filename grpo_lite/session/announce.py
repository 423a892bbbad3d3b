"""What takes more than a few seconds before the first step, each said in one line before it begins."""

from __future__ import annotations

from grpo_lite.models.base import Base, weights_bytes
from grpo_lite.models.embedded import embedded_folder
from grpo_lite.recipe.recipe import EMBEDDED_MODEL, Recipe
from grpo_lite.screen import Show
from grpo_lite.units import size

LARGE_BYTES = 1 << 30  # of weights; smaller ones are loaded within seconds


def announce_base(recipe: Recipe, show: Show) -> None:
    """Say so where the embedded model has to be converted first."""
    if recipe.model.id == EMBEDDED_MODEL and not embedded_folder().is_dir():
        show(f"model: {EMBEDDED_MODEL} is converted to bfloat16, once (about 20 s)")


def announce_data(recipe: Recipe, show: Show) -> None:
    """Say which datasets are read from the Hub, or from its cache."""
    if names := list(dict.fromkeys(source.hub for source in recipe.sources.values() if source.hub)):
        show(f"data: reading {' and '.join(names)} from the Hub or its cache")


def announce_weights(base: Base, show: Show) -> None:
    """Say that a model is fetched, or that a large one is loaded."""
    section = base.section
    stored = weights_bytes(base.folder)
    if not stored:
        show(f"model: fetching the weights of {section.id}, then loading them in {section.load_in}")
    elif stored >= LARGE_BYTES:
        show(f"model: loading {section.id} in {section.load_in} ({size(stored)} of weights)")
