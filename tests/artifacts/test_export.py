"""Exported graphs against the models themselves: `torch.export`, and ONNX as onnxruntime computes it. Batches are others than exported."""

from __future__ import annotations

import functools

import pytest
import torch
from helpers.models import randomise
from torch import nn
from torchvision.ops import nms

from compressvit.artifacts import export
from compressvit.errors import UserError
from compressvit.model.detectors import selection
from compressvit.model.families.adamixer import SMALL
from compressvit.model.weights import build
from compressvit.tasks.base import task_of
from compressvit.transforms import LORS, AdaptiveLORS, LowRank
from compressvit.transforms.applying import compress
from compressvit.transforms.low_rank.pivoted_layer import pivot

VIT = {"patch_size": 8, "embed_dim": 24, "depth": 1, "num_heads": 2}
SWIN = {"embed_dim": 24, "depths": (1, 1, 1, 1), "num_heads": (2, 2, 2, 2), "window_size": 2}


def adamixer() -> nn.Module:
    torch.manual_seed(0)
    model = build("adamixer", **{**SMALL, "stages": 2, "backbone_args": VIT})
    randomise(model, 0.1)
    return model.eval()


def adamixer_lors() -> nn.Module:
    steps = [
        AdaptiveLORS(rank=2, terms=1, init="scratch"),
        LORS(of="decoder", targets=("mixing.projection",), share=2, rank=2, init="scratch"),
    ]
    return compress(adamixer(), steps)


def faster_rcnn(background: float = 0.0, architecture: str = "faster_rcnn", **more: int) -> nn.Module:
    """One that finds objects without training: boxes and classes that differ from place to place, the fewer the higher the logit of
    background."""
    torch.manual_seed(0)
    model = build(
        architecture,
        backbone="swin_tiny_patch4_window7_224",
        backbone_args=SWIN,
        img_size=64,
        num_classes=3,
        channels=16,
        representation=32,
        **more,
    )
    head = model.heads.box_predictor
    with torch.no_grad():
        nn.init.normal_(model.rpn.head.bbox_pred.weight, std=0.1)
        nn.init.normal_(head.cls_score.weight, std=1.0)
        nn.init.normal_(head.bbox_pred.weight, std=1.0)
        head.cls_score.bias[0] += background
    return model.eval()


def mask_rcnn() -> nn.Module:
    model = faster_rcnn(architecture="mask_rcnn", outline=8)
    nn.init.normal_(model.heads.mask_predictor.mask_fcn_logits.weight, std=1.0)
    return model


MODELS = {f.__name__: f for f in (adamixer, adamixer_lors, faster_rcnn, mask_rcnn)}
MOST = {"adamixer": 6 * 5, "adamixer_lors": 6 * 5}  # detections of an image: queries × classes


LIMIT = 100  # detections of an image that a graph gives


def images_of(model: nn.Module, count: int) -> torch.Tensor:
    return torch.randn(count, 3, *model.img_size)


def compare(model: nn.Module, images: torch.Tensor, found: list[torch.Tensor], tolerance: float) -> list[int]:
    """Hold a graph's outputs against the model's detections, whose scores may be so close that their order differs; returns how many
    each image has."""
    counts = []
    for i, expected in enumerate(task_of(model).run(model, images)):
        n = len(expected.scores)
        boxes, scores, labels, *masks = (values[i, :n] for values in found)
        same = (boxes[:, None] - expected.boxes).abs().amax(-1) <= tolerance
        same &= (scores[:, None] - expected.scores).abs() <= tolerance
        same &= labels[:, None] == expected.labels
        assert bool(masks) == (expected.masks is not None)
        if masks:
            same &= (masks[0][:, None] - expected.masks).abs().flatten(2).amax(-1) <= tolerance
        assert same.any(0).all()
        assert same.any(1).all()
        assert (scores.diff() <= 0).all()
        assert all((values[i, n:] == 0).all() for values in found)
        counts.append(n)
    return counts


# ------------------------------------------------------------------------------------- Faster R-CNN in tensors of one size


@torch.no_grad()
@pytest.mark.parametrize(("background", "counts"), [(0.0, [100] * 3), (4.5, [28, 29, 22]), (9.0, [0] * 3)])
def test_detections_of_one_size_are_those_of_torchvision(background, counts):
    """With as many detections as there can be, with fewer, and with none."""
    model = faster_rcnn(background)
    images = images_of(model, 3)
    found = [part for part in model.answer(images) if part is not None]
    assert compare(model, images, found, 1e-6) == counts  # measured 0.0


@torch.no_grad()
@pytest.mark.parametrize("name", MODELS)
def test_graphs_give_as_many_detections_of_every_model(name):
    model = MODELS[name]()
    module, names = task_of(model).graph(model)
    images = images_of(model, 2)
    found = module(images)
    assert {part: values.shape[:2] for part, values in zip(names, found, strict=True)} == dict.fromkeys(
        names, (2, LIMIT)
    )
    assert max(compare(model, images, list(found), 1e-6)) == MOST.get(name, LIMIT)  # measured 0.0


def crowded(groups: torch.Tensor, side: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Boxes (N, 4) of which those of a group overlap, and their scores (N,)."""
    corner = (torch.rand(int(groups.max()) + 1, 2) * (side - 200))[groups] + torch.randn(len(groups), 2) * 12
    sides = 20 + 100 * torch.rand(len(groups), 2)
    return torch.cat([corner, corner + sides], dim=-1).clamp(0, side), torch.rand(len(groups))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
def test_groups_are_suppressed_as_each_alone(dtype):
    """The last of 1,203 classes at 1333²: in a row of classes as far as 1.6 million pixels, float32 would have steps of 1/8 pixel."""
    torch.manual_seed(0)
    groups = 1203 - 1 - torch.arange(1200) % 40
    boxes, scores = (values.to(dtype) for values in crowded(groups, 1333))
    kept = torch.zeros(len(groups), dtype=torch.bool)
    for group in groups.unique():
        index = torch.where(groups == group)[0]
        kept[index[nms(boxes[index].float(), scores[index].float(), 0.5)]] = True
    found = selection._suppressed(boxes[None], scores[None], 0.5, (1333, 1333), groups, 1203)
    assert found.dtype == dtype
    assert torch.equal(found[0], scores.masked_fill(~kept, selection.NONE))


# ----------------------------------------------------------------------------------------------------------- as other programs do


def computed(file, images: torch.Tensor) -> dict[str, torch.Tensor]:
    """What onnxruntime makes of images."""
    runtime = pytest.importorskip("onnxruntime")
    options = runtime.SessionOptions()
    options.log_severity_level = 3
    session = runtime.InferenceSession(file, options)
    names = [output.name for output in session.get_outputs()]
    values = session.run(names, {"images": images.numpy()})
    return {name: torch.from_numpy(value) for name, value in zip(names, values, strict=True)}


OF_EACH = pytest.mark.parametrize(  # a faster one, of torch.export alone: tests/model/test_adamixer.py
    "name", [pytest.param(name, marks=pytest.mark.slow if name == "mask_rcnn" else pytest.mark.wide) for name in MODELS]
)


@functools.cache
def graph_of(name: str) -> tuple[nn.Module, export.Graph]:
    """A model, and its graph, made in training mode."""
    model = MODELS[name]().train()
    graph = export.exported(model, images_of(model, 1))
    assert model.training
    return model.eval(), graph


@torch.no_grad()
@OF_EACH
def test_graphs_compute_the_same(name):
    model, graph = graph_of(name)
    computing = graph.program.module()
    for count in (1, 3):
        images = images_of(model, count)
        found = list(computing(images))
        assert {values.shape[:2] for values in found} == {(count, LIMIT)}
        counts = compare(model, images, found, 1e-5)  # measured 0.0
        assert max(counts) == MOST.get(name, LIMIT)


@torch.no_grad()
@OF_EACH
def test_graphs_compute_the_same_in_onnx(name, tmp_path):
    pytest.importorskip("onnxscript")
    model, graph = graph_of(name)
    export.write_onnx(graph, tmp_path / "model.onnx")
    assert [path.name for path in tmp_path.iterdir()] == ["model.onnx"]
    for count in (1, 3):
        images = images_of(model, count)
        found = computed(tmp_path / "model.onnx", images)
        assert list(found) == ["boxes", "scores", "labels"] + ["masks"] * (name == "mask_rcnn")
        compare(model, images, list(found.values()), 1e-4)  # measured 1.4e-5 of masks, 2.6e-6 of the others


@pytest.mark.wide
@torch.no_grad()
def test_a_graph_of_nothing_found():
    """Of torchvision's `nms` alone a graph fails where it keeps fewer than two boxes."""
    model = faster_rcnn(background=9.0)
    computing = export.exported(model, images_of(model, 1)).program.module()
    images = images_of(model, 2)
    assert compare(model, images, list(computing(images)), 0.0) == [0, 0]


@pytest.mark.wide
@torch.no_grad()
def test_a_classifier_in_onnx_gives_logits(tmp_path):
    pytest.importorskip("onnxscript")
    torch.manual_seed(0)
    classifier = build("vit_tiny_patch16_224", img_size=32, num_classes=5, **VIT).eval()
    model = compress(classifier, [LowRank(budget={"parameters": 0.6}, metric="weights")])
    export.write_onnx(export.exported(model, torch.randn(1, 3, 32, 32)), tmp_path / "model.onnx")
    images = torch.randn(3, 3, 32, 32)
    found = computed(tmp_path / "model.onnx", images)
    assert torch.allclose(found["logits"], model(images), atol=1e-5)  # measured 4.5e-8


@pytest.mark.wide
def test_channels_are_taken_as_rows_in_onnx(tmp_path):
    onnx, runtime = (pytest.importorskip(name) for name in ("onnx", "onnxruntime"))
    pytest.importorskip("onnxscript")
    torch.manual_seed(0)
    layers = nn.Sequential(nn.Linear(12, 20), nn.Linear(20, 12))
    pivot(layers, "0", 4), pivot(layers, "1", 4)
    for layer, (inputs, outputs) in zip(layers, ((12, 20), (20, 12)), strict=True):
        layer.set_factors(torch.randn(outputs, 4), torch.randn(4, inputs))
    orders = [layers[0].split.order[4:], layers[1].join.order]

    class Both(nn.Module):
        """Pivoted layers after a linear one of pixels, along the last axis, and channels that are taken along another."""

        def __init__(self):
            super().__init__()
            self.stem, self.layers = nn.Conv2d(3, 12, 2, 2), layers

        def forward(self, images):
            x = self.layers(self.stem(images).permute(0, 2, 3, 1))
            return x.index_select(2, torch.tensor([2, 0])).flatten(1), x.index_select(-1, torch.tensor(3)).flatten(1)

    model, images = Both().eval(), torch.randn(3, 3, 8, 8)
    with torch.no_grad():
        program = torch.export.export(model, (images[:2],), dynamic_shapes=({0: torch.export.Dim("batch", min=1)},))
    export.write_onnx(export.Graph(program, ("rows", "columns")), tmp_path / "model.onnx")
    graph = onnx.load(tmp_path / "model.onnx").graph
    axes = [node.attribute[0].i for node in graph.node if node.op_type == "Gather"]
    assert axes[:3] == [2] * 3  # of (B, 4, 4, C): not the last
    assert len(axes) >= len(orders) + 2
    session = runtime.InferenceSession(tmp_path / "model.onnx")
    for found, expected in zip(session.run(None, {"images": images.numpy()}), model(images), strict=True):
        assert (torch.from_numpy(found) - expected).abs().max() < 1e-5 * expected.abs().max()  # measured 2.0e-7


def test_weights_of_a_large_model_lie_beside_it(monkeypatch, tmp_path):
    pytest.importorskip("onnxscript")
    monkeypatch.setattr("torch.onnx._internal.exporter._onnx_program._LARGE_MODEL_THRESHOLD", 1000)
    model, images = nn.Linear(32, 32), torch.randn(2, 32)
    graph = export.Graph(torch.export.export(model, (images,)), ("logits",))
    for _ in range(2):  # the second replaces the first
        export.write_onnx(graph, tmp_path / "model.onnx")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["model.onnx", "model.onnx.data"]
    found = computed(tmp_path / "model.onnx", images)["logits"]
    assert torch.allclose(found, model(images), atol=1e-5)  # measured 3.6e-7


def test_a_failed_write_leaves_both_files(monkeypatch, tmp_path):
    class Full:
        def save(self, path):
            path.with_name(path.name + ".data").write_text("new")
            raise OSError(28, "No space left on device")

    monkeypatch.setattr(export, "PACKAGES", ())
    monkeypatch.setattr(export, "onnx_program", lambda *_, **__: Full())
    for name in ("model.onnx", "model.onnx.data"):
        (tmp_path / name).write_text("old")
    (tmp_path / ".model.onnx.killed.part").mkdir()
    with pytest.raises(UserError, match=r"model\.onnx could not be written: no space left"):
        export.write_onnx(export.Graph(None, ("logits",)), tmp_path / "model.onnx")  # type: ignore[arg-type]
    assert {path.name: path.read_text() for path in tmp_path.iterdir()} == dict.fromkeys(
        ("model.onnx", "model.onnx.data"), "old"
    )


def test_missing_packages_are_named(monkeypatch, tmp_path):
    monkeypatch.setattr(export, "PACKAGES", ("onnx_of_nowhere",))
    with pytest.raises(UserError, match=r"ONNX needs onnx_of_nowhere: pip install 'compressvit\[onnx\]'"):
        export.write_onnx(export.Graph(None, ("logits",)), tmp_path / "model.onnx")  # type: ignore[arg-type]
