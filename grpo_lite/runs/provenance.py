"""Provenance of a run: the environment (versions, commit, platform, command) and the files outside it.

Its result depends on local files of data and reward code. Their sums are kept, and a file that has changed is named.
"""

from __future__ import annotations

import hashlib
import importlib.metadata
import importlib.util
import platform
import subprocess
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from grpo_lite.recipe.recipe import Recipe
from grpo_lite.runs.run_dir import RunDir
from grpo_lite.screen import Show
from grpo_lite.units import now

Sums = Mapping[str, Mapping[str, str | None]]  # recipe key -> path and sha256

_PACKAGES = ("torch", "transformers", "trl", "peft", "bitsandbytes", "accelerate", "datasets", "unsloth", "vllm")


def environment_record() -> dict[str, Any]:
    """Return what a reader needs to reproduce the run: versions, commit, platform, command."""
    versions = {name: version_of(name) for name in _PACKAGES}
    return {
        "grpo_lite": version_of("grpo-lite") or "source tree",
        "git_commit": _git_commit(),
        "python": platform.python_version(),
        "platform": platform.platform(),
        "versions": {name: version for name, version in versions.items() if version is not None},
        "command": [Path(sys.argv[0]).name, *sys.argv[1:]],
        "started_at": now(),
    }


def version_of(name: str) -> str | None:
    """Return an installed package's version; None where it is not installed."""
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None


def _git_commit() -> str | None:
    here = Path(__file__).resolve().parent
    try:
        result = subprocess.run(
            ["git", "describe", "--always", "--dirty", "--abbrev=12"],
            cwd=here,
            capture_output=True,
            text=True,
            timeout=5,
        )
    except (OSError, subprocess.TimeoutExpired):
        return None
    return result.stdout.strip() or None


def outside_files(recipe: Recipe) -> Iterator[tuple[str, Path]]:
    """Yield the recipe's key and the file, for every local file of rows and of reward code that it names.

    Rewards of this package belong to its commit; of another installed package, to its version.
    """
    for key, source in recipe.sources.items():
        if source.path:
            yield f"{key}.path", Path(source.path).expanduser()
    functions = [(f"rewards[{i}].function", section.function) for i, section in enumerate(recipe.rewards)]
    functions += [("eval.lenient.function", recipe.eval.lenient.function)] if recipe.eval.lenient else []
    functions += [(f"eval.strict[{i}].function", section.function) for i, section in enumerate(recipe.eval.strict)]
    functions += [(f"tools[{i}]", reference) for i, reference in enumerate(recipe.tools)]
    named = recipe.environment if isinstance(recipe.environment, dict) else {"": recipe.environment}
    functions += [(f"environment{name and '.'}{name}", reference) for name, reference in named.items() if reference]
    for key, reference in functions:
        if (path := _file_of(reference)) is not None:
            yield key, path


def _file_of(reference: str) -> Path | None:
    """Return the file that a reward is read from: `file.py:function`, or a module that is one file on the path."""
    file, colon, _ = reference.rpartition(":")
    if colon and (file.endswith(".py") or "/" not in file):
        return Path(file).expanduser() if file.endswith(".py") else None
    dotted = reference.rpartition(".")[0]
    try:
        spec = importlib.util.find_spec(dotted) if dotted and "." not in dotted and dotted != "rewards" else None
    except (ImportError, ValueError):
        return None
    return Path(spec.origin) if spec and spec.origin and spec.origin.endswith(".py") else None


def file_sums(recipe: Recipe) -> dict[str, dict[str, str | None]]:
    """Return path and sha256 by the recipe's key; a file that cannot be read has none."""
    sums: dict[str, dict[str, str | None]] = {}
    for key, path in outside_files(recipe):
        try:
            with path.open("rb") as file:
                digest: str | None = hashlib.file_digest(file, "sha256").hexdigest()
        except OSError:
            digest = None
        sums[key] = {"path": str(path), "sha256": digest}
    return sums


def changed_files(then: Any, now: Sums) -> list[str]:
    """Return a line for every file that has changed.

    Args:
        then: what run.json holds under `files`; runs of earlier versions hold nothing, so no change is reported.
    """
    lines = []
    for key, old in then.items() if isinstance(then, dict) else ():
        new = now.get(key)
        if new is None or not isinstance(old, dict) or old.get("sha256") == new["sha256"]:
            continue
        if new["sha256"] is None:
            lines.append(f"{key}: {new['path']} cannot be read any more")
        else:
            lines.append(
                f"{key}: {new['path']} has changed since (sha256 {str(old.get('sha256'))[:12]} then, "
                f"{new['sha256'][:12]} now)"
            )
    return lines


def keep_sums(run: RunDir, recipe: Recipe, resumes: bool, show: Show) -> None:
    """Record in run.json which files a session reads; if it resumes a run, show which have changed.

    Args:
        resumes: the session resumes the run, so the files should be those recorded.
    """
    changed = show_changes(run, recipe, show) if resumes else []
    changes = {"changed_files": [*run.read_run().get("changed_files", []), *changed]} if changed else {}
    run.update_run(files=file_sums(recipe), **changes)


def show_changes(run: RunDir, recipe: Recipe, show: Show) -> list[str]:
    """Show which files differ from those that the run read last, and return the lines."""
    changed = changed_files(run.read_run().get("files"), file_sums(recipe))
    for line in changed:
        show(f"{line}, so this is not an exact resume")
    return changed


def starts_from(recipe: Recipe, record: Mapping[str, Any]) -> str | None:
    """Return the adapter that a run started from; None: a fresh one.

    Args:
        recipe: the run's; its `without_paths` names no folder of the training machine.
        record: run.json.
    """
    if recipe.init_from is None:
        return None
    sha256 = (record.get("init_from") or {}).get("sha256")
    return f"the adapter {recipe.init_from}" + (f" (sha256 {sha256[:12]})" if sha256 else "")
