"""redact: the values of secrets in the environment never reach a file of a run, the screen or a log."""

from __future__ import annotations

import contextlib
import logging
import os
import re
from collections.abc import Mapping
from pathlib import Path

_NAME = re.compile(r"(^|_)(TOKEN|SECRET|PASSWORD|PASSWD|PASSPHRASE|APIKEY|KEY|CREDENTIALS?)(_|$)", re.IGNORECASE)
_SHORTEST = 8  # shorter values would be found everywhere
HIDDEN = "[secret]"


def secrets(environment: Mapping[str, str] | None = None) -> dict[str, str]:
    """Return where secrets are named -> their values: environment variables, and the Hub's login."""
    given = os.environ if environment is None else environment
    found = {f"${name}": value for name, value in given.items() if _NAME.search(name)}
    home = given.get("HF_HOME") or os.path.join(os.path.expanduser("~"), ".cache", "huggingface")
    with contextlib.suppress(OSError, UnicodeDecodeError):
        found["the Hub's login"] = Path(given.get("HF_TOKEN_PATH") or Path(home) / "token").read_text().strip()
    return {name: value for name, value in found.items() if len(value) >= _SHORTEST and not value.startswith("/")}


def redact(text: str) -> str:
    """Return the text with every secret's value replaced."""
    for value in sorted(secrets().values(), key=len, reverse=True):
        text = text.replace(value, HIDDEN)
    return text


def secret_in(text: str) -> str | None:
    """Return the name of a secret whose value is in the text, or None."""
    return next((name for name, value in secrets().items() if value in text), None)


class RedactingFormatter(logging.Formatter):
    """Formats log records, tracebacks included, without the values of secrets."""

    def format(self, record: logging.LogRecord) -> str:
        """Return the formatted record."""
        return redact(super().format(record))
