"""Read JSON lines that another process is still writing, or that a kill cut short."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any


def read_json_lines(path: Path) -> list[dict[str, Any]]:
    """Return the objects in a file of JSON lines; none if there is no such file. A line cut by a kill is left out."""
    try:
        text = path.read_text(encoding="utf-8", errors="replace")  # a kill may have cut within a character
    except FileNotFoundError:
        return []
    return read_lines(text)


def read_lines(text: str) -> list[dict[str, Any]]:
    """Return the objects of JSON lines; a line cut by a kill is left out."""
    records = []
    for line in text.split("\n"):  # not splitlines: JSON holds U+2028 unescaped, and models write it
        try:
            value = json.loads(line)
        except ValueError:
            continue
        if isinstance(value, dict):
            records.append(value)
    return records
