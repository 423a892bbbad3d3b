"""A small Hub on the loopback: the endpoints that huggingface_hub 1.33 calls for a push and a fetch, over real HTTP.

Create, repo info, card check, pre-upload, LFS batch, upload, verify, commit; list and download. What is uploaded is
kept by its sha256, as on the Hub, so that a second push finds it. Faults are switched on by the test.
"""

from __future__ import annotations

import base64
import hashlib
import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import unquote

import pytest

TOKEN = "hf_" + "test" * 8


@dataclass
class Repo:
    """A repository: files by name with their sha256, and its commits."""

    private: bool
    files: dict[str, str] = field(default_factory=dict)
    commits: list[str] = field(default_factory=lambda: ["0" * 40])


@dataclass
class Hub:
    """The server's state, and the faults that a test wants."""

    url: str = ""
    repos: dict[str, Repo] = field(default_factory=dict)
    stored: dict[str, bytes] = field(default_factory=dict)  # uploaded content by sha256
    requests: list[tuple[str, str]] = field(default_factory=list)
    tokens: set[str] = field(default_factory=set)  # what came as Authorization
    status: dict[str, int] = field(default_factory=dict)  # part of a path -> the status it gets
    refuse_files: str = ""  # the batch endpoint's word against every file, as for a full account
    cut_uploads_after: int | None = None  # uploads that go through before the line breaks

    def uploads(self) -> int:
        """How many files were sent whole."""
        return sum(method == "PUT" for method, _ in self.requests)


@contextmanager
def running_hub() -> Iterator[Hub]:
    """Serve on a free port of the loopback until the block ends."""
    hub = Hub()

    class Handler(_Handler):
        state = hub

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.daemon_threads = True
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    hub.url = f"http://127.0.0.1:{server.server_address[1]}"
    try:
        yield hub
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


class _Handler(BaseHTTPRequestHandler):
    state: Hub

    def log_message(self, format: str, *args: Any) -> None:
        """Say nothing."""

    def do_GET(self) -> None:
        self._serve("GET")

    def do_HEAD(self) -> None:
        self._serve("HEAD")

    def do_POST(self) -> None:
        self._serve("POST")

    def do_PUT(self) -> None:
        self._serve("PUT")

    def _serve(self, method: str) -> None:
        hub, path = self.state, self.path.partition("?")[0]
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        if method == "PUT" and hub.cut_uploads_after is not None and hub.uploads() >= hub.cut_uploads_after:
            self.connection.close()  # in the middle of an upload: no answer at all
            return
        hub.requests.append((method, path))
        for part, status in hub.status.items():
            if part in path:
                return self._answer({"error": f"refused with {status}"}, status)
        if method == "PUT":  # a signed address: no token
            return self._put(path, body)
        if path == "/api/validate-yaml":
            return self._answer({"errors": [], "warnings": []})
        token = (self.headers.get("Authorization") or "").removeprefix("Bearer ")
        hub.tokens.add(token)
        if token != TOKEN:
            return self._answer({"error": "Invalid credentials in Authorization header"}, 401)
        self._api(method, path, body)

    def _api(self, method: str, path: str, body: bytes) -> None:
        hub = self.state
        if path == "/api/repos/create":
            asked = json.loads(body)
            repo_id = f"{asked['organization']}/{asked['name']}"
            if repo_id in hub.repos:
                return self._answer(
                    {"error": "You already created this model repo", "url": f"{hub.url}/{repo_id}"}, 409
                )
            hub.repos[repo_id] = Repo(asked.get("visibility") == "private" or bool(asked.get("private")))
            return self._answer({"url": f"{hub.url}/{repo_id}", "name": repo_id})
        if path == "/lfs-verify":
            asked = json.loads(body)
            return self._answer({}, 200 if asked["oid"] in hub.stored else 404)
        if "/resolve/" in path:
            return self._download(method, path)
        repo_id = "/".join(
            path.removeprefix("/api/models").strip("/").removesuffix(".git/info/lfs/objects/batch").split("/")[:2]
        )
        repo = hub.repos.get(repo_id)
        if repo is None:
            return self._answer({"error": "Repository not found"}, 404, code="RepoNotFound")
        if "/tree/" in path:
            files = [{"type": "file", "path": name, "oid": oid, "size": 0} for name, oid in repo.files.items()]
            return self._answer(files)
        if path.endswith("/objects/batch"):
            return self._batch(json.loads(body))
        if "/preupload/" in path:
            return self._preupload(json.loads(body), repo)
        if "/commit/" in path:
            return self._commit(body, repo, repo_id)
        siblings = [{"rfilename": name} for name in repo.files]
        self._answer({"id": repo_id, "private": repo.private, "sha": repo.commits[-1], "siblings": siblings})

    def _preupload(self, asked: dict[str, Any], repo: Repo) -> None:
        files = [
            {
                "path": file["path"],
                "uploadMode": "lfs"
                if file["path"].endswith((".safetensors", ".gguf", "tokenizer.json"))
                else "regular",
                "shouldIgnore": False,
                "oid": None,
            }
            for file in asked["files"]
        ]
        self._answer({"files": files})

    def _batch(self, asked: dict[str, Any]) -> None:
        objects = []
        for item in asked["objects"]:
            entry: dict[str, Any] = {"oid": item["oid"], "size": item["size"]}
            if self.state.refuse_files:
                entry["error"] = {"code": 403, "message": self.state.refuse_files}
            elif item["oid"] not in self.state.stored:
                entry["actions"] = {
                    "upload": {"href": f"{self.state.url}/upload/{item['oid']}?X-Signature=secret"},
                    "verify": {"href": f"{self.state.url}/lfs-verify"},
                }
            objects.append(entry)
        self._answer({"transfer": "basic", "objects": objects}, kind="application/vnd.git-lfs+json")

    def _put(self, path: str, body: bytes) -> None:
        oid = path.rpartition("/")[2]
        good = hashlib.sha256(body).hexdigest() == oid
        if good:
            self.state.stored[oid] = body
        self._answer({}, 200 if good else 400)

    def _commit(self, body: bytes, repo: Repo, repo_id: str) -> None:
        lines = [json.loads(line) for line in body.decode().splitlines()]
        header = next(line["value"] for line in lines if line["key"] == "header")
        if header.get("parentCommit") not in (None, repo.commits[-1]):
            return self._answer({"error": "A commit has happened since. Please refresh and try again."}, 412)
        for line in lines:
            value = line["value"]
            if line["key"] == "file":
                content = base64.b64decode(value["content"])
                oid = hashlib.sha256(content).hexdigest()
                self.state.stored[oid] = content
                repo.files[value["path"]] = oid
            elif line["key"] == "lfsFile":
                if value["oid"] not in self.state.stored:
                    return self._answer({"error": f"{value['path']} was never uploaded"}, 400)
                repo.files[value["path"]] = value["oid"]
            elif line["key"] == "deletedFile":
                del repo.files[value["path"]]
        sha = hashlib.sha1(body).hexdigest()
        repo.commits.append(sha)
        url = f"{self.state.url}/{repo_id}/commit/{sha}"
        self._answer({"success": True, "commitOid": sha, "commitUrl": url, "hookOutput": ""})

    def _download(self, method: str, path: str) -> None:
        repo_id, _, rest = path.strip("/").partition("/resolve/")
        repo, name = self.state.repos.get(repo_id), unquote(rest.partition("/")[2])
        if repo is None or name not in repo.files:
            return self._answer({"error": "Entry not found"}, 404, code="EntryNotFound")
        data = self.state.stored[repo.files[name]]
        self.send_response(200)
        self.send_header("ETag", f'"{repo.files[name]}"')
        self.send_header("X-Repo-Commit", repo.commits[-1])
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        if method == "GET":
            self.wfile.write(data)

    def _answer(self, value: Any, status: int = 200, kind: str = "application/json", code: str = "") -> None:
        data = json.dumps(value).encode()
        self.send_response(status)
        if code:
            self.send_header("X-Error-Code", code)
        self.send_header("Content-Type", kind)
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)


@contextmanager
def hub_in_place(monkeypatch: pytest.MonkeyPatch, cache: Path) -> Iterator[Hub]:
    """Serve, with huggingface_hub sent there: token set, files fetched into `cache`, no waits between tries."""
    from huggingface_hub import constants
    from huggingface_hub.utils import _http

    with running_hub() as hub:
        monkeypatch.setattr(constants, "ENDPOINT", hub.url)
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
        monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)  # HF_HUB_DISABLE_XET=1: plain LFS
        monkeypatch.setattr(constants, "HF_HUB_CACHE", str(cache))
        template = hub.url + "/{repo_id}/resolve/{revision}/{filename}"
        monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
        monkeypatch.setattr(_http.time, "sleep", lambda seconds: None)
        monkeypatch.setenv("HF_TOKEN", TOKEN)
        yield hub
