"""Trackers are TRL's own (`grpo.report_to`): only whether they are there is asked here, before anything loads."""

from __future__ import annotations

import importlib.util
from typing import Any

from grpo_lite.errors import GRPOLiteError

# Name in report_to -> the packages of which one must be there; upstream's other trackers say so themselves.
PACKAGES = {"tensorboard": ("tensorboard", "tensorboardX"), "trackio": ("trackio",), "wandb": ("wandb",)}


def require_trackers(report_to: Any, where: str) -> None:
    """Refuse to begin with a tracker that is not installed.

    Args:
        report_to: the recipe's `grpo.report_to`: a name, several, or "none".
        where: the recipe's path, for the message.

    Raises:
        GRPOLiteError: its package is missing.
    """
    names = [report_to] if isinstance(report_to, str) else list(report_to or ())
    for name in names:
        packages = PACKAGES.get(str(name), ())
        if packages and not any(importlib.util.find_spec(package) for package in packages):
            raise GRPOLiteError(
                f"{where}: grpo.report_to: {name} is given, and it is not installed. Add the trackers (trackio, "
                "tensorboard, wandb) by `python3 grpo_lite/bootstrap.py .venv trackers`, install it yourself by "
                f"`pip install {packages[0]}`, or leave grpo.report_to out."
            )
