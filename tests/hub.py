"""The hub's HTTP API, as far as huggingface_hub calls it for what we do: a server of this process, files in memory."""

from __future__ import annotations

import base64
import hashlib
import json
import re
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import unquote, urlsplit

import pytest

TOKEN = "hf_of_the_tests"
LFS_SUFFIXES = (".safetensors", ".mp4", ".parquet")
KINDS = {"models": "model", "datasets": "dataset"}


@dataclass
class Repository:
    """commits: commit -> path -> content. refs: branch or tag -> commit. access: public, or who wants a token: private,
    gated."""

    commits: dict[str, dict[str, bytes]] = field(default_factory=dict)
    refs: dict[str, str] = field(default_factory=dict)
    access: str = "public"

    def add(self, files: Mapping[str, bytes], ref: str = "main") -> str:
        """A commit of these files beside those that are there. Returns it."""
        whole = {**self.commits.get(self.refs.get(ref, ""), {}), **files}
        digest = hashlib.sha1(repr((len(self.commits), sorted(whole.items()))).encode()).hexdigest()
        self.commits[digest], self.refs[ref] = whole, digest
        return digest

    def files(self, ref: str = "main") -> dict[str, bytes]:
        return self.commits[self.refs[ref]]


@dataclass
class Hub:
    """repositories: (kind, id) -> what it holds. asked: method and path of every request. lfs: SHA-256 -> content."""

    repositories: dict[tuple[str, str], Repository] = field(default_factory=dict)
    asked: list[str] = field(default_factory=list)
    lfs: dict[str, bytes] = field(default_factory=dict)
    commits: list[str] = field(default_factory=list)
    is_down: bool = False
    url: str = ""

    def put(self, kind: str, name: str, folder: Path, access: str = "public") -> str:
        """A repository with all of a folder's files. Returns the commit."""
        files = {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}
        repository = self.repositories.setdefault((kind, name), Repository(access=access))
        return repository.add({"README.md": b"# A repository\n", **files})

    def fetched(self) -> list[str]:
        """Paths of files that were downloaded."""
        found = [line.partition("/resolve/") for line in self.asked if line.startswith("GET ")]
        return sorted(behind.partition("/")[2] for _, resolve, behind in found if resolve)


@contextmanager
def running(monkeypatch: pytest.MonkeyPatch, cache: Path) -> Iterator[Hub]:
    """A hub of its own, with an empty cache, that huggingface_hub takes for the one."""
    from huggingface_hub import constants

    from xr0_engine.training.data import hub as datasets

    hub = Hub()
    server = ThreadingHTTPServer(("127.0.0.1", 0), type("Handler", (_Handler,), {"hub": hub}))
    hub.url = f"http://127.0.0.1:{server.server_port}"
    threading.Thread(target=server.serve_forever, args=(0.05,), daemon=True).start()
    # What it reads of the environment when it is imported.
    monkeypatch.setattr(constants, "ENDPOINT", hub.url)
    monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", hub.url + "/{repo_id}/resolve/{revision}/{filename}")
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(cache))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    # Its own protocol for large files has no place here.
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
    monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(cache / "no token"))
    for name in ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN"):
        monkeypatch.delenv(name, raising=False)
    datasets._fetch.cache_clear()
    try:
        yield hub
    finally:
        datasets._fetch.cache_clear()
        server.shutdown()
        server.server_close()


class _Handler(BaseHTTPRequestHandler):
    hub: Hub
    protocol_version = "HTTP/1.1"

    def log_message(self, *arguments: object) -> None:
        pass

    def do_GET(self) -> None:
        self._answer()

    do_HEAD = do_POST = do_GET

    def _answer(self) -> None:
        body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        path = unquote(urlsplit(self.path).path)
        self.hub.asked.append(f"{self.command} {path}")
        if self.hub.is_down:
            # As a connection that breaks off.
            self.close_connection = True
            return None
        token = (self.headers.get("Authorization") or "").removeprefix("Bearer ") or None
        if token not in (None, TOKEN):
            return self._fail(401, message="Invalid credentials in Authorization header")
        if match := re.fullmatch(r"/api/(models|datasets)/([^/]+/[^/]+)(?:/([a-z]+)/(.+))?", path):
            kind, name, what, revision = KINDS[match[1]], match[2], match[3] or "revision", match[4] or "main"
            if (repository := self._repository(kind, name, token)) is None:
                return None
            if self.command == "POST":
                if token is None:
                    return self._fail(401, message="Unauthorized")
                return (
                    self._preupload(json.loads(body)) if what == "preupload" else self._commit(repository, name, body)
                )
            commit = self._commit_of(repository, revision)
            return None if commit is None else self._tell(repository, name, what, commit)
        if match := re.fullmatch(r"/(datasets/)?([^/]+/[^/]+)/resolve/([^/]+)/(.+)", path):
            repository = self._repository("dataset" if match[1] else "model", match[2], token)
            commit = None if repository is None else self._commit_of(repository, match[3])
            if repository is None or commit is None:
                return None
            content = repository.commits[commit].get(match[4])
            if content is None:
                return self._fail(404, "EntryNotFound")
            etag = hashlib.sha256(content).hexdigest()
            return self._send(200, content, {"ETag": f'"{etag}"', "X-Repo-Commit": commit})
        if token is None:
            return self._fail(401, message="Unauthorized")
        if path == "/api/repos/create":
            asked = json.loads(body)
            key = (asked.get("type", "model"), f"{asked['organization']}/{asked['name']}")
            if asked["organization"] != "our":
                return self._fail(403, message="You don't have the rights to create a model under this namespace")
            status = 409 if key in self.hub.repositories else 200
            private = asked.get("visibility") == "private"
            if status == 200:
                self.hub.repositories[key] = Repository(access="private" if private else "public")
                self.hub.repositories[key].add({".gitattributes": b"*.safetensors filter=lfs\n"})
            return self._json({"url": f"{self.hub.url}/{key[1]}"}, status)
        if path == "/api/validate-yaml":
            return self._json({"errors": [], "warnings": []})
        if path.endswith(".git/info/lfs/objects/batch"):
            objects = [
                {**it, "actions": {"upload": {"href": f"{self.hub.url}/lfs/{it['oid']}"}}}
                for it in json.loads(body)["objects"]
            ]
            return self._json({"transfer": "basic", "objects": objects})
        return self._fail(404)

    def do_PUT(self) -> None:
        body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        self.hub.asked.append(f"PUT {self.path}")
        self.hub.lfs[self.path.rpartition("/")[2]] = body
        self._send(200, b"")

    def _repository(self, kind: str, name: str, token: str | None) -> Repository | None:
        found = self.hub.repositories.get((kind, name))
        if found is None or (found.access == "private" and token is None):
            # To who is nobody, the hub does not tell the one from the other.
            self._fail(401 if token is None else 404, "RepoNotFound")
            return None
        if found.access == "gated" and token is None:
            self._fail(401, "GatedRepo")
            return None
        return found

    def _commit_of(self, repository: Repository, revision: str) -> str | None:
        commit = repository.refs.get(revision, revision)
        if commit not in repository.commits:
            self._fail(404, "RevisionNotFound")
            return None
        return commit

    def _tell(self, repository: Repository, name: str, what: str, commit: str) -> None:
        files = repository.commits[commit]
        if what == "tree":
            return self._json([_entry(path, content) for path, content in files.items()])
        told = {"id": name, "sha": commit, "private": repository.access == "private"}
        return self._json({**told, "siblings": [{"rfilename": path} for path in files]})

    def _preupload(self, asked: Mapping[str, list[dict[str, str]]]) -> None:
        self._json(
            {
                "files": [
                    {
                        "path": it["path"],
                        "uploadMode": "lfs" if it["path"].endswith(LFS_SUFFIXES) else "regular",
                        "shouldIgnore": False,
                    }
                    for it in asked["files"]
                ]
            }
        )

    def _commit(self, repository: Repository, name: str, body: bytes) -> None:
        files = {}
        for line in map(json.loads, body.splitlines()):
            value = line["value"]
            if line["key"] == "header":
                self.hub.commits.append(value["summary"])
            elif line["key"] == "file":
                files[value["path"]] = base64.b64decode(value["content"])
            elif line["key"] == "lfsFile":
                content = self.hub.lfs[value["oid"]]
                assert hashlib.sha256(content).hexdigest() == value["oid"]
                files[value["path"]] = content
            else:
                raise AssertionError(line["key"])
        commit = repository.add(files)
        self._json({"success": True, "commitOid": commit, "commitUrl": f"{self.hub.url}/{name}/commit/{commit}"})

    def _json(self, content: object, status: int = 200) -> None:
        self._send(status, json.dumps(content).encode(), {"Content-Type": "application/json"})

    def _fail(self, status: int, code: str | None = None, message: str | None = None) -> None:
        headers = {"X-Error-Code": code, "X-Error-Message": message}
        self._send(status, b"{}", {name: value for name, value in headers.items() if value})

    def _send(self, status: int, content: bytes, headers: Mapping[str, str] | None = None) -> None:
        self.send_response(status)
        for name, value in (headers or {}).items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(content)


def _entry(path: str, content: bytes) -> dict[str, object]:
    entry: dict[str, object] = {
        "type": "file",
        "path": path,
        "size": len(content),
        "oid": hashlib.sha1(content).hexdigest(),
    }
    if path.endswith(LFS_SUFFIXES):
        entry["lfs"] = {"oid": hashlib.sha256(content).hexdigest(), "size": len(content), "pointerSize": 130}
    return entry
