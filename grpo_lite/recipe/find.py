"""Where recipes are: the shipped ones, and those that a folder ./recipes adds.

The shipped ones are in the top-level `recipes/` of a checkout. A wheel holds them as `grpo_lite/recipes` (setup.py).
"""

from __future__ import annotations

import logging
import re
from functools import cache
from importlib import resources
from pathlib import Path

from grpo_lite.errors import RecipeError
from grpo_lite.recipe.checks import nearest

logger = logging.getLogger(__name__)

ANCHORS = "anchors"  # folder of the recipes that stand beside a published result
LOCAL = Path("recipes")  # in the current directory


def find_recipe(name_or_path: str) -> Path:
    """Return the path of a recipe named or pointed at. A recipe in ./recipes is preferred to a shipped one.

    Raises:
        RecipeError: there is none; the nearest name is offered.
    """
    path = Path(name_or_path)
    if path.suffix in (".yaml", ".yml"):
        if path.is_file():
            return path
        raise RecipeError(f"recipe {name_or_path}: no such file. {_what_there_is()}")
    if re.fullmatch(rf"({ANCHORS}/)?[\w.-]+", name_or_path):
        local, shipped = LOCAL / f"{name_or_path}.yaml", shipped_dir() / f"{name_or_path}.yaml"
        if local.is_file():
            if shipped.is_file() and local.read_bytes() != shipped.read_bytes():
                _say_which(local)
            return local
        if shipped.is_file():
            return shipped
        beside = shipped_dir() / ANCHORS / shipped.name  # a recipe's own name has no folder, and commands name it so
        if beside.is_file():
            return beside
    anchor = f"{ANCHORS}/{name_or_path}"
    meant = [name for name in anchor_names() if name.startswith(anchor)]  # such as tina, for anchors/tina-1.5b
    guess = f" (did you mean {meant[0]!r}?)" if meant else nearest(name_or_path, [*recipe_names(), *anchor_names()])
    raise RecipeError(
        f"recipe {name_or_path!r}: unknown{guess}. {_what_there_is()} Your own: give the path of a .yaml file."
    )


def recipe_names() -> list[str]:
    """Return the names of all recipes, shipped and in ./recipes, sorted."""
    return sorted({*_names(shipped_dir()), *_names(LOCAL)})


def anchor_names() -> list[str]:
    """Return the names of the shipped recipes that stand beside a published result, as `anchors/NAME`."""
    return [f"{ANCHORS}/{name}" for name in _names(shipped_dir() / ANCHORS)]


@cache
def shipped_dir() -> Path:
    """Return the folder of the shipped recipes: the installed package's, or the checkout's."""
    packaged = Path(str(resources.files("grpo_lite") / "recipes"))
    return packaged if packaged.is_dir() else Path(__file__).resolve().parents[2] / "recipes"


def _names(folder: Path) -> list[str]:
    return sorted(path.stem for path in folder.glob("*.yaml"))


def _what_there_is() -> str:
    shipped, local = _names(shipped_dir()), _names(LOCAL)
    text = f"Shipped recipes: {', '.join(shipped)}."
    text += f" In ./recipes: {', '.join(local)}." if local and local != shipped else ""
    return f"{text} Beside a published result: {', '.join(anchor_names())}."


@cache  # once is enough
def _say_which(local: Path) -> None:
    logger.warning("%s is used, not the shipped recipe of the same name.", local)
