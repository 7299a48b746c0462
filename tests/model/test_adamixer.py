"""AdaMixer: its counts, its parts against formulas written out, its boxes, and its matching."""

from __future__ import annotations

import itertools
import math

import pytest
import timm
import torch
from torch import nn
from torchvision.ops import box_iou, generalized_box_iou

from compressvit.errors import UserError
from compressvit.model.detectors import boxes, register_detectors
from compressvit.model.detectors.decoder import AdaptiveMixing, Decoder, DecoderStage, Sampling
from compressvit.model.detectors.prediction import SetPrediction, costs
from compressvit.model.detectors.sampling import level_weights, points_of, sample_pyramid
from compressvit.model.weights import build
from compressvit.transforms import LORS, AdaptiveLORS, LowRank
from compressvit.transforms.applying import apply_plans, compress

PAPER = {"dim": 256, "channels": 256, "classes": 80, "heads": 8, "hidden": 2048, "points_out": 128}
SMALL = {"queries": 6, "stages": 3, "dim": 32, "channels": 16, "heads": 4, "hidden": 48, "groups": 2, "points_in": 4}
SWIN = {"embed_dim": 24, "depths": (1, 1, 1, 1), "num_heads": (2, 2, 2, 2), "window_size": 2}
VIT = {"patch_size": 8, "embed_dim": 48, "depth": 2, "num_heads": 4}


def count(module: nn.Module) -> int:
    return sum(p.numel() for p in module.parameters())


def detector(backbone: str = "vit_tiny_patch16_224", args: dict | None = None, img_size=32, **given) -> nn.Module:
    torch.manual_seed(0)
    options = {**SMALL, "points_out": 8, "num_classes": 5, **given}
    return build(
        "adamixer", backbone=backbone, backbone_args=VIT if args is None else args, img_size=img_size, **options
    )


@pytest.mark.parametrize(
    ("groups", "points", "decoder", "mixing"), [(4, 32, 110_272_296, 100_864_512), (2, 64, 135_536_424, 126_128_640)]
)
def test_the_decoder_has_the_parameters_of_the_released_code(groups, points, decoder, mixing):
    with torch.device("meta"):
        whole = Decoder(6, groups=groups, points_in=points, **PAPER)
    assert count(whole) == decoder
    assert 6 * count(whole.stages[0].mixing) == mixing
    assert count(whole.stages[0]) - count(whole.stages[0].mixing) == 1_567_964


def test_lors_has_the_parameters_of_the_paper():
    """Part by part, as they follow from the paper's formulas with 2 groups of 64 points, r = 16, K = 1, 1, 2, 2, 3, 3, and r = 8."""
    register_detectors()
    with torch.device("meta"):
        model = timm.create_model("adamixer", backbone="resnet50", groups=2, points_in=64)
    apply_plans(model, [AdaptiveLORS(init="scratch").plan(model)])
    static = LORS(of="decoder", targets=("mixing.projection",), share=6, rank=8, init="scratch")
    apply_plans(model, [static.plan(model)])
    mixings = [stage.mixing for stage in model.decoder.stages]
    generators = [mixing.generator for mixing in mixings]
    assert generators[0].weight.numel() + generators[0].bias.numel() == 12_632_064
    assert sum(count(layer.terms.core) for layer in generators) == 3_158_016
    assert sum(count(layer.terms.up) + count(layer.terms.down) for layer in generators) == 172_032
    assert mixings[0].projection.weight.numel() == 8_388_608
    assert sum(count(mixing.projection.low_rank) for mixing in mixings) == 1_585_152
    assert sum(mixing.projection.bias.numel() + count(mixing.norm) for mixing in mixings) == 4_608
    assert len({id(p): p for mixing in mixings for p in mixing.parameters()}) > 0
    assert sum({id(p): p.numel() for mixing in mixings for p in mixing.parameters()}.values()) == 25_940_480
    assert count(model.decoder) == 35_348_264


# ------------------------------------------------------------------------------------------------------------------ boxes


def test_boxes_there_and_back():
    xyzr = torch.tensor([[30.0, 20.0, 4.0, 1.0]])  # 2^3.5 wide, 2^4.5 high
    x0, y0, x1, y1 = boxes.corners(xyzr)[0].tolist()
    assert (x1 - x0, y1 - y0) == pytest.approx((2**3.5, 2**4.5))
    assert ((x0 + x1) / 2, (y0 + y1) / 2) == pytest.approx((30, 20))
    assert boxes.corners(torch.tensor(boxes.whole_image(48, 96)))[:4].tolist() == pytest.approx(
        [0, 0, 96, 48], abs=1e-4
    )
    moved = boxes.refined(xyzr, torch.tensor([[0.5, -0.25, 1.0, 0.5]]))
    assert moved.tolist() == [[38.0, 16.0, 5.0, 1.5]]


def test_log_overlap_is_the_share_of_the_first_box():
    xyzr = torch.tensor([[[8.0, 8.0, 4.0, 0.0], [8.0, 8.0, 3.0, 0.0], [100.0, 8.0, 3.0, 0.0]]])  # 16, 8 and 8 pixels
    found = boxes.log_overlap(xyzr)[0].exp()
    expected = torch.tensor([[1.0, 0.25, 0.0], [1.0, 1.0, 0.0], [0.0, 0.0, 1.0]])
    assert torch.allclose(found, expected, atol=1e-5)  # 1e-7 is added


def test_position_embedding_tells_boxes_apart():
    xyzr = torch.tensor([[10.0, 20.0, 3.0, 0.0], [10.0, 20.0, 3.5, 0.0]])
    first, second = boxes.position_embedding(xyzr, 32)
    assert first.shape == (32,)
    assert first[0] == pytest.approx(math.sin(0.01), abs=1e-6)
    assert first[1] == pytest.approx(math.cos(0.01), abs=1e-6)
    assert torch.equal(first[:16], second[:16])  # x and y are the same
    assert not torch.equal(first[16:24], second[16:24])


# --------------------------------------------------------------------------------------------------------------- sampling


def test_sampling_reads_what_lies_at_a_point():
    """A ramp over the image is read back as the coordinates of the points, at every level."""
    strides, size = (4, 8, 16), 64
    maps = []
    for stride in strides:
        centres = torch.arange(size // stride) * stride + stride / 2
        ys, xs = torch.meshgrid(centres, centres, indexing="ij")
        maps.append(torch.stack([xs, ys, xs, ys]).expand(2, 4, -1, -1))  # two groups of (x, y)
    points = torch.empty(2, 3, 2, 5, 3).uniform_(12, 52)
    points[..., 2] = torch.rand(points.shape[:-1]) * 4
    found = sample_pyramid(maps, strides, points)
    assert found.shape == (2, 3, 2, 5, 2)
    assert torch.allclose(found, points[..., :2], atol=1e-4)


def test_levels_are_weighed_by_the_distance_of_logarithms():
    weights = level_weights(torch.tensor([3.0, 10.0]), (4, 8, 16))
    expected = torch.tensor([-0.5, 0.0, -0.5]).softmax(0)
    assert torch.allclose(weights[0], expected)
    assert weights[1].argmax() == 2


def test_points_lie_in_the_box():
    xyzr = torch.tensor([[[32.0, 16.0, 4.0, 1.0]]])
    offsets = torch.tensor([0.5, -0.5, -1.0]).expand(1, 1, 1, 1, 3)
    x, y, z = points_of(offsets, xyzr).flatten().tolist()
    assert (x, y, z) == pytest.approx((32 + 2**3.5 / 2, 16 - 2**4.5 / 2, 3.0))


def test_sampling_starts_on_a_grid_within_the_box():
    sampling = Sampling(8, groups=2, points=9)
    sampling.reset_parameters()
    offsets = sampling.offsets(torch.randn(1, 8)).view(2, 9, 3)
    places = {(round(x, 3), round(y, 3)) for x, y, _ in offsets[0].tolist()}
    assert places == set(itertools.product((-0.333, 0.0, 0.333), repeat=2))
    assert (offsets[..., 2] == -1).all()


# ----------------------------------------------------------------------------------------------------------------- mixing


def test_mixing_is_the_formula():
    torch.manual_seed(0)
    mixing = AdaptiveMixing(dim=6, channels=8, groups=2, points_in=3, points_out=5)
    features, query = torch.randn(1, 2, 2, 3, 4), torch.randn(1, 2, 6)
    found = mixing(features, query)
    for n in range(2):
        made = mixing.generator(query[0, n]).view(2, 4 * 4 + 5 * 3)
        parts = []
        for g in range(2):
            m, s = made[g, :16].view(4, 4), made[g, 16:].view(5, 3)
            first = features[0, n, g] @ m
            first = ((first - first.mean()) / (first.var(unbiased=False) + 1e-5).sqrt()).relu()
            second = s @ first
            parts.append(((second - second.mean()) / (second.var(unbiased=False) + 1e-5).sqrt()).relu())
        expected = mixing.norm(query[0, n] + mixing.projection(torch.stack(parts).flatten()))
        assert torch.allclose(found[0, n], expected, atol=1e-6)  # measured 3e-7


def test_attention_gains_the_overlap_times_tau():
    torch.manual_seed(0)
    stage = DecoderStage(16, 8, 3, heads=2, hidden=16, groups=2, points_in=4, points_out=4)
    query, overlap = torch.randn(1, 3, 16), torch.randn(1, 3, 3)
    q, k, v = stage.attn.qkv(query)[0].view(3, 3, 2, 8).unbind(1)
    heads = []
    for h in range(2):
        logits = q[:, h] @ k[:, h].T / 8**0.5 + stage.attn.tau[h] * overlap[0]
        heads.append(logits.softmax(-1) @ v[:, h])
    expected = stage.attn.proj(torch.stack(heads, 1).flatten(1))
    assert torch.allclose(stage.attn(query, overlap)[0], expected, atol=1e-6)


def test_a_new_decoder_says_the_whole_image_and_hardly_any_class():
    model = detector().eval()
    with torch.no_grad():
        found = model(torch.randn(2, 3, 32, 32))
    assert found.logits.shape == (3, 2, 6, 5)
    assert torch.allclose(found.boxes, torch.tensor([0.0, 0.0, 1.0, 1.0]).expand(3, 2, 6, 4), atol=1e-6)
    assert 0.001 < found.logits.sigmoid().mean() < 0.2


@pytest.mark.parametrize(
    ("backbone", "args", "size", "strides"),
    [
        ("vit_tiny_patch16_224", VIT, 32, (2, 4, 8, 16)),
        (
            "swin_tiny_patch4_window7_224",
            {"embed_dim": 24, "depths": (1, 1, 1, 1), "num_heads": (2, 2, 2, 2), "window_size": 2},
            64,
            (4, 8, 16, 32),
        ),
        ("resnet18", {}, (32, 64), (4, 8, 16, 32)),
        ("convnext_tiny", {"depths": (1, 1, 1, 1), "dims": (8, 16, 16, 32)}, 32, (4, 8, 16, 32)),
        ("cvt_13", {"depths": (1, 1, 1), "embed_dims": (8, 16, 32), "num_heads": (1, 1, 2)}, 64, (4, 8, 16, 32)),
    ],
)
def test_backbones_give_a_pyramid(backbone, args, size, strides):
    model = detector(backbone, args, size).eval()
    height, width = model.img_size
    assert model.pyramid.strides == strides
    maps = model.maps(torch.randn(1, 3, height, width))
    assert [tuple(found.shape) for found in maps] == [(1, 16, int(height / s), int(width / s)) for s in strides]


def test_sizes_that_do_not_fit_are_refused():
    stride = "images of 40×40 do not divide by the largest stride of the maps, 16"
    with pytest.raises(UserError, match=rf"{stride}; the nearest sizes: img_size=32 or 48$"):
        detector(img_size=40)
    with pytest.raises(UserError, match="channels=15 does not divide by 2"):
        detector(channels=15)


def test_a_backbone_of_no_family_is_refused():
    with pytest.raises(UserError, match=r"low_rank: the backbone resnet18 is of no family that compressvit knows"):
        LowRank(rank=4).plan(detector("resnet18", {}))


# --------------------------------------------------------------------------------------------------------------- matching


def test_costs_are_focal_l1_and_giou():
    torch.manual_seed(0)
    logits, found = torch.randn(4, 3), torch.rand(4, 2).repeat(1, 2)
    found[:, 2:] += 0.3
    target = {"boxes": torch.tensor([[0.1, 0.1, 0.5, 0.4], [0.5, 0.5, 0.9, 0.8]]), "labels": torch.tensor([2, 0])}
    got = costs(logits, found, target)
    for n, i in itertools.product(range(4), range(2)):
        p = logits[n, target["labels"][i]].sigmoid()
        focal = -0.25 * (1 - p) ** 2 * p.log() + 0.75 * p**2 * (1 - p).log()
        l1 = (found[n] - target["boxes"][i]).abs().sum()
        giou = generalized_box_iou(found[n : n + 1], target["boxes"][i : i + 1])[0, 0]
        assert got[n, i] == pytest.approx(float(2 * focal + 5 * l1 - 2 * giou), abs=1e-5)


def test_a_perfect_prediction_has_no_loss_and_each_object_one_query():
    truth = torch.tensor([[0.1, 0.1, 0.5, 0.4], [0.5, 0.5, 0.9, 0.8]])
    target = {"boxes": truth, "labels": torch.tensor([1, 0])}
    logits = torch.full((1, 1, 3, 2), -12.0)
    logits[0, 0, 2, 1] = logits[0, 0, 0, 0] = 12.0
    found = torch.stack([truth[1], torch.tensor([0.0, 0.0, 1.0, 1.0]), truth[0]])[None, None]
    losses = SetPrediction(logits, found).losses([target])
    assert losses["l1"] == 0
    assert float(losses["giou"]) == pytest.approx(0, abs=1e-5)
    assert float(losses["classes"]) < 1e-6
    worse = SetPrediction(logits, found.roll(1, dims=2)).losses([target])
    assert worse["l1"] > 0.5


def test_images_without_objects_learn_that_there_are_none():
    logits = torch.zeros(2, 1, 3, 2, requires_grad=True)
    found = torch.rand(2, 1, 3, 4, requires_grad=True)
    empty = {"boxes": torch.zeros(0, 4), "labels": torch.zeros(0, dtype=torch.long)}
    losses = SetPrediction(logits, found).losses([empty])
    sum(losses.values()).backward()
    assert (logits.grad > 0).all()
    assert (found.grad == 0).all()


def test_detections_are_the_likeliest_pairs():
    logits = torch.tensor([[[[0.0, 2.0], [3.0, -1.0]]]])
    found = torch.tensor([[[[0.0, 0.0, 0.5, 0.5], [0.5, 0.5, 1.0, 1.0]]]])
    (best,) = SetPrediction(logits, found).detections(limit=3)
    assert best.labels.tolist() == [0, 1, 0]
    assert best.boxes[0].tolist() == [0.5, 0.5, 1.0, 1.0]
    assert best.scores.tolist() == pytest.approx(torch.tensor([3.0, 2.0, 0.0]).sigmoid().tolist())


@pytest.mark.wide  # some seconds
def test_a_small_detector_learns_one_scene_by_heart():
    torch.manual_seed(0)
    model = detector().train()
    images = torch.randn(1, 3, 32, 32)
    truth = {"boxes": torch.tensor([[0.1, 0.2, 0.5, 0.6], [0.4, 0.5, 0.9, 0.9]]), "labels": torch.tensor([3, 1])}
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    for _ in range(120):
        optimizer.zero_grad()
        loss = sum(model(images).losses([truth]).values())
        loss.backward()
        optimizer.step()
    (best,) = model.eval()(images).detections(limit=2)
    order = best.labels.argsort(descending=True)
    assert best.labels[order].tolist() == [3, 1]
    assert box_iou(best.boxes[order], truth["boxes"]).diagonal().min() > 0.8  # measured


@pytest.mark.wide  # some seconds
def test_a_detector_is_exported_whole():
    model = compress(detector().eval(), [AdaptiveLORS(rank=2, terms=1, init="scratch")])
    images = torch.randn(2, 3, 32, 32)
    exported = torch.export.export(model, (images,)).module()
    with torch.no_grad():
        for ours, theirs in zip(model(images), exported(images), strict=True):
            assert torch.allclose(ours, theirs, atol=1e-6)
        traced = torch.jit.trace(model, images)
        assert torch.allclose(model(images).boxes, traced(images)[1], atol=1e-6)
