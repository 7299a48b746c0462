"""What several processes sum up of their shares of the images is what one process sums up of all."""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import Any

import pytest
import torch
from helpers.models import build, images_for
from helpers.together import together

from compressvit import processes
from compressvit.fitting.held_out import Seen
from compressvit.fitting.moments import collect_moments
from compressvit.fitting.sampling import TokenSample
from compressvit.fitting.shares import in_order, own, summed

PATHS = {
    "vit": ["blocks.0.attn.qkv", "blocks.1.mlp.fc2"],
    "swin": ["layers.0.blocks.1.attn.proj", "layers.1.blocks.0.mlp.fc1"],
}


@dataclass
class Some:
    numbers: int = 0
    share: float = 0.0
    tensor: Any = 0.0


@pytest.mark.parametrize("count", [3])
def test_sums_take_what_each_process_has(count):
    def total():
        with processes.joined():
            rank = processes.rank()
            return summed(Some(rank + 1, rank / 4, torch.full((2, 2), float(rank)).double() if rank else 0.0))

    for found in together(count, total):
        assert (found.numbers, found.share) == (6, 0.75)
        assert type(found.numbers) is int
        assert torch.equal(found.tensor, torch.full((2, 2), 3.0, dtype=torch.float64))


@pytest.mark.parametrize("tokens", [None, 4])
@pytest.mark.wide_unless(lambda name: name == "vit")
@pytest.mark.parametrize("name", PATHS)
def test_moments_of_shares_are_those_of_all(name, tokens):
    model = build(name)
    batches = images_for(model, 21).split(4)  # two of the three processes have two batches, and one of those is smaller

    def found():
        with processes.joined():
            sample = None if tokens is None else TokenSample(tokens)
            return collect_moments(model, PATHS[name], own(batches), outputs=True, sample=sample)

    alone = found()
    for moments in together(3, found):
        for path, expected in alone.items():
            for field in fields(expected):
                value, wanted = getattr(moments[path], field.name), getattr(expected, field.name)
                if isinstance(wanted, torch.Tensor):
                    assert (value - wanted).abs().max() <= 1e-12 * wanted.abs().max(), field.name  # measured 0
                else:
                    assert value == pytest.approx(wanted, rel=1e-12), field.name


def test_images_seen_in_turn_are_held_out_as_if_one_process_had_seen_them():
    thumbnails = torch.rand(22, 3, 8, 8)
    photographs = torch.arange(22) // 3
    for known in (None, photographs):
        whole, parts = Seen(), [Seen() for _ in range(3)]
        for i, batch in enumerate(thumbnails.split(4)):
            of = None if known is None else known.split(4)[i]
            for seen in (whole, parts[i % 3]):
                seen.add(batch, of)
        again = Seen.together(parts)
        assert again.sizes == [4, 4, 4, 4, 4, 2]
        assert torch.equal(again.held_out(), whole.held_out())


def test_order():
    assert in_order([[0, 3, 6], [1, 4], [2, 5]]) == list(range(7))


def test_where_broken_files_left_out_batches_each_process_knows_its_own():
    """Two of the first process, none of them missing, and three of the second."""
    items = in_order([["a", "b"], ["c", "d", "e"]])

    def mine():
        with processes.joined():
            return own(items, [2, 3])

    assert together(2, mine) == [["a", "b"], ["c", "d", "e"]]
