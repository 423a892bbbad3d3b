"""call_within: call a function for at most so many seconds, on the main thread and off it.

On the main thread an alarm interrupts it: pure Python, a sleep, a read, and the regular expressions of `re`, which hold
the interpreter's lock. Elsewhere (a notebook's worker, a web server) it runs in a thread of its own, which is abandoned
and told to stop. What holds the lock in C code off the main thread cannot be interrupted by any thread.
"""

from __future__ import annotations

import contextvars
import ctypes
import signal
import threading
import time
from collections.abc import Callable
from types import FrameType
from typing import Any


class TimeLimitExceeded(BaseException):
    """The limit is over. No `Exception`, so that a function's own `except Exception` does not swallow it."""


def call_within(seconds: float | None, function: Callable[[], Any]) -> Any:
    """Return what `function` returns, or raise when it takes longer than `seconds` (None: no limit).

    Raises:
        TimeLimitExceeded: it took longer. Off the main thread it may go on in the background until it next runs Python.
    """
    if seconds is None:
        return function()
    if threading.current_thread() is threading.main_thread():
        return _with_alarm(seconds, function)
    return _in_a_thread(seconds, function)


def _with_alarm(seconds: float, function: Callable[[], Any]) -> Any:
    """Raise in the main thread after so many seconds, and again each second in case it is swallowed.

    A function that uses `signal.alarm` itself (math-verify does) switches our timer off, so a thread also sends the
    signal.
    """
    over = threading.Event()
    main = threading.main_thread().ident or 0

    def ring(number: int, frame: FrameType | None) -> None:
        if not over.is_set():
            raise TimeLimitExceeded

    def watch() -> None:
        wait = seconds + 0.5
        while not over.wait(wait):
            signal.pthread_kill(main, signal.SIGALRM)
            wait = 1.0

    begun, waiting, every = time.monotonic(), 0.0, 0.0
    previous = signal.signal(signal.SIGALRM, ring)
    watcher = threading.Thread(target=watch, name="time-limit", daemon=True)
    try:
        try:
            watcher.start()
            waiting, every = signal.setitimer(signal.ITIMER_REAL, seconds, 1.0)
            return function()
        finally:
            over.set()  # a ring that comes just before this still finds the outer `finally`
    finally:
        over.set()
        signal.setitimer(signal.ITIMER_REAL, 0)
        watcher.join()  # so that no signal comes after the handler is gone
        signal.signal(signal.SIGALRM, previous)
        if waiting:  # an alarm of the caller's goes on
            signal.setitimer(signal.ITIMER_REAL, max(waiting - (time.monotonic() - begun), 1e-3), every)


def _in_a_thread(seconds: float, function: Callable[[], Any]) -> Any:
    results: list[Any] = []
    errors: list[BaseException] = []
    context = contextvars.copy_context()

    def work() -> None:
        try:
            results.append(context.run(function))
        except BaseException as error:
            errors.append(error)

    worker = threading.Thread(target=work, name="reward", daemon=True)
    worker.start()
    worker.join(seconds)
    if worker.is_alive():
        ctypes.pythonapi.PyThreadState_SetAsyncExc(
            ctypes.c_ulong(worker.ident or 0), ctypes.py_object(TimeLimitExceeded)
        )
        raise TimeLimitExceeded
    if errors:
        raise errors[0]
    return results[0]
