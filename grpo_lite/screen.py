"""The screen: lines for people, without secrets, that keep a run alive when the terminal or pipe closes.

When an SSH session drops or a `tee` dies, every write to the screen raises OSError. Training then continues without a
screen, until its last checkpoint is saved.
"""

from __future__ import annotations

import contextlib
import os
import select
import sys
import time
import unicodedata
from collections.abc import Callable, Iterator

from grpo_lite.files.redact import redact
from grpo_lite.units import time_left

Show = Callable[[str], None]
PROGRESS_EVERY_S = 10.0
_STEERING = ("Cc", "Cf", "Cs", "Zl", "Zp")  # Unicode categories: control, format, surrogate, line and paragraph ends
_JOINERS = "\u200c\u200d"  # part of many scripts and emoji


def quiet_on_broken_pipe(show: Show) -> Show:
    """Return `show` with secrets hidden and control characters escaped; it never raises OSError."""

    def careful(line: str) -> None:
        with ignore_closed_screen():
            show(printable(redact(line), keep="\n\t"))

    return careful


def progress_lines(show: Show, what: str, unit: str = "prompts") -> Callable[[int, int], None]:
    """Return a callback for (done, total) that shows the progress of a long step: every 10 s, and at its end."""
    begun = shown = time.monotonic()

    def progress(done: int, total: int) -> None:
        nonlocal shown
        now = time.monotonic()
        if done == total:
            show(f"{what}: {done}/{total} {unit}")
        elif now - shown >= PROGRESS_EVERY_S:
            shown = now
            left = (now - begun) / max(1, done) * (total - done)
            show(f"{what}: {done}/{total} {unit}, {time_left(left)}")

    return progress


def printable(text: str, keep: str = "") -> str:
    r"""Return a text that cannot control a terminal: control and direction characters are escaped, except `keep`.

    >>> printable("a\x1b[2J \u202eb\n", keep="\n")
    'a\\u001b[2J \\u202eb\n'
    """
    allowed = _JOINERS + keep
    return "".join(f"\\u{ord(c):04x}" if unicodedata.category(c) in _STEERING and c not in allowed else c for c in text)


def ready_streams() -> None:
    """Open /dev/null for each standard stream that is closed (`>&-`, some daemons), and accept every locale.

    Otherwise the next file that is opened gets the number of a closed stream, and C libraries print into it. A
    character that the locale (LC_ALL=C, Latin-1) cannot encode is shown as `?`.
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
def ignore_closed_screen() -> Iterator[None]:
    """Ignore an OSError of a write to the screen, and silence this process from then on."""
    try:
        yield
    except OSError:
        silence()


def reader_has_left() -> bool:
    """Return whether the standard output is a pipe that nobody reads any more, as after `| head -1`."""
    try:
        poll = select.poll()
        poll.register(sys.stdout.fileno(), select.POLLOUT)
        return any(event & (select.POLLERR | select.POLLHUP) for _, event in poll.poll(0))
    except (OSError, ValueError, AttributeError):  # no real file
        return False


def silence() -> None:
    """Send everything that this process prints from now on to /dev/null."""
    null = os.open(os.devnull, os.O_WRONLY)
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(OSError, ValueError, AttributeError):  # no real file: a notebook's, a test's
            os.dup2(null, stream.fileno())
    os.close(null)
