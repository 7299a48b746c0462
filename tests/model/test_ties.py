"""Tied parameters: what keeps a tie, what breaks it and who says so, and what training does with it."""

from __future__ import annotations

import copy
import functools

import pytest
import torch
from helpers.models import BACKBONES, build, images_for, outputs
from timm.models._manipulate import reinit_non_persistent_buffers
from torch import nn

from compressvit.artifacts import artifact
from compressvit.errors import UserError
from compressvit.model import surgery, ties
from compressvit.training.optimisation import build_average, build_optimizer
from compressvit.training.phases.finetune import Finetune
from compressvit.transforms import IRPE, Multiplex
from compressvit.transforms.applying import compress
from compressvit.transforms.record import compression_of

KINDS = ("vit", "deit_distilled", "swin")


def student_of(name: str) -> nn.Module:
    """Half of the blocks share with the other half, and have private transforms that do something."""
    return surgery.deep_copy(_student_of(name))


@functools.cache
def _student_of(name: str) -> nn.Module:
    torch.manual_seed(0)
    return compress(build(name), [Multiplex(share=2, mixing_bias=True, mlp_conv=3, form="reference")])


def declared(model: nn.Module) -> list[list[str]]:
    return compression_of(model).ties


# -------------------------------------------------------------------------------------------------------- tie and count


def test_tie_makes_one_parameter_under_every_name():
    model = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3), nn.Linear(3, 3))
    first = model[0].weight
    ties.tie(model, [["0.weight", "2.weight"]])
    assert model[2].weight is first is model[0].weight
    assert model[1].weight is not first
    assert ties.tied_groups(model) == [["0.weight", "2.weight"]]
    assert list(model.state_dict()) == [f"{i}.{n}" for i in range(3) for n in ("weight", "bias")]


def test_tie_refuses_other_shapes_and_then_ties_nothing():
    model = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3), nn.Linear(3, 4))
    with pytest.raises(
        UserError, match=r"^0\.weight \(3, 3\) and 2\.weight \(4, 3\) are of different shapes .*another `share`"
    ):
        ties.tie(model, [["0.bias", "1.bias"], ["0.weight", "2.weight"]])
    assert ties.tied_groups(model) == []


@pytest.mark.wide_unless(lambda name: name in ("vit", "swin"))
@pytest.mark.parametrize("name", BACKBONES)
def test_a_shared_tensor_is_counted_once(name):
    model = student_of(name)
    by_name = dict(model.named_parameters(remove_duplicate=False))
    aliases = [alias for group in declared(model) for alias in group[1:]]
    assert len(aliases) >= 2 * 8
    state, buffers = model.state_dict(), dict(model.named_buffers())
    statistics = state.keys() & buffers.keys()  # of CvT's batch norms
    assert all("conv_proj" in name for name in statistics)
    whole = sum(tensor.numel() for name, tensor in state.items() if name not in statistics)
    assert whole == sum(p.numel() for p in by_name.values())
    assert ties.count_parameters(model) == whole - sum(by_name[a].numel() for a in aliases)
    unique = ties.unique_state(model)
    assert sum(t.numel() for name, t in unique.items() if name not in statistics) == ties.count_parameters(model)
    assert unique.keys() - statistics == by_name.keys() - set(aliases)
    assert statistics <= unique.keys()


def test_count_at_paths_counts_a_tensor_at_its_first_path():
    model = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3), nn.Linear(3, 3))
    ties.tie(model, [["0.weight", "1.weight"]])
    assert ties.count_at_paths(model, ["0", "1", "2"]) == {"0": 12, "1": 3, "2": 12}
    assert ties.count_at_paths(model, ["2", "1"]) == {"2": 12, "1": 12}


def test_buffers_stay_in_the_unique_state():
    model = nn.Sequential(nn.BatchNorm1d(3), nn.BatchNorm1d(3))
    ties.tie(model, [["0.weight", "1.weight"]])
    assert ties.unique_state(model).keys() == model.state_dict().keys() - {"1.weight"}


# ------------------------------------------------------------------------------------------------ what keeps and breaks

KEEPS = {
    "deepcopy": lambda model, folder: copy.deepcopy(model),
    "to(dtype)": lambda model, folder: model.to(torch.float64),
    "half": lambda model, folder: model.bfloat16(),
    "to(device)": lambda model, folder: model.to("cpu"),
    "train": lambda model, folder: model.train(),
    "requires_grad_": lambda model, folder: model.requires_grad_(False),
    "skeleton": lambda model, folder: surgery.skeleton(model),
    "save and load": lambda model, folder: artifact.load(artifact.save(model, folder / "student")),
    "load_state_dict": lambda model, folder: (model.load_state_dict(copy.deepcopy(model.state_dict())), model)[1],
    "reset_classifier": lambda model, folder: (model.reset_classifier(3), model)[1],
    "zero_grad and step": lambda model, folder: _one_step(model),
}


def _one_step(model: nn.Module) -> nn.Module:
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    model(images_for(model)).sum().backward()
    optimizer.step()
    optimizer.zero_grad()
    return model


@pytest.mark.wide_unless(lambda name: name == "vit")
@pytest.mark.parametrize("operation", KEEPS)
@pytest.mark.parametrize("name", KINDS)
def test_what_keeps_the_ties(name, operation, tmp_path):
    model = student_of(name)
    before = ties.tied_groups(model)
    assert before == declared(model)
    after = KEEPS[operation](model, tmp_path)
    assert ties.tied_groups(after) == before
    ties.check(after, declared(after))


def _assign(model: nn.Module) -> nn.Module:
    model.load_state_dict({name: tensor.clone() for name, tensor in model.state_dict().items()}, assign=True)
    return model


BREAKS = {
    "to('meta')": lambda model: model.to("meta"),
    "to_empty()": lambda model: surgery.skeleton(model).to_empty(device="cpu"),
    "load_state_dict(assign=True)": _assign,
}


@pytest.mark.parametrize("operation", BREAKS)
@pytest.mark.parametrize("name", KINDS)
def test_what_breaks_the_ties_is_said_and_mended(name, operation, tmp_path):
    model = student_of(name)
    before = declared(model)
    model = BREAKS[operation](model)
    assert ties.tied_groups(model) == []
    canonical, alias = before[0][:2]
    with pytest.raises(UserError) as refusal:
        ties.check(model, before)
    assert str(refusal.value).startswith(f"{alias} no longer shares its tensor with {canonical}")
    assert operation in str(refusal.value)
    assert "compressvit.ties.retie(model)" in str(refusal.value)
    worse = "has no values to save" if operation == "to('meta')" else "no longer shares its tensor"
    with pytest.raises(UserError, match=worse):
        artifact.save(model, tmp_path / "student")
    assert not list(tmp_path.iterdir())
    ties.retie(model)
    assert ties.tied_groups(model) == before
    ties.check(model, before)


def test_a_swin_of_another_size_must_be_retied(tmp_path):
    model = student_of("swin")
    before = declared(model)
    model.set_input_size(img_size=(64, 64))
    with pytest.raises(UserError, match=r"relative_position_bias_table no longer shares.*set_input_size\(\)"):
        ties.check(model, before)
    resized = outputs(model)
    ties.retie(model)
    assert ties.tied_groups(model) == before
    assert torch.equal(outputs(model), resized), "equal tables were resized to equal tables"
    again = artifact.load(artifact.save(model, tmp_path / "student"))
    assert torch.equal(outputs(again), resized)


def test_a_shared_tensor_that_is_gone_is_named(tmp_path):
    model = student_of("vit")
    model.prune_intermediate_layers([0])
    with pytest.raises(UserError, match=r"^blocks\.1\.attn\.qkv\.weight, which is shared, is gone.*before compressing"):
        artifact.save(model, tmp_path / "student")


@pytest.mark.parametrize("name", ["vit", "swin"])
def test_a_model_through_the_meta_device_comes_back(name):
    torch.manual_seed(0)
    extra = [IRPE()] if name == "vit" else []
    model = compress(build(name), [Multiplex(share=2, mlp_conv=3, form="reference"), *extra])
    state, expected = model.state_dict(), outputs(model)
    state = {n: t.clone() for n, t in state.items()}
    model.to("meta").to_empty(device="cpu")
    ties.retie(model)
    model.load_state_dict(state)
    reinit_non_persistent_buffers(model)
    assert torch.equal(outputs(model), expected)


def test_retie_keeps_the_value_of_the_first_name():
    model = student_of("vit")
    first, second = model.blocks[0].mlp.fc1, model.blocks[1].mlp.fc1
    second.weight = nn.Parameter(torch.zeros_like(second.weight))
    expected = first.weight.clone()
    ties.retie(model)
    assert second.weight is first.weight
    assert torch.equal(first.weight, expected)


def test_retie_leaves_a_plain_model_alone():
    model = build("vit")
    before = list(model.parameters())
    ties.retie(model)
    assert all(a is b for a, b in zip(before, model.parameters(), strict=True))


# ------------------------------------------------------------------------------------------------------------- training


@pytest.mark.parametrize("name", KINDS)
def test_gradient_of_a_shared_tensor_is_the_sum_over_its_uses(name):
    model = student_of(name).double()
    separate = copy.deepcopy(model)
    for group in declared(model):
        for alias in group[1:]:
            path, _, tail = alias.rpartition(".")
            parameter = separate.get_parameter(alias)
            setattr(separate.get_submodule(path), tail, nn.Parameter(parameter.detach().clone()))
    assert ties.tied_groups(separate) == []
    images = images_for(model).double()
    for m in (model, separate):
        m(images).square().sum().backward()
    assert len(declared(model)) >= 2 * 8
    for group in declared(model):
        gradients = [separate.get_parameter(n).grad for n in group]
        shared = model.get_parameter(group[0]).grad
        assert (shared - sum(gradients)).abs().max() <= 1e-12 * shared.abs().max()  # seen 0.0
        if group[0].endswith("fc2.weight"):
            assert (shared - gradients[0]).abs().max() > 1e-3 * shared.abs().max(), "one use alone is not the sum"


@pytest.mark.parametrize("name", KINDS)
def test_average_moves_a_shared_tensor_once_a_step(name):
    decay, model = 0.9, student_of(name)
    average = build_average(model, decay)
    assert ties.tied_groups(average.module) == declared(model)
    uses = {group[0]: len(group) for group in declared(model)}
    assert len(uses) >= 2 * 8
    expected: dict[str, torch.Tensor] = {}
    per_use: dict[str, torch.Tensor] = {}  # what averaging once a use, as timm's ModelEmaV3 does, would give
    generator = torch.Generator().manual_seed(0)
    for step in range(4):
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(torch.randn(parameter.shape, generator=generator))
        average.update(model)
        for n, p in model.named_parameters():
            rate = average.decay_at(step)
            now, slow = p.detach().clone(), rate ** uses.get(n, 1)
            expected[n] = now if step == 0 else rate * expected[n] + (1 - rate) * now
            per_use[n] = now if step == 0 else slow * per_use[n] + (1 - slow) * now
    averaged = dict(average.module.named_parameters())
    assert averaged.keys() == expected.keys()
    for n, value in expected.items():
        assert (averaged[n] - value).abs().max() < 5e-6  # seen 9.5e-07
        if n in uses:
            assert (averaged[n] - per_use[n]).abs().max() > 0.1, n


def test_no_average_without_a_decay():
    assert build_average(build("vit"), None) is None


@pytest.mark.parametrize("name", BACKBONES)
def test_optimiser_has_each_shared_tensor_once(name):
    model = student_of(name)
    optimizer = build_optimizer(model, Finetune(), batch_size=8, device=torch.device("cpu"))
    inside = [p for group in optimizer.param_groups for p in group["params"]]
    assert len({id(p) for p in inside}) == len(inside)
    assert {id(p) for p in inside} == {id(p) for p in model.parameters()}
    assert sum(p.numel() for p in inside) == ties.count_parameters(model)
    decayed = {id(p) for group in optimizer.param_groups if group["weight_decay"] for p in group["params"]}
    assert 0 < len(decayed) < len(inside)
    for n, parameter in model.named_parameters():
        free = parameter.ndim <= 1 or n.endswith(("pos_embed", "_token", "relative_position_bias_table", "logit_scale"))
        free |= ".cpb_mlp." in n
        assert (id(parameter) in decayed) != free, n


def test_frozen_parameters_are_not_in_the_optimiser():
    model = student_of("vit")
    model.head.requires_grad_(False)
    optimizer = build_optimizer(model, Finetune(), batch_size=8, device=torch.device("cpu"))
    inside = {id(p) for group in optimizer.param_groups for p in group["params"]}
    assert not inside & {id(p) for p in model.head.parameters()}
