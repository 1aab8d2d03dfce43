"""A stand-in of the Hugging Face hub on 127.0.0.1, for huggingface_hub's real client, with faults on request."""

import hashlib
import json
import re
import threading
from base64 import b64decode
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from types import SimpleNamespace
from urllib.parse import unquote

import pytest

_INFO = re.compile(r"/api/(models|datasets)/([^/]+/[^/?]+)(?:/revision/([^/?]+))?(?:\?.*)?")
_TREE = re.compile(r"/api/(models|datasets)/([^/]+/[^/]+)/tree/([^/?]+)(?:\?.*)?")
_FILE = re.compile(r"/(datasets/)?([^/]+/[^/]+)/resolve/([^/]+)/([^?]+)")
_UPLOAD = re.compile(r"/api/models/([^/]+/[^/]+)/(preupload|commit)/([^/?]+)(?:\?.*)?")


@dataclass
class Fault:
    """What happens to the requests whose `METHOD /path` holds `where`, `times` times.

    `kind`: a status; drop (the connection ends within the file, and the client may resume); cut (the file ends early, and its
    Content-Length agrees).
    """

    where: str
    kind: int | str
    times: int = 1
    code: str | None = None


@dataclass
class Repository:
    files: dict[str, bytes] = field(default_factory=dict)
    gated: bool = False

    @property
    def commit(self) -> str:
        digest = hashlib.sha1(usedforsecurity=False)
        for path in sorted(self.files):
            digest.update(path.encode() + self.files[path])
        return digest.hexdigest()


class HubServer(ThreadingHTTPServer):
    """`models` and `datasets` by their names, the `faults` that are left, and the `requests` that came."""

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.models: dict[str, Repository] = {}
        self.datasets: dict[str, Repository] = {}
        self.faults: list[Fault] = []
        self.requests: list[str] = []
        self.url = f"http://127.0.0.1:{self.server_port}"

    def fail(self, where: str, kind: int | str, times: int = 1, code: str | None = None) -> None:
        self.faults.append(Fault(where, kind, times, code))

    def fetched(self) -> list[str]:
        """The files that were sent, in order."""
        return [unquote(match[4]) for line in self.requests if line.startswith("GET ") and (match := _FILE.fullmatch(line[4:]))]

    def looked_up(self) -> list[str]:
        return [match[2] for line in self.requests if (match := _INFO.fullmatch(line.partition(" ")[2]))]

    def handle_error(self, request, client_address):
        pass  # a client that went away


class Handler(BaseHTTPRequestHandler):
    server: HubServer
    protocol_version = "HTTP/1.1"

    def log_message(self, *_):
        pass

    def _answer(self, status: int, content: bytes = b"", headers: dict[str, str] | None = None) -> None:
        self.send_response(status)
        for name, value in {"Content-Length": str(len(content)), **(headers or {})}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(content)

    def _fault(self) -> Fault | None:
        line = f"{self.command} {self.path}"
        self.server.requests.append(line)
        fault = next((fault for fault in self.server.faults if fault.times > 0 and fault.where in line), None)
        if fault is not None:
            fault.times -= 1
        return fault

    def do_GET(self):
        fault = self._fault()
        if fault is not None and isinstance(fault.kind, int):
            return self._answer(fault.kind, b"{}", {"X-Error-Code": fault.code} if fault.code else {})
        if match := _INFO.fullmatch(self.path):
            return self._info(getattr(self.server, match[1]).get(match[2]), match[2], match[3])
        if match := _TREE.fullmatch(self.path):
            files = getattr(self.server, match[1])[match[2]].files.items()
            return self._json([{"type": "file", "path": path, "size": len(text), "oid": path} for path, text in files])
        if match := _FILE.fullmatch(self.path):
            kind = self.server.datasets if match[1] else self.server.models
            return self._file(kind.get(match[2]), match[3], unquote(match[4]), fault)
        return self._answer(404, b"{}")

    do_HEAD = do_GET

    def _info(self, repository, name, revision):
        if repository is None:
            return self._answer(404, b"{}", {"X-Error-Code": "RepoNotFound"})
        if revision not in (None, "main", repository.commit):
            return self._answer(404, b"{}", {"X-Error-Code": "RevisionNotFound"})
        siblings = [{"rfilename": path, "size": len(content)} for path, content in repository.files.items()]
        content = {"id": name, "sha": repository.commit, "siblings": siblings, "tags": [], "private": False, "downloads": 0}
        return self._answer(200, json.dumps(content).encode(), {"Content-Type": "application/json"})

    def _file(self, repository, revision, path, fault):
        if repository is None:
            return self._answer(404, b"{}", {"X-Error-Code": "RepoNotFound"})
        headers = {"X-Repo-Commit": repository.commit}
        if repository.gated and "Authorization" not in self.headers:
            return self._answer(401, b"{}", {**headers, "X-Error-Code": "GatedRepo"})
        if revision not in ("main", repository.commit):
            return self._answer(404, b"{}", {"X-Error-Code": "RevisionNotFound"})
        if path not in repository.files:
            return self._answer(404, b"{}", {**headers, "X-Error-Code": "EntryNotFound"})
        content = repository.files[path]
        headers |= {"ETag": f'"{hashlib.sha256(content).hexdigest()}"', "Accept-Ranges": "bytes"}
        start = re.fullmatch(r"bytes=(\d+)-", self.headers.get("Range", ""))
        if start:
            headers["Content-Range"] = f"bytes {start[1]}-{len(content) - 1}/{len(content)}"
            content = content[int(start[1]) :]
        if fault is not None and self.command == "GET":
            if fault.kind == "cut":
                return self._answer(200, content[: len(content) // 2], headers)
            self.send_response(206 if start else 200)
            for name, value in {"Content-Length": str(len(content)), **headers}.items():
                self.send_header(name, value)
            self.end_headers()
            self.wfile.write(content[: len(content) // 2])
            self.wfile.flush()
            self.close_connection = True
            return self.connection.close()
        return self._answer(206 if start else 200, content, headers)

    def do_POST(self):
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        fault = self._fault()
        if fault is not None:
            return self._answer(fault.kind, b'{"error": "no"}', {"Content-Type": "application/json"})
        if self.path == "/api/repos/create":
            asked = json.loads(body)
            name = f"{asked.get('organization') or 'owner'}/{asked['name']}"
            self.server.models.setdefault(name, Repository())
            return self._json({"url": f"{self.server.url}/{name}", "name": name})
        if self.path == "/api/validate-yaml":
            return self._json({"errors": [], "warnings": []})
        name, action, _ = _UPLOAD.fullmatch(self.path).groups()
        if action == "preupload":
            paths = [file["path"] for file in json.loads(body)["files"]]
            return self._json({"files": [{"path": path, "uploadMode": "regular", "shouldIgnore": False} for path in paths]})
        for line in map(json.loads, body.splitlines()):
            if line["key"] == "deletedFile":
                del self.server.models[name].files[line["value"]["path"]]
            if line["key"] == "file":
                self.server.models[name].files[line["value"]["path"]] = b64decode(line["value"]["content"])
        commit = self.server.models[name].commit
        return self._json({"commitUrl": f"{self.server.url}/{name}/commit/{commit}", "commitOid": commit})

    def _json(self, content) -> None:
        self._answer(200, json.dumps(content).encode(), {"Content-Type": "application/json"})


def connect(monkeypatch: pytest.MonkeyPatch, cache, url: str) -> None:
    """Have huggingface_hub ask `url` and keep files in `cache`; nothing waits."""
    monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", url)
    monkeypatch.setattr(
        "huggingface_hub.constants.HUGGINGFACE_CO_URL_TEMPLATE", url + "/{repo_id}/resolve/{revision}/{filename}"
    )
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(cache))
    monkeypatch.setattr("fourier_moe.files.retrying.FIRST_WAIT_SECONDS", 0.0)
    for module in ("file_download", "utils._http"):
        monkeypatch.setattr(f"huggingface_hub.{module}.time", SimpleNamespace(sleep=lambda _: None, time=lambda: 0.0))


def serve() -> HubServer:
    server = HubServer()
    threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True).start()
    return server
