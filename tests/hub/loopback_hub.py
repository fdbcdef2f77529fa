"""A hub on loopback: the part of the Hugging Face Hub's API that uploads and downloads use, in memory.

A repository is a dictionary of files per branch. Faults can be switched on: see `Hub.fault`.
"""

import base64
import hashlib
import json
import re
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from types import SimpleNamespace
from typing import Any
from urllib.parse import unquote, urlsplit

import pytest
from huggingface_hub import constants
from huggingface_hub.utils import _http

WRITER, READER, STRANGER = "hf_writerwriterwriter", "hf_readerreaderreader", "hf_strangerstranger"
SHA = "0" * 39
INVALID = "Invalid credentials in Authorization header"  # by which the library knows it from a hidden repository


@dataclass
class Repo:
    """A repository: visibility, files of its branch main, and how often it was committed to."""

    private: bool = False
    files: dict[str, bytes] = field(default_factory=dict)
    commits: list[str] = field(default_factory=list)


class Hub(ThreadingHTTPServer):
    """The server. `fault` breaks the next requests: "cut" ends the connection in the middle of a commit's body,
    "unavailable" answers 503; `faults` counts how many are left."""

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.repos: dict[str, Repo] = {}
        self.fault, self.faults = "", 0
        self.requests: list[tuple[str, str]] = []
        self.url = f"http://127.0.0.1:{self.server_address[1]}"
        threading.Thread(target=self.serve_forever, daemon=True).start()

    def fail(self, fault: str, times: int) -> None:
        """Break the next `times` commits."""
        self.fault, self.faults = fault, times

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Connections that a fault cut are no news."""


@contextmanager
def running_hub(monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    """A hub that is the default of everything in this process, although the tests are offline otherwise."""
    server = Hub()
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "ENDPOINT", server.url)
    # The library repeats a broken request for half a minute, the trainer a broken commit: here without pauses.
    monkeypatch.setattr("trl_apex.trainers.publishing.PAUSES", (0.0, 0.0))
    monkeypatch.setattr(_http, "time", SimpleNamespace(**{**vars(time), "sleep": lambda seconds: None}))
    yield server
    server.shutdown()
    server.server_close()


class Handler(BaseHTTPRequestHandler):
    """One request."""

    protocol_version = "HTTP/1.1"
    server: Hub

    def log_message(self, format: str, *args: Any) -> None:
        """Silence."""

    def route(self) -> None:
        method, path = self.command, unquote(urlsplit(self.path).path)
        self.server.requests.append((method, path))
        if method == "POST" and "/commit/" in path and self.broken():
            return
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0)) if method == "POST" else b""
        for verb, pattern, action in ROUTES:
            found = re.fullmatch(pattern, path)
            if found and method in verb:
                action(self, *found.groups(), **({"body": body} if method == "POST" else {}))
                return
        self.answer(404, {"error": f"no route {method} {path}"})

    do_GET = do_HEAD = do_POST = route

    def broken(self) -> bool:
        if self.server.faults <= 0:
            return False
        self.server.faults -= 1
        self.close_connection = True
        if self.server.fault == "cut":
            self.rfile.read(64)  # the beginning of the body, then nothing more
            self.connection.close()
        else:
            self.answer(503, {"error": "busy"})
        return True

    def answer(self, status: int, content: Any = None, headers: dict | None = None, raw: bytes = b"") -> None:
        payload = json.dumps(content).encode() if content is not None else raw
        self.send_response(status)
        for name, value in {"Content-Length": str(len(payload)), **(headers or {})}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(payload)

    def user(self) -> str:
        token = (self.headers.get("Authorization") or "").removeprefix("Bearer ")
        return {WRITER: "me", READER: "me-reading", STRANGER: "stranger"}.get(token, "" if not token else "?")

    def allowed(self, name: str, write: bool = False) -> bool:
        """Whether the caller may see (or change) a repository; answers the request if not."""
        user, repo = self.user(), self.server.repos.get(name)
        if user == "?":
            self.answer(401, {"error": INVALID}, {"X-Error-Message": "Invalid token"})
        elif repo is None or (repo.private and user not in ("me", "me-reading")):
            hidden = 404 if user else 401
            self.answer(hidden, {"error": "Repository not found"}, {"X-Error-Code": "RepoNotFound"})
        elif write and user != "me":
            self.answer(403, {"error": "You don't have the rights"}, {"X-Error-Message": "Forbidden"})
        else:
            return True
        return False

    def whoami(self) -> None:
        user = self.user()
        if user in ("", "?"):
            self.answer(401, {"error": INVALID})
        else:
            self.answer(200, {"type": "user", "name": user, "orgs": []})

    def create(self, body: bytes) -> None:
        user, asked = self.user(), json.loads(body)
        name = f"{asked.get('organization') or user}/{asked['name']}"
        if user in ("", "?"):
            self.answer(401, {"error": INVALID})
        elif name in self.server.repos:
            self.answer(409, {"error": "You already created this model repo", "url": f"{self.server.url}/{name}"})
        elif user != "me":
            self.answer(403, {"error": "You don't have the rights to create a model under this namespace"})
        else:
            self.server.repos[name] = Repo(private=asked.get("visibility") == "private" or bool(asked.get("private")))
            self.answer(200, {"url": f"{self.server.url}/{name}", "name": name, "id": name})

    def preupload(self, name: str, revision: str, body: bytes) -> None:
        if self.allowed(name, write=True):
            paths = [entry["path"] for entry in json.loads(body)["files"]]
            modes = [{"path": path, "uploadMode": "regular", "shouldIgnore": False, "oid": None} for path in paths]
            self.answer(200, {"files": modes})

    def commit(self, name: str, revision: str, body: bytes) -> None:
        if not self.allowed(name, write=True):
            return
        repo, files, summary = self.server.repos[name], {}, ""
        for line in body.splitlines():
            entry = json.loads(line)
            if entry["key"] == "header":
                summary = entry["value"]["summary"]
            elif entry["key"] == "file":
                files[entry["value"]["path"]] = base64.b64decode(entry["value"]["content"])
        repo.files.update(files)  # all at once, as a commit is
        repo.commits.append(summary)
        commit = f"{SHA}{len(repo.commits)}"
        url = f"{self.server.url}/{name}/commit/{commit}"
        self.answer(200, {"success": True, "commitUrl": url, "commitOid": commit, "hookOutput": ""})

    def info(self, name: str, revision: str | None = None) -> None:
        if self.allowed(name):
            repo = self.server.repos[name]
            facts = {
                "id": name,
                "modelId": name,
                "sha": f"{SHA}{len(repo.commits)}",
                "private": repo.private,
                "tags": [],
            }
            self.answer(200, {**facts, "siblings": [{"rfilename": path} for path in repo.files]})

    def tree(self, name: str, revision: str, folder: str | None = None) -> None:
        if self.allowed(name):
            files = self.server.repos[name].files
            self.answer(200, [{"type": "file", "path": p, "size": len(c), "oid": _etag(c)} for p, c in files.items()])

    def resolve(self, name: str, revision: str, path: str) -> None:
        if not self.allowed(name):
            return
        repo = self.server.repos[name]
        headers = {"X-Repo-Commit": f"{SHA}{len(repo.commits)}", "Accept-Ranges": "none"}
        if path not in repo.files:
            self.answer(404, {"error": "Entry not found"}, {"X-Error-Code": "EntryNotFound", **headers})
        else:
            content = repo.files[path]
            self.answer(200, None, {"ETag": f'"{_etag(content)}"', **headers}, raw=content)

    def validate(self, body: bytes) -> None:
        self.answer(200, {"errors": [], "warnings": []})


def _etag(content: bytes) -> str:
    return hashlib.sha1(content).hexdigest()


REPO, REVISION = r"([\w.-]+/[\w.-]+)", r"([\w.-]+)"
ROUTES: list[tuple[str, str, Any]] = [
    ("GET", r"/api/whoami-v2", Handler.whoami),
    ("POST", r"/api/repos/create", Handler.create),
    ("POST", r"/api/validate-yaml", Handler.validate),
    ("POST", rf"/api/models/{REPO}/preupload/{REVISION}", Handler.preupload),
    ("POST", rf"/api/models/{REPO}/commit/{REVISION}", Handler.commit),
    ("GET", rf"/api/models/{REPO}/revision/{REVISION}", Handler.info),
    ("GET", rf"/api/models/{REPO}/tree/{REVISION}(/.*)?", Handler.tree),
    ("GET", rf"/api/models/{REPO}", Handler.info),
    ("GET HEAD", rf"/{REPO}/resolve/{REVISION}/(.+)", Handler.resolve),
]
