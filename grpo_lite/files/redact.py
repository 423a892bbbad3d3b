"""Keep the values of secrets out of a run's files, the screen and the logs."""

from __future__ import annotations

import contextlib
import html
import json
import logging
import os
import re
import sys
import traceback
import urllib.parse
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import Any

# TOKENIZERS_PARALLELISM is no secret; KEY has to be a word of its own (not KEYBOARD, MONKEY).
_NAME = re.compile(
    r"TOKEN(?!IZ)|SECRET|PASSW|PASSPHRASE|CREDENTIAL|(API|ACCESS|PRIVATE)_?KEY|(^|_)(KEYS?|PAT|AUTH)(_|$)",
    re.IGNORECASE,
)
_SHORTEST = 8  # shorter values would match everywhere
# Secrets recognised by their form, whatever the environment says: `https://user:password@host` (pathlib makes one
# slash of two), and tokens of the Hub, GitHub, GitLab, OpenAI-like services, Slack and AWS.
_USERINFO = re.compile(r"(?<=:/)(/?)[^\s/@:'\"]*:[^\s/@'\"]+@")
_TOKEN = re.compile(
    r"\b(?:hf_[A-Za-z0-9]{30,}|gh[pousr]_[A-Za-z0-9]{30,}|github_pat_\w{30,}|glpat-[\w-]{20,}"
    r"|sk-(?=[\w-]*\d)[\w-]{20,}|xox[abeprs]-[\w-]{10,}|AKIA[0-9A-Z]{16})"
)
_KEY = re.compile(r"(api|access|private|secret)_?key|(api|access|auth|hub|hf)_?token|secret|passw", re.IGNORECASE)
_PROSE = ("description", "data.prompt", "data.system", "data.examples", "data.gold_completion")
HIDDEN = "[secret]"


def secrets(environment: Mapping[str, str] | None = None) -> dict[str, str]:
    """Return the values of secrets by where they come from: environment variables, and the Hub's login."""
    variables = os.environ if environment is None else environment
    values = {f"${name}": value.strip() for name, value in variables.items() if _NAME.search(name)}
    home = variables.get("HF_HOME") or os.path.join(os.path.expanduser("~"), ".cache", "huggingface")
    with contextlib.suppress(OSError, UnicodeDecodeError):
        values["the Hub's login"] = Path(variables.get("HF_TOKEN_PATH") or Path(home) / "token").read_text().strip()
    return {name: value for name, value in values.items() if len(value) >= _SHORTEST and not _is_path(value)}


def _is_path(value: str) -> bool:
    """Return whether a value names an existing file (SSL_KEY_FILE …); base64 may begin with a slash, too."""
    try:
        return value.startswith(("/", "~")) and os.path.exists(os.path.expanduser(value))
    except ValueError:
        return False


def _spellings(value: str) -> set[str]:
    """Return a value as it is, and as JSON, Python, HTML and URLs write it."""
    spellings = {value, json.dumps(value)[1:-1], json.dumps(value, ensure_ascii=False)[1:-1], repr(value)[1:-1]}
    return spellings | {html.escape(value), urllib.parse.quote(value, safe="", errors="replace")}


def redact(text: str) -> str:
    """Return the text without secrets: known values, however they are spelled, and what has the form of one."""
    for spelling in sorted({s for value in secrets().values() for s in _spellings(value)}, key=len, reverse=True):
        text = text.replace(spelling, HIDDEN)
    return _TOKEN.sub(HIDDEN, _USERINFO.sub(rf"\1{HIDDEN}@", text) if "@" in text else text)


def secret_in(text: str) -> str | None:
    """Return the name of a secret whose value is in the text, or None."""
    return next((name for name, value in secrets().items() if any(s in text for s in _spellings(value))), None)


def planted_secret(value: Any, where: str = "") -> str | None:
    """Return the key of a recipe's value that looks like a secret, or None.

    Such are tokens of known form, addresses with a password, and texts under keys like `api_key`; what is all capitals
    is the name of an environment variable.

    Args:
        value: a recipe as plain data, or a part of it.
        where: the part's key.
    """
    if isinstance(value, Mapping | list):
        items = value.items() if isinstance(value, Mapping) else ((f"[{i}]", item) for i, item in enumerate(value))
        pairs = ((f"{where}{key}" if str(key)[:1] == "[" or not where else f"{where}.{key}", v) for key, v in items)
        return next((found for key, item in pairs if (found := planted_secret(item, key))), None)
    if not isinstance(value, str):
        return None
    named = _KEY.search(where.rpartition(".")[2]) and len(value) >= _SHORTEST and not re.fullmatch("[A-Z0-9_]+", value)
    address = _USERINFO.search(value) and not where.startswith(_PROSE)
    return where if _TOKEN.search(value) or address or (named and not _is_path(value)) else None


class RedactingFormatter(logging.Formatter):
    """Formats log records, tracebacks included, without the values of secrets."""

    def format(self, record: logging.LogRecord) -> str:
        """Return the formatted record."""
        return redact(super().format(record))


def redact_logs() -> None:
    """Hide secrets in log records: ours, and those of libraries with their own handlers (transformers, datasets)."""
    for handler in logging.getLogger().handlers:
        handler.setFormatter(RedactingFormatter("%(name)s: %(message)s"))
    make = logging.getLogRecordFactory()
    if getattr(make, "hides_secrets", False):
        return

    def record(*args: Any, **kwargs: Any) -> logging.LogRecord:
        entry = make(*args, **kwargs)
        with contextlib.suppress(TypeError, ValueError, KeyError):  # a faulty call: logging itself reports it
            message = entry.getMessage()
            if (hidden := redact(message)) != message:
                entry.msg, entry.args = hidden, None
        return entry

    record.hides_secrets = True  # type: ignore[attr-defined]
    logging.setLogRecordFactory(record)


def redact_tracebacks() -> None:
    """Hide secrets in the traceback of an uncaught error (GRPO_LITE_TRACEBACK=1)."""

    def show(kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
        sys.stderr.write(redact("".join(traceback.format_exception(kind, error, trace))))

    sys.excepthook = show
