"""Manifests that somebody else wrote: each of these hung, reached for the network, took gigabytes or was a trace once."""

from __future__ import annotations

import json
import resource
import socket
import time

import pytest
import timm
import torch
from helpers.models import build

import compressvit
from compressvit import LowRank, Multiplex
from compressvit.artifacts import artifact
from compressvit.errors import UserError


def edited(path, change):
    """The artifact with a changed manifest, without the checksum that would notice."""
    file = path / "compressvit.json"
    content = json.loads(file.read_text())
    content.pop("checksum", None)
    change(content)
    file.write_text(json.dumps(content))
    return path


@pytest.fixture
def plain(tmp_path):
    return compressvit.save(build("vit"), tmp_path / "a")


HOSTILE = {
    "the hub": (lambda m: m.update(architecture="hf-hub:timm/resnet18.a1_in1k"), "has no architecture of that name"),
    "a folder": (lambda m: m.update(architecture="local-dir:/etc"), "has no architecture of that name"),
    "a path": (lambda m: m.update(architecture="../../etc/passwd"), "has no architecture of that name"),
    "a file": (lambda m: m["args"].update(checkpoint_path="/etc/passwd"), "would read another file"),
    "pretrained": (lambda m: m["args"].update(pretrained_cfg={"url": "http://x"}), "would read another file"),
    "depth": (lambda m: m["args"].update(depth=100_000), "far more parts than any model"),
    "depth beyond memory": (lambda m: m["args"].update(depth=10**12), "at most 1,048,576"),
    "width": (lambda m: m["args"].update(embed_dim=12_000), "of another shape"),
    "classes": (lambda m: m["args"].update(num_classes=10**6), "of another shape"),
    "heads": (lambda m: m["args"].update(num_heads=-2), "no size is negative"),
    "no heads": (lambda m: m["args"].update(num_heads=0), "cannot build"),
    "precision": (lambda m: m.update(dtype="float16"), "of another type"),
    "mean of text": (lambda m: m["input"].update(mean=["x"]), "input.*valid number"),
    "mean that is none": (lambda m: m["input"].update(mean=[float("nan")] * 3), "input.*finite"),
    "no mean": (lambda m: m["input"].update(mean=[]), "input.*at least 1 item"),
    "deviation": (lambda m: m["input"].update(std=[0, 1, 1]), "input.*greater than 0"),
    "interpolation": (lambda m: m["input"].update(interpolation="magic"), "input.*nearest"),
    "size": (lambda m: m["input"].update(input_size=[3, 0, 32]), "input.*greater than 0"),
    "crop": (lambda m: m["input"].update(crop_pct=-1), "input.*greater than 0"),
    "nested": (lambda m: m["args"].update(x=json.loads("[" * 90 + "]" * 90)), "nested more than 64 deep"),
}


@pytest.mark.parametrize("what", HOSTILE)
def test_a_hostile_manifest_is_a_sentence(what, plain, monkeypatch):
    change, message = HOSTILE[what]

    def no_network(*arguments, **named):
        raise AssertionError("it reached for the network")

    monkeypatch.setattr(socket.socket, "connect", no_network)
    edited(plain, change)
    before, began = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, time.monotonic()
    with pytest.raises(UserError, match=message) as error:
        compressvit.load(plain)
    assert str(plain) in str(error.value)
    assert time.monotonic() - began < 10
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 300_000  # kB


@pytest.mark.parametrize(
    ("transform", "change"),
    [
        (LowRank(rank=3, metric="weights"), lambda plan: plan["ranks"].update(dict.fromkeys(plan["ranks"], 10**7))),
        (LowRank(rank=3, metric="weights"), lambda plan: plan["ranks"].update(dict.fromkeys(plan["ranks"], -1))),
        (LowRank(rank=3, metric="weights"), lambda plan: plan["ranks"].update({"blocks.9.mlp.fc1": 3})),
        (Multiplex(share=2), lambda plan: plan["groups"].append(["blocks.77"])),
    ],
)
def test_a_hostile_plan_is_a_sentence(transform, change, tmp_path):
    path = compressvit.save(compressvit.compress(build("vit"), [transform]), tmp_path / "a")
    edited(path, lambda manifest: change(manifest["transforms"][0]["plan"]))
    with pytest.raises(UserError, match=r"compressvit\.json|model\.safetensors does not fit"):
        compressvit.load(path)


def test_a_header_that_lies(plain):
    file = plain / "model.safetensors"
    whole = file.read_bytes()
    for damaged in (whole[:-4], whole + b"\x00" * 4, b"\xff" * 8 + whole[8:], b"", whole[:8], whole[:20]):
        file.write_bytes(damaged)
        with pytest.raises(UserError, match="is not a complete safetensors file"):
            compressvit.load(plain)


@pytest.mark.wide_unless(lambda name: name == "convnext_atto")
@pytest.mark.parametrize(
    "name", ["resnet18", "vit_tiny_patch16_224", "convnext_atto", "efficientnet_b0", "mixer_s32_224"]
)
def test_models_of_every_kind_are_still_read(name, tmp_path):
    model = timm.create_model(name).half().eval()
    again = compressvit.load(compressvit.save(model, tmp_path / "a"))
    for key, tensor in model.state_dict().items():
        assert torch.equal(again.state_dict()[key], tensor), key


def test_what_somebody_put_beside_an_artifact_stays(plain):
    (plain / "README.md").write_text("mine")
    artifact.save(build("vit", seed=3), plain)
    assert (plain / "README.md").read_text() == "mine"
    assert sorted(p.name for p in plain.parent.iterdir()) == ["a"]
