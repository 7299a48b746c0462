"""Multiplexed blocks and iRPE compute what a plain re-writing of their formulas computes.

The number in the comment beside a tolerance is the error seen, the largest over the parameters of that test.
"""

from __future__ import annotations

import math

import pytest
import timm
import torch
from helpers.models import EVERYTHING, VIT, blocks_of, build, equal_within_stages, gap, randomise
from helpers.plain_blocks import naive_attention, naive_irpe, naive_mlp, naive_mlp_conv, naive_norm, naive_swin_block
from torch import nn

from compressvit.errors import UserError
from compressvit.transforms import IRPE, Multiplex
from compressvit.transforms.applying import compress, transform_
from compressvit.transforms.irpe import ContextualKeyPosition, bucket_ids, piecewise_index

# ---------------------------------------------------------------------------------------------- the arithmetic, plainly


@pytest.mark.parametrize("form", ["identity", "reference"])
@pytest.mark.parametrize("name", ["vit", "vit_no_class_token", "dinov2_registers"])
def test_vit_block_is_the_formula(name, form):
    torch.manual_seed(0)
    student = compress(build(name), [Multiplex(share=2, form=form, **EVERYTHING), IRPE()]).double()
    block = blocks_of(student)[1]
    randomise(block)
    skip, grid = student.num_prefix_tokens, student.patch_embed.grid_size
    x = torch.randn(skip + grid[0] * grid[1], 48, dtype=torch.float64)
    with torch.no_grad():
        normed = naive_norm(block.norm1, x)
        q = (normed @ block.attn.qkv.weight.T + block.attn.qkv.bias)[:, :48] / math.sqrt(12)
        position = [naive_irpe(block.attn.rpe_k.table, part, grid, skip) for part in q.split(12, dim=-1)]
        scale1, scale2 = (getattr(ls, "gamma", 1.0) for ls in (block.ls1, block.ls2))
        y = x + scale1 * naive_attention(block.attn, normed, position, None)
        tokens = naive_mlp_conv(block.mlp_conv, y[skip:].reshape(*grid, 48), form == "reference").flatten(0, 1)
        # tokens off the grid: the convolution passes them by, the reference's LN does not
        prefix = naive_norm(block.mlp_conv.norm, y[:skip]) if form == "reference" else y[:skip]
        y = torch.cat([prefix, tokens])
        expected = y + scale2 * naive_mlp(block.mlp, naive_norm(block.norm2, y))
        assert (block(x[None])[0] - expected).abs().max() < 1e-12  # seen 1.1e-14


@pytest.mark.wide_unless(lambda index, form: (index, form) in ((1, "reference"), (2, "identity")))
@pytest.mark.parametrize("form", ["identity", "reference"])
@pytest.mark.parametrize("index", [0, 1, 2, 3])
def test_swin_block_is_the_formula(index, form):
    student = compress(build("swin"), [Multiplex(share=2, form=form, **EVERYTHING)]).double()
    block = blocks_of(student)[index]
    assert block.shift_size == ((2, 2) if index % 2 else (0, 0))
    randomise(block)
    torch.manual_seed(0)
    x = torch.randn(*block.input_resolution, block.dim, dtype=torch.float64)
    with torch.no_grad():
        expected = naive_swin_block(block, x, form == "reference")
        assert (block(x[None])[0] - expected).abs().max() < 1e-12  # seen 6.3e-15


def test_swin_blocks_keep_their_shift_and_mask():
    model = equal_within_stages(build("swin"))
    masks = [block.attn_mask for block in blocks_of(model)]
    shifts = [block.shift_size for block in blocks_of(model)]
    transform_(model, [Multiplex(share=(2, 4), **EVERYTHING)])
    blocks = blocks_of(model)
    assert all(block.attn_mask is mask for block, mask in zip(blocks, masks, strict=True))
    assert [block.shift_size for block in blocks] == shifts == [(0, 0), (2, 2)] * 3
    assert [mask is None for mask in masks] == [True, False] * 3
    with torch.no_grad():
        for norm in ("norm1", "norm2"):
            getattr(blocks[1], norm).load_state_dict(getattr(blocks[0], norm).state_dict())
        x = torch.randn(1, 16, 16, 16, generator=torch.Generator().manual_seed(0))
        assert (blocks[0](x) - blocks[1](x)).abs().max() > 1e-2, "equal but for the shift, and the shift must be seen"


def test_a_shared_position_table_is_one_parameter():
    student = compress(build("swin"), [Multiplex(share=(2, 4))])
    tables = [b.attn.relative_position_bias_table for b in blocks_of(student)]
    assert len({id(t) for t in tables}) == 2
    assert all(b.attn._get_rel_pos_bias().shape == (1, b.attn.num_heads, 16, 16) for b in blocks_of(student))


# ----------------------------------------------------------------------------------------------------------------- iRPE


@pytest.mark.wide_unless(lambda grid: grid == (5, 9))
@pytest.mark.parametrize("skip", [0, 2])
@pytest.mark.parametrize("grid", [(14, 14), (5, 9)])
def test_irpe_is_the_quadruple_loop(grid, skip):
    torch.manual_seed(0)
    position = ContextualKeyPosition(3, grid, skip, ratio=1.9, dtype=torch.float64)
    assert position.table.shape == (3, 49 + (skip > 0))
    nn.init.normal_(position.table)
    q = torch.randn(1, 2, skip + grid[0] * grid[1], 3, dtype=torch.float64)
    with torch.no_grad():
        got = position(q)
        for head in range(2):
            expected = naive_irpe(position.table, q[0, head], grid, skip)
            assert (got[0, head] - expected).abs().max() < 1e-13  # seen 1.8e-15


def test_irpe_buckets_of_the_paper():
    # by hand: exact to 1; 2 → 1.95, 3 → 2.32, 4 → 2.58, 13 → 3.66, each rounded, at most 3.8, and cut
    by_hand = {0: 0, 1: 1, 2: 2, 3: 2, 4: 3, 13: 3}
    for distance, bucket in by_hand.items():
        assert piecewise_index(distance, 1.9) == bucket
        assert piecewise_index(-distance, 1.9) == -bucket
    assert set(bucket_ids(14, 14, 0, 1.9).flatten().tolist()) == set(range(49))
    assert set(bucket_ids(14, 14, 1, 1.9).flatten().tolist()) == set(range(50))


def test_irpe_keeps_the_function_and_its_tables_are_private():
    teacher = build("vit_no_class_token")
    student = compress(teacher, [Multiplex(share=2), IRPE()])
    tables = [b.attn.rpe_k.table for b in blocks_of(student)]
    assert len({id(t) for t in tables}) == 4
    assert gap(student, compress(teacher, [Multiplex(share=2)])) == 0
    with torch.no_grad():
        tables[2].normal_(std=10.0)
    assert gap(student, compress(teacher, [Multiplex(share=2)])) > 1e-3


def test_irpe_planned_on_meta_does_not_spoil_the_next_model():
    bucket_ids.cache_clear()
    with torch.device("meta"):
        compress(timm.create_model("vit_tiny_patch16_224", **VIT), [IRPE()])
    student = compress(build("vit"), [IRPE()])
    assert gap(student, build("vit")) < 1e-5  # seen 1.5e-07


def test_irpe_at_another_size_says_so():
    student = compress(timm.create_model("vit_tiny_patch16_224", **VIT, dynamic_img_size=True), [IRPE()])
    with pytest.raises(UserError, match=r"built for 17 tokens and got 65; build the model with the input size"):
        student(torch.randn(1, 3, 64, 64))
