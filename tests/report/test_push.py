"""`push`: files and model card of a student, to a stand-in for the Hugging Face Hub."""

from __future__ import annotations

import json
import shlex
import shutil

import huggingface_hub
import pytest
import torch
import yaml
from helpers.hub import Hub, repositories_of
from helpers.runs import done, refused

import compressvit
from compressvit.report.card import Cuts, origin_of

NAME = "me/small-digits"


@pytest.fixture
def repositories(monkeypatch, tmp_path):
    yield from repositories_of(monkeypatch, tmp_path)


def test_a_student_is_published_with_its_card_and_loads_by_its_name(finished, repositories):
    told = json.loads(done("push", finished, NAME, "--licence", "mit", "--private", "--json"))
    files = repositories[NAME]
    assert {name: len(content) for name, content in files.items()} == told["bytes"]
    assert set(files) == {"README.md", "compressvit.json", "model.safetensors"}
    assert (Hub.private, told["commit"]) == ({NAME: True}, Hub.commit)
    images = torch.randn(2, 1, 8, 8)
    ours, theirs = compressvit.load(finished / "student"), compressvit.load(f"hf-hub:{NAME}")
    assert torch.equal(ours(images), theirs(images))
    front, body = files["README.md"].decode().removeprefix("---\n").split("---\n\n", 1)
    about = yaml.safe_load(front)
    assert (about["license"], about["pipeline_tag"]) == ("mit", "image-classification")
    assert "multiplex" in about["tags"]
    results = json.loads((finished / "results.json").read_text())
    assert (
        f"| parameters (unique) | {results['teacher']['parameters']:,} | {results['student']['parameters']:,} |" in body
    )
    assert f'compressvit.load("hf-hub:{NAME}")' in body
    assert "compressvit evaluate RUN" in body
    assert "vit_tiny_patch16_224, trained in the run itself, whose licence is not recorded." in body
    assert str(finished.parent) not in body


def test_what_is_there_is_not_replaced_unasked(finished, repositories):
    repositories[NAME] = {"model.safetensors": b"mine"}
    words = ("push", finished, NAME, "--licence", "mit")
    assert f"{NAME} has model.safetensors already; give --overwrite" in refused(*words)
    assert repositories[NAME] == {"model.safetensors": b"mine"}
    assert f"/{NAME}: README.md (" in done(*words, "--overwrite")
    assert len(repositories[NAME]["model.safetensors"]) > 4


def test_nothing_is_published_without_a_licence_or_in_a_dry_run(finished, repositories, tmp_path):
    assert "no licence is recorded of the teacher (vit_tiny_patch16_224, trained in" in refused("push", finished, NAME)
    shutil.copytree(finished / "student", tmp_path / "artifact")
    assert "no licence is recorded of the run it comes from" in refused("push", tmp_path / "artifact", NAME)
    assert "is no name of the Hugging Face Hub, which is ORG/NAME" in refused("push", finished, "small-digits")
    assert done("push", finished, NAME, "--licence", "mit", "--dry-run").startswith("--- license: mit library_name:")
    assert "## Figures" not in done("push", tmp_path / "artifact", NAME, "--licence", "mit", "--dry-run")
    (tmp_path / "artifact" / "model.safetensors").write_bytes(b"cut")
    assert "model.safetensors" in refused("push", tmp_path / "artifact", NAME, "--licence", "mit")
    assert not repositories
    assert not Hub.asked


def test_who_may_not_publish_is_told_to_log_in(finished, repositories, monkeypatch):
    monkeypatch.setenv("HF_TOKEN", "hf_of_another")
    message = refused("push", finished, NAME, "--licence", "mit")
    assert f"{NAME} could not be published: " in message
    assert "Log in first: hf auth login" in message


def test_who_is_offline_is_told_what_was_to_be_published_and_how_to_repeat_it(finished, repositories, monkeypatch):
    monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", "http://127.0.0.1:9")  # nobody listens there
    before = {path: path.read_bytes() for path in (finished / "student").iterdir()}
    message = refused("push", finished, NAME, "--licence", "mit", "--private")
    assert f"{NAME}: the Hugging Face Hub cannot be reached (" in message
    assert "nothing was published of README.md (" in message
    assert "model.safetensors (" in message
    assert (
        f"{finished / 'student'} stays as it is, and the card is made of its run again (--dry-run shows it)" in message
    )
    assert message.endswith(f"compressvit push {finished} {NAME} --licence mit --private")
    assert {path: path.read_bytes() for path in (finished / "student").iterdir()} == before
    with pytest.raises(compressvit.UserError, match=r"\(dry_run=True shows it\).*: compressvit\.push\('"):
        compressvit.push(finished, NAME, licence="mit")


@pytest.mark.parametrize(
    ("error", "words"),
    [
        (ConnectionResetError("peer has gone"), "the Hugging Face Hub cannot be reached (peer has gone)"),
        (FileNotFoundError(2, "no such file", "model.safetensors"), "could not be published: [Errno 2] no such file"),
        (RuntimeError("no space left there"), "could not be published: no space left there. Nothing of it is lost"),
    ],
)
def test_what_is_no_fault_of_the_connection_is_not_called_one(error, words, finished, repositories, monkeypatch):
    def fail(*_, **__):
        raise error

    monkeypatch.setattr(huggingface_hub.HfApi, "create_commit", fail)
    assert words in refused("push", finished, NAME, "--licence", "mit")
    assert repositories[NAME] == {}


@pytest.mark.parametrize(
    ("model", "weights", "repository", "licence"),
    [
        ("vit_small_patch14_dinov2.lvd142m", "pretrained", "timm/vit_small_patch14_dinov2.lvd142m", "apache-2.0"),
        ("vit_small_patch14_dinov2", "hf-hub:me/dino@v1", "me/dino", None),
        ("vit_small_patch14_dinov2", "/home/me/dino.safetensors", None, None),
        ("vit_tiny_patch16_224", "train", None, None),
    ],
)
def test_where_a_teacher_comes_from(model, weights, repository, licence):
    found = origin_of({"teacher": {"model": model, "weights": weights}})
    assert (found.repository, found.licence) == (repository, licence)
    assert "/home" not in found.text


def test_the_licence_of_a_teacher_on_the_hub_is_that_of_its_card(finished, repositories, tmp_path, monkeypatch):
    run = tmp_path / "run"
    shutil.copytree(finished, run)
    resolved = run / "resolved.yaml"
    resolved.write_text(resolved.read_text().replace("weights: train", "weights: hf-hub:them/teacher"))
    info = huggingface_hub.ModelInfo(id="them/teacher", cardData={"license": "cc-by-4.0"}, tags=[])
    monkeypatch.setattr(huggingface_hub.HfApi, "model_info", lambda self, name: info)
    told = json.loads(done("push", run, NAME, "--dry-run", "--json"))
    assert told["licence"] == "cc-by-4.0"
    assert "base_model: them/teacher" in told["card"]

    def refuse(self, name):
        raise OSError("no route to host")

    monkeypatch.setattr(huggingface_hub.HfApi, "model_info", refuse)
    message = refused("push", run, NAME, "--dry-run")
    assert "weights of them/teacher" in message
    assert "; the Hub could not be asked: no route to host)" in message


@pytest.mark.parametrize(
    ("key", "value", "cut"),
    [
        ("root", "data/clients/acme/x", "…/x"),
        ("root", "/home/me/My Data/acme/p", "…/p"),
        ("weights", "~me/data/x.safetensors", "…/x.safetensors"),
        ("weights", "pretrained", "pretrained"),
        ("weights", "hf-hub:me/vit", "hf-hub:me/vit"),
        ("adapter", r"C:\Users\me\lora", "…/lora"),
        ("description", "photographs of /home/me/photos", "photographs of …/photos"),
        ("description", "class token / patches, 0.5/0.6", "class token / patches, 0.5/0.6"),
        ("description", "https://arxiv.org/abs/2106.09685", "https://arxiv.org/abs/2106.09685"),
        ("description", "file:///home/me/x", "…/x"),
    ],
)
def test_paths_are_cut(key, value, cut):
    cuts = Cuts({"teacher": {key: value}})
    assert cuts.values({"teacher": {key: value}}) == {"teacher": {key: cut}}
    if key != "description":
        assert cuts.text(f"{value}: 3 files") == f"{cut}: 3 files"  # in a note
        assert shlex.split(cuts.command(["compressvit", "apply", f"teacher.{key}={value}", value])) == [
            *("compressvit", "apply", f"teacher.{key}={cut}", cut)
        ]


@pytest.mark.parametrize(
    ("teacher", "text", "licence"),
    [
        ({"adapter": "/x/lora"}, "timm's pretrained weights, with the adapter …/lora", None),
        ({"finetune": {"epochs": 1}}, "timm's pretrained weights, trained further in the run", "apache-2.0"),
        ({"model": "adamixer", "weights": "train", "backbone": "pretrained"}, "on the backbone pretrained", None),
    ],
)
def test_what_is_added_to_a_teacher_is_part_of_where_it_comes_from(teacher, text, licence):
    usual = {"model": "vit_small_patch14_dinov2.lvd142m", "weights": "pretrained"}
    found = origin_of({"teacher": {**usual, **teacher}})
    assert text in found.text
    assert found.licence == licence


def test_nothing_private_goes_to_a_public_repository(finished, repositories):
    repositories[NAME] = {}
    message = refused("push", finished, NAME, "--licence", "mit", "--private")
    assert f"{NAME} is there already and public" in message
    assert repositories[NAME] == {}
