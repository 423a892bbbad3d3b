"""screen: lines for people without the values of secrets; a terminal or pipe that is gone ends nothing.

An SSH session that drops, or a `tee` that dies, makes every write to the screen an OSError. Training goes on without a
screen until it has saved what it has.
"""

from __future__ import annotations

import contextlib
import os
import sys
import unicodedata
from collections.abc import Callable, Iterator

from grpo_lite.files.redact import redact

Show = Callable[[str], None]
_STEERING = ("Cc", "Cf", "Cs", "Zl", "Zp")  # Unicode categories: control, format, surrogate, line and paragraph ends
_JOINERS = "\u200c\u200d"  # part of many scripts and emoji


def steadfast(show: Show) -> Show:
    """Return `show` such that secrets are hidden, nothing steers the terminal, and it never raises OSError."""

    def careful(line: str) -> None:
        with surviving():
            show(printable(redact(line), keep="\n\t"))

    return careful


def printable(text: str, keep: str = "") -> str:
    r"""Return a text that cannot steer a terminal: control and direction characters are written out, `keep` is kept.

    >>> printable("a\x1b[2J \u202eb\n", keep="\n")
    'a\\u001b[2J \\u202eb\n'
    """
    kept = _JOINERS + keep
    return "".join(f"\\u{ord(c):04x}" if unicodedata.category(c) in _STEERING and c not in kept else c for c in text)


def ready_streams() -> None:
    """Give a process without screen or keyboard (`>&-`, some daemons) ones that lead nowhere; fail in no locale.

    Without, the next file that is opened takes their numbers, and C libraries print into it. What a locale's
    characters (LC_ALL=C, Latin-1) cannot say is shown as `?`.
    """
    for number in range(3):
        try:
            os.fstat(number)
        except OSError:
            os.set_inheritable(os.open(os.devnull, os.O_RDWR), True)  # takes the lowest free number: this one
    for number, name in enumerate(("stdin", "stdout", "stderr")):
        stream = getattr(sys, name)
        if stream is None:
            setattr(sys, name, os.fdopen(number, "w" if number else "r", encoding="utf-8", closefd=False))
        elif number and hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="replace")


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
