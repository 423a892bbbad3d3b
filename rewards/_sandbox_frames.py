"""Messages on the socket between the parent and one sandboxed process: a length of four bytes, then JSON."""

from __future__ import annotations

import os
from typing import Any

from rewards._sandbox_codec import MAX_FRAME_BYTES, CodecError, dumps, loads

LENGTH_BYTES = 4


def pack(text: bytes) -> bytes:
    """Return a message ready to be sent.

    Raises:
        CodecError: the message is longer than a reader would take.
    """
    if len(text) > MAX_FRAME_BYTES:
        raise CodecError(f"a message of {len(text)} bytes, more than {MAX_FRAME_BYTES}")
    return len(text).to_bytes(LENGTH_BYTES, "big") + text


def read_message(descriptor: int) -> Any:
    """Wait for a message and return it; None at the end of the stream. For the sandboxed side: it waits for ever."""
    head = _read(descriptor, LENGTH_BYTES)
    return loads(_read(descriptor, int.from_bytes(head, "big"))) if head else None


def write_message(descriptor: int, message: Any) -> None:
    """Send a message, waiting as long as the other side is busy."""
    data = memoryview(pack(dumps(message)))
    while data:
        data = data[os.write(descriptor, data) :]


def _read(descriptor: int, count: int) -> bytes:
    parts = []
    while count:
        part = os.read(descriptor, min(count, 1 << 20))
        if not part:
            return b""
        parts.append(part)
        count -= len(part)
    return b"".join(parts)
