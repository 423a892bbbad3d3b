"""Times and sizes as people read them: the only place that formats a duration or a number of bytes for a sentence."""

from __future__ import annotations

import time


def duration(seconds: float | None) -> str | None:
    """Return seconds as `4.2 s`, `42 s`, `3 min 28 s` or `2 h 05 min`; None if they are not known."""
    if seconds is None:
        return None
    if seconds < 59.5:
        return f"{seconds:.1f} s" if seconds < 9.95 else f"{seconds:.0f} s"
    minutes, rest = divmod(round(seconds), 60)
    hours, left = divmod(minutes, 60)
    return f"{hours} h {left:02d} min" if hours else f"{minutes} min {rest:02d} s"


def span(low_s: float, high_s: float) -> str:
    """Return a range of times in one unit, as `40 to 70 min` or `1.5 to 3 h`; a digit or two, as it is an estimate.

    >>> span(100, 300), span(2500, 4100), span(5400, 12000), span(50000, 90000)
    ('2 to 5 min', '42 to 68 min', '1.5 to 3.3 h', '14 to 25 h')
    """
    if high_s < 90 * 60:
        least, most = max(1, round(low_s / 60)), max(1, round(high_s / 60))
        return f"{least} to {most} min" if most > least else f"about {most} min"
    low, high = (f"{s / 3600:.1f}".removesuffix(".0") if s < 35000 else f"{s / 3600:.0f}" for s in (low_s, high_s))
    return f"{low} to {high} h"


def whole_seconds(seconds: float) -> str:
    """Return seconds without tenths, for a figure that changes while it is read: `4 s`, `42 s`, `3 min 28 s`."""
    return f"{seconds:.0f} s" if seconds < 9.95 else str(duration(seconds))


def time_left(seconds: float) -> str:
    """Return an estimate as `about 5 s left`, of at least a second."""
    return f"about {whole_seconds(max(1.0, seconds))} left"


def size(count: float | None) -> str | None:
    """Return a number of bytes in the largest unit that fits, as `1.5 MiB` or `812 B`; None if it is not known."""
    if count is None:
        return None
    for unit, power in (("GiB", 30), ("MiB", 20), ("KiB", 10)):
        if count >= 1 << power:
            return f"{count / (1 << power):.1f} {unit}"
    return f"{count:.0f} B"


def gib(count: float, digits: int = 1) -> str:
    """Return a number of bytes in GiB whatever its size, as `0.4 GiB`: for plans, whose figures are compared."""
    return f"{count / (1 << 30):.{digits}f} GiB"


def now() -> str:
    """Return the time, UTC, to the second."""
    return time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())
