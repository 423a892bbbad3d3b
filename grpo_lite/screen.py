"""screen: lines for people without the values of secrets; a terminal or pipe that is gone ends nothing.

An SSH session that drops, or a `tee` that dies, makes every write to the screen an OSError. Training goes on without a
screen until it has saved what it has.
"""

from __future__ import annotations

import contextlib
import os
import sys
from collections.abc import Callable, Iterator

from grpo_lite.redact import redact

Show = Callable[[str], None]


def steadfast(show: Show) -> Show:
    """Return `show` such that secrets are hidden, and that it never raises OSError."""

    def careful(line: str) -> None:
        with surviving():
            show(redact(line))

    return careful


@contextlib.contextmanager
def surviving() -> Iterator[None]:
    """Let what is written inside fail; from then on this process writes to nowhere."""
    try:
        yield
    except OSError:
        abandon()


def abandon() -> None:
    """Send what this process still writes to its screen to nowhere."""
    nowhere = os.open(os.devnull, os.O_WRONLY)
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(OSError, ValueError, AttributeError):  # no real file: a notebook's, a test's
            os.dup2(nowhere, stream.fileno())
    os.close(nowhere)
