"""Times and sizes as people read them."""

from __future__ import annotations

import time


def format_seconds(seconds: float) -> str:
    """Return `m:ss`, or `h:mm:ss` from an hour on."""
    minutes, secs = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{secs:02d}" if hours else f"{minutes}:{secs:02d}"


def gib(size: float | None) -> str | None:
    """Return bytes in GiB."""
    return None if not size else f"{size / 2**30:.1f} GiB"


def size(count: int) -> str:
    """Return a number of bytes in the largest unit that fits, as `1.5 MiB` or `812 B`."""
    for unit, power in (("GiB", 30), ("MiB", 20), ("KiB", 10)):
        if count >= 1 << power:
            return f"{count / (1 << power):.1f} {unit}"
    return f"{count} B"


def now() -> str:
    """Return the time, UTC, to the second."""
    return time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())


def duration(seconds: float | None) -> str | None:
    """Return seconds as `4.2 s`, `42 s`, `3 min 28 s` or `2 h 05 min`."""
    if seconds is None:
        return None
    if seconds < 59.5:
        return f"{seconds:.1f} s" if seconds < 9.95 else f"{seconds:.0f} s"
    minutes, rest = divmod(round(seconds), 60)
    hours, left = divmod(minutes, 60)
    return f"{hours} h {left:02d} min" if hours else f"{minutes} min {rest:02d} s"
