"""CvT: what it computes, and what is said of its blocks. Its files are in test_cvt_files.py, its counts in tests/test_published.py."""

from __future__ import annotations

import itertools
import math
from typing import Any

import pytest
import torch
from helpers.models import EVERYTHING, build, images_for, outputs, randomise
from helpers.plain_blocks import naive_mix, naive_mlp_conv, naive_norm
from torch import Tensor, nn

from compressvit.errors import UserError
from compressvit.model import weights
from compressvit.model.backbone import describe, input_size, prefix_in
from compressvit.model.cost import macs
from compressvit.model.families.cvt import SMALL
from compressvit.model.taps import Taps
from compressvit.training.losses import attention_relation
from compressvit.training.pairs import match_layers
from compressvit.training.phases.distill import Distill
from compressvit.training.terms import Batch
from compressvit.training.tokens import CLASS, Layout
from compressvit.transforms import IRPE, SSF, VPT, Multiplex, Narrow, RepAdapter
from compressvit.transforms.applying import compress
from compressvit.transforms.narrow.places import places
from compressvit.transforms.record import compression_of
from compressvit.transforms.shrink.prices import Prices


def moved(**more: Any) -> nn.Module:
    torch.manual_seed(0)
    model = weights.build("cvt_13", {**SMALL, **more}).eval()
    randomise(model, 0.1)
    return model


# ------------------------------------------------------------------------------------------------------- the arithmetic


def naive_projection(layer: Any, grid: Tensor, stride: int) -> Tensor:
    """A depth-wise 3×3 convolution over zeros around the grid (height, width, C), and the batch norm by its statistics."""
    height, width, _ = grid.shape
    found = []
    for i, j in itertools.product(range(0, height, stride), range(0, width, stride)):
        total = torch.zeros_like(grid[0, 0])
        for di, dj in itertools.product((-1, 0, 1), repeat=2):
            if 0 <= i + di < height and 0 <= j + dj < width:
                total += layer.conv.weight[:, 0, di + 1, dj + 1] * grid[i + di, j + dj]
        bn = layer.bn
        found.append((total - bn.running_mean) / torch.sqrt(bn.running_var + bn.eps) * bn.weight + bn.bias)
    return torch.stack(found)


def naive_attention(attn: Any, x: Tensor, grid: tuple[int, int], skip: int) -> Tensor:
    """Of tokens (N, C), the first `skip` of which are not on the grid; logits are divided by √C."""
    given = []
    for part, stride in (("q", 1), ("k", 2), ("v", 2)):
        tokens = naive_projection(getattr(attn, f"conv_proj_{part}"), x[skip:].reshape(*grid, -1), stride)
        layer = getattr(attn, f"proj_{part}")
        given.append(torch.cat([x[:skip], tokens]) @ layer.weight.T + layer.bias)
    width = x.shape[-1] // attn.num_heads
    q, k, v = ([part[:, h * width : (h + 1) * width] for h in range(attn.num_heads)] for part in given)
    logits = [a @ b.T / x.shape[-1] ** 0.5 for a, b in zip(q, k, strict=True)]
    maps = naive_mix(attn.prob_mix, [a.softmax(-1) for a in naive_mix(attn.logit_mix, logits)])
    out = torch.cat([a @ b for a, b in zip(maps, v, strict=True)], dim=-1)
    return out @ attn.proj.weight.T + attn.proj.bias


@pytest.mark.parametrize("stage", [0, 1])
@torch.no_grad()
def test_a_block_is_the_formula(stage):
    """With all that multiplexing adds; the class token, which only the last stage has, passes the convolutions by."""
    model = compress(build("cvt"), [Multiplex(share=2, **EVERYTHING)]).double()
    block: Any = model.get_submodule(f"stage{stage}.blocks.1")
    randomise(block)
    grid, width = [(8, 8), (4, 4)][stage], [16, 32][stage]
    x = torch.randn(stage + grid[0] * grid[1], width, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    y = x + naive_attention(block.attn, naive_norm(block.norm1, x), grid, stage)
    y[stage:] = naive_mlp_conv(block.mlp_conv, y[stage:].reshape(*grid, width), False).flatten(0, 1)
    hidden = naive_norm(block.norm2, y) @ block.mlp.fc1.weight.T + block.mlp.fc1.bias
    hidden = hidden * torch.sigmoid(1.702 * hidden)  # QuickGELU
    expected = y + hidden @ block.mlp.fc2.weight.T + block.mlp.fc2.bias
    assert (block(x[None], size=grid)[0] - expected).abs().max() < 1e-12  # seen 3.6e-15


@pytest.mark.parametrize("size", [(32, 32), (48, 80)])
@torch.no_grad()
def test_images_of_any_size_are_seen_as_by_a_model_of_that_size(size):
    model, other = moved(), moved(img_size=size)
    other.load_state_dict(model.state_dict())
    images = torch.randn(2, 3, *size, generator=torch.Generator().manual_seed(0))
    features, maps = model.forward_intermediates(images, norm=True)
    assert torch.equal(other(images), model.forward_head(features))
    assert [tuple(m.shape[1:]) for m in maps] == [
        (info["num_chs"], -(-size[0] // info["reduction"]), -(-size[1] // info["reduction"]))
        for info in model.feature_info
    ]
    assert torch.equal(maps[-1].flatten(2).mT, features[:, 1:]), "the class token is no part of a map"
    (first,) = model.forward_intermediates(images, [0], stop_early=True, intermediates_only=True)
    assert torch.equal(first, maps[0])


@torch.no_grad()
def test_without_a_class_token_the_mean_is_classified():
    model = moved(class_token=False)
    images = images_for(model)
    features = model.forward_features(images)
    assert features.shape == (2, 16, 32)
    assert torch.equal(model(images), model.head(features.mean(dim=1)))
    assert not any("cls_token" in name for name in model.state_dict())


def test_stochastic_depth_rises_over_the_last_stage():
    model = weights.build("cvt_13", SMALL, depths=(2, 3), drop_path_rate=0.2)
    rates = [getattr(block.drop_path, "drop_prob", 0.0) for stage in model.stages for block in stage.blocks]
    assert rates == pytest.approx([0, 0, 0, 0.1, 0.2])


@pytest.mark.parametrize(
    ("args", "words"),
    [
        ({"num_heads": (2, 3)}, r"num_heads=\[2, 3\]: 3 heads do not divide a width of 32"),
        ({"embed_dims": (16, 32, 64)}, r"embed_dims=\[16, 32, 64\] is for 3 stages, and depths=\[2, 2\] for 2"),
        ({"kv_strides": (2,)}, r"kv_strides=\[2\] is for 1 stages"),
        ({"widths": 3}, "unexpected keyword argument 'widths'"),
    ],
    ids=str,
)
def test_what_cannot_be_built_is_said(args, words):
    with pytest.raises(UserError, match=words):
        weights.build("cvt_13", {**SMALL, **args})


def test_a_name_that_is_nearly_right_is_told():
    with pytest.raises(UserError, match=r"has no model 'cvt_31'; did you mean 'cvt_21'"):
        weights.build("cvt_31")


# ----------------------------------------------------------------------------------------------------------- its blocks


def test_blocks_say_what_they_see():
    with torch.device("meta"):
        model = weights.build("cvt_13", img_size=384)
    blocks = describe(model).blocks
    assert input_size(model) == (3, 384, 384)
    assert [len(stage) for stage in describe(model).stages] == [1, 2, 10]
    found = [(b.path, b.width, b.heads, b.resolution, b.prefix_tokens) for b in blocks]
    assert found[:2] == [("stage0.blocks.0", 64, 1, (96, 96), 0), ("stage1.blocks.0", 192, 3, (48, 48), 0)]
    assert found[-1] == ("stage2.blocks.9", 384, 6, (24, 24), 1)
    assert blocks[0].projections == ("attn.proj_q", "attn.proj_k", "attn.proj_v")
    assert [prefix_in(model, path) for path in ("stage1.blocks.1.mlp.fc1", "stage2.blocks.0.attn.proj_k")] == [0, 1]
    assert Layout.of(model) == Layout(384, (CLASS,), (24, 24))


def test_heads_are_priced_as_they_are_counted():
    """Of every block alone: what goes with half of its heads, of which keys and values see fewer tokens."""
    model = moved(img_size=64)
    found = places(model, describe(model))
    prices = Prices.of(model, found, ("macs",))
    whole = macs(model, input_size(model))
    assert [place.options for place in found] == [("heads",)] * 4
    for index, place in enumerate(found):
        heads = tuple(p.heads // 2 if p is place else p.heads for p in found)
        student = compress(model, [Narrow(heads=heads, metric="weights")])
        form = compression_of(student).plans[0].forms[place.path]
        assert form.qkv == ("attn.proj_q", "attn.proj_k", "attn.proj_v")
        saved = prices.part(place.path, "attn") - prices.part(place.path, "attn", form)
        assert whole - macs(student, input_size(model)) == saved[0], index


@torch.no_grad()
def test_relations_are_of_queries_and_of_fewer_keys():
    """And where only one of two models has a class token, it is left out where it is: in the last stage."""
    student, teacher = moved(), moved(class_token=False)
    pairs, how = match_layers(student, teacher, "matched")
    assert [tuple(len(layout.prefix) for layout in pair.layouts) for pair in pairs] == [(0, 0), (1, 0)]
    assert "prefix tokens are left out" in how
    tokens = torch.randn(2, 17, 32, generator=torch.Generator().manual_seed(0))
    heads = student.stage1.blocks[0].attn.heads(tokens, (4, 4))
    assert [tuple(part.shape) for part in heads] == [(2, 4, 17, 8), (2, 4, 5, 8), (2, 4, 5, 8)]
    given = [part.transpose(1, 2).flatten(2) for part in heads]
    assert attention_relation(given, given, with_kl=True)[1] == 0


@pytest.mark.parametrize(
    ("spec", "words"),
    [
        (IRPE(), r"keys stand where its queries do, and .* is a CvT, whose keys and values are on a coarser grid"),
        (VPT(), r"is a CvT, which does not say so \(`Family.prompts`\); adapt it with adapters"),
        (Narrow(head_dim=4), r"another layer before each of queries, keys and values; try `heads`"),
    ],
    ids=lambda value: getattr(value, "name", ""),
)
def test_what_is_refused_and_why(spec, words):
    with pytest.raises(UserError, match=words):
        spec.plan(build("cvt"))


VIT = {"img_size": 32, "patch_size": 8, "embed_dim": 48, "depth": 2, "num_heads": 4, "num_classes": 5}


@pytest.mark.parametrize(
    ("name", "args", "attention"),
    [
        ("cvt_13", {**SMALL, "class_token": False}, True),
        ("cvt_13", {**SMALL, "img_size": 64}, True),
        ("vit_tiny_patch16_224", VIT, False),
    ],
    ids=["no class token", "larger images", "vit"],
)
@torch.no_grad()
def test_relations_to_other_models_are_of_keys_as_far_apart(name, args, attention):
    """A ViT has a key for every token: hidden states are compared with its, and queries, keys and values are not."""
    student, teacher = moved(), weights.build(name, args).eval()
    pairs, how = match_layers(student, teacher, ((0, 0), (3, 1 if name.startswith("vit") else 3)))
    assert ("attention relations of all pairs are left out" in how) is not attention
    terms = Distill().terms(student, pairs, teacher=teacher)
    taps = Taps(student, [t for term in terms for t in term.student_taps])
    others = Taps(teacher, [t for term in terms for t in term.teacher_taps])
    images = images_for(student)
    logits = student(images), teacher(nn.functional.interpolate(images, input_size(teacher)[1:]))
    batch = Batch(*logits, taps.pop(), others.pop(), torch.zeros(2, dtype=torch.long))
    values = {term.name: term.function(batch)[0].item() for term in terms}
    assert ("attention_relation" in values) is attention
    assert all(math.isfinite(value) and value > 0 for value in values.values())


def test_ssf_comes_after_the_batch_norms_and_not_before():
    """Convolutions there have no bias, and what follows them takes in a scale as well."""
    layers = SSF().plan(build("cvt")).layers
    inside = {path.rpartition("conv_proj_")[2] for path in layers if ".conv_proj_" in path}
    assert inside == {"q.bn", "k.bn", "v.bn"}


@pytest.mark.parametrize(
    ("spec", "folds"),
    [
        (RepAdapter(width=4), False),
        (RepAdapter(width=4, position="after"), True),
        (RepAdapter(width=4, place="mlp"), True),
    ],
    ids=["before", "after", "mlp"],
)
@torch.no_grad()
def test_repadapter_merges_where_no_convolution_stands_between(spec, folds):
    student = compress(build("cvt"), [spec])
    randomise(student, 0.05)
    (plan,) = compression_of(student).plans
    assert plan.foldable is folds
    before = outputs(student)
    if folds:
        plan.fold(student)
        assert (outputs(student) - before).abs().max() < 1e-5 * before.abs().max()  # measured 2.6e-7
        return
    with pytest.raises(
        UserError, match=r"a convolution stands between what enters the attention of cvt_13 and its queries"
    ):
        plan.fold(student)
    assert torch.equal(outputs(student), before)
