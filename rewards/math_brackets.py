"""Brackets in a cleaned text: how deep each place is, where one closes, and splitting outside all of them."""

from __future__ import annotations

import re
from functools import lru_cache

_OPEN, _CLOSE = "([{", ")]}"


def split_outside(text: str, separator: str) -> list[str]:
    """Split at a separator outside all brackets and macros' braces."""
    parts: list[str] = []
    start = 0
    for match in re.finditer(separator, text):
        if match.end() > match.start() and depths(text)[match.start()] == 0:
            parts.append(text[start : match.start()])
            start = match.end()
    return [*parts, text[start:]]


@lru_cache(maxsize=64)
def depths(text: str) -> tuple[int, ...]:
    """Return how many brackets are open around each character; a bracket itself counts as outside."""
    depth, result, place = 0, [], 0
    while place < len(text):
        step = 7 if text.startswith(("\\lbrace", "\\rbrace"), place) else 1
        opens = text[place] in _OPEN or text.startswith("\\lbrace", place)
        closes = text[place] in _CLOSE or text.startswith("\\rbrace", place)
        depth -= closes
        result.extend([depth] * step)
        depth += opens
        place += step
    return tuple(result)


def closing_place(text: str, place: int) -> int:
    """Return where the bracket that opens at `place` closes, −1 if it does not."""
    levels = depths(text)
    after = place + (7 if text.startswith("\\lbrace", place) else 1)
    for index in range(after, len(text)):
        if levels[index] <= levels[place]:
            return index
    return -1
