"""Weights in few bits: the nearest codes are the nearest, error feedback loses less, and no round of improvements loses more."""

from __future__ import annotations

import itertools

import pytest
import torch

from compressvit.fitting.rounding import Feedback, groups_of, nearest, values_of

GROUP = 16


def some(outputs: int = 24, inputs: int = 40, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    """A weight, and the moment of correlated inputs."""
    generator = torch.Generator().manual_seed(seed)
    few = torch.randn(500, 8, generator=generator) @ torch.randn(8, inputs, generator=generator)
    x = few + 0.5 * torch.randn(500, inputs, generator=generator)
    return torch.randn(outputs, inputs, generator=generator), x.mT @ x / len(x)


@pytest.mark.parametrize(
    ("inputs", "group", "expected"), [(64, 64, (1, 64)), (588, 64, (10, 59)), (40, 64, (1, 40)), (65, 64, (2, 33))]
)
def test_groups_are_as_equal_as_can_be(inputs, group, expected):
    assert groups_of(inputs, group) == expected


@pytest.mark.parametrize("bits", [2, 3, 4, 5, 8])
def test_every_number_has_the_nearest_code(bits):
    weight, _ = some()
    found = nearest(weight, bits, GROUP)
    count, size = groups_of(40, GROUP)
    assert found.scales.shape == (24, count)
    assert found.codes.max().item() < 2**bits
    scales = found.scales.float().repeat_interleave(size, dim=1)[:, :40]
    for other in range(2**bits):
        there = (other - 2 ** (bits - 1)) * scales
        assert ((weight - values_of(found, bits, GROUP)).abs() <= (weight - there).abs() + 1e-6).all()


def test_scales_cut_off_what_is_not_worth_its_place():
    weight, _ = some()
    found = values_of(nearest(weight, 3, GROUP), 3, GROUP)
    size = groups_of(40, GROUP)[1]
    widest = torch.nn.functional.pad(weight, (0, 2)).view(24, -1, size).abs().amax(dim=2) / 3.5
    scales = widest.repeat_interleave(size, dim=1)[:, :40]
    uncut = (weight / scales).round().clamp(-4, 3) * scales
    assert (weight - found).norm() < 0.9 * (weight - uncut).norm()  # 0.77


def test_without_correlations_feedback_changes_nothing():
    weight, _ = some()
    plain, fed = nearest(weight, 3, GROUP), Feedback(torch.eye(40), 1e-2).round(weight, 3, GROUP, sweeps=0)
    assert torch.equal(plain.codes, fed.codes)
    assert torch.equal(plain.scales, fed.scales)


@pytest.mark.parametrize("bits", [3, 4])
def test_feedback_loses_less_of_the_outputs_and_rounds_less_still(bits):
    weight, moment = some()
    feedback = Feedback(moment, 1e-2)
    plain = weight - values_of(nearest(weight, bits, GROUP), bits, GROUP)
    errors = [feedback.squared_errors(plain)]
    for sweeps in range(4):
        errors.append(
            feedback.squared_errors(weight - values_of(feedback.round(weight, bits, GROUP, sweeps), bits, GROUP))
        )
    assert errors[1].sum() < 0.4 * errors[0].sum()  # 0.21 and 0.14
    assert errors[3].sum() < 0.95 * errors[1].sum()  # 0.64 and 0.84
    for before, after in itertools.pairwise(errors[1:]):
        assert (after <= before * (1 + 1e-4)).all()


def test_no_single_code_can_be_improved_after_many_rounds():
    weight, moment = some(outputs=3, inputs=12)
    feedback = Feedback(moment, 1e-2)
    found = feedback.round(weight, 2, 8, sweeps=20)
    least = feedback.squared_errors(weight - values_of(found, 2, 8))
    for i in range(12):
        for code in range(4):
            codes = found.codes.clone()
            codes[:, i] = code
            assert (
                feedback.squared_errors(weight - values_of(found._replace(codes=codes), 2, 8)) >= least - 1e-5
            ).all()


def test_an_input_that_is_always_zero_does_no_harm():
    weight, moment = some()
    moment[:, 5] = moment[5] = 0
    found = Feedback(moment, 1e-2).round(weight, 4, GROUP, sweeps=2)
    assert found.scales.isfinite().all()
    lost = weight - values_of(found, 4, GROUP)
    assert lost[:, 5].norm() < 0.2 * weight[:, 5].norm()  # 0.13
    assert lost.norm() < 0.2 * weight.norm()  # 0.10
    nothing = Feedback(torch.zeros(40, 40), 1e-2).round(torch.zeros(24, 40), 4, GROUP, sweeps=2)
    assert values_of(nothing, 4, GROUP).abs().max() < 1e-6
