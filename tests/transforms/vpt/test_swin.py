"""Prompt tokens in a Swin: the paper's formulas window by window, and what timm's interface sees of them."""

from __future__ import annotations

import copy
import itertools
import math

import pytest
import timm
import torch
from helpers.contract import teacher
from helpers.models import SWIN, images_for, outputs, randomise
from helpers.plain_blocks import naive_mlp, naive_norm
from helpers.prompts import EXACT, FORMS, gap, prompted, prompts_of, shapes
from torch import Tensor, nn

from compressvit.transforms import VPT
from compressvit.transforms.applying import compress


def naive_swin_block(block: nn.Module, prompts: Tensor, x: Tensor) -> tuple[Tensor, Tensor]:
    """x: (height, width, M); window by window and head by head. Returns the grid, and the prompts as they leave the block."""
    height, width, _ = x.shape
    (win, _), (shift, _), p, heads = block.window_size, block.shift_size, len(prompts), block.attn.num_heads
    weight, offset = (t.unflatten(0, (3, heads, -1)) for t in (block.attn.qkv.weight, block.attn.qkv.bias))
    normed, tokens = naive_norm(block.norm1, x), naive_norm(block.norm1, prompts)
    tall, wide = -(-height // win) * win, -(-width // win) * win
    attended, of_prompts = torch.zeros_like(x), []
    for top, left in itertools.product(range(0, tall, win), range(0, wide, win)):
        rolled = [(top + i, left + j) for i, j in itertools.product(range(win), repeat=2)]
        # rolling first, then zeros at the far edges
        places = [((i + shift) % height, (j + shift) % width) if i < height and j < width else None for i, j in rolled]
        image = torch.stack([normed[place] if place else torch.zeros_like(x[0, 0]) for place in places])
        region = [(i >= tall - shift, j >= wide - shift) for i, j in rolled]
        bias = x.new_zeros(heads, p + len(rolled), p + len(rolled))
        for (q, a), (k, b) in itertools.product(enumerate(rolled), repeat=2):
            row = (a[0] - b[0] + win - 1) * (2 * win - 1) + a[1] - b[1] + win - 1
            apart = 100 if shift and region[q] != region[k] else 0
            bias[:, p + q, p + k] = block.attn.relative_position_bias_table[row] - apart
        maps, both = [], torch.cat([tokens, image])
        for h in range(heads):
            q, k, v = (both @ weight[i, h].T + offset[i, h] for i in range(3))
            maps.append((q @ k.T / math.sqrt(q.shape[-1]) + bias[h]).softmax(-1) @ v)
        out = torch.cat(maps, dim=-1) @ block.attn.proj.weight.T + block.attn.proj.bias
        of_prompts.append(out[:p])
        for place, value in zip(places, out[p:], strict=True):
            if place:
                attended[place] = value
    x, prompts = x + attended, prompts + sum(of_prompts) / len(of_prompts)
    return tuple(y + naive_mlp(block.mlp, naive_norm(block.norm2, y)) for y in (x, prompts))


@pytest.mark.wide_unless(lambda side, deep: side == 26 and deep)
@FORMS
@pytest.mark.parametrize("side", [32, 28, 26], ids=["windows_fit", "windows_are_padded", "patches_are_padded"])
@torch.no_grad()
def test_swin_is_windowed_attention_with_prompts(side, deep):
    """Three prompts fill up neither the 16, 14 or 13 columns of the first stage nor the 8 or 7 of the second."""
    torch.manual_seed(0)
    plain = timm.create_model("swin_tiny_patch4_window7_224", **{**SWIN, "img_size": side}).double().eval()
    model = compress(plain, [VPT(prompts=3, deep=deep)])
    randomise(model)
    plain.load_state_dict(model.state_dict(), strict=False)
    images, tokens = images_for(model).double(), iter([p.tokens for p in prompts_of(model)])
    x, prompts = plain.patch_embed(images), None
    for stage in plain.layers:
        x = stage.downsample(x)
        if prompts is not None and not deep:  # four copies, side by side
            prompts = stage.downsample.reduction(stage.downsample.norm(prompts.repeat(1, 1, 4)))
        for block in stage.blocks:
            if deep or prompts is None:
                prompts = next(tokens).expand(len(x), -1, -1)
            pairs = [naive_swin_block(block, own, image) for own, image in zip(prompts, x, strict=True)]
            x, prompts = (torch.stack(part) for part in zip(*pairs, strict=True))
    assert next(tokens, None) is None
    assert gap(model.forward_features(images), plain.norm(x)) < EXACT
    assert gap(outputs(model, images), outputs(plain, images)) > 1e-3, "the prompts do nothing"


@FORMS
def test_swin_of_any_input_size_masks_as_one_of_a_fixed(deep):
    fixed = prompted("swin", deep)
    plain = timm.create_model("swin_tiny_patch4_window7_224", **SWIN, dynamic_img_size=True).eval()
    free = compress(plain.double(), [VPT(prompts=3, deep=deep)])
    free.load_state_dict(fixed.state_dict())
    assert gap(outputs(free), outputs(fixed)) < EXACT
    assert outputs(free, torch.randn(1, 3, 40, 48).double()).shape == (1, 5)


@torch.no_grad()
def test_swins_intermediates_are_the_grids_in_every_form():
    model, plain = (
        prompted("swin", deep=False, count=20),
        copy.deepcopy(teacher("swin")).double(),
    )  # two rows, then three
    images, seen = images_for(model).double(), []
    for i, stage in enumerate(model.layers):
        stage.register_forward_hook(lambda m, inputs, y, rows=(2, 0)[i]: seen.append(y[:, : y.shape[1] - rows]))
    features = model.forward_features(images)
    grids = [y.permute(0, 3, 1, 2) for y in seen]
    assert [y.shape[2:] for y in grids] == [(16, 16), (8, 8)]
    for indices, norm, stop_early in itertools.product((None, [0], [-1]), (False, True), (False, True)):
        given = {"indices": indices, "norm": norm, "stop_early": stop_early}
        for only in (True, False):
            ours, theirs = (m.forward_intermediates(images, **given, intermediates_only=only) for m in (model, plain))
            assert shapes(ours) == shapes(theirs)
        assert torch.equal(ours[0], grids[0].permute(0, 2, 3, 1) if indices == [0] and stop_early else features)
        assert torch.equal(
            ours[1][0], features.permute(0, 3, 1, 2) if norm and indices == [-1] else grids[(indices or [0])[0]]
        )
    assert model.prune_intermediate_layers([0]) == [0]
    assert torch.equal(model.forward_features(images), grids[0].permute(0, 2, 3, 1))
