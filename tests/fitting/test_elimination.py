"""Removing inputs of a layer: what it costs is the error of the best layer without them."""

from __future__ import annotations

import pytest
import torch

from compressvit.fitting.elimination import eliminate

LEAST = 1e-6  # the ridge that is always there


def problem(inputs: int = 12, outputs: int = 5, tokens: int = 200, seed: int = 0):
    generator = torch.Generator().manual_seed(seed)
    z = torch.randn(tokens, inputs, generator=generator, dtype=torch.float64)
    z = z @ torch.randn(
        inputs, inputs, generator=generator, dtype=torch.float64
    )  # inputs that say something of each other
    weight = torch.randn(outputs, inputs, generator=generator, dtype=torch.float64)
    return weight, z.mT @ z / tokens


@pytest.mark.parametrize("at_once", [1, 4])
def test_the_error_is_that_of_the_best_layer_without_them(at_once):
    weight, moment = problem()
    whole = moment + LEAST * moment.diagonal().mean() * torch.eye(12, dtype=torch.float64)
    found = eliminate(weight, moment, 0.0, [12, 9, 4, 1], at_once=at_once)
    assert list(found) == [12, 9, 4, 1]
    assert found[12].error == 0
    assert found[12].weight.equal(weight)
    for width, removal in found.items():
        kept = removal.kept
        best = torch.linalg.solve(whole[kept][:, kept], whole[kept] @ weight.mT).mT
        wrong = weight.clone()
        wrong[:, kept] -= best
        torch.testing.assert_close(removal.weight, best)
        error = (wrong @ whole * wrong).sum().item()
        assert len(kept) == width
        assert removal.error == pytest.approx(error, rel=1e-9, abs=1e-12)


def test_less_is_left_the_more_it_costs():
    weight, moment = problem()
    errors = [removal.error for removal in eliminate(weight, moment, 1e-3, range(1, 13)).values()]
    assert errors == sorted(errors)
    assert errors[0] == 0


def test_what_others_say_as_well_goes_first_and_costs_nothing():
    weight, moment = problem(inputs=6)
    twice = torch.cat([torch.eye(6, dtype=torch.float64)] * 2, dim=1)  # every input twice
    removal = eliminate(torch.cat([weight, weight], dim=1), twice.mT @ moment @ twice, 0.0, [6], at_once=1)[6]
    assert sorted((removal.kept % 6).tolist()) == list(range(6))
    size = (2 * weight @ moment * 2 * weight).sum().item()
    assert removal.error < 1e-4 * size  # measured 4e-6 of it: the ridge's


def test_heads_go_as_a_whole():
    weight, moment = problem(inputs=12)
    removal = eliminate(weight, moment, 1e-3, [8, 4], group=4)[4]
    assert removal.kept.tolist() in ([0, 1, 2, 3], [4, 5, 6, 7], [8, 9, 10, 11])
    others = [
        eliminate(weight[:, order], moment[order][:, order], 1e-3, [4], group=4)[4].error
        for order in (torch.arange(12).roll(4), torch.arange(12).roll(8))
    ]
    assert others == pytest.approx([removal.error] * 2)  # wherever in the layer they stand
