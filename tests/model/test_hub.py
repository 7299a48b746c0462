"""Repositories of the Hugging Face Hub by name, against a local stand-in for its HTTP interface."""

from __future__ import annotations

import json

import huggingface_hub
import pytest
from helpers.hub import Hub, repositories_of
from helpers.models import build

import compressvit
from compressvit.errors import UserError
from compressvit.model import hub
from compressvit.model.hub import weights_path


@pytest.fixture
def repositories(monkeypatch, tmp_path):
    yield from repositories_of(monkeypatch, tmp_path)


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


def test_a_model_in_several_files_is_downloaded_whole(repositories, tmp_path):
    parts = {"a": "model-00001-of-2.safetensors", "b": "model-00002-of-2.safetensors"}
    files = {"config.json": b"{}", "model.safetensors.index.json": json.dumps({"weight_map": parts}).encode()}
    repositories["me/vit"] = {**files, **dict.fromkeys(parts.values(), b"x")}
    path = weights_path("hf-hub:me/vit", "teacher.weights")
    assert {file.name for file in path.iterdir()} == set(repositories["me/vit"])
    hub._downloaded.cache_clear()
    (path / parts["b"]).unlink()  # as if the download had been stopped
    assert parts["b"] in {file.name for file in weights_path("hf-hub:me/vit", "teacher.weights").iterdir()}


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
        ("me/parts", r"hf-hub:me/parts has no model.safetensors or pytorch_model.bin"),
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
