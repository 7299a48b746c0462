"""What the neurons of real adapters cost, and that a budget is kept by the parameters a model really trains."""

from __future__ import annotations

import itertools

import pytest
from helpers.models import build

from compressvit.errors import UserError
from compressvit.training.phases.prune.neurons import amounts, cycles, prices, prunable_plan, scores, select, shrink_
from compressvit.training.phases.prune.spec import Prune, PruneTarget
from compressvit.transforms import Adapters, AdaptFormer
from compressvit.transforms.applying import compress
from compressvit.transforms.record import trained_parameters

SPECS = {
    "adapters": Adapters(ratio=0.25),
    "biased": Adapters(width=6, bias=True),
    "adaptformer": AdaptFormer(width=6),
    "learnable": AdaptFormer(width=6, scale="learnable"),
}


def prune(**target) -> Prune:
    return Prune(target=PruneTarget(**target), rate=0.4)


def test_three_units_are_three_targets():
    """In Swin a neuron of a later stage costs more parameters, and one of an earlier stage more MACs."""
    model = compress(build("swin"), [SPECS["adapters"]])
    plan = prunable_plan(model)
    price, start = prices(model, plan), dict(plan.widths)
    first, last = price["layers.0.blocks.0.mlp"], price["layers.1.blocks.0.mlp"]
    assert (first.parameters, last.parameters) == (2 * 16, 2 * 32)
    assert (first.macs, last.macs) == (2 * 16 * 16**2, 2 * 32 * 8**2)
    kept = [
        select(scores(model, plan, "magnitude"), 9, prune(**{u: 0.3}), start, price)
        for u in ("neurons", "parameters", "macs")
    ]
    widths = [{path: len(chosen) for path, chosen in keep.items()} for keep in kept]
    assert all(a != b for a, b in itertools.combinations(widths, 2))


@pytest.mark.wide_unless(lambda kind, asked: asked in (0.5, "number") and kind in ("biased", "learnable"))
@pytest.mark.parametrize("asked", [0.35, 0.5, 0.9, "number"])
@pytest.mark.parametrize("scope", ["global", "local"])
@pytest.mark.parametrize("kind", SPECS)
def test_a_budget_of_parameters_holds_for_what_is_trained(kind, scope, asked):
    """Biases of the upper projections and learnable scales count, though no neuron takes them along."""
    model = compress(build("vit"), [SPECS[kind]])
    plan = prunable_plan(model)
    price, start = prices(model, plan), dict(plan.widths)
    have = trained_parameters(model)["trained_adapter"]
    spec = prune(parameters=have * 2 // 3 if asked == "number" else asked).model_copy(update={"scope": scope})
    unit, wanted, there = amounts(spec.target, start, price)
    assert (unit, there) == ("parameters", have)
    assert wanted == (have * 2 // 3 if asked == "number" else int(asked * have))
    last = cycles(spec.target, spec.rate, start, price, scope, plan.least)
    shrink_(model, select(scores(model, plan, "random", seed=3), last, spec, start, price, plan.least))
    left = trained_parameters(model)["trained_adapter"]
    dearest = max(p.parameters for p in price.values())
    assert left <= wanted < left + (dearest if scope == "global" else len(price) * dearest)


def test_the_least_budget_of_adapters_with_biases_is_one_neuron_each():
    model = compress(build("vit"), [SPECS["adaptformer"]])
    plan = prunable_plan(model)
    price, start = prices(model, plan), dict(plan.widths)
    least = sum(p.parameters + p.fixed for p in price.values())
    assert cycles(prune(parameters=least).target, 0.4, start, price, "global", plan.least)
    with pytest.raises(UserError, match=rf"each of \d+ adapters keeps 1; give at least {least:,} of"):
        cycles(prune(parameters=least - 1).target, 0.4, start, price, "global", plan.least)
