"""A fit in order that was interrupted goes on after the blocks it was done with."""

from __future__ import annotations

import pytest
import torch
from helpers.models import build, images_for

from compressvit import LowRank
from compressvit.fitting import walk
from compressvit.fitting.allocate import Budget
from compressvit.fitting.choices import Choices
from compressvit.fitting.reference import Reference
from compressvit.model import surgery
from compressvit.transforms import Shrink
from compressvit.transforms.applying import transform_
from compressvit.transforms.shrink.spec import ShrinkBudget

STEPS = [
    LowRank(budget=Budget(parameters=0.6), metric="outputs", sequential=True),
    Shrink(budget=ShrinkBudget(parameters=0.6), multiple=4),
]


class Stopped(Exception):
    pass


def fitted(step, folder, stop_at="", tokens=4):
    """The student, and how many sums over tokens were made; the fit of a block's first layer raises at `stop_at`."""
    teacher = build("vit")
    student = surgery.deep_copy(teacher)
    choices = Choices(folder / "step.json")
    reference = Reference(surgery.deep_copy(teacher), images_for(teacher, 8), tokens, choices=choices)
    sums = []

    def noting(side, wanted, until, device, original=walk.Side.seen):
        if side.info.path == stop_at:
            raise Stopped
        sums.append((side.info.path, until))
        return original(side, wanted, until, device)

    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(walk.Side, "seen", noting)
        try:
            transform_(student, [step], reference)
        except Stopped:
            return None, sums
    return student, sums


def same(one, other):
    return all(torch.equal(a, b) for a, b in zip(one.state_dict().values(), other.state_dict().values(), strict=True))


@pytest.mark.wide_unless(lambda step: step.name == "low_rank")
@pytest.mark.parametrize("step", STEPS, ids=lambda step: step.name)
def test_it_ends_as_if_it_had_not_been_stopped(step, tmp_path):
    whole, every = fitted(step, tmp_path / "whole")
    _, before = fitted(step, tmp_path / "run", stop_at="blocks.2")
    student, after = fitted(step, tmp_path / "run")
    assert {path for path, _ in before} == {"blocks.0", "blocks.1"}
    assert {path for path, _ in after} == {"blocks.2", "blocks.3"}
    assert before + after == every
    assert same(student, whole)


@pytest.mark.wide
def test_values_of_another_fit_are_not_read(tmp_path):
    fitted(STEPS[0], tmp_path)
    other = LowRank(budget=Budget(parameters=0.7), metric="outputs", sequential=True)
    student, sums = fitted(other, tmp_path)
    assert len({path for path, _ in sums}) == 4
    assert same(student, fitted(other, tmp_path / "alone")[0])


def test_a_damaged_file_is_told_and_its_block_fitted_again(tmp_path, caplog):
    whole, _ = fitted(STEPS[0], tmp_path)
    file = tmp_path / "step.fit" / "blocks.1.safetensors"
    file.write_bytes(file.read_bytes()[:-40])
    student, sums = fitted(STEPS[0], tmp_path)
    assert {path for path, _ in sums} == {"blocks.1"}
    assert "blocks.1 is fitted again" in caplog.text
    assert same(student, whole)
