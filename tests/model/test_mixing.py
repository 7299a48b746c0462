"""Attention in the open: heads first in memory, in pieces on a CPU, and without the mixes that are the identity.

The number in the comment beside a tolerance is the error seen, the largest over the parameters of that test.
"""

from __future__ import annotations

import pytest
import torch
from helpers.models import BACKBONES, build, images_for, randomise

from compressvit.model import mixing
from compressvit.model.taps import Taps
from compressvit.transforms import IRPE, Multiplex
from compressvit.transforms.applying import compress
from compressvit.transforms.multiplex import HeadMixing

NAMES = [name for name in BACKBONES if name not in ("hiera", "vit_no_class_token", "deit_distilled")]


def student_of(name: str, **more) -> torch.nn.Module:
    student = compress(build(name), [Multiplex(share=1, **{"mixing_bias": True, **more})]).double().eval()
    randomise(student, 0.05)
    return student


@pytest.fixture
def mixed(monkeypatch):
    """The number of images or windows of every call of a mix."""
    seen, forward = [], HeadMixing.forward

    def counting(self, maps):
        seen.append(len(maps))
        return forward(self, maps)

    monkeypatch.setattr(HeadMixing, "forward", counting)
    return seen


@pytest.mark.wide_unless(lambda name: name in ("vit", "swin"))
@pytest.mark.parametrize("name", NAMES)
@torch.no_grad()
def test_pieces_compute_what_the_whole_batch_does(monkeypatch, mixed, name):
    student = student_of(name)
    images = torch.cat([images_for(student)] * 2)[:3].double() + torch.arange(3.0)[:, None, None, None]
    monkeypatch.setattr(mixing, "AT_ONCE", 2**40)
    whole = student(images)
    calls, most = len(mixed), max(mixed)
    mixed.clear()
    monkeypatch.setattr(mixing, "AT_ONCE", 1)
    pieces = student(images)
    assert (pieces - whole).abs().max() < 1e-12  # 1.4e-14
    if name != "cait":  # whose attention mixes heads by itself
        assert len(mixed) > 2 * calls
        assert max(mixed) < most
    assert (student(images.flip(0)) - whole).abs().max() > 1e-3


def test_windows_of_an_image_stay_together(monkeypatch, mixed):
    student = student_of("swin")
    masked = [block.attn_mask is not None for layer in student.layers for block in layer.blocks]
    assert True in masked
    assert False in masked
    monkeypatch.setattr(mixing, "AT_ONCE", 1)
    with torch.no_grad():
        student(torch.cat([images_for(student)] * 2).double())
    windows = {
        len(block.attn_mask) for layer in student.layers for block in layer.blocks if block.attn_mask is not None
    }
    assert set(mixed) <= windows | {1}
    assert windows & set(mixed)


def test_who_records_maps_sees_those_of_the_whole_batch(monkeypatch, mixed):
    monkeypatch.setattr(mixing, "AT_ONCE", 1)
    student = student_of("vit")
    images = images_for(student).double()
    taps = Taps(student, [("blocks.0.attn.attn_drop", "input"), ("blocks.1.attn.prob_mix", "output")])
    with torch.no_grad():
        student(images)
    seen = taps.pop()
    heads, tokens = student.blocks[0].attn.num_heads, student.patch_embed.num_patches + 1
    for maps in (seen["blocks.0.attn.attn_drop"]["input"], seen["blocks.1.attn.prob_mix"]["output"]):
        maps = maps[0] if isinstance(maps, tuple) else maps
        assert maps.shape == (len(images), heads, tokens, tokens)
    assert mixed[:4] == [len(images)] * 4, "the two blocks with hooks"
    assert 1 in mixed


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("first", [True, False])
def test_a_mix_is_its_formula_forward_and_backward(first, bias):
    torch.manual_seed(0)
    mix = HeadMixing(3, bias=bias, dtype=torch.float64)
    randomise(mix)
    maps = (
        torch.randn(3, 2, 4, 5, dtype=torch.float64).transpose(0, 1)
        if first
        else torch.randn(2, 3, 4, 5, dtype=torch.float64)
    )
    maps.requires_grad_()
    given = [maps, *mix.parameters()]
    weights = torch.randn(2, 3, 4, 5, dtype=torch.float64)
    plain = torch.einsum("gh,bhnm->bgnm", mix.weight, maps) + (mix.bias[:, None, None] if bias else 0)
    torch.testing.assert_close(mix(maps), plain)
    found, expected = (torch.autograd.grad((out * weights).sum(), given) for out in (mix(maps), plain))
    torch.testing.assert_close(found, expected)


def test_a_mix_that_changes_nothing_is_left_out():
    mix, maps = HeadMixing(3, bias=True), torch.randn(2, 3, 64, 64)
    assert mix(maps) is not maps, "it can be learned from"
    with torch.no_grad():
        assert mix(maps) is maps
        mix.weight.data[0, 1] = 1e-6  # by a way that changes no version
        assert not torch.equal(mix(maps), maps)
        mix.reset_identity()
        mix.bias[2] = 1e-3
        assert not torch.equal(mix(maps), maps)
        traced = torch.jit.trace(HeadMixing(3), maps)
        assert "matmul" in str(traced.graph)


def test_contextual_positions_come_in_pieces_too(monkeypatch, mixed):
    student = compress(build("vit"), [Multiplex(share=1), IRPE()]).double().eval()
    randomise(student, 0.05)
    images = images_for(student).double()
    with torch.no_grad():
        whole = student(images)
        monkeypatch.setattr(mixing, "AT_ONCE", 1)
        mixed.clear()
        assert (student(images) - whole).abs().max() < 1e-12  # 0.0
    assert set(mixed) == {1}
