"""Weights from files and hubs: every layout is read, code in a file never runs, and every bad input is told so."""

from __future__ import annotations

import argparse
import os
import pickle
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from helpers.models import ADAPTED, BACKBONES, VIT, build, images_for, outputs
from safetensors.torch import save_file
from timm.layers import resample_abs_pos_embed

from compressvit.artifacts import artifact
from compressvit.errors import UserError
from compressvit.files import load_checkpoint
from compressvit.model import weights

WHERE = "teacher.weights"


# ----------------------------------------------------------------------------------------------------- weights in files

FILES: dict[str, Callable[[dict[str, torch.Tensor]], Any]] = {
    "plain": lambda state: state,
    "model": lambda state: {"model": state, "optimizer": {"lr": 0.1}, "epoch": 3},
    "state_dict": lambda state: {"state_dict": state},
    "teacher": lambda state: {"teacher": state},
    "nested": lambda state: {"state_dict": {"model": state}},
    "average first": lambda state: {"model": {n: t + 1 for n, t in state.items()}, "model_ema": state},
    "data parallel": lambda state: {"model": {f"module.{n}": t for n, t in state.items()}},
}


@pytest.mark.wide_unless(lambda name: name == "vit")
@pytest.mark.parametrize("kind", [*FILES, "safetensors", "artifact", "legacy"])
@pytest.mark.parametrize("name", ["vit", "swin"])
def test_weights_from_a_file(name, kind, tmp_path):
    source, model = build(name), build(name, seed=5)
    path = tmp_path / ("weights.safetensors" if kind == "safetensors" else "weights.pth")
    if kind == "safetensors":
        artifact.save_file(source.state_dict(), path)
    elif kind == "artifact":
        artifact.save(source, path)
    else:
        content = FILES.get(kind, FILES["plain"])(source.state_dict())
        torch.save(content, path, _use_new_zipfile_serialization=kind != "legacy")
    assert not torch.equal(outputs(model), outputs(source))
    weights.load_file(model, path, WHERE)
    assert torch.equal(outputs(model), outputs(source))


def own_names(state: dict[str, torch.Tensor], prefix: str) -> dict[str, torch.Tensor]:
    return {f"{prefix}{name}": tensor for name, tensor in state.items()}


# As other programs save them: the content, and what the log reports.
FOREIGN: dict[str, tuple[Callable[[dict[str, torch.Tensor]], Any], list[str]]] = {
    "MAE and DeiT": (lambda s: {"model": s, "args": argparse.Namespace(lr=0.1, layers=[1]), "epoch": 3}, []),
    "timm's train.py": (
        lambda s: {
            "epoch": 1,
            "arch": "vit",
            "state_dict": own_names(s, "module."),
            "args": argparse.Namespace(lr=0.1),
            "optimizer": {"state": {0: {"exp_avg": torch.zeros(2)}}, "param_groups": []},
        },
        ["the prefix 'module.' was taken off 56 tensors"],
    ),
    "an average of weights": (
        lambda s: {"state_dict": {n: t + 1 for n, t in s.items()}, "model_ema": s, "epoch": 3},
        ["the weights are those under 'model_ema', not those under 'state_dict'"],
    ),
    "timm's average": (
        lambda s: {"state_dict": {n: t + 1 for n, t in s.items()}, "state_dict_ema": s, "model": {"x": torch.zeros(1)}},
        ["the weights are those under 'state_dict_ema', not those under 'state_dict' or 'model'"],
    ),
    "net": (lambda s: {"net": s, "acc": 90.0}, ["the weights are those under 'net'"]),
    "model_state_dict": (
        lambda s: {"model_state_dict": own_names(s, "backbone."), "epoch": 3},
        ["the weights are those under 'model_state_dict'", "the prefix 'backbone.' was taken off 56 tensors"],
    ),
    "two prefixes": (lambda s: own_names(s, "module.model."), ["the prefix 'module.model.' was taken off 56 tensors"]),
    "DINO": (
        lambda s: {
            "student": own_names(s, "module.backbone."),
            "teacher": {**own_names(s, "backbone."), "projection.mlp.0.weight": torch.zeros(3, 3)},
            "args": argparse.Namespace(),
        },
        [
            "the weights are those under 'teacher', not those under 'student'",
            "the prefix 'backbone.' was taken off 56 tensors, and 1 without it were left out (projection.mlp.0.weight)",
        ],
    ),
}


@pytest.mark.parametrize("kind", FOREIGN)
def test_weights_as_other_programs_save_them(kind, tmp_path, caplog):
    caplog.set_level("INFO", logger="compressvit")
    source, model = build("vit"), build("vit", seed=5)
    content, notes = FOREIGN[kind]
    torch.save(content(source.state_dict()), tmp_path / "w.pth")
    found = weights.load_file(model, tmp_path / "w.pth", WHERE)
    assert torch.equal(outputs(model), outputs(source))
    assert [note.text for note in found] == [f"{WHERE}: {tmp_path / 'w.pth'}: {note}" for note in notes]
    assert [record.message for record in caplog.records] == [note.text for note in found]


def test_a_prefix_in_a_safetensors_file(tmp_path):
    source, model = build("vit"), build("vit", seed=5)
    artifact.save_file(own_names(source.state_dict(), "module."), tmp_path / "w.safetensors")
    weights.load_file(model, tmp_path / "w.safetensors", WHERE)
    assert torch.equal(outputs(model), outputs(source))


def test_what_cannot_be_decided_is_refused_and_shown(tmp_path):
    model = build("vit")
    state = model.state_dict()
    for content, message in (
        ({"a": state, "b": state}, r"holds more than one state dict \(a, b\)"),
        (own_names(state, "a.") | own_names(state, "b."), r"The file's first tensors are a\.cls_token, a\.pos_embed"),
        (
            own_names(state, "module.base_encoder.") | own_names(state, "module.momentum_encoder."),
            r"they fit after 'module\.base_encoder\.' and after 'module\.momentum_encoder\.': save those that are meant",
        ),
        ({"hyper": {"lr": 1}, "epoch": 3}, r"holds a dict, not a state dict of tensors; its keys are hyper, epoch"),
    ):
        torch.save(content, tmp_path / "w.pth")
        with pytest.raises(UserError, match=message):
            weights.load_file(model, tmp_path / "w.pth", WHERE)


class Local:
    """A class that a weights file has no business to hold."""


@pytest.mark.parametrize("name", ["w.pth", "checkpoint"])
def test_a_refusal_names_the_class_and_never_advises_to_run_it(name, tmp_path):
    torch.save({"model": build("vit").state_dict(), "x": Local()}, tmp_path / name)
    read = load_checkpoint if name == "checkpoint" else lambda path: weights.load_file(build("vit"), path, WHERE)
    with pytest.raises(UserError, match=r"Local") as error:
        read(tmp_path / name)
    for advice in ("weights_only", "trusted source", "add_safe_globals", "arbitrary code"):
        assert advice not in str(error.value)


class Bomb:
    """A pickle that would write a file when it is read."""

    def __init__(self, target: Path):
        self.target = target

    def __reduce__(self):
        return os.mkdir, (str(self.target),)


@pytest.mark.parametrize("legacy", [False, True], ids=["zip", "legacy"])
def test_code_in_a_file_is_refused_and_does_not_run(legacy, tmp_path):
    file, ran = tmp_path / "evil.pth", tmp_path / "ran"
    model = build("vit")
    content = {"model": model.state_dict(), "bomb": Bomb(ran)}
    torch.save(content, file, _use_new_zipfile_serialization=not legacy)
    with pytest.raises(
        UserError, match=r"evil\.pth is not a file of plain tensors \(it holds code.*convert it to safetensors"
    ):
        weights.load_file(model, file, WHERE)
    disguised = tmp_path / "evil.safetensors"
    disguised.write_bytes(file.read_bytes())
    with pytest.raises(UserError, match="is not a complete safetensors file"):
        weights.load_file(model, disguised, WHERE)
    assert not ran.exists()
    torch.load(file, weights_only=False)
    assert ran.exists(), "the bomb must be live, or this tests nothing"


@pytest.mark.filterwarnings("ignore:Detected pickle protocol")
def test_a_pickle_that_torch_does_not_read_is_named_without_torchs_advice(tmp_path):
    (tmp_path / "w.pth").write_bytes(pickle.dumps({"a": bytearray(3), "b": {1, 2}}, protocol=5))
    with pytest.raises(UserError, match=r"w\.pth is not a file of plain tensors \(it holds") as error:
        weights.load_file(build("vit"), tmp_path / "w.pth", WHERE)
    for advice in ("weights_only", "arbitrary code", "trust the source"):
        assert advice not in str(error.value)


@pytest.mark.wide_unless(lambda legacy: not legacy)
@pytest.mark.parametrize("legacy", [False, True], ids=["zip", "legacy"])
def test_a_damaged_file_is_never_a_stack_trace(legacy, tmp_path):
    model, path, chance = build("vit"), tmp_path / "weights.pth", random.Random(0)
    torch.save(model.state_dict(), path, _use_new_zipfile_serialization=not legacy)
    whole = path.read_bytes()
    refused = 0
    for attempt in range(60):
        damaged = bytearray(whole[: chance.randrange(len(whole))] if attempt % 2 else whole)
        for _ in range(attempt % 4 * 5):
            if damaged:
                damaged[chance.randrange(min(len(damaged), 3000))] = chance.randrange(256)
        path.write_bytes(damaged)
        try:
            weights.load_file(model, path, WHERE)
        except UserError as error:
            refused += 1
            assert str(path) in str(error)  # noqa: PT017
    assert refused >= 30, "every truncated file at least"


NOT_WEIGHTS = {
    "a number": (5, "holds a int, not a state dict of tensors"),
    "a list": ([torch.zeros(1)], "holds a list, not a state dict of tensors"),
    "mixed": ({"head.weight": torch.zeros(1), "epoch": 3}, "holds a dict, not a state dict of tensors"),
    "another model": (
        {"conv1.weight": torch.zeros(1)},
        r"does not fit vit_tiny_patch16_224: \d+ tensors missing.*1 unknown, first conv1",
    ),
    "nothing": ({}, "tensors missing, first"),
    "a backbone": (
        {name: value for name, value in build("vit").state_dict().items() if not name.startswith("head.")},
        r"weights\.pth has no classifier, and the model one of 5 classes; set num_classes=0 beside it",
    ),
}


@pytest.mark.parametrize("what", NOT_WEIGHTS)
def test_a_file_of_something_else(what, tmp_path):
    content, message = NOT_WEIGHTS[what]
    torch.save(content, tmp_path / "weights.pth")
    model = build("vit")
    before = outputs(model)
    with pytest.raises(UserError, match=message):
        weights.load_file(model, tmp_path / "weights.pth", WHERE)
    assert torch.equal(outputs(model), before)


def test_no_file_at_all(tmp_path):
    for path in (tmp_path / "nothing.pth", tmp_path):
        with pytest.raises(
            UserError, match=r"teacher\.weights: there is no file .*Supply weights as a file: teacher\.weights=PATH"
        ):
            weights.load_file(build("vit"), path, WHERE)


def test_positions_of_another_grid_are_told(tmp_path):
    other = timm.create_model("test_vit", img_size=48, num_classes=0)
    swin = build("swin")
    for model, states, note in (
        (
            timm.create_model("test_vit", img_size=32, num_classes=0),
            other.state_dict(),
            "img_size=48 in its arguments (`--img-size` of shrink) keeps",
        ),
        (other, other.state_dict(), None),
        (build("swin", seed=5), swin.state_dict(), None),
    ):
        artifact.save_file(states, tmp_path / "w.safetensors")
        found = {n.what: n.text for n in weights.load_file(model, tmp_path / "w.safetensors", WHERE)}
        assert (note or "") in found.pop("positions", "")
        assert not found
        assert (note is None) == (
            model.state_dict().keys() == states.keys() and same_shapes(model.state_dict(), states)
        )


def same_shapes(a, b):
    return all(a[name].shape == b[name].shape for name in a)


def test_positions_are_resampled_as_timm_does():
    small, large = build("vit"), timm.create_model("vit_tiny_patch16_224", **{**VIT, "img_size": 64}).eval()
    tensors = weights.resample_positions(small.state_dict(), large)
    expected = resample_abs_pos_embed(small.pos_embed, new_size=(8, 8), old_size=(4, 4), num_prefix_tokens=1)
    assert torch.equal(tensors["pos_embed"], expected)
    assert torch.equal(tensors["pos_embed"][:, :1], small.pos_embed[:, :1]), "the class token's row is not on the grid"


@pytest.mark.parametrize(("name", "args"), [("vit", {"img_size": 64}), ("swin", {"img_size": 64, "window_size": 8})])
def test_weights_of_another_resolution(name, args, tmp_path):
    small = build(name)
    architecture, built_with = BACKBONES[name]
    large = timm.create_model(architecture, **{**built_with, **args}).eval()
    torch.save(small.state_dict(), tmp_path / "weights.pth")
    weights.load_file(large, tmp_path / "weights.pth", WHERE)
    resized = small
    resized.set_input_size(img_size=(64, 64))
    images = images_for(large)
    with torch.no_grad():
        assert (large(images) - resized(images)).abs().max() < 1e-6  # seen 0.0


@pytest.mark.parametrize("name", ["vit", "deit_distilled", "swin"])
def test_another_number_of_classes(name, tmp_path, caplog):
    source = build(name)
    torch.save(source.state_dict(), tmp_path / "weights.pth")
    architecture, args = BACKBONES[name]
    model = timm.create_model(architecture, **{**args, "num_classes": 9}).eval()
    before = {n: t.clone() for n, t in model.state_dict().items()}
    with pytest.raises(
        UserError, match=r"classifier of 5 classes and the model one of 9; set num_classes=5.*teacher\.finetune"
    ):
        weights.load_file(model, tmp_path / "weights.pth", WHERE)
    assert all(torch.equal(t, before[n]) for n, t in model.state_dict().items())
    with caplog.at_level("INFO", logger="compressvit"):
        (note,) = weights.load_file(model, tmp_path / "weights.pth", WHERE, new_head=True)
    assert "another number of classes; the classifier is initialised anew" in caplog.text
    assert note.what == "classifier"
    fresh = 0
    for n, tensor in model.state_dict().items():
        is_head = n.startswith("head")
        assert torch.equal(tensor, before[n] if is_head else source.state_dict()[n]), n
        fresh += is_head
    assert fresh == {"vit": 2, "deit_distilled": 4, "swin": 2}[name]


def test_a_model_without_a_classifier_leaves_the_files_aside(tmp_path):
    for name in ("vit", "swin"):
        source, (architecture, args) = build(name), BACKBONES[name]
        torch.save(source.state_dict(), tmp_path / "weights.pth")
        model = timm.create_model(architecture, **{**args, "num_classes": 0})
        (note,) = weights.load_file(model, tmp_path / "weights.pth", WHERE)
        assert all(torch.equal(t, source.state_dict()[n]) for n, t in model.state_dict().items())
        assert (note.what, note.count) == ("classifier", 2)
        assert "the file's classifier was left out (head." in note.text


@pytest.mark.parametrize("name", ["vit", "swin", "convnext"])
def test_the_classes_of_a_file_are_known_also_of_a_model_that_timm_builds_headless(name, tmp_path):
    """DINOv2 has no classifier in timm, and those who fine-tuned it have."""
    model, args = {**BACKBONES, **ADAPTED}[name]
    file = tmp_path / "fine_tuned.safetensors"
    for classes in (7, 0):
        save_file(weights.build(model, {**args, "num_classes": classes}).state_dict(), file)
        for own in (0, 5):
            empty = weights.build(model, {**args, "num_classes": own}, device="meta")
            assert weights.classes_in_file(empty, file, "the file") == classes


def test_a_matrix_of_another_width_is_no_classifier(tmp_path):
    """As the projection head of a self-supervised training."""
    model = weights.build("vit_tiny_patch16_224", {**VIT, "num_classes": 0})
    save_file({**model.state_dict(), "head.weight": torch.zeros(7, 8)}, tmp_path / "projected.safetensors")
    assert weights.classes_in_file(model, tmp_path / "projected.safetensors", "the file") == 0


def test_a_classifier_has_the_name_that_timm_gives_it(tmp_path):
    args = {"layers": (1, 1, 1, 1), "channels": (8, 8, 8, 8)}
    source = timm.create_model("resnet18", **args)
    torch.save(source.state_dict(), tmp_path / "weights.pth")
    (note,) = weights.load_file(timm.create_model("resnet18", num_classes=0, **args), tmp_path / "weights.pth", WHERE)
    assert "the file's classifier was left out (fc.weight, fc.bias)" in note.text
