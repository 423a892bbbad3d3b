"""A small OpenAI-compatible server that judges as a test tells it to: well, slowly, with errors, or hostile."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

Answer = Callable[[dict[str, Any], int], "Reply"]  # of the request and its number, from 0


@dataclass
class Reply:
    """What the server sends back."""

    body: bytes
    status: int = 200
    headers: dict[str, str] = field(default_factory=dict)
    delay_s: float = 0.0


@dataclass
class JudgeServer:
    """Its address, and what it was asked."""

    base_url: str = ""
    requests: list[dict[str, Any]] = field(default_factory=list)
    authorizations: list[str | None] = field(default_factory=list)
    at_once: int = 0  # most requests that were open together
    started: list[float] = field(default_factory=list)


def verdict(score: Any, reason: Any = "so", **fields: Any) -> Reply:
    return says(json.dumps({"reason": reason, "score": score}), **fields)


def says(content: Any, usage: Any = (100, 20), **fields: Any) -> Reply:
    counted = {"usage": {"prompt_tokens": usage[0], "completion_tokens": usage[1]}} if usage else {}
    return Reply(json.dumps({"choices": [{"message": {"content": content}}], **counted}).encode(), **fields)


def response_in(request: dict[str, Any]) -> str:
    """Return the completion that a request shows the judge."""
    text = request["messages"][-1]["content"]
    first = text.index("\n", text.index("[RESPONSE ")) + 1
    return str(text[first : text.rindex("\n[END OF RESPONSE ")])


@contextmanager
def judging(answer: Answer) -> Iterator[JudgeServer]:
    """Run a server until the block ends."""
    server = JudgeServer()
    lock, open_now = threading.Lock(), 0

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            nonlocal open_now
            request = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            with lock:
                number = len(server.requests)
                server.requests.append(request)
                server.authorizations.append(self.headers.get("Authorization"))
                server.started.append(time.monotonic())
                open_now += 1
                server.at_once = max(server.at_once, open_now)
            reply = answer(request, number)
            time.sleep(reply.delay_s)
            with lock:
                open_now -= 1
            try:
                self.send_response(reply.status)
                for name, value in {"Content-Length": str(len(reply.body)), **reply.headers}.items():
                    self.send_header(name, value)
                self.end_headers()
                self.wfile.write(reply.body)
            except OSError:  # the client has gone: it was too slow, or too large
                pass

        def log_message(self, *args: Any) -> None:
            pass

    http = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    http.daemon_threads = True
    thread = threading.Thread(target=http.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True)
    thread.start()
    server.base_url = f"http://127.0.0.1:{http.server_port}/v1"
    try:
        yield server
    finally:
        http.shutdown()
        http.server_close()
