"""A small Hub on the loopback: the endpoints that huggingface_hub 1.33 and 2.4 call, over real HTTP.

Repositories: create, repo info, card check, pre-upload, LFS batch, upload, verify, commit; list and download. What is
uploaded is kept by its sha256, as on the Hub, so that a second push finds it.
Buckets: create, info, tree, batch, the address of a file and tokens. Their content goes by xet: the real hf_xet
cuts it, packs it and puts it together again, in a folder (`local://`) instead of the Hub's storage servers.
Faults are switched on by the test.
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
class Bucket:
    """A bucket: the files as hf_xet describes them in the batches that it sent."""

    private: bool
    files: dict[str, dict[str, Any]] = field(default_factory=dict)
    batches: list[list[dict[str, Any]]] = field(default_factory=list)


@dataclass
class Hub:
    """The server's state, and the faults that a test wants."""

    url: str = ""
    repos: dict[str, Repo] = field(default_factory=dict)
    buckets: dict[str, Bucket] = field(default_factory=dict)
    xet: str = ""  # where the content of buckets lies, as hf_xet is told it
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
        if path.startswith(("/api/buckets/", "/buckets/")):
            return self._bucket(method, path, body)
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

    def _bucket(self, method: str, path: str, body: bytes) -> None:
        hub = self.state
        parts = path.removeprefix("/api").removeprefix("/buckets/").split("/", 2)
        bucket_id, rest = "/".join(parts[:2]), unquote(parts[2]) if len(parts) == 3 else ""
        if method == "POST" and not rest:
            url = f"{hub.url}/buckets/{bucket_id}"
            if bucket_id in hub.buckets:
                return self._answer({"error": "You already created this bucket", "url": url}, 409)
            asked = json.loads(body)
            hub.buckets[bucket_id] = Bucket(asked.get("visibility") == "private" or bool(asked.get("private")))
            return self._answer({"url": url})
        bucket = hub.buckets.get(bucket_id)
        if bucket is None:
            return self._answer({"error": "Bucket not found"}, 404, code="RepoNotFound")
        if rest == "batch":
            return self._bucket_batch(bucket, [json.loads(line) for line in body.splitlines()])
        if rest.startswith("xet-"):
            return self._answer({"casUrl": hub.xet, "accessToken": "xet", "exp": 2**33})
        if rest.partition("/")[0] == "tree":
            prefix = rest.partition("/")[2]
            return self._answer([file for name, file in bucket.files.items() if name.startswith(prefix)])
        if rest.startswith("resolve/"):
            file = bucket.files[rest.removeprefix("resolve/")]
            return self._answer({}, headers={
                "X-Xet-Hash": file["xetHash"], "X-Linked-Size": str(file["size"]),
                "Link": f'<{hub.url}/api/buckets/{bucket_id}/xet-read-token>; rel="xet-auth"',
            })  # fmt: skip
        self._answer({
            "id": bucket_id, "private": bucket.private, "createdAt": "2026-01-01T00:00:00.000Z",
            "size": sum(file["size"] for file in bucket.files.values()), "totalFiles": len(bucket.files),
        })  # fmt: skip

    def _bucket_batch(self, bucket: Bucket, operations: list[dict[str, Any]]) -> None:
        bucket.batches.append(operations)
        for operation in operations:
            name = operation["path"]
            if operation["type"] == "deleteFile":
                del bucket.files[name]
            else:
                oid = operation["xetHash"]
                bucket.files[name] = {"type": "file", "path": name, "size": self._xet_size(oid), "xetHash": oid}
        self._answer({"success": True, "failed": []})

    def _xet_size(self, oid: str) -> int:
        """Return a file's size by the shard that hf_xet sent for it (xet-core's MDB format).

        The hash, 4 words, then per segment 48 bytes, of which the word behind hash and flags is its length. A hash is
        printed as four 64-bit numbers, which lie in the file in little-endian order.
        """
        key = b"".join(bytes.fromhex(oid[at : at + 16])[::-1] for at in range(0, 64, 16))
        for shard in Path(self.state.xet.removeprefix("local://")).rglob("xorbs/**/*.mdb"):
            data = shard.read_bytes()
            if (at := data.find(key)) >= 0:
                segments = int.from_bytes(data[at + 36 : at + 40], "little")
                lengths = (data[at + 48 * number + 36 :][:4] for number in range(1, segments + 1))
                return sum(int.from_bytes(length, "little") for length in lengths)
        raise AssertionError(f"{oid} was never uploaded")

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

    def _answer(
        self, value: Any, status: int = 200, kind: str = "application/json", code: str = "", headers: Any = None
    ) -> None:
        data = json.dumps(value).encode()
        self.send_response(status)
        for name, content in (headers or {}).items():
            self.send_header(name, content)
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
        hub.xet = f"local://{cache.parent / 'xet'}"
        (cache.parent / "xet").mkdir(exist_ok=True)
        yield hub
