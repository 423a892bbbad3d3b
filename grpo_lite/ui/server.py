"""The server of the page: routes, and the guard in front of them. Starlette and uvicorn (the extra `ui`), no torch.

It listens on 127.0.0.1 only. Pages on the web can make a browser send requests here, so every request is judged: its
Host must name this machine (against DNS rebinding), its Origin must be the page's own, and whatever tells something
about runs needs the token that the command prints. A Content-Security-Policy lets the page run its own script only.
"""

from __future__ import annotations

import hmac
import json
import logging
import math
import re
import secrets
import socket
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import uvicorn
from starlette.applications import Starlette
from starlette.concurrency import run_in_threadpool
from starlette.datastructures import MutableHeaders
from starlette.requests import Request
from starlette.responses import HTMLResponse, JSONResponse, PlainTextResponse, Response
from starlette.routing import Route
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from grpo_lite.errors import GRPOLiteError, RunDirError
from grpo_lite.files.redact import redact
from grpo_lite.report.page import page_part, report_html
from grpo_lite.runs.run_dir import RunDir
from grpo_lite.ui.ask import LONGEST_QUESTION, Asker, Busy
from grpo_lite.ui.views import comparison, find_run, plan_choices, plan_view, run_card, run_view, runs_in, version

logger = logging.getLogger(__name__)

HOST = "127.0.0.1"
_OWN_HOST = re.compile(r"(127\.0\.0\.1|localhost)(:\d+)?")
_LARGEST_BODY = 8 * LONGEST_QUESTION  # bytes
_PAGE = Path(__file__).resolve().parent / "page"
_POLICY = (
    "default-src 'none'; script-src 'self'; style-src 'self'; connect-src 'self'; img-src 'self' data:; "
    "base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
)
# A report holds its script and style inside. It gets an origin of its own, so that it does not reach the page.
_REPORT_POLICY = (
    "default-src 'none'; script-src 'unsafe-inline'; style-src 'unsafe-inline'; img-src data:; base-uri 'none'; "
    "form-action 'none'; frame-ancestors 'none'; sandbox allow-scripts"
)
_HEADERS = {
    "Content-Security-Policy": _POLICY,
    "X-Content-Type-Options": "nosniff",
    "X-Frame-Options": "DENY",
    "Referrer-Policy": "no-referrer",
    "Cross-Origin-Resource-Policy": "same-origin",
    "Cross-Origin-Opener-Policy": "same-origin",
    "Cache-Control": "no-store",
}


def serve(folder: Path, port: int, announce: Callable[[str], None]) -> None:
    """Serve the page over a folder of runs until Ctrl-C.

    Args:
        folder: that holds run directories; runs that begin later appear.
        port: of 127.0.0.1; another one is taken where it is in use.
        announce: gets the page's address, token included, once it can be opened.
    """
    token = secrets.token_urlsafe(24)
    with _listening(port) as listener:
        config = uvicorn.Config(
            build_app(folder, token), log_config=None, access_log=False, lifespan="off", timeout_graceful_shutdown=1
        )
        announce(f"http://{HOST}:{listener.getsockname()[1]}/?token={token}")
        uvicorn.Server(config).run(sockets=[listener])


def _listening(port: int) -> socket.socket:
    listener = socket.socket(socket.AF_INET, socket.SOCK_STREAM)
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        listener.bind((HOST, port))
    except OSError:
        listener.bind((HOST, 0))
    listener.listen()
    return listener


def build_app(folder: Path, token: str) -> ASGIApp:
    """Return the application over a folder of runs, behind its guard."""
    asker = Asker()
    routes = [
        Route("/", _index),
        Route("/page/{name}", _asset),
        Route("/report", lambda request: _report(folder, request)),
        Route("/api/runs", lambda request: _runs(folder, request)),
        Route("/api/run", lambda request: _run(folder, token, request)),
        Route("/api/compare", lambda request: _Json(comparison(folder, request.query_params.getlist("run")))),
        Route("/api/plan", _plan),
        Route("/api/choices", lambda request: _Json(plan_choices())),
        Route("/api/ask", _ask, methods=["POST"]),
    ]
    app = Starlette(routes=routes, exception_handlers={GRPOLiteError: _refusal, Exception: _failure})
    app.state.folder, app.state.asker = folder, asker
    return Guard(app, token)


class Guard:
    """Refuses requests from other sites and without the token with 403, and adds the headers that keep the page tight.

    The token comes in the address of the page (`/`), and in a header for data: a form of another site cannot send that.
    A report opens by a key of its own (`report_key`), so that its address can be passed on.
    """

    def __init__(self, app: ASGIApp, token: str) -> None:
        self.app = app
        self.token = token

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Judge a request, then pass it on."""
        if scope["type"] != "http":
            return  # no websockets here

        async def send_with_headers(message: Message) -> None:
            if message["type"] == "http.response.start":
                headers = MutableHeaders(scope=message)
                for name, value in _HEADERS.items():
                    headers.setdefault(name, value)
            await send(message)

        fault = self._fault(Request(scope))
        app = PlainTextResponse(fault, status_code=403) if fault else self.app
        await app(scope, receive, send_with_headers)

    def _fault(self, request: Request) -> str:
        """Return why a request is refused; "": it is not."""
        host, origin = request.headers.get("host", ""), request.headers.get("origin")
        if not _OWN_HOST.fullmatch(host):
            return "refused: the Host header does not name this machine."
        if origin is not None and origin != f"http://{host}":
            return "refused: the request comes from another site."
        path = request.scope["path"]  # what is routed; old versions of Starlette made `url` from the Host header
        if path.startswith("/page/"):
            return ""  # the page's own script and style, the same for everybody
        given, wanted = request.query_params.get("token", ""), self.token
        if path.startswith("/api/"):
            given = request.headers.get("authorization", "").removeprefix("Bearer ")
        elif path == "/report":
            given, wanted = request.query_params.get("key", ""), report_key(self.token, _run_name(request))
        if not hmac.compare_digest(given.encode(), wanted.encode()):
            return "refused: the token is missing or wrong. Open the address that the command printed, token included."
        return ""


def report_key(token: str, name: str) -> str:
    """Return the key that opens the report of one run, as long as the server runs; it does not tell the token."""
    return hmac.new(token.encode(), name.encode("utf-8", "surrogatepass"), "sha256").hexdigest()


def _run_name(request: Request) -> str:
    return str(request.query_params.get("run", ""))


class _Json(JSONResponse):
    """JSON without secrets."""

    def render(self, content: Any) -> bytes:
        return json.dumps(_shown(content), allow_nan=False).encode()


def _shown(content: Any) -> Any:
    """Return data with secrets hidden in its texts, and null for numbers that JSON does not have."""
    if isinstance(content, str):
        return redact(content)
    if isinstance(content, Mapping):
        return {redact(str(key)): _shown(value) for key, value in content.items()}
    if isinstance(content, list | tuple):
        return [_shown(value) for value in content]
    return None if isinstance(content, float) and not math.isfinite(content) else content


def _refusal(request: Request, error: Exception) -> Response:
    return _Json({"error": str(error)}, status_code=404 if isinstance(error, RunDirError) else 400)


def _failure(request: Request, error: Exception) -> Response:
    """Answer with a failure that nobody foresaw; Starlette raises it again, for the log."""
    return _Json({"error": f"{type(error).__name__}: {error}"}, status_code=500)


def _index(request: Request) -> Response:
    return HTMLResponse((_PAGE / "index.html").read_text(encoding="utf-8"))


_ASSETS = {
    "page.css": ("text/css", lambda: page_part("page.css")),  # the report's
    "parts.js": ("text/javascript", lambda: page_part("parts.js")),  # the report's
    "ui.css": ("text/css", lambda: (_PAGE / "ui.css").read_text(encoding="utf-8")),
    "ui.js": ("text/javascript", lambda: (_PAGE / "ui.js").read_text(encoding="utf-8")),
}


def _asset(request: Request) -> Response:
    kind, read = _ASSETS.get(request.path_params["name"], (None, None))
    return PlainTextResponse("not found", 404) if read is None else Response(read(), media_type=kind)


def _report(folder: Path, request: Request) -> Response:
    html = report_html(find_run(folder, _run_name(request)))
    return HTMLResponse(html, headers={"Content-Security-Policy": _REPORT_POLICY})


def _runs(folder: Path, request: Request) -> Response:
    runs = runs_in(folder)
    tag = f'"{hash(tuple((name, _version_of(run)) for name, run in runs.items()))}"'
    if request.headers.get("if-none-match") == tag:
        return Response(status_code=304)
    cards = [run_card(name, run) for name, run in runs.items()]
    return _Json({"folder": str(folder), "runs": cards}, headers={"ETag": tag})


def _run(folder: Path, token: str, request: Request) -> Response:
    name = _run_name(request)
    run = find_run(folder, name)
    tag = f'"{version(run)}"'
    if request.headers.get("if-none-match") == tag:
        return Response(status_code=304)
    return _Json({**run_view(name, run), "report_key": report_key(token, name)}, headers={"ETag": tag})


def _version_of(run: RunDir) -> str:
    try:
        return version(run)
    except (GRPOLiteError, LookupError, TypeError, ValueError, AttributeError, OSError) as error:
        return str(error)


def _plan(request: Request) -> Response:
    query = request.query_params
    try:
        group, completion = (int(query[key]) if query.get(key) else None for key in ("group", "completion"))
    except ValueError:
        raise GRPOLiteError("plan: group and completion are whole numbers.") from None
    return _Json(plan_view(query.get("recipe", ""), query.get("card", "t4"), group, completion))


async def _ask(request: Request) -> Response:
    body = b""
    async for piece in request.stream():
        body += piece
        if len(body) > _LARGEST_BODY:
            return _Json({"error": "ask: the question is too long."}, status_code=413)
    try:
        asked = json.loads(body)
        name, question, temperature = str(asked["run"]), str(asked["question"]), float(asked.get("temperature") or 0)
    except (ValueError, KeyError, TypeError, AttributeError):
        return _Json({"error": "ask: give JSON with run, question and perhaps temperature."}, status_code=400)
    run = find_run(request.app.state.folder, name)
    try:
        return _Json(await run_in_threadpool(request.app.state.asker.ask, run, question, temperature))
    except Busy as error:
        return _Json({"error": str(error)}, status_code=409)
    except GRPOLiteError:
        raise
    except Exception as error:  # a model that does not load, memory that is short: the page says it
        logger.exception("The question was not answered.")
        return _Json({"error": f"ask: {type(error).__name__}: {error}"}, status_code=500)
