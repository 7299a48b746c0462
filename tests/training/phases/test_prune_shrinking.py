"""Taking neurons out of adapters; which ones is in test_prune.py."""

from __future__ import annotations

import copy

import pytest
import torch
from helpers.adapted import FAMILIES, SPECS, adapted
from helpers.models import build, gap, outputs, randomise
from torch import nn

from compressvit.artifacts import artifact
from compressvit.model import surgery, ties
from compressvit.model.backbone import input_size
from compressvit.model.cost import macs
from compressvit.training.phases.prune.neurons import (
    prices,
    prunable_plan,
    shrink_,
)
from compressvit.transforms import SSF, Multiplex, RepAdapter
from compressvit.transforms.record import compression_of

UNITS = {"neurons": lambda p: 1, "parameters": lambda p: p.parameters, "macs": lambda p: p.macs}
every_kind = pytest.mark.parametrize("kind", SPECS)
every_family = pytest.mark.parametrize("family", FAMILIES)


def some(model: nn.Module, seed: int = 0) -> dict[str, torch.Tensor]:
    """Every other neuron or so; all of the first adapter, and of the second as few as it may keep."""
    plan, generator = prunable_plan(model), torch.Generator().manual_seed(seed)
    keep = {}
    for i, (path, b) in enumerate(plan.bottlenecks(model).items()):
        hidden = b.up.in_features
        count = (hidden, plan.least)[i] if i < 2 else max(1, hidden // 2)
        keep[path] = torch.randperm(hidden, generator=generator)[:count].sort().values
    return keep


@torch.no_grad()
def mask_(model: nn.Module, keep: dict[str, torch.Tensor]) -> nn.Module:
    """Set the columns of U to zero that the removed neurons feed."""
    for path, bottleneck in prunable_plan(model).bottlenecks(model).items():
        gone = torch.ones(bottleneck.up.in_features, dtype=torch.bool)
        gone[keep[path]] = False
        bottleneck.up.weight[:, gone] = 0
    return model


def added(model: nn.Module) -> int:
    """Parameters that the ledger says were added."""
    return sum(entry.after - entry.before for entry in compression_of(model).ledger)


@pytest.mark.wide_unless(
    lambda family, kind: (family, kind) in (("vit", "adaptformer"), ("vit", "biased"), ("convnext", "adapters"))
)
@every_kind
@every_family
def test_shrunk_is_masked(family, kind, tmp_path):
    model = adapted(family, SPECS[kind])
    plan = prunable_plan(model)
    full, price, keep = copy.deepcopy(model), prices(model, plan), some(model)
    masked = mask_(copy.deepcopy(model), keep)
    widths = shrink_(model, keep)
    assert widths == {path: len(chosen) for path, chosen in keep.items()}
    assert gap(model, masked) < 1e-6  # measured up to 9e-8
    assert gap(model, full) > 1e-3  # measured from 1.5e-3

    # What it saves is what the neurons cost.
    for unit, count in (("parameters", ties.count_parameters), ("macs", lambda m: macs(m, input_size(m)))):
        gone = sum(UNITS[unit](price[path]) * (plan.widths[path] - n) for path, n in widths.items())
        assert count(full) - count(model) == gone > 0
    for path, bottleneck in prunable_plan(model).bottlenecks(model).items():
        assert bottleneck.down.weight.shape[0] == bottleneck.up.weight.shape[1] == widths[path]
        assert (bottleneck.down.out_features, bottleneck.up.in_features) == (widths[path],) * 2
        assert all(p.requires_grad and p.is_leaf for p in bottleneck.parameters())

    # The record and the artifact say the same, without any images.
    assert prunable_plan(model).widths == widths
    ledger = compression_of(model).ledger
    assert added(model) == ties.count_parameters(model) - ties.count_parameters(build(family))
    for entry in ledger:
        left = {0: "; pruned away", 1: "; 1 neuron left"}.get(
            widths[entry.path], f"; {widths[entry.path]} neurons left"
        )
        assert entry.change.endswith(left)
    loaded = artifact.load(artifact.save(model, tmp_path / "student"))
    assert prunable_plan(loaded).widths == widths
    assert torch.equal(outputs(loaded), outputs(model))


@every_family
def test_an_empty_adapter_leaves_the_forward_pass(family):
    model, plain = adapted(family), build(family)
    keep = some(model)
    empty = next(path for path, chosen in keep.items() if not len(chosen))
    assert type(model.get_submodule(empty)) is not type(plain.get_submodule(empty))
    shrink_(model, keep)
    assert type(model.get_submodule(empty)) is type(plain.get_submodule(empty))
    assert not [key for key in model.state_dict() if key.startswith(f"{empty}.adapter")]
    assert not hasattr(model.get_submodule(empty), "adapter")
    assert empty not in prunable_plan(model).bottlenecks(model)


def test_no_adapter_at_all_is_the_plain_model(tmp_path):
    model, plain = adapted("vit"), build("vit")
    shrink_(model, {path: torch.arange(0) for path in prunable_plan(model).widths})
    assert torch.equal(outputs(model), outputs(plain))
    assert model.state_dict().keys() == plain.state_dict().keys()
    assert torch.equal(outputs(artifact.load(artifact.save(model, tmp_path / "student"))), outputs(plain))


@pytest.mark.wide_unless(lambda around: around[0])
@pytest.mark.parametrize(
    "around", [(Multiplex(share=2), None), (None, SSF()), (None, RepAdapter(width=4, scale=0.5))], ids=str
)
def test_it_shrinks_between_other_transforms(around, tmp_path):
    before, after = around
    model = adapted("vit", *[s for s in (before, SPECS["adapters"], after) if s])
    others = [p for p in model.parameters() if p.requires_grad]
    randomise(nn.ParameterList(others), 0.02)
    plain, keep = build("vit"), some(model)
    masked = mask_(copy.deepcopy(model), keep)
    for _ in range(2):  # a second removal finds the first in the record
        shrink_(model, keep)
        keep = {p: torch.arange(n) for p, n in prunable_plan(model).widths.items() if n}
    assert gap(model, masked) < 1e-6  # measured up to 1.3e-7
    assert added(model) == ties.count_parameters(model) - ties.count_parameters(plain)
    assert torch.equal(outputs(artifact.load(artifact.save(model, tmp_path / "student"))), outputs(model))


def test_it_shrinks_a_skeleton():
    model = adapted("vit")
    empty = surgery.skeleton(model)
    assert shrink_(empty, some(model)) == shrink_(model, some(model))
    assert {n: p.shape for n, p in empty.named_parameters()} == {n: p.shape for n, p in model.named_parameters()}
