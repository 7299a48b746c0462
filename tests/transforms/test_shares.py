"""Students that several processes fit, each on its share of the images, are those that one process fits."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from helpers.models import build, images_for, outputs
from helpers.runs import undrawn
from helpers.together import together

from compressvit import LORS, AdaptFormer, LowRank, Multiplex, Narrow, Quantise, Shrink, processes
from compressvit.errors import UserError
from compressvit.fitting import walk
from compressvit.fitting.choices import Choices
from compressvit.fitting.reference import Reference
from compressvit.fitting.shares import own
from compressvit.model import surgery
from compressvit.transforms.applying import transform_
from compressvit.transforms.shares import Shares

STEPS = {
    "low_rank": [LowRank(budget={"parameters": 0.6})],
    "lors": [LORS(share=2, rank=4)],
    "narrow": [Narrow(neurons=0.5, heads=1)],
    "shrink": [Shrink(budget={"parameters": 0.6})],
    "shrink, quantise": [Shrink(budget={"parameters": 0.6}), Quantise(bits=4)],
    "multiplex, lors": [Multiplex(share=2, mlp_conv=3), LORS(share=2, rank=8)],
    "adaptformer, low_rank": [AdaptFormer(width=4), LowRank(rank=8)],
}
CPU = torch.device("cpu")
BATCH = 16


def fitted(name: str, steps: list, images: torch.Tensor, tokens: int | None = None, folder: Path | None = None):
    """The student, in each process that has it, and how many images this process was given."""
    given = []

    def share():
        given.append(0)
        for batch in own(images.split(BATCH)):
            given[-1] += len(batch)
            yield batch

    with processes.joined(), undrawn():
        student = build(name)
        shares = Shares(surgery.deep_copy(student), share, tokens, CPU)
        torch.manual_seed(0)
        choices = Choices(folder and folder / "step.json")
        reference = Reference(build(name), share, tokens, choices=choices, asks=shares.asked)
        ledger = processes.led_for(lambda: transform_(student, steps, reference), [], shares.help)
    return student, ledger, given


@pytest.mark.wide_unless(lambda name, steps: name == "vit" and steps in ("low_rank", "shrink, quantise"))
@pytest.mark.parametrize("steps", STEPS)
@pytest.mark.parametrize("name", ["vit", "swin"])
def test_a_student_fitted_by_several_processes_is_that_of_one(name, steps):
    images = images_for(build(name), 72)
    tokens = 6 if name == "vit" else None
    expected, entries, whole = fitted(name, STEPS[steps], images, tokens)
    (student, ledger, mine), (_, _, theirs) = together(2, fitted, name, STEPS[steps], images, tokens)
    wanted = outputs(expected, images)
    error = (outputs(student, images) - wanted).norm() / wanted.norm()
    assert error <= 1e-6  # measured 0: float64 holds sums of float32 terms exactly, in any order
    assert [(entry.path, entry.change) for entry in ledger] == [(entry.path, entry.change) for entry in entries]
    assert set(whole) == {72}
    assert len(mine) == len(theirs) == len(whole)
    assert set(mine) == {40}
    assert set(theirs) == {32}


@pytest.mark.parametrize("which", ["the leader's", "another's"])
def test_what_one_process_finds_wrong_ends_all(which):
    """An image that is not finite is seen by one of them alone, in the middle of a pass."""
    images = images_for(build("vit"), 48)
    images[3 if which == "the leader's" else BATCH] = float("nan")

    def refused():
        with pytest.raises(UserError) as told:
            fitted("vit", STEPS["low_rank"], images)
        return str(told.value)

    first, second = together(2, refused)
    mine, theirs = (first, second) if which == "the leader's" else (second, first)
    assert "not finite on the calibration images" in mine
    assert "another process of the run has ended" in theirs


def test_a_process_without_any_image_is_told_once():
    images = images_for(build("vit"), BATCH)

    def refused():
        with pytest.raises(UserError) as told:
            fitted("vit", STEPS["low_rank"], images)
        return str(told.value), type(told.value).__name__

    first, second = together(2, refused)
    assert "no calibration image of process 1 can be read" in first[0]
    assert second[1] == "ToldElsewhere"


def test_blocks_that_were_fitted_before_are_taken_over(tmp_path, monkeypatch):
    """The leader has their values from a file, and the others from the leader."""
    images, steps, advance = images_for(build("vit"), 48), STEPS["low_rank"], walk.Side.advance

    def stopped(side, following, device):
        if following.path == "blocks.2":
            raise UserError("stopped")
        advance(side, following, device)

    def ended():
        with pytest.raises(UserError):
            fitted("vit", steps, images, folder=tmp_path)

    with monkeypatch.context() as patched:
        patched.setattr(walk.Side, "advance", stopped)
        together(2, ended)
    assert {file.stem for file in (tmp_path / "step.fit").iterdir()} == {"blocks.0", "blocks.1"}
    (again, *_), _ = together(2, fitted, "vit", steps, images, None, tmp_path)
    (whole, *_), _ = together(2, fitted, "vit", steps, images)
    assert all(torch.equal(a, b) for a, b in zip(again.state_dict().values(), whole.state_dict().values(), strict=True))
