"""Time limits of code that is not ours: rewards, tools and environments, plain (`call_within`) and async (`wait_for`).

On the main thread an alarm interrupts pure Python, a sleep, a read, and the regular expressions of `re`, which hold the
interpreter's lock. On other threads (a notebook's worker, a web server) a call runs in a thread of its own, which is
abandoned and asked to stop. Code that catches everything is stopped too: what is raised in it comes back whenever it is
caught and dropped (`_Stopper`).

Not stopped: C code that holds the interpreter's lock, a call's own threads and processes, and, off the main thread,
code that catches everything and keeps all that it caught.

Async code runs on one event loop, in a thread of its own, so that a client's connections stay usable from call to
call. What swallows its cancellation is not resumed.
"""

from __future__ import annotations

import asyncio
import contextlib
import contextvars
import ctypes
import functools
import inspect
import os
import signal
import threading
import time
import types
from collections.abc import Callable, Coroutine, Generator
from concurrent.futures import wait
from types import FrameType
from typing import Any

_POLL_S = 0.2  # how soon an exception thrown into a waiting thread is seen
_CANCEL_S = 1.0  # what is cancelled may clean up for so long; a loop that does nothing for so long is blocked
_SINGLE_RINGS = 2  # alarms that leave a second to clean up
_END_S = 0.3  # a thread that has not ended by then is left running

_raise_in_thread = ctypes.pythonapi.PyThreadState_SetAsyncExc

_lock = threading.Lock()
_loop: _Loop | None = None


class TimeLimitExceeded(BaseException):
    """The limit is over. No `Exception`, so that a function's own `except Exception` does not swallow it.

    Attributes:
        still_running: whether the call could not be ended in time, so that what it uses is not safe to use.
    """

    still_running = False


def call_within(seconds: float | None, function: Callable[[], Any]) -> Any:
    """Return what `function` returns, or raise when it takes longer than `seconds` (None: no limit).

    The working directory is afterwards what it was: a run's files have paths relative to it. A process that the call
    has forked, and that comes back from it too, ends here: it would train a second time in the same run.

    Raises:
        TimeLimitExceeded: it took longer.
    """
    with _as_before():
        if seconds is None:
            return function()
        if threading.current_thread() is threading.main_thread():
            return _with_alarm(seconds, function)
        return _in_a_thread(seconds, function)


def is_async(function: Callable[..., Any]) -> bool:
    """Return whether a call returns a coroutine; as TRL's `is_async_callable`."""
    while isinstance(function, functools.partial):
        function = function.func
    return inspect.iscoroutinefunction(function) or inspect.iscoroutinefunction(type(function).__call__)


def wait_for(coroutine: Coroutine[Any, Any, Any]) -> Any:
    """Return what a coroutine returns; where this call is interrupted, the coroutine is cancelled.

    The caller waits in plain Python, so `call_within` interrupts it on any thread.
    """
    loop = _running_loop()
    driven = _Driven(coroutine, loop)
    future = asyncio.run_coroutine_threadsafe(driven.run(), loop.events)
    try:
        while not future.done():
            wait([future], timeout=_POLL_S)
        return future.result()
    except BaseException as error:
        if not future.done():
            driven.given_up_at = time.monotonic()
            future.cancel()
            _leave_if_blocked(loop)
            if isinstance(error, TimeLimitExceeded):
                error.still_running = not driven.ended.wait(_END_S)
        raise


def start(coroutine: Coroutine[Any, Any, Any]) -> None:
    """Let a coroutine run on the loop of `wait_for`; nobody waits for it, so it should not raise."""
    loop = _running_loop()
    asyncio.run_coroutine_threadsafe(_Driven(coroutine, loop).run(), loop.events)


@contextlib.contextmanager
def _as_before() -> Generator[None]:
    process = os.getpid()
    try:
        before = os.getcwd()
    except OSError:  # it was deleted
        before = ""
    try:
        yield
    finally:
        if os.getpid() != process:
            os._exit(1)
        with contextlib.suppress(OSError):
            if before:
                os.chdir(before)


class _Stopper:
    """Raises TimeLimitExceeded in one thread, and again whenever the code there has caught it and dropped it.

    When the exception's last reference goes, its `__del__` asks the interpreter to raise another one in the thread. It
    is a function of C, so the interpreter first looks for such a request in the code that dropped the exception: behind
    the `except:`, where nothing catches it. Each loop around is left in the same way.
    """

    def __init__(self, thread: int) -> None:
        self.thrown = False
        self.kind: type[TimeLimitExceeded] = type("TimeLimitExceeded", (TimeLimitExceeded,), {})
        self._thread = ctypes.c_ulong(thread)
        self._again = functools.partial(_raise_in_thread, self._thread, ctypes.py_object(self.kind))
        self.kind.__del__ = staticmethod(self._again)  # type: ignore[attr-defined]

    def throw(self) -> None:
        """Let the thread raise when it next runs Python."""
        if "__del__" in vars(self.kind):
            self.thrown = True
            self._again()

    def disarm(self) -> None:
        """Raise no more, also where the exception is freed later; called in the thread, when its call has ended."""
        with contextlib.suppress(AttributeError):  # done before
            del self.kind.__del__  # type: ignore[attr-defined]
        _raise_in_thread(self._thread, None)


def _with_alarm(seconds: float, function: Callable[[], Any]) -> Any:
    """Raise in the main thread after so many seconds, and again each second.

    A function that uses `signal.alarm` itself (math-verify does) switches our timer off, so a thread also sends the
    signal. Code that catches the exceptions and keeps them gets the later ones a few microseconds apart, until one
    comes while it is in its `except:`.
    """
    over = threading.Event()
    main = threading.main_thread().ident or 0
    stopper = _Stopper(main)
    rings = 0

    def ring(number: int, frame: FrameType | None) -> None:
        nonlocal rings
        if not over.is_set() and _is_inside(frame, stopper):
            rings += 1
            if rings > _SINGLE_RINGS:
                signal.setitimer(signal.ITIMER_REAL, (10 + time.perf_counter_ns() % 50) * 1e-6)
            stopper.thrown = True
            raise stopper.kind

    def watch() -> None:
        wait_s = seconds + 0.5
        while not over.wait(wait_s):
            signal.pthread_kill(main, signal.SIGALRM)
            wait_s = 1.0

    start, caller_delay, caller_interval = time.monotonic(), 0.0, 0.0
    previous = signal.signal(signal.SIGALRM, ring)
    watcher = threading.Thread(target=watch, name="time-limit", daemon=True)
    try:
        try:
            watcher.start()
            caller_delay, caller_interval = signal.setitimer(signal.ITIMER_REAL, seconds, 1.0)
            result = _stoppable(function, stopper)
        finally:
            over.set()  # what comes back just before this still finds the outer `finally`
            stopper.disarm()
    finally:
        over.set()
        signal.setitimer(signal.ITIMER_REAL, 0)
        watcher.join()  # so that no signal comes after the handler is gone
        stopper.disarm()
        signal.signal(signal.SIGALRM, previous)
        if caller_delay:  # restart the caller's own alarm
            signal.setitimer(signal.ITIMER_REAL, max(caller_delay - (time.monotonic() - start), 1e-3), caller_interval)
    if stopper.thrown:
        raise TimeLimitExceeded
    return result


def _stoppable(function: Callable[[], Any], stopper: _Stopper) -> Any:
    """Call the function in a frame by which `_is_inside` knows it."""
    return function()


def _is_inside(frame: FrameType | None, stopper: _Stopper) -> bool:
    """Return whether a frame belongs to the call that a stopper is for, and not to what follows it."""
    while frame is not None:
        if frame.f_code is _stoppable.__code__ and frame.f_locals.get("stopper") is stopper:
            return True
        frame = frame.f_back
    return False


def _in_a_thread(seconds: float, function: Callable[[], Any]) -> Any:
    results: list[Any] = []
    errors: list[BaseException] = []
    stoppers: list[_Stopper] = []
    context = contextvars.copy_context()

    def work() -> None:
        stopper = _Stopper(threading.get_ident())
        stoppers.append(stopper)
        try:
            try:
                results.append(context.run(function))
            finally:
                stopper.disarm()
        except BaseException as error:
            errors.append(error)
        finally:
            stopper.disarm()

    worker = threading.Thread(target=work, name="time-limit", daemon=True)
    worker.start()
    worker.join(seconds)
    if worker.is_alive():
        for stopper in stoppers:
            stopper.throw()
        worker.join(_END_S)
        over = TimeLimitExceeded()
        over.still_running = worker.is_alive()
        raise over
    if errors:
        raise errors[0]
    return results[0]


class _Driven:
    """Runs a coroutine. One that is given up is resumed for `_CANCEL_S` more, so that it may clean up, then no more."""

    def __init__(self, coroutine: Coroutine[Any, Any, Any], loop: _Loop) -> None:
        self.coroutine, self.loop = coroutine, loop
        self.given_up_at: float | None = None
        self.ended = threading.Event()

    async def run(self) -> Any:
        return await self._steps()

    @types.coroutine
    def _steps(self) -> Generator[Any, Any, Any]:
        step: Callable[[Any], Any] = self.coroutine.send
        value: Any = None
        while True:
            try:
                awaited = step(value)
            except StopIteration as end:
                self.ended.set()
                return end.value
            except BaseException as error:
                self.ended.set()
                if self.given_up_at is None or not isinstance(error, TimeLimitExceeded):
                    raise
                self.loop.stopper.disarm()  # it was thrown into the loop that this coroutine blocked
                raise asyncio.CancelledError from None
            try:
                step, value = self.coroutine.send, (yield awaited)
            except BaseException as error:
                step, value = self.coroutine.throw, error
            if self.given_up_at is not None and time.monotonic() - self.given_up_at > _CANCEL_S:
                _left_behind.append(self.coroutine)
                raise asyncio.CancelledError


_left_behind: list[Any] = []  # coroutines that are not resumed; freeing one would resume it


class _Loop:
    """An event loop in a thread of its own."""

    def __init__(self) -> None:
        self.events = asyncio.new_event_loop()
        thread = threading.Thread(target=self._run, name="async-calls", daemon=True)
        thread.start()
        self.stopper = _Stopper(thread.ident or 0)

    def _run(self) -> None:
        while True:  # what is thrown may come when the call that blocked the loop has just ended
            with contextlib.suppress(TimeLimitExceeded):
                self.events.run_forever()
            self.stopper.disarm()


def _running_loop() -> _Loop:
    global _loop
    with _lock:
        if _loop is None:
            _loop = _Loop()
        return _loop


def _leave_if_blocked(loop: _Loop) -> None:
    """Use another loop from now on where a call blocks this one, as `time.sleep` in `async def` does; end that call."""
    global _loop
    _loop = None  # first, since a time limit may interrupt the wait
    alive = threading.Event()
    loop.events.call_soon_threadsafe(alive.set)
    try:
        if alive.wait(_CANCEL_S):
            with _lock:
                _loop = _loop or loop
    finally:
        if not alive.is_set():
            loop.stopper.throw()
