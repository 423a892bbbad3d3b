"""From a recipe's name and overrides to a checked Recipe: reading, overriding, and all faults in one message."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import yaml
from pydantic import ValidationError

from grpo_lite.errors import RecipeError
from grpo_lite.recipe.algorithms import expand_algorithm, follow_new_word
from grpo_lite.recipe.checks import cross_faults, damage_faults, nearest, upstream_section
from grpo_lite.recipe.find import find_recipe, recipe_names
from grpo_lite.recipe.objective import combination_faults
from grpo_lite.recipe.recipe import GRPO_DEFAULTS, LORA_DEFAULTS, Recipe, SourceSection
from grpo_lite.recipe.trl_keys import is_trl_key, top_level_advice

_SOURCE_KINDS = {
    "hub": ("path", "generator", "kwargs", "data_dir"),
    "path": ("hub", "generator", "kwargs", "config", "data_dir", "revision", "split"),
    "generator": ("hub", "path", "config", "data_dir", "revision", "split"),
}
_SOURCES = (("data", "train"), ("data", "eval"), ("warmup", "data"))
_MOST_ALIASES = 20
_TRL_FILE = 3  # keys of TRL at the top level from which a file is taken for one of `trl grpo`
_LARGEST = 4_000_000  # values and characters of a recipe, aliases written out
# `{question}` is a template here, not a YAML mapping.
_TEMPLATE_KEYS = ("prompt", "system", "gold_completion", "completion")


def load_recipe(name_or_path: str, overrides: Sequence[str] = ()) -> Recipe:
    """Read a recipe, apply `key.path=value` overrides, and check every value.

    Args:
        name_or_path: the name of a recipe, shipped or in ./recipes, or the path of a .yaml file.
        overrides: e.g. `grpo.max_steps=50`, `rewards[0].weight=2`; values are YAML.

    Raises:
        RecipeError: with every fault of the recipe and the overrides, one a line.
    """
    return build_recipe(*read_recipe(name_or_path, overrides))


def read_recipe(name_or_path: str, overrides: Sequence[str] = ()) -> tuple[dict[str, Any], str]:
    """Return a recipe as it is written, with the overrides applied and nothing else checked, and its path.

    Raises:
        RecipeError: there is no such recipe, it is not YAML, or an override does not fit it.
    """
    path = find_recipe(name_or_path)
    raw = read_yaml(path)
    for override in overrides:
        apply_override(raw, override)
    _follow_new_source(raw, overrides)
    follow_new_word(raw, overrides)
    raw.setdefault("name", re.sub(r"[^A-Za-z0-9_.-]", "-", path.stem))
    return raw, str(path)


def load_all(overrides: Sequence[str] = (), names: Sequence[str] | None = None) -> tuple[dict[str, Recipe], list[str]]:
    """Load the recipes of these names, or all but the anchors. Also return a message for each that is not valid.

    Raises:
        RecipeError: none of them is valid, as without the packages whose options recipes are checked against.
    """
    recipes: dict[str, Recipe] = {}
    faults = []
    for name in recipe_names() if names is None else names:
        try:
            recipes[name] = load_recipe(name, overrides)
        except RecipeError as error:  # a file in ./recipes may be anything
            faults.append(str(error))
    if faults and not recipes:
        raise RecipeError(faults[0])
    return recipes, faults


def build_recipe(raw: dict[str, Any], where: str, *, for_training: bool = True) -> Recipe:
    """Check a recipe's values, ours by pydantic and upstream's by upstream's annotations.

    Args:
        raw: the recipe as read.
        where: its path, for messages.
        for_training: also refuse what would damage a training; False: it only says how a finished run was trained.

    Raises:
        RecipeError: with every fault, one a line, each starting with `where: key`.
    """
    raw = dict(raw)
    faults = [*drop_removed_keys(raw), *expand_algorithm(raw)]
    for section, defaults in (("lora", LORA_DEFAULTS), ("grpo", GRPO_DEFAULTS)):
        values = raw.get(section) or {}
        raw[section], section_faults = upstream_section(
            section, {**defaults, **values} if isinstance(values, dict) else values
        )
        faults += section_faults
    recipe = None
    try:
        recipe = Recipe.model_validate(raw)
    except ValidationError as error:
        faults += _own_faults(error)
    if recipe is not None and not faults:
        faults += cross_faults(recipe)
        faults += [*damage_faults(recipe), *combination_faults(recipe)] if for_training else []
    if faults or recipe is None:
        lines = "\n".join(f"  {where}: {fault}" for fault in faults)
        if sum(key not in Recipe.model_fields and is_trl_key(key) for key in raw) >= _TRL_FILE:
            lines += f"\nIt looks like a config of `trl grpo`: `grpo-lite convert {where}` turns it into a recipe."
        raise RecipeError(f"{len(faults)} fault{'s' if len(faults) > 1 else ''} in the recipe:\n{lines}")
    return recipe


def drop_removed_keys(raw: dict[str, Any]) -> list[str]:
    """Remove the keys of older releases, in place. Return a fault for each whose value asks for what is gone."""
    sampling = raw.get("sampling")
    if not isinstance(sampling, dict) or "difficulty" not in sampling:
        return []
    raw["sampling"] = {key: value for key, value in sampling.items() if key != "difficulty"}
    if sampling["difficulty"] is False:
        return []
    return [
        "sampling.difficulty: removed. Preferring prompts that are solved sometimes gave no gain outside noise "
        "(docs/measurements/compare_trl.md). Delete the key."
    ]


class _Loader(yaml.SafeLoader):
    """SafeLoader that refuses a key given twice, which PyYAML would silently overwrite, and what aliases blow up."""

    aliases = 0

    def get_single_data(self) -> Any:
        data = super().get_single_data()
        if self.aliases and _written_out(data, {}) > _LARGEST:  # 20 are enough for 3**6 copies of a long list
            raise yaml.composer.ComposerError(None, None, "its aliases (*name) make it too large, or endless", None)
        return data

    def compose_node(self, parent: Any, index: Any) -> Any:
        if self.check_event(yaml.AliasEvent):
            self.aliases += 1
            if self.aliases > _MOST_ALIASES:  # nested ones grow without bound when they are written out
                mark = self.peek_event().start_mark
                raise yaml.composer.ComposerError(None, None, f"more than {_MOST_ALIASES} aliases (*name)", mark)
        return super().compose_node(parent, index)

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        keys: set[Any] = set()
        for key_node, _ in node.value:
            key = self.construct_object(key_node, deep=True)
            if isinstance(key, str | int | float | bool) and key in keys:
                raise yaml.constructor.ConstructorError(
                    None, None, f"the key {key!r} is given twice", key_node.start_mark
                )
            if isinstance(key, str | int | float | bool):
                keys.add(key)
        return super().construct_mapping(node, deep)


def _written_out(value: Any, sizes: dict[int, float]) -> float:
    """Return how many values and characters data has once every alias is written out; infinite if it holds itself."""
    if not isinstance(value, dict | list):
        return 1.0 + (len(value) if isinstance(value, str) else 0)
    if id(value) not in sizes:
        sizes[id(value)] = math.inf  # while it is being counted
        parts = [*value, *value.values()] if isinstance(value, dict) else value
        sizes[id(value)] = 1.0 + sum(_written_out(part, sizes) for part in parts)
    return sizes[id(value)]


def read_yaml(path: Path) -> dict[str, Any]:
    """Read one YAML mapping.

    Raises:
        RecipeError: the file cannot be read, is not YAML, or is not a mapping; with line and column.
    """
    try:
        data = yaml.load(path.read_text(encoding="utf-8"), Loader=_Loader)  # a SafeLoader: builds plain data only
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        place = f" line {mark.line + 1}, column {mark.column + 1}" if mark else ""
        problem = getattr(error, "problem", None) or str(error)
        raise RecipeError(
            f"{path}{place}: not valid YAML: {problem}. Check the indentation and quotes there."
        ) from None
    except (OSError, ValueError, RecursionError) as error:  # ValueError: no UTF-8, a date or a number that is none
        raise RecipeError(f"{path}: cannot be read: {error or 'nested too deeply'}.") from None
    if not isinstance(data, dict) or not all(isinstance(key, str) for key in data):
        raise RecipeError(f"{path}: a recipe is a mapping such as `model:` / `data:` / `rewards:`, not a bare value.")
    return data


def apply_override(raw: dict[str, Any], override: str) -> None:
    """Set one `key.path=value` in the raw recipe, in place.

    Raises:
        RecipeError: the override has no `=`, or its path runs through a plain value or past a list's end.
    """
    try:
        override.encode("utf-8")
    except UnicodeEncodeError:
        raise RecipeError(f"override {override!a}: is not UTF-8. If it reads well, set LC_ALL=C.UTF-8.") from None
    key, equals, text = override.partition("=")
    steps = [step for step in re.split(r"[.\[\]]+", key.strip()) if step]
    if not equals or not steps:
        raise RecipeError(f"override {override!r}: write key.path=value, for example grpo.max_steps=50.")
    value = _override_value(steps[-1], text)
    target: Any = raw
    for i, step in enumerate(steps[:-1]):
        target = _descend(target, step, override, ".".join(steps[: i + 1]))
    last = steps[-1]
    if isinstance(target, list):
        _descend(target, last, override, key)  # the position after the last one adds an entry
        target[int(last)] = value
    elif isinstance(target, dict):
        if value is not None and tuple(steps[:-1]) in _SOURCES:
            for other in _SOURCE_KINDS.get(last, ()):  # a new source replaces the old one with its details
                target.pop(other, None)
        target[last] = value
    else:
        raise RecipeError(f"override {override!r}: {'.'.join(steps[:-1])} is a plain value and has no {last!r}.")


def _override_value(key: str, text: str) -> Any:
    """Read an override's value as YAML; a template, or what is not YAML, is taken as it stands."""
    if key in _TEMPLATE_KEYS and text not in ("", "null", "~"):
        return text
    try:
        return yaml.load(text, Loader=_Loader) if text.strip() else None
    except (yaml.YAMLError, ValueError, RecursionError):
        return text


def _follow_new_source(raw: dict[str, Any], overrides: Sequence[str]) -> None:
    """Hold out a tenth of a training source given on the line, unless the line says what to evaluate on.

    The recipe's own held-out sets and its warm-up on data belong to the recipe's own data: other columns, another task.
    """
    new_source = any(re.match(r"data\.train\.(hub|path|generator)=", override) for override in overrides)
    eval_given = any(re.match(r"data\.(eval|holdout)\b", override) for override in overrides)
    if new_source and not eval_given and raw["data"].get("eval"):
        raw["data"]["eval"] = None
        raw["data"]["holdout"] = 0.1
    section = raw.get("eval")
    if new_source and isinstance(section, dict) and not any(line.startswith("eval.also") for line in overrides):
        section.pop("also", None)
    warmup = raw.get("warmup")
    on_data = isinstance(warmup, dict) and warmup.get("source", "data") == "data"
    if new_source and on_data and not any(override.startswith("warmup") for override in overrides):
        raw["warmup"] = None


def _descend(target: Any, step: str, override: str, path: str) -> Any:
    if isinstance(target, list):
        if step.isdigit() and int(step) == len(target):
            target.append({})
        if not step.isdigit() or int(step) >= len(target):
            raise RecipeError(
                f"override {override!r}: {path}: the list has the positions 0 to {len(target) - 1}, and {len(target)} "
                "adds one."
            )
        return target[int(step)]
    if not isinstance(target, dict):
        raise RecipeError(f"override {override!r}: {path}: there is a plain value above it.")
    if target.get(step) is None:
        target[step] = {}
    return target[step]


def _own_faults(error: ValidationError) -> Iterable[str]:
    for item in error.errors(include_url=False):
        where = _dotted(item["loc"])
        value = item.get("input")
        if item["type"] == "extra_forbidden":
            allowed = _keys_at(item["loc"][:-1])
            if len(item["loc"]) == 1:
                yield f"{where}: unknown key{top_level_advice(where, allowed)}"
                continue
            hint = nearest(str(item["loc"][-1]), allowed)
            yield f"{where}: unknown key{hint}. Allowed: {', '.join(sorted(allowed))}."
        elif item["type"] == "missing" and isinstance(item["loc"][-1], int):  # of a row such as [step, low, high]
            row, field = _dotted(item["loc"][:-1]), _describe(item["loc"][:-2])
            yield f"{row}: {value!r} is given, and a value is missing. {field}"
        elif item["type"] == "missing":
            yield f"{where}: missing. {_describe(item['loc'])}"
        elif item["type"] == "value_error":
            yield f"{where}: {item['ctx']['error']}."
        else:
            quoted = repr(value) if len(repr(value)) <= 60 else repr(value)[:57] + "..."
            allowed = [str(v) for v in re.findall(r"'([^']*)'", item.get("ctx", {}).get("expected", ""))]
            guess = nearest(str(value), allowed) if isinstance(value, str) else ""
            message = item["msg"][0].lower() + item["msg"][1:]
            but = "but the " if message.startswith("input") else "but "
            yield f"{where}: {quoted} is given, {but}{message}{guess}."


def _dotted(loc: tuple[int | str, ...]) -> str:
    text = ""
    for part in loc:
        text += f"[{part}]" if isinstance(part, int) else f".{part}" if text else str(part)
    return text or "the recipe"


def _model_at(loc: tuple[int | str, ...]) -> Any:
    model: Any = Recipe
    for part in loc:
        if isinstance(part, int):
            continue
        field = getattr(model, "model_fields", {}).get(part)
        if field is None:
            return None
        kinds = [field.annotation, *getattr(field.annotation, "__args__", ())]
        model = next((kind for kind in kinds if hasattr(kind, "model_fields")), None)
    return model


def _keys_at(loc: tuple[int | str, ...]) -> list[str]:
    return list(getattr(_model_at(loc) or SourceSection, "model_fields", {}))


def _describe(loc: tuple[int | str, ...]) -> str:
    model = _model_at(loc[:-1])
    field = getattr(model, "model_fields", {}).get(loc[-1]) if model else None
    return (field.description if field and field.description else f"Add the key {loc[-1]!r}") + (
        "" if field and field.description and field.description.endswith(".") else "."
    )
