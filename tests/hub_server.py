"""A stand-in for the hub, on this machine: enough of its HTTP API for the real `huggingface_hub` client.

    with HubServer() as hub:
        subprocess.run(..., env={**os.environ, **hub.environment(folder)})

It keeps repositories of models in memory: commits, branches, and large files by their hash, which must be uploaded
before a commit may name them. Whoever writes, or reads what is private, shows the token of the one user.
"""

from __future__ import annotations

import base64
import hashlib
import json
import re
import threading
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import parse_qs, unquote, urlsplit

import yaml

USER, TOKEN = "owner", "hf_token_of_the_owner"
LARGE = (".safetensors", ".bin", ".pt")
NAME = r"(?P<repo>[\w.-]+/[\w.-]+)"


@dataclass
class Commit:
    """One state of a repository."""

    message: str
    files: dict[str, bytes]
    large: set[str] = field(default_factory=set)  # which of them are stored by hash


@dataclass
class Repository:
    """Commits by hash, and which of them each branch ends in."""

    private: bool
    commits: dict[str, Commit] = field(default_factory=dict)
    branches: dict[str, str] = field(default_factory=dict)

    def add(self, branch: str, commit: Commit) -> str:
        number = f"{len(self.commits)} {commit.message} {sorted(commit.files)}"
        name = hashlib.sha1(number.encode()).hexdigest()
        self.commits[name] = commit
        self.branches[branch] = name
        return name

    def find(self, revision: str) -> str | None:
        name = self.branches.get(revision, revision)
        return name if name in self.commits else None

    def history(self) -> list[str]:
        """The messages of all commits, the oldest first."""
        return [commit.message for commit in self.commits.values()]


class Refusal(Exception):
    """An answer that is an error."""

    def __init__(self, status: int, message: str, code: str | None = None, commit: str | None = None, **answer: str):
        super().__init__(message)
        self.status, self.answer = status, answer
        headers = {"X-Error-Message": message, "X-Error-Code": code, "X-Repo-Commit": commit}
        self.headers = {name: value for name, value in headers.items() if value is not None}


class HubServer:
    """The server; a context manager that listens on a free port."""

    def __init__(self) -> None:
        self.repositories: dict[str, Repository] = {}
        self.blobs: dict[str, bytes] = {}
        self.requests: list[str] = []
        self.breaks_at: list[str] = []  # requests whose path contains one of these are answered by an error
        self.lock = threading.Lock()

    def __enter__(self) -> HubServer:
        handler = type("Handler", (_Handler,), {"hub": self})
        self.server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
        self.url = f"http://127.0.0.1:{self.server.server_port}"
        threading.Thread(target=self.server.serve_forever, daemon=True).start()
        return self

    def __exit__(self, *error: object) -> None:
        self.server.shutdown()
        self.server.server_close()

    def environment(self, home: Any, token: str | None = TOKEN) -> dict[str, str]:
        """Environment variables that point the client here, with a cache of its own."""
        return {"HF_ENDPOINT": self.url, "HF_HOME": str(home), "HF_HUB_OFFLINE": "0", "HF_HUB_DISABLE_XET": "1",
                "HF_HUB_DISABLE_TELEMETRY": "1", "HF_HUB_DISABLE_PROGRESS_BARS": "1", "NO_PROXY": "127.0.0.1",
                "HF_TOKEN": token or ""}  # fmt: skip

    def files(self, repo: str, revision: str = "main") -> dict[str, bytes]:
        """What a repository holds."""
        repository = self.repositories[repo]
        return repository.commits[repository.find(revision)].files


class _Handler(BaseHTTPRequestHandler):
    hub: HubServer
    protocol_version = "HTTP/1.1"

    def log_message(self, *args: Any) -> None:
        pass

    def do_GET(self) -> None:
        self._answer("GET")

    def do_HEAD(self) -> None:
        self._answer("GET")

    def do_POST(self) -> None:
        self._answer("POST")

    def do_PUT(self) -> None:
        self._answer("PUT")

    def _answer(self, method: str) -> None:
        self.body = self._read_body()
        path = unquote(urlsplit(self.path).path)
        with self.hub.lock:
            self.hub.requests.append(f"{self.command} {path}")
            try:
                if any(part in path for part in self.hub.breaks_at):
                    raise Refusal(400, "the server broke off")
                for verb, pattern, action in ROUTES:
                    match = re.fullmatch(pattern, path)
                    if verb == method and match is not None:
                        content, headers = action(self, **match.groupdict())
                        break
                else:
                    raise Refusal(404, f"nothing at {path}")
            except Refusal as refusal:
                return self._send(refusal.status, {"error": str(refusal), **refusal.answer}, refusal.headers)
        self._send(200, content, headers)

    def _read_body(self) -> bytes:
        if self.headers.get("Transfer-Encoding") == "chunked":
            parts = []
            while size := int(self.rfile.readline(), 16):
                parts.append(self.rfile.read(size))
                self.rfile.readline()
            self.rfile.readline()
            return b"".join(parts)
        return self.rfile.read(int(self.headers.get("Content-Length") or 0))

    def _send(self, status: int, content: Any, headers: dict[str, str]) -> None:
        data = content if isinstance(content, bytes) else json.dumps(content).encode()
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(data)

    # ---- who may do what -----------------------------------------------------------------------------------

    def _authorize(self) -> None:
        if self.headers.get("Authorization") != f"Bearer {TOKEN}":
            raise Refusal(401, "Invalid credentials in Authorization header")

    def _repository(self, name: str) -> Repository:
        repository = self.hub.repositories.get(name)
        hidden = repository is not None and repository.private
        if repository is None or (hidden and self.headers.get("Authorization") != f"Bearer {TOKEN}"):
            raise Refusal(404, "Repository not found", "RepoNotFound")
        return repository

    def _commit(self, name: str, revision: str) -> tuple[str, Commit]:
        repository = self._repository(name)
        found = repository.find(revision)
        if found is None:
            raise Refusal(404, f"Invalid rev id: {revision}", "RevisionNotFound")
        return found, repository.commits[found]

    # ---- the answers ---------------------------------------------------------------------------------------

    def create(self) -> Any:
        self._authorize()
        values = json.loads(self.body)
        owner = values.get("organization") or USER
        if owner != USER:
            raise Refusal(403, f"You don't have the rights to create a model under the namespace {owner}")
        name = f"{owner}/{values['name']}"
        answer = {"url": f"{self.hub.url}/{name}", "name": name}
        if name in self.hub.repositories:
            raise Refusal(409, "You already created this model repo", **answer)
        private = values.get("visibility") == "private" or bool(values.get("private"))
        repository = self.hub.repositories[name] = Repository(private)
        repository.add("main", Commit("initial commit", {".gitattributes": b"*.safetensors filter=lfs\n"}))
        return answer, {}

    def whoami(self) -> Any:
        self._authorize()
        return {"name": USER, "type": "user", "orgs": []}, {}

    def validate_yaml(self) -> Any:
        content = json.loads(self.body)["content"]
        values = yaml.safe_load(content.split("---")[1]) if content.startswith("---") else {}
        errors = []
        if not isinstance(values.get("tags", []), list):
            errors.append({"message": '"tags" must be an array'})
        if "base_model" in values and not re.fullmatch(r"[\w.-]+/[\w.-]+", str(values["base_model"])):
            errors.append({"message": '"base_model" must be the name of a repository'})
        if errors:
            raise Refusal(400, json.dumps(errors))
        return {"errors": [], "warnings": []}, {}

    def preupload(self, repo: str, revision: str) -> Any:
        self._authorize()
        self._commit(repo, revision)
        files = json.loads(self.body)["files"]
        modes = {True: "lfs", False: "regular"}
        return {"files": [{"path": file["path"], "uploadMode": modes[file["path"].endswith(LARGE)],
                           "shouldIgnore": False} for file in files]}, {}  # fmt: skip

    def batch(self, repo: str) -> Any:
        self._authorize()
        self._repository(repo)
        objects = []
        for item in json.loads(self.body)["objects"]:
            href = f"{self.hub.url}/lfs/{item['oid']}"
            actions = {"upload": {"href": href}, "verify": {"href": f"{href}/verify"}}
            objects.append({**item, "actions": actions} if item["oid"] not in self.hub.blobs else item)
        return {"transfer": "basic", "objects": objects}, {}

    def store(self, oid: str) -> Any:
        if hashlib.sha256(self.body).hexdigest() != oid:
            raise Refusal(400, "the content does not have the hash it was announced with")
        self.hub.blobs[oid] = self.body
        return {}, {}

    def verify(self, oid: str) -> Any:
        if oid not in self.hub.blobs:
            raise Refusal(404, "no such object")
        return {}, {}

    def commit(self, repo: str, revision: str) -> Any:
        self._authorize()
        _, before = self._commit(repo, revision)
        files, large, message = dict(before.files), set(before.large), ""
        for line in self.body.splitlines():
            entry = json.loads(line)
            kind, value = entry["key"], entry["value"]
            if kind == "header":
                message = value["summary"]
            elif kind == "file":
                files[value["path"]] = base64.b64decode(value["content"])
            elif kind == "lfsFile":
                if value["oid"] not in self.hub.blobs:
                    raise Refusal(400, f"{value['path']} names an object that was not uploaded")
                files[value["path"]] = self.hub.blobs[value["oid"]]
                large.add(value["path"])
            elif kind == "deletedFile":
                if files.pop(value["path"], None) is None:
                    raise Refusal(400, f"there is no {value['path']} to delete")
            else:
                raise Refusal(400, f"unknown operation {kind}")
        if "create_pr" in parse_qs(urlsplit(self.path).query):
            revision = f"refs/pr/{len(self._repository(repo).branches)}"
        name = self._repository(repo).add(revision, Commit(message, files, large & files.keys()))
        url = f"{self.hub.url}/{repo}"
        return {"success": True, "commitUrl": f"{url}/commit/{name}", "commitOid": name,
                "pullRequestUrl": f"{url}/discussions/1"}, {}  # fmt: skip

    def branch(self, repo: str, revision: str) -> Any:
        self._authorize()
        repository = self._repository(repo)
        if revision in repository.branches:
            raise Refusal(409, "Reference already exists")
        repository.branches[revision] = repository.branches["main"]
        return {}, {}

    def info(self, repo: str, revision: str = "main") -> Any:
        name, commit = self._commit(repo, revision)
        siblings = [{"rfilename": path} for path in commit.files]
        return {"_id": name, "id": repo, "modelId": repo, "sha": name, "private": self._repository(repo).private,
                "siblings": siblings, "tags": [], "downloads": 0, "likes": 0}, {}  # fmt: skip

    def tree(self, repo: str, revision: str) -> Any:
        _, commit = self._commit(repo, revision)
        entries = []
        for path, content in commit.files.items():
            entry = {"type": "file", "path": path, "size": len(content), "oid": hashlib.sha1(content).hexdigest()}
            if path in commit.large:
                oid = hashlib.sha256(content).hexdigest()
                entry["lfs"] = {"oid": oid, "size": len(content), "pointerSize": 130}
            entries.append(entry)
        return entries, {}

    def refs(self, repo: str) -> Any:
        branches = self._repository(repo).branches
        refs = [
            {"name": name, "ref": f"refs/heads/{name}", "targetCommit": commit} for name, commit in branches.items()
        ]
        return {"branches": refs, "tags": [], "converts": []}, {}

    def commits(self, repo: str, revision: str) -> Any:
        self._commit(repo, revision)
        history = reversed(self._repository(repo).commits.items())
        return [{"id": name, "title": commit.message, "message": "", "date": "2026-01-01T00:00:00.000Z",
                 "authors": [{"user": USER}]} for name, commit in history], {}  # fmt: skip

    def resolve(self, repo: str, revision: str, path: str) -> Any:
        name, commit = self._commit(repo, revision)
        if path not in commit.files:
            raise Refusal(404, "Entry not found", "EntryNotFound", commit=name)
        content = commit.files[path]
        return content, {"X-Repo-Commit": name, "ETag": f'"{hashlib.sha256(content).hexdigest()}"'}


ROUTES: list[tuple[str, str, Any]] = [
    ("POST", "/api/repos/create", _Handler.create),
    ("GET", "/api/whoami-v2", _Handler.whoami),
    ("POST", "/api/validate-yaml", _Handler.validate_yaml),
    ("POST", f"/api/models/{NAME}/preupload/(?P<revision>.+)", _Handler.preupload),
    ("POST", f"/api/models/{NAME}/commit/(?P<revision>.+)", _Handler.commit),
    ("POST", f"/api/models/{NAME}/branch/(?P<revision>.+)", _Handler.branch),
    ("GET", f"/api/models/{NAME}", _Handler.info),
    ("GET", f"/api/models/{NAME}/revision/(?P<revision>.+)", _Handler.info),
    ("GET", f"/api/models/{NAME}/tree/(?P<revision>[^/]+)", _Handler.tree),
    ("GET", f"/api/models/{NAME}/refs", _Handler.refs),
    ("GET", f"/api/models/{NAME}/commits/(?P<revision>[^/]+)", _Handler.commits),
    ("POST", rf"/{NAME}\.git/info/lfs/objects/batch", _Handler.batch),
    ("PUT", "/lfs/(?P<oid>[0-9a-f]+)", _Handler.store),
    ("POST", "/lfs/(?P<oid>[0-9a-f]+)/verify", _Handler.verify),
    ("GET", f"/{NAME}/resolve/(?P<revision>[^/]+)/(?P<path>.+)", _Handler.resolve),
]
