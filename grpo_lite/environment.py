"""What a reader needs to reproduce a run, read from the environment: versions, commit, platform, command."""

from __future__ import annotations

import importlib.metadata
import platform
import subprocess
import sys
from pathlib import Path
from typing import Any

from grpo_lite.run_dir import now

_PACKAGES = ("torch", "transformers", "trl", "peft", "bitsandbytes", "accelerate", "datasets", "unsloth", "vllm")


def environment_record() -> dict[str, Any]:
    """Return what a reader needs to reproduce the run: versions, commit, platform, command."""
    found = {name: version_of(name) for name in _PACKAGES}
    return {
        "grpo_lite": version_of("grpo-lite") or "source tree",
        "git_commit": _git_commit(),
        "python": platform.python_version(),
        "platform": platform.platform(),
        "versions": {name: version for name, version in found.items() if version is not None},
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
