"""A stand-in of Hugging Face on this machine: what huggingface_hub asks for to push and pull."""

from __future__ import annotations

import base64
import contextlib
import hashlib
import json
import re
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import huggingface_hub
import pytest
from huggingface_hub import constants

COMMIT = "a" * 40


class Service(ThreadingHTTPServer):
    """Repositories in memory, without versions."""

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.repositories: dict[str, dict[str, bytes]] = {}
        self.objects: dict[str, bytes] = {}
        self.requests: list[str] = []

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}"


class _Handler(BaseHTTPRequestHandler):
    server: Service

    def log_message(self, *arguments: object) -> None:
        """Nothing on the tests' standard error."""

    def do_HEAD(self) -> None:
        self.do_GET()

    def do_GET(self) -> None:
        self.server.requests.append(f"{self.command} {self.path}")
        resolve = re.fullmatch(r"/([^/]+/[^/]+)/resolve/[^/]+/(.+)", self.path)
        info = re.fullmatch(r"/api/models/([^/]+/[^/]+)(/revision/.+)?", self.path)
        if resolve:
            self._file(*resolve.groups())
        elif info and info[1] in self.server.repositories:
            self._json({"id": info[1], "sha": COMMIT, "siblings": [], "tags": []})
        else:
            self._missing("RepoNotFound")

    def do_POST(self) -> None:
        self.server.requests.append(f"{self.command} {self.path}")
        body = self._body()
        if not self.headers.get("Authorization"):
            return self._answer(401, b"{}", {})
        if self.path == "/api/repos/create":
            request = json.loads(body)
            repo = "/".join(filter(None, [request.get("organization"), request["name"]]))
            self.server.repositories.setdefault(repo, {})
            return self._json({"url": f"{self.server.url}/{repo}", "name": repo, "id": repo})
        repo = "/".join(self.path.removeprefix("/api/models").split("/")[1:3]).removesuffix(".git")
        if "/preupload/" in self.path:
            return self._json({"files": [_mode(file) for file in json.loads(body)["files"]]})
        if self.path.endswith("/objects/batch"):
            objects = json.loads(body)["objects"]
            return self._json({"transfer": "basic", "objects": list(map(self._upload, objects))})
        if "/commit/" in self.path:
            self._commit(repo, [json.loads(line) for line in body.splitlines()])
            url = f"{self.server.url}/{repo}/commit/{COMMIT}"
            return self._json({"commitUrl": url, "commitOid": COMMIT})
        return self._missing("EntryNotFound")

    def do_PUT(self) -> None:
        body = self._body()
        self.server.objects[self.path.rpartition("/")[2]] = body
        self._answer(200, b"", {})

    def _body(self) -> bytes:
        if "Content-Length" in self.headers:
            return self.rfile.read(int(self.headers["Content-Length"]))
        chunks = []  # each after its length in hexadecimal digits; the last one is empty
        while n_bytes := int(self.rfile.readline(), 16):
            chunks.append(self.rfile.read(n_bytes))
            self.rfile.readline()
        self.rfile.readline()
        return b"".join(chunks)

    def _upload(self, wanted: dict[str, object]) -> dict[str, object]:
        href = f"{self.server.url}/objects/{wanted['oid']}"
        return wanted | {"actions": {"upload": {"href": href, "header": {}}}}

    def _commit(self, repo: str, lines: list[dict[str, dict[str, str]]]) -> None:
        for line in lines:
            value = line["value"]
            if str(line["key"]) == "file":
                content = base64.b64decode(value["content"])
            elif str(line["key"]) == "lfsFile":
                content = self.server.objects[value["oid"]]
            else:
                continue
            self.server.repositories[repo][value["path"]] = content

    def _file(self, repo: str, path: str) -> None:
        if repo not in self.server.repositories:
            return self._missing("RepoNotFound")
        content = self.server.repositories[repo].get(path)
        if content is None:
            return self._missing("EntryNotFound")
        etag = f'"{hashlib.sha256(content).hexdigest()}"'
        return self._answer(200, content, {"ETag": etag, "X-Repo-Commit": COMMIT})

    def _json(self, data: object) -> None:
        self._answer(200, json.dumps(data).encode(), {"Content-Type": "application/json"})

    def _missing(self, code: str) -> None:
        self._answer(404, b"", {"X-Error-Code": code, "X-Error-Message": "not here"})

    def _answer(self, status: int, body: bytes, headers: dict[str, str]) -> None:
        self.send_response(status)
        for key, value in headers.items():
            self.send_header(key, value)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)


def _mode(file: dict[str, str]) -> dict[str, object]:
    mode = "lfs" if file["path"].endswith(".safetensors") else "regular"
    return {"path": file["path"], "uploadMode": mode, "shouldIgnore": False}


@contextlib.contextmanager
def serve(monkeypatch: pytest.MonkeyPatch, cache: object) -> Iterator[Service]:
    """Inside, huggingface_hub talks to a service of this process and to no other."""
    service = Service()
    thread = threading.Thread(target=service.serve_forever, args=(0.05,), daemon=True)
    thread.start()
    template = constants.HUGGINGFACE_CO_URL_TEMPLATE.replace(constants.ENDPOINT, service.url)
    monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
    monkeypatch.setattr(constants, "ENDPOINT", service.url)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(cache))
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_TELEMETRY", True)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setenv("HF_TOKEN", "hf_token_of_tests")
    try:
        yield service
    finally:
        huggingface_hub.close_session()
        service.shutdown()
        service.server_close()
        thread.join()
