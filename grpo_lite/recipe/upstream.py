"""What `LoraConfig` and `GRPOConfig` accept, read from the installed sources without importing them.

Importing TRL costs seconds and torch; validating a recipe must cost neither. The dataclass bodies are parsed with
`ast`, so names, annotations and enum values always are those of the versions installed here.
"""

from __future__ import annotations

import ast
import importlib.metadata
import importlib.util
import re
import typing
from collections.abc import Iterator, Mapping
from functools import cache
from pathlib import Path
from typing import Any, Literal

from grpo_lite.commands import hint_setup
from grpo_lite.errors import RecipeError

# Closed sets that upstream annotates as a bare `str` (read in trl 1.14 and 1.16; a test checks).
CHOICES: dict[str, tuple[str, ...]] = {
    "loss_type": ("grpo", "dr_grpo", "dapo", "bnpo", "cispo", "sapo", "luspo", "vespo"),
    "scale_rewards": ("group", "batch", "none"),
    "importance_sampling_level": ("token", "sequence"),
    "multi_objective_aggregation": ("sum_then_normalize", "normalize_then_sum"),
    "vllm_mode": ("server", "colocate"),
    "vllm_importance_sampling_mode": ("token_truncate", "token_mask", "sequence_truncate", "sequence_mask"),
}

# (distribution, file, class): the class bodies that make up each config, base classes first.
_SOURCES = {
    "grpo": (
        ("transformers", "training_args.py", "TrainingArguments"),
        ("trl", "trainer/base_config.py", "_BaseConfig"),
        ("trl", "trainer/grpo_config.py", "GRPOConfig"),
    ),
    "lora": (
        ("peft", "config.py", "PeftConfigMixin"),
        ("peft", "config.py", "PeftConfig"),
        ("peft", "tuners/lora/config.py", "LoraConfig"),
    ),
}
_ENUM_SOURCES = (("transformers", "trainer_utils.py"), ("transformers", "training_args.py"))


@cache
def config_fields(section: Literal["grpo", "lora"]) -> Mapping[str, Any]:
    """Return field name -> Python type of the upstream config, enums as `Literal`.

    Raises:
        RecipeError: an upstream package is not installed, or has moved its config.
    """
    enums = {name: Literal[values] for package, file in _ENUM_SOURCES for name, values in _enums(package, file)}
    fields: dict[str, Any] = {}
    for package, file, class_name in _SOURCES[section]:
        for name, annotation in _class_annotations(package, file, class_name):
            fields[name] = Literal[CHOICES[name]] if name in CHOICES else _evaluate(annotation, enums)
    if "scale_rewards" in fields:  # TRL also takes the booleans of its first versions
        fields["scale_rewards"] = Literal["group", "batch", "none", True, False]
    return fields


@cache
def config_defaults(section: Literal["grpo", "lora"]) -> Mapping[str, Any]:
    """Return field name -> upstream's default, of the fields whose default is written as a plain value.

    Raises:
        RecipeError: as config_fields.
    """
    defaults: dict[str, Any] = {}
    for package, file, class_name in _SOURCES[section]:
        for name, value in _class_defaults(package, file, class_name):
            try:
                defaults[name] = ast.literal_eval(value)
            except ValueError:  # computed, or made by a factory
                defaults.pop(name, None)
    return defaults


def installed_versions() -> dict[str, str]:
    """Return the versions of the packages whose configs are read here."""
    return {name: importlib.metadata.version(name) for name in ("transformers", "trl", "peft")}


def _source_tree(package: str, file: str) -> ast.Module:
    spec = importlib.util.find_spec(package)
    if spec is None or spec.origin is None:
        raise RecipeError(f"{package} is not installed, so recipes cannot be checked. Run `{hint_setup()}`.")
    path = Path(spec.origin).parent / file
    if not path.is_file():
        raise RecipeError(
            f"{package} {importlib.metadata.version(package)} has no {file}: this version is not supported. "
            f"Run `{hint_setup()}` to install the supported one."
        )
    return ast.parse(path.read_text(encoding="utf-8"))


def _class_annotations(package: str, file: str, class_name: str) -> Iterator[tuple[str, str]]:
    for item in _class_fields(package, file, class_name):
        yield ast.unparse(item.target), ast.unparse(item.annotation)


def _class_defaults(package: str, file: str, class_name: str) -> Iterator[tuple[str, ast.expr]]:
    """Yield each field that has a default, `x: int = 1` or `x: int = field(default=1)`."""
    for item in _class_fields(package, file, class_name):
        value = item.value
        if isinstance(value, ast.Call):
            value = next((keyword.value for keyword in value.keywords if keyword.arg == "default"), value)
        if value is not None:
            yield ast.unparse(item.target), value


def _class_fields(package: str, file: str, class_name: str) -> list[ast.AnnAssign]:
    for node in ast.walk(_source_tree(package, file)):
        if isinstance(node, ast.ClassDef) and node.name == class_name:
            fields = [item for item in node.body if isinstance(item, ast.AnnAssign)]
            return [item for item in fields if "ClassVar" not in ast.unparse(item.annotation)]
    raise RecipeError(
        f"{package} {importlib.metadata.version(package)} has no class {class_name} in {file}: this version is not "
        f"supported. Run `{hint_setup()}` to install the supported one."
    )


def _enums(package: str, file: str) -> Iterator[tuple[str, tuple[str, ...]]]:
    for node in _source_tree(package, file).body:
        if isinstance(node, ast.ClassDef) and any("Enum" in ast.unparse(base) for base in node.bases):
            values = tuple(
                item.value.value
                for item in node.body
                if isinstance(item, ast.Assign)
                and isinstance(item.value, ast.Constant)
                and isinstance(item.value.value, str)
            )
            if values:
                yield node.name, values


class _Namespace(dict[str, Any]):
    """Names an annotation may use; a class we do not import is `Any`."""

    def __missing__(self, key: str) -> Any:
        return Any


def _evaluate(annotation: str, enums: Mapping[str, Any]) -> Any:
    if any(re.search(rf"\b{name}\b", annotation) for name in enums):
        annotation = annotation.replace(" | str", "")  # `SchedulerType | str` would accept any string
    namespace = _Namespace(
        {name: getattr(typing, name) for name in ("Any", "Literal", "Optional", "Union")},
        **{kind.__name__: kind for kind in (bool, int, float, str, dict, list, tuple)},
        **enums,
    )
    try:
        return eval(annotation, {"__builtins__": {}}, namespace)
    except TypeError:  # an operator between stand-ins, e.g. `Any | Any` of a newer upstream
        return Any
