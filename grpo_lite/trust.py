"""Code shipped with a model runs only where the recipe asks for it and the user said yes on the command line."""

from __future__ import annotations

import os

from grpo_lite.errors import ModelError
from grpo_lite.recipe import ModelSection

VARIABLE = "GRPO_LITE_TRUST_REMOTE_CODE"
FLAG = "--trust-remote-code"


def confirm() -> None:
    """Note the user's yes, for this process and those it starts."""
    os.environ[VARIABLE] = "1"


def trusts_remote_code(section: ModelSection) -> bool:
    """Return whether the model's own Python may run.

    Raises:
        ModelError: the recipe asks for it, and the user has not confirmed it.
    """
    if section.trust_remote_code and os.environ.get(VARIABLE) != "1":
        raise ModelError(
            f"model.trust_remote_code: true is given, so Python code that comes with {section.id} would run here with "
            f"your rights. Read it, then confirm with {FLAG} (make: ARGS={FLAG}; or {VARIABLE}=1), or set it to false."
        )
    return section.trust_remote_code
