"""An exported file as a model that is evaluated: what a task makes of its outputs, and metadata that say something else."""

from __future__ import annotations

import json
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from helpers.models import build, images_for, randomise
from helpers.runs import refused
from torch import nn

from compressvit.artifacts.formats import onnx
from compressvit.artifacts.formats.base import FORMATS, Source
from compressvit.data.input import input_config
from compressvit.data.spec import Data
from compressvit.errors import UserError
from compressvit.model import stored
from compressvit.model.families.adamixer import SMALL
from compressvit.model.weights import build as build_detector
from compressvit.runs.evaluate import _as_asked
from compressvit.tasks.base import task_of


class Session:
    """A model in the place of onnxruntime's session."""

    def __init__(self, source: Source):
        self.source, self.custom_metadata_map = source, dict(source.metadata)

    def get_modelmeta(self):
        return self

    def get_inputs(self):
        return [SimpleNamespace(name="images", type="tensor(float)", shape=["batch", *self.source.input.size])]

    def get_outputs(self):
        count = getattr(self.source.model, "num_classes", 0)
        return [
            SimpleNamespace(name=name, type="tensor(float)", shape=["batch", count])
            for name in self.source.reference[1]
        ]

    def run(self, names, given):
        found = self.source.reference[0](torch.from_numpy(given["images"]))
        found = [found] if isinstance(found, torch.Tensor) else found
        assert len(names) == len(found)
        return [part.numpy() for part in found]


def detector() -> nn.Module:
    torch.manual_seed(0)
    args = {"patch_size": 8, "embed_dim": 24, "depth": 1, "num_heads": 2}
    model = build_detector("adamixer", **{**SMALL, "stages": 1, "backbone_args": args})
    randomise(model, 0.1)
    return model.eval()


def source_of(model: nn.Module) -> Source:
    return Source(model, task_of(model), input_config(model, Data(name="images")))


@pytest.fixture
def opened(monkeypatch, tmp_path):
    """Opens a model as if it came from a file, with other metadata where they are given."""
    (tmp_path / "student.onnx").touch()
    monkeypatch.setattr(type(FORMATS["onnx"]), "packages", ())

    def opened(model: nn.Module, **said: str):
        session = Session(source_of(model))
        session.custom_metadata_map |= said
        monkeypatch.setattr(onnx, "session_of", lambda file: session)
        return FORMATS["onnx"].read(tmp_path / "student.onnx").side

    return opened


@torch.no_grad()
@pytest.mark.parametrize("classes", [7, 0])
def test_a_classifier_and_features(opened, classes):
    model = build("vit")
    model.reset_classifier(classes)
    if classes:
        stored.name_classes(model, [f"class {i}" for i in range(classes)])
    side, images = opened(model), images_for(model)
    task = task_of(side.model)
    assert task is task_of(model)
    assert side.input == source_of(model).input
    assert stored.class_names(side.model) == stored.class_names(model)
    found, expected = task.run(side.model, images), task.run(model, images)
    assert torch.equal(found if classes else found.pooled, expected if classes else expected.pooled)


@pytest.mark.parametrize(
    ("name", "inputs", "message"),
    [
        ("x", "tensor(float)", "it takes x, where images alone are meant"),
        ("images", "tensor(float16)", "its images are not float32"),
    ],
)
def test_a_graph_that_takes_something_else_is_refused(opened, monkeypatch, name, inputs, message):
    monkeypatch.setattr(
        Session, "get_inputs", lambda self: [SimpleNamespace(name=name, type=inputs, shape=[1, 3, 32, 32])]
    )
    with pytest.raises(UserError, match=message):
        opened(build("vit"))


def test_overrides_change_what_a_file_takes(opened):
    side = opened(build("vit"))
    data = Data(name="images", mean=(0.25,), std=(0.1, 0.2, 0.3), interpolation="box", crop_pct=0.5)
    changed = _as_asked(side, data, ["data.name=images", "data.mean=[0.25]", "data.crop_pct=0.5"])
    assert changed.input == replace(side.input, mean=(0.25,) * 3, crop_pct=0.5)
    assert _as_asked(side, data, []).input == side.input


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("--device", "cuda"), "--device cuda: a file of ONNX is evaluated on the CPU"),
        (("--require", "macs<=1e9"), "--require macs<=1e9: macs are not counted in a file of ONNX"),
    ],
)
def test_what_cannot_be_had_of_a_file_is_refused_first(tmp_path, words, message):
    (tmp_path / "student.onnx").touch()
    assert message in refused("evaluate", tmp_path / "student.onnx", *words)


@torch.no_grad()
def test_a_detector(opened):
    model = detector()
    side, images = opened(model), torch.randn(2, 3, *model.img_size)
    assert task_of(side.model).name == "detection"
    for ours, theirs in zip(task_of(model).run(side.model, images), task_of(model).run(model, images), strict=True):
        assert all(torch.equal(a, b) for a, b in zip(ours[:3], theirs[:3], strict=True))
        assert len(ours.scores) == 30  # queries × classes, without the zeros behind them


@pytest.mark.parametrize(
    ("said", "message"),
    [
        ({"task": "divination"}, "there is no task 'divination'"),
        ({"crop_pct": "0"}, "crop_pct: "),
        ({"interpolation": "magic"}, "interpolation: "),
        ({"input_size": "[3, 0, 8]"}, "input_size"),
        ({"mean": "[0.5]"}, "mean and std of 1 and 3 channels, of 3"),
        ({"num_classes": "many"}, "num_classes: "),
        ({"mean": "[" * 10_000}, "mean: "),
        ({"label_names": json.dumps({"a": 1})}, "label_names: "),
        ({"outputs": '["scores"]'}, "it has no output scores; there are logits; export it again"),
        ({"outputs": "[]"}, "of the task classification there is one output, not none"),
        ({"outputs": '["logits"]', "task": "detection"}, "the outputs of a detector are boxes, scores, labels and"),
        ({"input_size": "[3, 8, 8]"}, "its images are 3×.*, and input_size is 3×8×8"),
        ({"num_classes": "3"}, "it gives 5 logits, and num_classes is 3"),
    ],
)
def test_metadata_that_say_something_else_are_refused(opened, said, message):
    with pytest.raises(UserError, match=message.replace("[", r"\[")):
        opened(build("vit"), **said)
