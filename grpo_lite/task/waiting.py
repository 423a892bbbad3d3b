"""Async rewards called like plain ones: all run on one event loop, in a thread of its own.

One loop for the whole process, so that the connections of a reward's client stay usable from batch to batch. The
caller waits in plain Python, so a time limit of `task.guard` interrupts it on any thread, and the reward is cancelled.
"""

from __future__ import annotations

import asyncio
import functools
import inspect
import threading
from collections.abc import Callable, Coroutine
from concurrent.futures import wait
from typing import Any

_POLL_S = 0.2  # how soon an exception thrown into this thread is seen
_CANCEL_S = 1.0  # a loop that does not cancel within it is blocked, and is left behind

_lock = threading.Lock()
_loop: asyncio.AbstractEventLoop | None = None


def is_async(function: Callable[..., Any]) -> bool:
    """Return whether a call returns a coroutine; as TRL's `is_async_callable`."""
    while isinstance(function, functools.partial):
        function = function.func
    return inspect.iscoroutinefunction(function) or inspect.iscoroutinefunction(type(function).__call__)


def wait_for(coroutine: Coroutine[Any, Any, Any]) -> Any:
    """Return what a coroutine returns; where this call is interrupted, the coroutine is cancelled."""
    loop = _running_loop()
    future = asyncio.run_coroutine_threadsafe(coroutine, loop)
    try:
        while not future.done():
            wait([future], timeout=_POLL_S)
        return future.result()
    finally:
        if not future.done():
            future.cancel()
            _leave_if_blocked(loop)


def _running_loop() -> asyncio.AbstractEventLoop:
    global _loop
    with _lock:
        if _loop is None:
            _loop = asyncio.new_event_loop()
            threading.Thread(target=_loop.run_forever, name="async-rewards", daemon=True).start()
        return _loop


def _leave_if_blocked(loop: asyncio.AbstractEventLoop) -> None:
    """Use another loop from now on where a reward has blocked this one, as `time.sleep` in `async def` does."""
    global _loop
    _loop = None  # first, since a time limit may interrupt the wait
    alive = threading.Event()
    loop.call_soon_threadsafe(alive.set)
    if alive.wait(_CANCEL_S):
        with _lock:
            _loop = _loop or loop
