"""How a command is written for the reader: `make merge RUN=…` in a checkout, `grpo-lite merge …` anywhere else.

Every message that names a command asks here, so that the reader can type what it says. Standard library only.
"""

from __future__ import annotations

import os
import shlex
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent  # of a checkout, or the folder of installed packages
UNKNOWN = "…"  # stands for a value that the reader knows
TAKE_RECIPE = ("plan", "backends", "probe", "train", "warmup", "show", "check", "check-env", "rewards check")
MAKE_TARGETS = {"rewards check": "check-rewards"}  # the others have the verb's name
MAKE_VARIABLES = {
    "gguf": "GGUF",
    "nf4": "NF4",
    "force": "FORCE",
    "gpus": "GPUS",
    "budget": "BUDGET",
}  # other options go into ARGS


def speaks_make() -> bool:
    """Return whether the reader types `make`: in the root of a checkout, unless this process is `grpo-lite` itself."""
    try:
        at_root = os.path.samefile(os.curdir, ROOT)
    except OSError:  # the current directory is gone
        return False
    if not at_root or not (ROOT / "Makefile").is_file():
        return False
    return "MAKELEVEL" in os.environ or Path(sys.argv[0]).name != "grpo-lite"


def hint(
    verb: str, *overrides: str, recipe: str = "", run: Path | str = "", repo: str = "", **options: str | bool
) -> str:
    """Return a command for the reader to type.

    Args:
        verb: of `grpo-lite`.
        overrides: `key=value` of a recipe.
        recipe: its name; where the verb needs one and none is given, a placeholder is written.
        run: the run directory.
        repo: of the Hub.
        options: `overwrite=True` is --overwrite, `gguf="q8_0"` is --gguf q8_0.
    """
    needs_recipe = verb in TAKE_RECIPE
    if speaks_make():
        variables = {"RECIPE": recipe or (UNKNOWN if needs_recipe else ""), "RUN": str(run), "REPO": repo}
        variables |= {MAKE_VARIABLES[key]: _value(options[key]) for key in options if key in MAKE_VARIABLES}
        words = [
            "make",
            MAKE_TARGETS.get(verb, verb),
            *(f"{name}={_quoted(value)}" for name, value in variables.items() if value),
        ]
        rest = [*overrides, *_flags({key: value for key, value in options.items() if key not in MAKE_VARIABLES})]
        return " ".join([*words, *([make_arguments(" ".join(rest))] if rest else [])])
    words = ["grpo-lite", verb]
    words += [_quoted(recipe) if recipe else "RECIPE"] if needs_recipe else []
    words += overrides
    if run:
        path = "RUN" if run == UNKNOWN else _quoted(str(run))
        words += ["--run", path] if needs_recipe else [path]
    words += [repo if repo != UNKNOWN else "REPO"] if repo else []
    return " ".join([*words, *_flags(options)])


def hint_overrides(overrides: str) -> str:
    """Return overrides as they are added to the reader's command: `ARGS="a=1"`, or `a=1`."""
    return either(make_arguments(overrides), overrides)


def hint_run(run: Path | str = UNKNOWN) -> str:
    """Return how the reader names a run directory: `RUN=…`, or `--run …`."""
    return either(f"RUN={_quoted(str(run))}", f"--run {_quoted(str(run))}")


def hint_processes(count: int) -> str:
    """Return the command that trains on several cards of this machine."""
    launch = f"accelerate launch --multi_gpu --num_processes {count} --mixed_precision no -m grpo_lite.cli"
    return either(f"make train GPUS={count}", f"{launch} train RECIPE")


def hint_setup(extra: str = "") -> str:
    """Return the command that installs this project's packages; `unsloth` is an extra."""
    package = f"'grpo-lite[{extra}]'" if extra else "grpo-lite"
    return either("make setup" + (f" BACKEND={extra}" if extra else ""), f"pip install --upgrade {package}")


def either(make: str, grpo_lite: str) -> str:
    """Return the wording for the reader's own command."""
    return make if speaks_make() else grpo_lite


def make_arguments(text: str) -> str:
    """Return `ARGS="…"`, in other quotes where the shell would read double ones."""
    return "ARGS=" + (shlex.quote(text) if set(text) & set('"$`\\!') else f'"{text}"')


def _flags(options: dict[str, str | bool]) -> list[str]:
    flags = []
    for name, value in options.items():
        flags += [f"--{name.replace('_', '-')}"] if value is True else []
        flags += [f"--{name.replace('_', '-')}", _quoted(str(value))] if not isinstance(value, bool) else []
    return flags


def _value(value: str | bool) -> str:
    return value if isinstance(value, str) else "1" if value else ""


def _quoted(text: str) -> str:
    return text if text == UNKNOWN else shlex.quote(text)
