"""An optimiser's state after a removal: what has a weight's shape is cut like it, and what has none stays."""

from __future__ import annotations

import pytest
import torch
from helpers.models import build

from compressvit.training.phases.prune.neurons import prunable_plan, shrink_
from compressvit.transforms import Adapters
from compressvit.transforms.applying import compress

KEPT = torch.tensor([1, 3])


def state_of(parameter: torch.Tensor, kind: str) -> dict:
    values = torch.arange(parameter.numel(), dtype=torch.float32).reshape(parameter.shape)
    return {
        "adam": {"step": torch.tensor(7.0), "exp_avg": values, "exp_avg_sq": 2 * values},
        "with nothing yet": {"step": 7, "momentum_buffer": None, "exp_avg": values},
        "of one number": {"step": torch.ones(1), "exp_avg": values, "name": "x"},
        "sums over rows": {"step": 7, "exp_avg": values, "rows": values.sum(-1)},
    }[kind]


@pytest.mark.parametrize("kind", ["adam", "with nothing yet", "of one number", "sums over rows"])
def test_moments_are_cut_like_the_weight(kind):
    model = compress(build("vit"), [Adapters(width=4)])
    plan = prunable_plan(model)
    path = next(iter(plan.widths))
    names = {side: f"{plan.prefix(path)}.{side}.weight" for side in ("down", "up")}
    before = {name: state_of(model.get_parameter(name), kind) for name in names.values()}
    moments = {name: dict(state) for name, state in before.items()}
    keep = {p: KEPT if p == path else torch.arange(width) for p, width in plan.widths.items()}
    shrink_(model, keep, moments)
    for dim, name in enumerate(names.values()):
        if kind == "sums over rows":  # they do not tell the neurons apart
            assert moments[name] == {}
            continue
        assert moments[name].keys() == before[name].keys()
        for key, value in before[name].items():
            if isinstance(value, torch.Tensor) and value.ndim == 2:
                value = value.index_select(dim, KEPT)
                assert torch.equal(moments[name][key], value)
                assert value.shape == model.get_parameter(name).shape
            else:
                assert moments[name][key] is value
