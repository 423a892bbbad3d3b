"""One program in one worker, seen from the parent: its processes, its sockets, its deadline. Every wait is bounded."""

from __future__ import annotations

import os
import socket
import tempfile
import time
from collections.abc import Callable
from types import TracebackType
from typing import Any, NamedTuple

from .pool import SandboxError, Worker
from .wire import LENGTH_BYTES, MAX_FRAME_BYTES, CodecError, dumps, loads, pack

_MOST_BYTES = 4 * MAX_FRAME_BYTES  # that a process may send in all


class GoneError(Exception):
    """The sandboxed process hung up, sent nonsense or more than it may."""


class End(NamedTuple):
    """How a process ended."""

    kind: str
    code: int | None  # exit code, negative for a signal
    stopped: str | None  # why the worker killed it


class Channel:
    """A socket to a sandboxed process; each method raises TimeoutError at the deadline and GoneError at the end."""

    def __init__(self, sock: socket.socket, deadline: float) -> None:
        self.socket = sock
        self.started = time.monotonic()
        self.deadline = deadline
        self.buffer = bytearray()
        self.received = 0
        self.gather_s = 0.0  # how long to let answers gather before they are read: one awakening for several

    def left_s(self) -> float:
        """Return the seconds until the deadline."""
        return max(0.0, self.deadline - time.monotonic())

    def used_s(self) -> float:
        """Return the seconds since the start."""
        return time.monotonic() - self.started

    def send(self, data: bytes) -> None:
        """Send bytes."""
        self._bounded(lambda: self.socket.sendall(data))

    def receive(self) -> bytes:
        """Return the next message's text."""
        while True:
            length = int.from_bytes(self.buffer[:LENGTH_BYTES], "big") if len(self.buffer) >= LENGTH_BYTES else 0
            if length > MAX_FRAME_BYTES:
                raise GoneError("it sent a message that is too long")
            if len(self.buffer) >= LENGTH_BYTES and len(self.buffer) >= LENGTH_BYTES + length:
                text = bytes(self.buffer[LENGTH_BYTES : LENGTH_BYTES + length])
                del self.buffer[: LENGTH_BYTES + length]
                return text
            if not self.receive_some():
                raise GoneError("its process ended")

    def receive_object(self) -> dict[str, Any]:
        """Return the next message, which must be an object."""
        try:
            message = loads(self.receive())
        except CodecError as error:
            raise GoneError(str(error)) from None
        if type(message) is not dict:
            raise GoneError("it sent no object")
        return message

    def receive_some(self) -> bool:
        """Wait for more bytes in the buffer; False at the end of the stream."""
        time.sleep(min(self.gather_s, self.left_s()))
        part: bytes = self._bounded(lambda: self.socket.recv(1 << 16))
        self.received += len(part)
        if self.received > _MOST_BYTES:
            raise GoneError("it sent too much")
        self.buffer += part
        return bool(part)

    def _bounded(self, action: Callable[[], Any]) -> Any:
        left = self.deadline - time.monotonic()
        if left <= 0:
            raise TimeoutError
        self.socket.settimeout(left)
        try:
            return action()
        except (BrokenPipeError, ConnectionResetError):
            raise GoneError("its process ended") from None


class Session:
    """Processes of one program on a borrowed worker; leaving it ends them and removes their files."""

    def __init__(self, worker: Worker, timeout_s: float) -> None:
        self.worker = worker
        self.timeout_s = timeout_s
        self.sockets: list[socket.socket] = []
        self.ended = False

    def __enter__(self) -> Session:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        try:
            if not self.ended and not isinstance(error, SandboxError):
                self.end()
        finally:
            for sock in self.sockets:  # only now: a process that is killed asleep does not wake up to see it
                sock.close()

    def start(self, kind: str) -> Channel:
        """Start a process of a kind and return the channel to it; its time runs from now."""
        ours, theirs = socket.socketpair()
        self.sockets.append(ours)
        self._spawn(kind, [theirs])
        return Channel(ours, time.monotonic() + self.timeout_s)

    def start_program(self, stdin: bytes) -> tuple[Channel, Channel]:
        """Start a script and return its channel and its standard output."""
        ours, theirs = socket.socketpair()
        output, its_output = socket.socketpair()
        self.sockets += [ours, output]
        with _file_of(stdin) as its_input:
            self._spawn("program", [theirs, its_input, its_output])
        deadline = time.monotonic() + self.timeout_s
        return Channel(ours, deadline), Channel(output, deadline)

    def _spawn(self, kind: str, theirs: list[Any]) -> None:
        """Hand descriptors to the worker, for a new child; ours of them are closed.

        Its success is not waited for: a child whose layers fail hangs up, and `end` tells why.
        """
        message = {"do": "spawn", "kind": kind, "timeout_s": self.timeout_s}
        try:
            self.worker.tell(message, [file.fileno() for file in theirs])
        finally:
            for file in theirs:
                file.close()

    def end(self, wait_s: float = 0.0) -> list[End]:
        """Give the processes time to end by themselves, kill what is left, and return how each ended.

        Raises:
            SandboxError: a layer failed: nothing of the program ran, and there is no verdict.
        """
        self.ended = True
        reply = self.worker.request({"do": "end", "wait_s": wait_s}, wait_s=wait_s)
        if reply["failed"]:
            raise SandboxError(f"a layer of the sandbox failed: {reply['failed']}")
        return [End(*row) for row in reply["ends"]]


def packed(content: dict[str, Any]) -> bytes:
    """Return a message ready to be sent."""
    return pack(dumps(content))


def _file_of(data: bytes) -> Any:
    """Return an open nameless file with this content, in memory where the system can."""
    file: Any
    if hasattr(os, "memfd_create"):
        file = os.fdopen(os.memfd_create("input"), "w+b")
    else:
        file = tempfile.TemporaryFile()  # noqa: SIM115 - the caller closes it
    file.write(data)
    file.seek(0)
    return file
