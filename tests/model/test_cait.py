"""timm's CaiT: heads that talk to each other, and a class token that comes after the blocks."""

from __future__ import annotations

from typing import Any

import pytest
import timm
import torch
from helpers.models import build, images_for, outputs, randomise

from compressvit.errors import UserError
from compressvit.model.families.cait import SMALL
from compressvit.model.positions import resample_positions
from compressvit.transforms import IRPE, VPT, Adapters, Multiplex, Narrow, Quantise, Shrink
from compressvit.transforms.applying import compress
from compressvit.transforms.record import compression_of


def test_blocks_have_no_class_token():
    model = build("cait")
    student: Any = compress(model, [Multiplex(share=2, mlp_conv=3), IRPE()])
    assert student.blocks[0].mlp_conv.num_prefix_tokens == 0
    assert student.blocks[0].attn.rpe_k.bucketing[:3] == (4, 4, 0)
    assert outputs(student, images_for(model)).isfinite().all()


@torch.no_grad()
def test_dimensions_go_and_heads_stay():
    model = build("cait")
    randomise(model, 0.1)
    student: Any = compress(model, [Narrow(head_dim=4, sequential=False)], images_for(model, 32))
    assert student.blocks[0].attn.qkv.out_features == 48
    assert torch.equal(student.blocks[0].attn.proj_l.weight, model.blocks[0].attn.proj_l.weight)
    assert 0 < (outputs(student) - outputs(model)).norm() < 0.2 * outputs(model).norm()


@pytest.mark.wide
def test_shrink_leaves_heads_that_mix():
    model = build("cait")
    randomise(model, 0.1)
    (plan,) = compression_of(compress(model, [Shrink(budget={"parameters": 0.6}, metric="weights")])).plans
    assert not any(form.heads for form in plan.forms.values())


def test_the_blocks_of_the_class_token_are_rounded_and_nothing_else():
    model = build("cait")
    last = {name: p.clone() for name, p in model.named_parameters() if name.startswith("blocks_token_only")}
    assert len(last) == 2 * 18
    adapted = compress(model, [Narrow(neurons=0.5, metric="weights"), Adapters(width=4)])
    assert all(torch.equal(adapted.get_parameter(name), value) for name, value in last.items())
    assert not any(adapted.get_parameter(name).requires_grad for name in last)
    rounded = compression_of(compress(model, [Quantise(bits=4, group=16, metric="weights")])).ledger
    assert sum(entry.path.startswith("blocks_token_only") for entry in rounded) == 2 * 6


def test_positions_of_another_size_are_resampled():
    table = build("cait").state_dict()
    found = resample_positions(
        {f"module.{name}": t for name, t in table.items()},
        timm.create_model("cait_xxs24_224", **{**SMALL, "img_size": 64}),
    )
    assert found["pos_embed"].shape == (1, 64, 48)
    assert torch.allclose(found["pos_embed"].mean(), table["pos_embed"].mean(), atol=1e-3)


@pytest.mark.parametrize(
    ("spec", "words"),
    [
        (Narrow(heads=2), r"needs heads that work apart, and .* is a CaiT, whose attention mixes them .*; it works on"),
        (VPT(deep=False), r"the arguments of its `forward_intermediates`, or vpt\.deep=true"),
    ],
    ids=["heads", "shallow"],
)
def test_what_is_refused_and_why(spec, words):
    with pytest.raises(UserError, match=words):
        spec.plan(build("cait"))
