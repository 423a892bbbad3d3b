"""Read JSON lines that another process is still writing, or that a kill cut short."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any


def read_json_lines(path: Path) -> list[dict[str, Any]]:
    """Return the objects of a file of JSON lines; none where there is no such file, and no line cut by a kill."""
    try:
        text = path.read_text(encoding="utf-8", errors="replace")  # a kill may have cut within a character
    except FileNotFoundError:
        return []
    return read_lines(text)


def read_lines(text: str) -> list[dict[str, Any]]:
    """Return the objects of JSON lines; a line cut by a kill is left out."""
    found = []
    for line in text.split("\n"):  # not splitlines: U+2028 and the like stand bare in JSON, and models write them
        try:
            value = json.loads(line)
        except ValueError:
            continue
        if isinstance(value, dict):
            found.append(value)
    return found
