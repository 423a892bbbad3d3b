"""A head start: rows of a batch are asked about while others of it are still being generated.

A reward that waits, scores each row by itself and takes `head_start` is called with single rows first, then with the
whole batch. That call gets the answers that are there, waits for those under way, and asks for the rest: the scores are
those without a head start, and so is what is asked.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from typing import Any, Protocol, TypeVar


class Session(Protocol):
    """What the calls for one batch share, such as their `Questions`."""

    def cancel(self) -> None: ...
    async def close(self) -> None: ...


_Session = TypeVar("_Session", bound=Session)


class HeadStart:
    """What is asked about rows of a batch that is not complete yet; all calls about the batch share one `Session`.

    So no question is asked twice, and the limits hold for the calls together. One event loop makes these calls.

    Attributes:
        is_off: whether asking more before the batch is complete is of no use.
    """

    def __init__(self) -> None:
        self.is_off = False
        self._session: Any = None
        self._loop: asyncio.AbstractEventLoop | None = None
        self._is_over = False

    def session(self, make: Callable[[], _Session]) -> _Session:
        """Return the session, made by the first call; another loop, which replaces one that was blocked, makes its own.

        Raises:
            RuntimeError: it was closed.
        """
        if self._is_over:
            raise RuntimeError("the batch is over")
        loop = asyncio.get_running_loop()
        if self._session is None or self._loop is not loop:
            self._session, self._loop = make(), loop
        session: _Session = self._session
        return session

    async def close(self) -> None:
        """End it: what is still under way is cancelled."""
        self._is_over = True
        session, self._session = self._session, None
        if session is None or self._loop is None:
            return
        if self._loop is asyncio.get_running_loop():
            await session.close()
        else:
            self._loop.call_soon_threadsafe(session.cancel)


@asynccontextmanager
async def shared(head_start: HeadStart | None, make: Callable[[], _Session]) -> AsyncIterator[_Session]:
    """Return the session of a call: the one of its head start, which outlives it, or one of its own."""
    if head_start is not None:
        yield head_start.session(make)
        return
    session = make()
    try:
        yield session
    finally:
        await session.close()
