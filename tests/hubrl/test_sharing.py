"""Hubs that are pushed and pulled: folders, and a local stand-in of Hugging Face's service."""

from __future__ import annotations

import base64
import contextlib
import hashlib
import json
import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
import yaml
from small_hubs import nature_spec, write_hub

from hubrl.encoders import file_sha256
from hubrl.sharing import pull, push
from hubrl.specs import load_hub

ROOT = Path(__file__).resolve().parents[2]


def test_a_hub_comes_back_from_a_folder(hub5: Path, tmp_path: Path) -> None:
    push(load_hub(hub5), str(tmp_path / "shared"))
    hub = pull(str(tmp_path / "shared"), tmp_path / "mine")
    assert [spec.sha256 for spec in hub.encoders] == [s.sha256 for s in load_hub(hub5).encoders]
    for spec in hub.encoders:
        assert spec.weights is not None
        assert file_sha256(tmp_path / "mine" / spec.weights) == spec.sha256
    assert sorted(file.name for file in (tmp_path / "mine").iterdir()) == [
        *(f"{letter}.safetensors" for letter in "abcde"),
        "hub.yaml",
    ]


def test_places_that_exist_are_left_alone(hub5: Path, tmp_path: Path) -> None:
    (tmp_path / "there").mkdir()
    with pytest.raises(ValueError, match="there exists; give a new folder"):
        push(load_hub(hub5), str(tmp_path / "there"))
    with pytest.raises(ValueError, match="there exists; give a new folder"):
        pull(str(hub5), tmp_path / "there")


def test_a_file_that_is_another_one_is_not_taken(hub5: Path, tmp_path: Path) -> None:
    (hub5 / "c.safetensors").write_bytes((hub5 / "a.safetensors").read_bytes())
    with pytest.raises(ValueError, match=r"encoder 'c': .* has sha256 .*, its card says"):
        pull(str(hub5), tmp_path / "mine")
    with pytest.raises(ValueError, match=r"encoder 'c': .* has sha256 .*, its card says"):
        push(load_hub(hub5), str(tmp_path / "shared"))
    (hub5 / "c.safetensors").unlink()
    with pytest.raises(ValueError, match=r"c\.safetensors is missing: .* is no hub"):
        pull(str(hub5), tmp_path / "mine")
    assert not (tmp_path / "mine").exists()
    assert not (tmp_path / "shared").exists()


@pytest.mark.parametrize("weights", ["../stolen.safetensors", "/tmp/stolen.safetensors"])
def test_a_card_cannot_reach_outside_its_hub(weights: str, hub5: Path, tmp_path: Path) -> None:
    cards = yaml.safe_load((hub5 / "hub.yaml").read_text())
    cards["encoders"][0]["weights"] = weights
    (hub5 / "hub.yaml").write_text(yaml.safe_dump(cards))
    with pytest.raises(ValueError, match="allowed: a file inside the hub's folder"):
        pull(str(hub5), tmp_path / "deep" / "mine")
    assert not (tmp_path / "deep").exists()


class Service(BaseHTTPRequestHandler):
    """The few requests of Hugging Face's service that push and pull make; one repository."""

    files: dict[str, bytes]
    requests: list[str]

    def do_HEAD(self) -> None:
        self._file(with_body=False)

    def do_GET(self) -> None:
        if "/resolve/" in self.path:
            self._file(with_body=True)
        else:
            self._json({"id": "me/hub", "sha": "1" * 40, "siblings": [], "private": False})

    def do_POST(self) -> None:
        self.requests.append(self.path)
        body = self._body()
        if self.path.endswith("/repos/create"):
            self._json({"url": "http://127.0.0.1/me/hub", "name": "me/hub", "id": "me/hub"})
        elif "/preupload/" in self.path:
            files = [
                {"path": file["path"], "uploadMode": "regular", "shouldIgnore": False}
                for file in json.loads(body)["files"]
            ]
            self._json({"files": files})
        elif "/commit/" in self.path:
            for line in body.splitlines():
                entry = json.loads(line)
                if entry["key"] == "file":
                    value = entry["value"]
                    self.files[value["path"]] = base64.b64decode(value["content"])
            self._json({"commitUrl": "http://127.0.0.1/me/hub/commit/1", "commitOid": "1" * 40})
        else:
            self._json({})

    def _body(self) -> bytes:
        if "Content-Length" in self.headers:
            return self.rfile.read(int(self.headers["Content-Length"]))
        chunks = []
        while size := int(self.rfile.readline(), 16):
            chunks.append(self.rfile.read(size))
            self.rfile.readline()
        return b"".join(chunks)

    def _file(self, with_body: bool) -> None:
        content = self.files.get(self.path.rpartition("/")[2])
        if content is None:
            self.send_response(404)
            self.send_header("X-Error-Code", "EntryNotFound")
            self.send_header("Content-Length", "0")
            self.end_headers()
            return
        self.send_response(200)
        self.send_header("Content-Length", str(len(content)))
        self.send_header("X-Repo-Commit", "1" * 40)
        self.send_header("ETag", f'"{hashlib.sha256(content).hexdigest()}"')
        self.end_headers()
        if with_body:
            self.wfile.write(content)

    def _json(self, data: Any) -> None:
        content = json.dumps(data).encode()
        self.send_response(200)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        self.wfile.write(content)

    def log_message(self, *args: Any) -> None:
        pass


@contextlib.contextmanager
def service() -> Iterator[tuple[str, type[Service]]]:
    """Its address on this machine, and what it holds."""

    class Own(Service):
        files: dict[str, bytes] = {}  # noqa: RUF012
        requests: list[str] = []  # noqa: RUF012

    server = ThreadingHTTPServer(("127.0.0.1", 0), Own)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_port}", Own
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


def hubs(address: str, home: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    """huggingface_hub reads its endpoint once, when it is imported: so, a process of its own."""
    own = {
        "HF_ENDPOINT": address,
        "HF_HOME": str(home),
        "HF_TOKEN": "hf_none",
        "HF_HUB_DISABLE_XET": "1",
        "HF_HUB_DISABLE_TELEMETRY": "1",
        "NO_PROXY": "127.0.0.1",
        "OMP_NUM_THREADS": "1",
    }
    return subprocess.run(
        [sys.executable, "-m", "hubrl.hubs", *arguments],
        cwd=ROOT,
        env=os.environ | own,
        capture_output=True,
        text=True,
        timeout=120,
    )


def test_a_hub_comes_back_from_a_service(tmp_path: Path) -> None:
    folder = write_hub(tmp_path / "hub", [nature_spec("a"), nature_spec("b")])
    with service() as (address, held):
        pushed = hubs(address, tmp_path / "home", "push", str(folder), "me/hub")
        assert pushed.returncode == 0, pushed.stderr
        assert set(held.files) == {"hub.yaml", "a.safetensors", "b.safetensors"}
        assert held.files["a.safetensors"] == (folder / "a.safetensors").read_bytes()
        mine = tmp_path / "mine"
        pulled = hubs(address, tmp_path / "home", "pull", "me/hub", str(mine))
        assert pulled.returncode == 0, pulled.stderr
        assert load_hub(mine).encoders == load_hub(folder).encoders
        missing = hubs(address, tmp_path / "home", "pull", "me/nothing/", str(tmp_path / "no"))
        assert missing.returncode == 2
        assert "Traceback" not in missing.stderr
        assert not (tmp_path / "no").exists()
