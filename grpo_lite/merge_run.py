"""merge_run: a run's adapter onto its 16-bit base, verified on held-out prompts and recorded."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from grpo_lite.data import Prompts
from grpo_lite.run_dir import RunDir


def merge_run(run: RunDir, show: Callable[[str], None], prompts: Prompts | None = None) -> dict[str, Any]:
    """Merge and verify."""
    return {}
