"""Aligning neurons and heads: the function stays, what was only permuted is found again, and sharing loses less."""

from __future__ import annotations

import copy

import pytest
import timm
import torch
from helpers.models import VIT, build, images_for, outputs

from compressvit import Align, Multiplex
from compressvit.errors import UserError
from compressvit.model.backbone import describe
from compressvit.transforms.align import _heads, _neurons, _permute
from compressvit.transforms.applying import compress


def relative(a, b):
    return ((a - b).norm() / b.norm()).item()


@pytest.mark.wide_unless(lambda backbone: backbone in ("vit", "swin"))
@pytest.mark.parametrize("backbone", ["vit", "deit_distilled", "dinov3", "cait", "swin"])
@pytest.mark.parametrize("parts", [{"heads": False}, {"neurons": False}, {}])
def test_the_function_stays_and_the_weights_move(backbone, parts):
    teacher = build(backbone)
    student = compress(teacher, [Align(share=2, **parts)])
    images = images_for(teacher)
    assert relative(outputs(student, images), outputs(teacher, images)) < 1e-5  # measured 5e-7
    moved = [n for n, p in student.named_parameters() if not torch.equal(p, teacher.get_parameter(n))]
    assert any("mlp.fc1" in n for n in moved) == parts.get("neurons", True)
    assert any("attn.qkv" in n for n in moved) == parts.get("heads", True)


@pytest.mark.wide_unless(lambda backbone: backbone in ("vit", "swin"))
@pytest.mark.parametrize("backbone", ["vit", "dinov3", "swin", "swin_v2", "beit", "vit_relpos", "cait"])
@torch.no_grad()
def test_a_permuted_copy_is_put_back_in_order(backbone):
    teacher = build(backbone)
    first, second = [m for m in teacher.modules() if hasattr(m, "attn") and hasattr(m, "mlp")][:2]
    second.load_state_dict(first.state_dict(), strict=False)
    _permute(_neurons(second), torch.randperm(len(second.mlp.fc1.weight)))
    family = describe(teacher).family
    _permute(_heads(second, family), torch.arange(second.attn.num_heads).flip(0))
    assert not torch.equal(second.attn.qkv.weight, first.attn.qkv.weight)
    aligned = compress(teacher, [Align(share=2)])
    ours, theirs = [m for m in aligned.modules() if hasattr(m, "attn") and hasattr(m, "mlp")][:2]
    for name, parameter in ours.named_parameters():
        assert torch.equal(theirs.get_parameter(name), parameter), name


def spread(model, group=2):
    """Squared distance of the blocks of a group from their mean, over MLP and attention weights."""
    total = 0.0
    for start in range(0, len(model.blocks), group):
        for tail in ("attn.qkv.weight", "attn.proj.weight", "mlp.fc1.weight", "mlp.fc2.weight"):
            weights = torch.stack([model.blocks[i].get_parameter(tail) for i in range(start, start + group)])
            total += (weights - weights.mean(0)).square().sum().item()
    return total


def test_aligned_blocks_lie_closer_and_more_rounds_do_not_hurt():
    teacher = build("vit")
    spreads = [spread(teacher, 4)]
    spreads += [spread(compress(teacher, [Align(share=4, rounds=r)]), 4) for r in (1, 2, 4)]
    assert spreads[1] < spreads[0]
    assert spreads[3] <= spreads[1] * 1.001


def test_weights_that_are_not_finite_are_named():
    model = build("vit")
    with torch.no_grad():
        model.blocks[1].mlp.fc1.bias[0] = float("nan")
    with pytest.raises(UserError, match=r"blocks.1.mlp.fc1.bias holds numbers that are not finite"):
        compress(model, [Align(share=2)])


def test_sharing_after_alignment_starts_from_the_aligned_mean():
    teacher = build("vit")
    aligned = compress(teacher, [Align(share=2)])
    student = compress(teacher, [Align(share=2), Multiplex(share=2)])
    mean = (aligned.blocks[0].mlp.fc1.weight.double() + aligned.blocks[1].mlp.fc1.weight.double()) / 2
    assert torch.allclose(student.blocks[0].mlp.fc1.weight.double(), mean, atol=1e-7)
    assert torch.equal(student.blocks[0].attn.proj.bias, student.blocks[1].attn.proj.bias)


@pytest.mark.parametrize(
    ("before", "args", "spec", "words"),
    [
        ([Multiplex(share=2)], {}, Align(share=2), "put `align` first"),
        ([Multiplex(share=1, mlp_conv=3)], {}, Align(share=2), "put `align` first"),
        ([], {}, Align(share=3), r"align\.share=3 does not divide"),
        ([], {"scale_attn_norm": True}, Align(share=2), r"normed together; set align\.heads=false"),
        (
            [],
            {"mlp_layer": timm.layers.GatedMlp},
            Align(share=2),
            r"is a GatedMlp; set align\.neurons=false",
        ),
    ],
)
def test_what_cannot_be_aligned(before, args, spec, words):
    model = timm.create_model("vit_tiny_patch16_224", **{**VIT, **args})
    with pytest.raises(UserError, match=words):
        compress(copy.deepcopy(model), [*before, spec])
