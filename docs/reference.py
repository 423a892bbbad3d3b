"""Write docs/reference.md, every recipe key, reward and command, from the code: `python docs/build.py`."""

from __future__ import annotations

import inspect
import re
import types
from collections.abc import Iterator
from typing import Any, Literal, Union, get_args, get_origin

import click
from pydantic import BaseModel
from pydantic_core import PydanticUndefined

import rewards
from grpo_lite.cli import main
from grpo_lite.recipe.recipe import Recipe

OPENING = """# Reference

Written from the code by `python docs/build.py`, so it says what this version does. [Commands](#commands) ·
[recipe keys](#recipe-keys) · [reward functions](#reward-functions). For examples see [every command](commands.md) and
the [recipes](../recipes/README.md).
"""
UPSTREAM = {
    "lora": "peft's `LoraConfig`, under its own names (`r`, `lora_alpha`, `target_modules` …), and `init_from`",
    "grpo": "TRL's `GRPOConfig`, under its own names (`num_generations`, `max_completion_length`, `beta` …)",
}


def reference() -> str:
    """Return the page."""
    return "\n".join([OPENING, *_commands(), *_keys(), *_rewards()]) + "\n"


# Commands


def _commands() -> Iterator[str]:
    yield "## Commands\n"
    for name, command in _verbs(main, "grpo-lite"):
        arguments = [p for p in command.params if isinstance(p, click.Argument)]
        options = [p for p in command.params if isinstance(p, click.Option)]
        usage = " ".join([name, *(_argument(argument) for argument in arguments)])
        yield f"### `{usage}`\n"
        yield _plain(inspect.cleandoc(command.help or "")) + "\n"
        if options:
            yield "| option | does |\n|---|---|"
            for option in options:
                yield f"| {_option(option)} | {_cell(option.help or '')} |"
            yield ""


def _verbs(group: click.Group, prefix: str) -> Iterator[tuple[str, click.Command]]:
    for name, command in group.commands.items():
        if isinstance(command, click.Group):
            yield from _verbs(command, f"{prefix} {name}")
        elif not command.hidden:
            yield f"{prefix} {name}", command


def _argument(argument: click.Argument) -> str:
    name = re.sub(r"[\[\]. …]", "", argument.metavar or argument.name or "").upper()
    many = " …" if argument.nargs == -1 else ""
    return f"{name}{many}" if argument.required else f"[{name}{many}]"


def _option(option: click.Option) -> str:
    names = ", ".join(f"`{name}`" for name in [*option.opts, *option.secondary_opts])
    if option.is_flag:
        return names
    choices = getattr(option.type, "choices", None)
    return f"{names} {' / '.join(map(str, choices)) if choices else (option.metavar or option.type.name.upper())}"


# Recipe keys


def _keys() -> Iterator[str]:
    yield "## Recipe keys\n"
    yield "A key without a default is required. `grpo-lite show RECIPE` prints a recipe with every value resolved.\n"
    yield "| key | values | default | meaning |\n|---|---|---|---|"
    for key, field in Recipe.model_fields.items():
        if key in UPSTREAM:
            yield f"| `{key}:` | the keys of upstream | | {UPSTREAM[key]} |"
        elif section := _section(field.annotation):
            meaning = _cell(field.description or _first(section))
            yield f"| `{key}:` | [section](#{key}) | {_default(field)} | {meaning} |"
        else:
            yield _row(key, field)
    yield ""
    for key, field in Recipe.model_fields.items():
        if key not in UPSTREAM and (section := _section(field.annotation)):
            yield from _table(key, section, many=_is_list(field.annotation))


def _table(key: str, section: type[BaseModel], many: bool) -> Iterator[str]:
    yield f"### `{key}`\n"
    yield (section.__doc__ or "").strip() + (" A list of these." if many else "") + "\n"
    yield "| key | values | default | meaning |\n|---|---|---|---|"
    for name, field in section.model_fields.items():
        inner = _section(field.annotation)
        yield _row(name, field)
        for deeper, its in inner.model_fields.items() if inner and inner is not section else ():
            yield _row(f"{name}{'[N]' if _is_list(field.annotation) else ''}.{deeper}", its)
    yield ""


def _row(key: str, field: Any) -> str:
    return f"| `{key}` | {_cell(_values(field.annotation))} | {_default(field)} | {_cell(field.description or '')} |"


def _section(annotation: Any) -> type[BaseModel] | None:
    """Return the section that an annotation holds, alone, in a list, in a dict by name, or optional."""
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return annotation
    return next(filter(None, map(_section, get_args(annotation))), None)


def _is_list(annotation: Any) -> bool:
    return get_origin(annotation) is list


def _values(annotation: Any) -> str:
    if _section(annotation):
        return {list: "a list", dict: "by name"}.get(get_origin(annotation), "a section")  # type: ignore[call-overload]
    if get_origin(annotation) is Literal:
        return " / ".join(f"`{value}`" for value in get_args(annotation))
    if get_origin(annotation) in (Union, types.UnionType):
        return ", ".join(_values(a) if a is not type(None) else "null" for a in get_args(annotation))
    names = {str: "text", int: "whole number", float: "number", bool: "true / false", Any: "anything"}
    return {list: "a list", dict: "a mapping"}.get(get_origin(annotation)) or names.get(annotation, "text")


def _default(field: Any) -> str:
    if field.is_required():
        return ""
    value = field.default if field.default is not PydanticUndefined else field.default_factory()
    if isinstance(value, BaseModel):
        return "see there"
    spelled = {None: "null", True: "true", False: "false"}
    shown = spelled[value] if value is None or isinstance(value, bool) else value
    return f"`{shown!s}`" if shown != "" else "empty"


# Rewards


def _rewards() -> Iterator[str]:
    yield "## Reward functions\n"
    yield "Of the package `rewards`; every one takes TRL's call, `reward(completions, <dataset columns>, **kwargs)`.\n"
    for name in sorted(rewards.__all__):
        function = getattr(rewards, name)
        top = getattr(function, "top", None)
        lines = inspect.cleandoc(function.__doc__ or "")
        yield f"### `rewards.{name}`\n"
        yield f"```py\n{_signature(name, function)}\n```\n"
        yield _plain(lines.split("\n\n")[0]) + "\n"
        if arguments := re.search(r"^Args:\n((?: {4}.*\n?)+)", lines, flags=re.MULTILINE):
            yield from (f"- {_plain(line)}" for line in _items(arguments[1]))
            yield ""
        if top is not None:
            yield f"A perfect completion earns {top:g}.\n"


def _signature(name: str, function: Any) -> str:
    parameters = [
        p.replace(annotation=inspect.Parameter.empty) for p in inspect.signature(function).parameters.values()
    ]
    return name + re.sub(r"<function (\w+) at \w+>", r"\1", str(inspect.Signature(parameters)))


def _items(block: str) -> list[str]:
    """Return the arguments of a docstring's block, each with its continuation lines on one."""
    items: list[str] = []
    for line in inspect.cleandoc(block).splitlines():
        if line.startswith(" ") and items:
            items[-1] += " " + line.strip()
        else:
            items.append(re.sub(r"^([\w*, ]+):", r"`\1`:", line.strip()))
    return items


def _first(thing: Any) -> str:
    return (thing.__doc__ or "").strip().split("\n")[0]


def _plain(text: str) -> str:
    return "\n".join(line.rstrip() for line in text.replace("\b", "").splitlines()).strip()


def _cell(text: str) -> str:
    return " ".join(text.split()).replace("|", "\\|")
