"""call_within: what hangs is stopped, on the main thread and off it."""

from __future__ import annotations

import asyncio
import contextlib
import gc
import os
import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from grpo_lite.task.time_limit import TimeLimitExceeded, call_within, wait_for


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


def keep() -> None:
    caught = []
    while True:
        try:
            time.sleep(0.01)
        except BaseException as error:
            caught.append(error)


def bare_loops() -> None:
    while True:
        try:
            while True:
                try:
                    while True:
                        try:  # noqa: SIM105
                            time.sleep(0.005)
                        except:  # noqa: E722
                            pass
                except:  # noqa: E722
                    continue
        except BaseException as error:
            last = error  # noqa: F841


def busy_bare_loop() -> None:
    while True:
        try:  # noqa: SIM105
            sum(range(100))
        except:  # noqa: E722
            pass


def suppressed() -> None:
    while True:
        with contextlib.suppress(BaseException):
            time.sleep(0.01)


def swallowing_calls() -> None:
    def tries() -> None:
        with contextlib.suppress(BaseException):
            time.sleep(0.01)

    while True:
        tries()


def answers_too_late() -> str:
    try:
        time.sleep(30)
    except:  # noqa: E722
        return "an answer"
    return "never"


SWALLOWS: dict[str, Callable[[], Any]] = {
    "bare excepts in three loops": bare_loops,
    "a busy loop with a bare except": busy_bare_loop,
    "suppress": suppressed,
    "calls that swallow": swallowing_calls,
}

HANGS: dict[str, Callable[[], Any]] = {
    "an endless loop": spin,
    "a sleep": lambda: time.sleep(30),
    "a bare except": swallow,
    "an alarm of its own": own_alarm,
    "a regular expression": lambda: re.match(r"(a+)+$", "a" * 60 + "b"),
    "a loop that keeps what it catches": keep,
    "an answer too late": answers_too_late,
    **SWALLOWS,
}


@pytest.mark.parametrize("name", HANGS)
def test_what_hangs_on_the_main_thread_is_interrupted(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    # An alarm may come while a finalizer runs; pytest's own hook for that would be interrupted by the next one.
    monkeypatch.setattr(sys, "unraisablehook", lambda _: None)
    begun = time.monotonic()
    with pytest.raises(TimeLimitExceeded):
        call_within(0.2, HANGS[name])
    assert time.monotonic() - begun < 5


@pytest.mark.parametrize("name", SWALLOWS)
def test_what_swallows_everything_off_the_main_thread_is_ended(name: str) -> None:
    ended: list[Any] = []

    def watched() -> None:
        try:
            SWALLOWS[name]()
        finally:
            ended.append(threading.current_thread().name)

    def notebook() -> None:
        try:
            call_within(0.1, watched)
        except TimeLimitExceeded as over:
            ended.append(over.still_running)

    thread = threading.Thread(target=notebook)
    thread.start()
    thread.join(10)
    assert ended == ["time-limit", False]


def test_a_call_that_cannot_be_ended_is_said_to_run_still() -> None:
    over: list[bool] = []

    def notebook() -> None:
        try:
            call_within(0.1, lambda: time.sleep(2))
        except TimeLimitExceeded as limit:
            over.append(limit.still_running)

    thread = threading.Thread(target=notebook)
    thread.start()
    thread.join(10)
    assert over == [True]


def test_nothing_is_raised_after_the_call_has_ended() -> None:
    for _ in range(3):
        for hang in (bare_loops, answers_too_late):
            with pytest.raises(TimeLimitExceeded):
                call_within(0.05, hang)
            gc.collect()
            assert sum(range(10_000)) == 49_995_000


def test_cleaning_up_is_left_its_time() -> None:
    cleaned: list[str] = []

    def careful() -> None:
        try:
            time.sleep(30)
        finally:
            time.sleep(0.2)
            cleaned.append("up")

    with pytest.raises(TimeLimitExceeded):
        call_within(0.1, careful)
    assert cleaned == ["up"]


async def swallows_cancelling() -> None:
    while True:
        try:  # noqa: SIM105
            await asyncio.sleep(0.01)
        except:  # noqa: E722
            pass
        RESUMED.append(time.monotonic())


async def blocks_and_swallows() -> None:
    while True:
        try:  # noqa: SIM105
            time.sleep(0.01)
        except:  # noqa: E722
            pass
        RESUMED.append(time.monotonic())


async def waits_for_itself() -> str:
    try:
        async with asyncio.timeout(0.05):
            await asyncio.sleep(30)
    except TimeoutError:
        await asyncio.sleep(0.05)
    return "after its own timeout"


RESUMED: list[float] = []


@pytest.mark.parametrize("threaded", [False, True])
@pytest.mark.parametrize("hang", [swallows_cancelling, blocks_and_swallows], ids=lambda hang: hang.__name__)
def test_async_code_that_swallows_everything_is_ended(hang: Any, threaded: bool) -> None:
    over: list[bool] = []

    def run() -> None:
        try:
            call_within(0.1, lambda: wait_for(hang()))
        except TimeLimitExceeded as limit:
            over.append(limit.still_running)
        assert call_within(5, lambda: wait_for(waits_for_itself())) == "after its own timeout"
        over.append(False)

    if threaded:
        thread = threading.Thread(target=run)
        thread.start()
        thread.join(10)
    else:
        run()
    assert len(over) == 2
    time.sleep(1.2)  # what is cancelled may clean up for a second
    last = len(RESUMED)
    time.sleep(0.1)
    assert len(RESUMED) == last > 0


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


def test_a_call_leaves_the_working_directory_as_it_was(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    call_within(5.0, lambda: os.chdir("/"))
    assert Path.cwd() == tmp_path
    with pytest.raises(ZeroDivisionError):
        call_within(None, lambda: (os.chdir("/"), 1 / 0))
    assert Path.cwd() == tmp_path


@pytest.mark.parametrize("seconds", ["None", "5"])
def test_a_call_that_forks_comes_back_once(seconds: str, root: Path) -> None:
    """A child that went on would be a second training in the same run."""
    program = f"""
import os, sys
from grpo_lite.task.time_limit import call_within
call_within({seconds}, os.fork)
os.write(1, b"went on,")
"""
    done = subprocess.run([sys.executable, "-c", program], cwd=root, capture_output=True, text=True, timeout=60)
    assert (done.stdout, done.returncode) == ("went on,", 0), done.stderr
