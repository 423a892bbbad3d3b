"""Measurements kept in the user's cache as small records, looked up by the settings they depend on. Torch-free."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from grpo_lite.errors import GRPOLiteError, ModelError
from grpo_lite.files.atomic import read_record, write_atomic


def cache_dir() -> Path:
    """Return a writable cache folder: $GRPO_LITE_CACHE, the user's cache, or a temporary folder without a home."""
    home = os.environ.get("XDG_CACHE_HOME") or os.path.join(os.path.expanduser("~"), ".cache")
    candidates = [os.environ.get("GRPO_LITE_CACHE"), os.path.join(home, "grpo_lite")]
    for candidate in [*candidates, os.path.join(tempfile.gettempdir(), f"grpo_lite-{os.getuid()}")]:
        if candidate:
            path = Path(candidate)
            with contextlib.suppress(OSError):
                path.mkdir(parents=True, exist_ok=True)
                if os.access(path, os.W_OK):
                    return path
    raise ModelError("No folder for the model cache is writable. Set GRPO_LITE_CACHE to one that is.")


def keep_record(kind: str, settings: Mapping[str, Any], record: Mapping[str, Any]) -> None:
    """Keep a record of one kind; a cache that cannot be written is no error.

    Args:
        kind: the folder's name.
        settings: what the record depends on.
        record: JSON.
    """
    with contextlib.suppress(OSError, GRPOLiteError):
        file = _file(kind, settings)
        file.parent.mkdir(parents=True, exist_ok=True)
        write_atomic(file, json.dumps(record, indent=2) + "\n")


def kept_record(kind: str, settings: Mapping[str, Any]) -> dict[str, Any]:
    """Return the record kept for exactly these settings; an empty mapping if there is none or it is unreadable."""
    try:
        return read_record(_file(kind, settings))
    except GRPOLiteError:
        return {}


def _file(kind: str, settings: Mapping[str, Any]) -> Path:
    text = json.dumps(settings, sort_keys=True, default=str)
    return cache_dir() / kind / f"{hashlib.sha256(text.encode()).hexdigest()[:20]}.json"
