"""call_within: what hangs is stopped, on the main thread and off it."""

from __future__ import annotations

import re
import signal
import threading
import time
from collections.abc import Callable
from typing import Any

import pytest

from grpo_lite.task.guard import TimeLimitExceeded, call_within


def spin() -> None:
    while True:
        pass


def swallow() -> None:
    while True:
        try:
            time.sleep(30)
        except BaseException:
            break
    time.sleep(30)  # a bare except does not save it: the limit rings again


def own_alarm() -> None:
    previous = signal.signal(signal.SIGALRM, lambda *_: None)
    signal.alarm(5)
    signal.alarm(0)  # as math-verify does: our timer is off now
    signal.signal(signal.SIGALRM, previous)
    time.sleep(30)


HANGS: dict[str, Callable[[], Any]] = {
    "an endless loop": spin,
    "a sleep": lambda: time.sleep(30),
    "a bare except": swallow,
    "an alarm of its own": own_alarm,
    "a regular expression": lambda: re.match(r"(a+)+$", "a" * 60 + "b"),
}


@pytest.mark.parametrize("name", HANGS)
def test_what_hangs_on_the_main_thread_is_interrupted(name: str) -> None:
    begun = time.monotonic()
    with pytest.raises(TimeLimitExceeded):
        call_within(0.2, HANGS[name])
    assert time.monotonic() - begun < 5


def test_the_caller_s_own_alarm_goes_on() -> None:
    rung: list[float] = []
    handler = signal.signal(signal.SIGALRM, lambda *_: rung.append(time.monotonic()))
    timer = signal.setitimer(signal.ITIMER_REAL, 0.3)
    begun = time.monotonic()
    try:
        with pytest.raises(TimeLimitExceeded):
            call_within(0.1, spin)
        time.sleep(0.5)
    finally:
        signal.signal(signal.SIGALRM, handler)
        signal.setitimer(signal.ITIMER_REAL, *timer)
    assert len(rung) == 1
    assert 0.25 < rung[0] - begun < 0.5


@pytest.mark.parametrize("hang", [lambda: time.sleep(3), lambda: [time.sleep(0.01) for _ in range(300)]],
                         ids=["a sleep", "a loop"])  # fmt: skip
def test_what_hangs_off_the_main_thread_is_left_behind(hang: Callable[[], Any]) -> None:
    caught: list[float] = []

    def notebook() -> None:
        begun = time.monotonic()
        try:
            call_within(0.2, hang)
        except TimeLimitExceeded:
            caught.append(time.monotonic() - begun)

    thread = threading.Thread(target=notebook)
    thread.start()
    thread.join(10)
    assert caught
    assert caught[0] < 2


@pytest.mark.parametrize("threaded", [False, True])
def test_results_and_errors_pass_through(threaded: bool) -> None:
    found: list[Any] = []

    def run() -> None:
        found.append(call_within(5, lambda: 7))
        with pytest.raises(ZeroDivisionError):
            call_within(5, lambda: 1 // 0)

    if threaded:
        thread = threading.Thread(target=run)
        thread.start()
        thread.join()
    else:
        run()
    assert found == [7]
