"""The images that judge a fit are of other photographs than those it has seen."""

from __future__ import annotations

import copy
import logging

import pytest
import torch
import torch.nn.functional as F
from helpers.models import build, images_for

from compressvit import LowRank, compress
from compressvit.data.photographs import Photographed
from compressvit.fitting.held_out import every_fourth
from compressvit.fitting.reference import Reference

ONE_BY_ONE = torch.arange(160) % 4 == 3


def crops(photographs: int, each: int, seed: int = 0) -> torch.Tensor:
    """Of random smooth photographs, (photographs · each, 3, 32, 32), each after the other: colours around one of its own, which change
    slowly. The crops do not overlap."""
    generator = torch.Generator().manual_seed(seed)
    colour = 2 * torch.randn(photographs, 3, 1, 1, generator=generator)
    coarse = torch.randn(photographs, 3, 4, 4 * each, generator=generator)
    smooth = F.interpolate(0.3 * coarse, size=(32, 32 * each), mode="bicubic") + colour
    return torch.cat(smooth.split(32, dim=3), dim=1).reshape(photographs * each, 3, 32, 32)


def held_out(images: torch.Tensor | list) -> torch.Tensor:
    reference = Reference(build("vit"), images)
    assert len(list(reference.batches()))
    return reference.held_out()


@pytest.mark.parametrize("each", [2, 8, 16])
def test_neighbours_that_are_alike_are_not_on_both_sides(each):
    judges = held_out(crops(160 // each, each))
    photographs = torch.arange(160) // each
    assert not set(photographs[judges].tolist()) & set(photographs[~judges].tolist())
    assert 0.2 <= judges.double().mean() <= 0.3  # measured 0.24 to 0.26


def test_images_that_are_not_alike_are_held_out_as_before():
    assert torch.equal(held_out(crops(160, 1)), ONE_BY_ONE)
    shuffled = crops(20, 8)[torch.randperm(160, generator=torch.Generator().manual_seed(0))]
    assert torch.equal(held_out(shuffled), ONE_BY_ONE)  # of which nothing is known
    assert torch.equal(held_out(torch.randn(160, 3, 32, 32)), ONE_BY_ONE)
    assert torch.equal(held_out(torch.ones(160, 3, 32, 32)), ONE_BY_ONE)
    for few in range(1, 8):
        assert torch.equal(held_out(torch.randn(few, 3, 32, 32)), ONE_BY_ONE[:few])


def test_every_fourth_photograph_is_held_out_where_they_are_known():
    """Whatever the images look like, and whatever the order of the numbers."""
    order = torch.randperm(160, generator=torch.Generator().manual_seed(0))
    photographs = (order // 4) * 7 % 41
    images = crops(20, 8)
    judges = held_out([Photographed(*pair) for pair in zip(images.split(24), photographs.split(24), strict=True)])
    assert not set(photographs[judges].tolist()) & set(photographs[~judges].tolist())
    assert judges.sum() == 40
    alone = [Photographed(*pair) for pair in zip(images.split(24), (order + 5).split(24), strict=True)]
    assert torch.equal(held_out(alone), ONE_BY_ONE)
    pairs = list(
        zip(images.split(24), torch.zeros(160).long().split(24), strict=True)
    )  # a loader's: targets say nothing
    assert torch.equal(held_out(pairs), held_out(images))


def test_of_fewer_than_four_photographs_the_last_is_held_out(caplog):
    assert every_fourth(torch.tensor([5, 5, 2, 2, 2, 5, 9])).tolist() == [False] * 6 + [True]
    caplog.clear()  # what a test before left at a lower level
    with caplog.at_level(logging.INFO, "compressvit"):
        assert not every_fourth(torch.zeros(8)).any()
        every_fourth(torch.arange(8) // 2)
    assert "all 8 calibration images are of one photograph" in caplog.text
    assert "8 calibration images of 4 photographs, of which every fourth judges the fit" in caplog.text


def test_a_fit_depends_on_which_images_are_of_one_photograph():
    """And where each is of its own, knowing it changes no bit."""
    teacher = build("vit")
    images = images_for(teacher, 32)

    def weight(photographs: torch.Tensor | None) -> torch.Tensor:
        batches = images.split(8)
        if photographs is not None:
            batches = [Photographed(*pair) for pair in zip(batches, photographs.split(8), strict=True)]
        student = compress(copy.deepcopy(teacher), [LowRank(rank=4, targets=("mlp.fc1",), metric="inputs")], batches)
        return torch.cat([value.flatten() for value in student.state_dict().values()])

    assert torch.equal(weight(torch.arange(32)), weight(None))
    assert not torch.equal(weight(torch.arange(32) // 2), weight(None))
