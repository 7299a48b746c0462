"""timm's Hiera: blocks that widen the tokens and pool queries, in the order of mask units."""

from __future__ import annotations

from typing import Any

import pytest
import timm
import torch
from helpers.models import build, images_for, outputs, randomise
from torch import nn

from compressvit.artifacts.export import exported
from compressvit.errors import UserError
from compressvit.model import surgery
from compressvit.model.backbone import describe, input_size
from compressvit.model.cost import macs
from compressvit.model.families.hiera import SMALL
from compressvit.model.positions import resample_positions
from compressvit.transforms import IRPE, LORS, VPT, Align, FacT, Multiplex, Narrow, Shrink
from compressvit.transforms.applying import compress
from compressvit.transforms.narrow.places import places
from compressvit.transforms.record import compression_of
from compressvit.transforms.shrink.prices import Prices


def moved(**more: Any) -> nn.Module:
    torch.manual_seed(0)
    model = timm.create_model("hiera_tiny_224", **{**SMALL, **more}).eval()
    randomise(model, 0.1)
    return model


@pytest.mark.parametrize("more", [{}, {"use_expand_proj": False, "init_values": 0.5}], ids=str)
@torch.no_grad()
def test_blocks_with_empty_slots_are_timms(more):
    model = moved(**more)
    before = outputs(model)
    for info in describe(model, "slotted_block").blocks:
        surgery.specialise(model, info.path, describe(model).slotted_block)
    assert torch.equal(outputs(model), before)


def test_blocks_say_what_they_see():
    with torch.device("meta"):
        model = timm.create_model("hiera_tiny_224", img_size=256)
    found = [(b.stage, b.width, b.heads, b.resolution, b.window) for b in describe(model).blocks]
    assert input_size(model) == (3, 256, 256)
    assert found[:3] == [(0, 96, 1, (64, 64), (8, 8)), (1, 192, 2, (32, 32), (8, 8)), (1, 192, 2, (32, 32), (4, 4))]
    assert found[-2:] == [(3, 768, 8, (8, 8), (16, 16)), (3, 768, 8, (8, 8), None)]


def test_heads_are_priced_as_they_are_counted():
    """Of every block alone: what goes with half of its heads."""
    model = moved(stages=(2, 2, 2), q_pool=2, mask_unit_attn=(True, True, False), img_size=64)
    found = places(model, describe(model))
    prices = Prices.of(model, found, ("macs",))
    whole = macs(model, input_size(model))
    for index, place in enumerate(found):
        heads = tuple(p.heads // 2 if p is place else p.heads for p in found)
        student = compress(model, [Narrow(heads=heads, metric="weights")])
        form = compression_of(student).plans[0].forms[place.path]
        saved = prices.part(place.path, "attn") - prices.part(place.path, "attn", form)
        assert whole - macs(student, input_size(model)) == saved[0], index


def test_dimensions_go_where_no_queries_are_pooled():
    model = moved()
    assert [place.options for place in places(model, describe(model))] == [
        ("heads", "head_dim"),
        ("heads", "head_dim"),
        ("heads",),
        ("heads", "head_dim"),
    ]
    images = images_for(model, 2)
    spec = Shrink(budget={"parameters": 0.9}, methods=("head_dim",), multiple=2, metric="weights")
    student = compress(model, [spec])
    forms = compression_of(student).plans[0].forms
    assert any(form.head_dim for form in forms.values())
    assert outputs(student, images).isfinite().all()


def test_official_names_are_timms():
    own = build("hiera").state_dict()
    official = {n.replace("head.norm.", "norm.").replace("head.fc.", "head.projection."): t for n, t in own.items()}
    assert official.keys() != own.keys()
    assert resample_positions(official, build("hiera", seed=1)).keys() == own.keys()


@pytest.mark.wide
def test_a_graph_has_no_attention_that_onnx_lacks():
    model, images = moved(), images_for(moved())
    program = exported(model, images).program
    fused = [node for node in program.graph.nodes if "scaled_dot_product_attention" in str(node.target)]
    assert {node.args[0].meta["val"].ndim for node in fused} == {4}
    assert torch.allclose(program.module()(images), outputs(model, images), atol=1e-5)
    assert all(block.attn.fused_attn for block in model.blocks)


@pytest.mark.parametrize(
    ("spec", "words"),
    [
        *(
            (spec, "needs blocks of one shape in every stage, and .* begin with a block that widens the tokens")
            for spec in (Multiplex(share=1), LORS(share=2, rank=2), Align(share=2), FacT())
        ),
        (Narrow(head_dim=4), r"whose attention .*, or pools queries, .*; try `heads`"),
        (IRPE(), "needs attention whose logits it can change, and .* is a Hiera"),
        (VPT(), r"is a Hiera, which does not say so \(`Family.prompts`\); adapt it with adapters"),
    ],
    ids=lambda value: getattr(value, "name", ""),
)
def test_what_is_refused_and_why(spec, words):
    with pytest.raises(UserError, match=words):
        spec.plan(build("hiera"))
