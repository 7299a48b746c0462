"""Repositories of the Hugging Face Hub by name, against a local stand-in for its HTTP interface."""

from __future__ import annotations

import hashlib
import json
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import ClassVar

import huggingface_hub
import pytest
from helpers.models import build

import compressvit
from compressvit.errors import UserError
from compressvit.model import hub
from compressvit.model.hub import weights_path


class Hub(BaseHTTPRequestHandler):
    """Files of repositories by `ORG/NAME`, at the address that a client asks for them."""

    repositories: ClassVar[dict[str, dict[str, bytes]]] = {}
    asked: ClassVar[list[str]] = []
    commit = "0123456789abcdef0123456789abcdef01234567"

    def do_HEAD(self):
        self._answer(False)

    def do_GET(self):
        self._answer(True)

    def _answer(self, whole):
        if self.path.startswith("/api/models/"):
            return self._describe(*self.path.strip("/").split("/")[2:4])
        organisation, name, kind, revision, file = self.path.strip("/").split("/")
        files = self.repositories.get(f"{organisation}/{name}")
        self.asked.append(f"{self.command} {revision} {file}")
        content = None if files is None or kind != "resolve" else files.get(file)
        self.send_response(404 if content is None else 200)
        if content is None:
            self.send_header("X-Error-Code", "RepoNotFound" if files is None else "EntryNotFound")
            content = b""
        else:
            self.send_header("ETag", f'"{hashlib.sha256(content).hexdigest()}"')
        self.send_header("X-Repo-Commit", self.commit)
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        if whole:
            self.wfile.write(content)

    def _describe(self, organisation, name):
        files = self.repositories.get(f"{organisation}/{name}")
        self.asked.append("what is there")
        found = {
            "id": f"{organisation}/{name}",
            "sha": self.commit,
            "siblings": [{"rfilename": file} for file in files or ()],
        }
        content = json.dumps(found).encode()
        self.send_response(404 if files is None else 200)
        if files is None:
            self.send_header("X-Error-Code", "RepoNotFound")
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        self.wfile.write(content)

    def log_message(self, *_):
        pass


@pytest.fixture
def repositories(monkeypatch, tmp_path):
    """What the stand-in has; empty at first."""
    server = ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    address = f"http://127.0.0.1:{server.server_port}"
    for name, value in {
        "ENDPOINT": address,
        "HF_HUB_CACHE": str(tmp_path / "cache"),
        "HF_HUB_DISABLE_XET": True,
    }.items():
        monkeypatch.setattr(huggingface_hub.constants, name, value)
    template = address + "/{repo_id}/resolve/{revision}/{filename}"
    monkeypatch.setattr(huggingface_hub.constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
    monkeypatch.setattr(Hub, "repositories", {})
    monkeypatch.setattr(Hub, "asked", [])
    hub._downloaded.cache_clear()
    yield Hub.repositories
    hub._downloaded.cache_clear()
    server.shutdown()
    server.server_close()


def files_of(model, folder):
    path = compressvit.save(model, folder)
    return {file.name: file.read_bytes() for file in path.iterdir()}


def test_a_repository_is_a_folder_and_is_asked_once(repositories, tmp_path):
    repositories["me/vit"] = files_of(build("vit"), tmp_path / "artifact")
    path = weights_path("hf-hub:me/vit", "teacher.weights")
    assert compressvit.load(path).num_classes == build("vit").num_classes
    count = len(Hub.asked)
    hub._downloaded.cache_clear()  # another process
    assert weights_path("hf-hub:me/vit", "teacher.weights") == path
    assert len(Hub.asked) == count  # all is in the cache


def test_files_are_of_one_commit(repositories, tmp_path, monkeypatch):
    """Also where a part of an earlier one is in the cache."""
    repositories["me/vit"] = files_of(build("vit"), tmp_path / "artifact")
    huggingface_hub.hf_hub_download("me/vit", "compressvit.json")
    monkeypatch.setattr(Hub, "commit", "f" * 40)
    path = weights_path("hf-hub:me/vit", "teacher.weights")
    assert path.name == "f" * 40
    assert compressvit.load(path)


def test_the_cache_is_enough_without_a_connection(repositories, tmp_path, monkeypatch):
    """Also of a model without a file on its images."""
    files = files_of(build("vit"), tmp_path / "artifact")
    repositories["me/vit"] = {"config.json": b"{}", "model.safetensors": files["model.safetensors"]}
    path = weights_path("hf-hub:me/vit", "teacher.weights")
    hub._downloaded.cache_clear()
    monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", "http://127.0.0.1:9")
    assert weights_path("hf-hub:me/vit", "teacher.weights") == path


def test_a_revision_is_asked_for(repositories, tmp_path):
    repositories["me/vit"] = files_of(build("vit"), tmp_path / "artifact")
    weights_path("hf-hub:me/vit@v2", "teacher.weights")
    assert {line.split()[1] for line in Hub.asked if line != "what is there"} == {"v2"}


def test_a_folder_by_timms_word(tmp_path):
    assert weights_path(f"local-dir:{tmp_path}", "teacher.weights") == tmp_path


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("a--b/c", r"hf-hub:a--b/c is not in the local cache and could not be downloaded \(.*a--b/c"),
        ("me", r"hf-hub:me is no repository of the Hugging Face Hub; it is written hf-hub:ORG/NAME"),
        (
            "me/nothing",
            r"hf-hub:me/nothing is not in the local cache and could not be downloaded \(.*404",
        ),
        ("me/text", r"hf-hub:me/text has neither compressvit.json nor config.json"),
        ("me/parts", r"hf-hub:me/parts has no model.safetensors or pytorch_model.bin; models in several files"),
    ],
)
def test_what_cannot_be_had_is_refused(name, text, repositories):
    repositories["me/text"] = {"README.md": b"hello"}
    repositories["me/parts"] = {
        "config.json": json.dumps({"model_type": "vit"}).encode(),
        "model-00001-of-2.safetensors": b"",
    }
    with pytest.raises(UserError, match=f"teacher.weights: {text}"):
        weights_path(f"hf-hub:{name}", "teacher.weights")
