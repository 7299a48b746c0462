"""Every model of timm that is of a family: what its family says of it, and the plans of what changes it most. Takes minutes."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import timm
import torch
from torch import nn

from compressvit.errors import UserError
from compressvit.model import ties
from compressvit.model.backbone import describe, family_of
from compressvit.model.family import FAMILIES, Family
from compressvit.model.weights import build
from compressvit.transforms import Adapters, LowRank, Narrow, Quantise, Transform
from compressvit.transforms.applying import apply_plans

STEPS: tuple[Transform, ...] = (LowRank(rank=8), Narrow(neurons=0.5), Adapters(width=8), Quantise(bits=8))


def names(family: Family) -> list[str]:
    """Those of timm's modules in which the classes of a family are."""
    modules = {kind.__module__.rpartition(".")[2] for kind in family.models} & set(timm.list_modules())
    return [name for module in sorted(modules) for name in timm.list_models(module=module)]


OF_TIMM = [(name, word) for word, family in FAMILIES.items() if family.body is None for name in names(family)]


def test_there_are_as_many_as_were_counted():
    assert len(OF_TIMM) >= 335  # timm 1.0.31 has 335


def refusal(function: Callable[..., object], *args: object) -> str | None:
    """The sentence with which something is refused."""
    try:
        function(*args)
    except UserError as error:
        return str(error)
    return None


def changed(step: Transform, model: nn.Module) -> None:
    apply_plans(model, [step.plan(model)])


@pytest.mark.slow
@pytest.mark.parametrize(("name", "word"), OF_TIMM)
def test_it_is_planned(name, word):
    model = build(name, device="meta")
    if family_of(model) is not FAMILIES[word]:  # a class of its own in the same module
        pytest.skip(f"{type(model).__name__} is not of the family {word}")
    if said := refusal(describe, model):  # blocks of a kind of their own
        assert name in said
        return
    whole, blocks = ties.count_parameters(model), describe(model).blocks
    assert [block.index for block in blocks] == list(range(len(blocks)))
    for step in STEPS:
        copy = build(name, device="meta")
        if said := refusal(changed, step, copy):
            assert step.name in said
            continue
        assert (ties.count_parameters(copy) != whole) == (step.name != "quantise")
        assert all(tensor.device == torch.device("meta") for tensor in copy.state_dict().values())
