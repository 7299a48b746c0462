"""`deep_copy` copies a model as `copy.deepcopy` does."""

from __future__ import annotations

import copy
from collections import OrderedDict

import pytest
import torch
from helpers.contract import same_values, structure, teacher, values
from torch import nn

from compressvit.model.surgery import deep_copy, skeleton
from compressvit.transforms import VPT, LoRA, Multiplex
from compressvit.transforms.applying import compress
from compressvit.transforms.record import compression_of

MADE = {
    "plain": ("vit", []),
    "tied": ("swin", [Multiplex(share=2, mlp_conv=3)]),
    "extended": ("vit", [VPT(prompts=2), LoRA(rank=2)]),
}


def _made(kind: str) -> nn.Module:
    name, transforms = MADE[kind]
    return compress(teacher(name), transforms)


def _attributes(model: nn.Module) -> list[dict[str, object]]:
    """Of every module, what is neither a tensor nor a module."""
    plain = (bool, int, float, str, tuple, list, type(None))
    return [
        {name: v for name, v in vars(m).items() if isinstance(v, plain)} | {"names": list(vars(m))}
        for m in model.modules()
    ]


@pytest.mark.parametrize("kind", MADE)
def test_it_is_what_deepcopy_returns(kind):
    model = _made(kind)
    expected, copied = copy.deepcopy(model), deep_copy(model)
    assert structure(copied) == structure(expected) == structure(model)
    assert _attributes(copied) == _attributes(expected)
    assert same_values(values(copied), values(expected))
    assert [p.requires_grad for p in copied.parameters()] == [p.requires_grad for p in expected.parameters()]
    assert compression_of(copied) == compression_of(expected)
    state = values(model)
    with torch.no_grad():
        for tensor in (*copied.parameters(), *copied.buffers()):
            tensor.add_(1)
    assert same_values(values(model), state), "they share memory"
    theirs = {id(m) for m in model.modules()}
    assert not theirs & {id(m) for m in copied.modules()}


def test_no_container_of_a_module_is_shared():
    model = nn.Sequential(nn.Linear(2, 2))
    copied = deep_copy(model)
    for mine, other in zip(model.modules(), copied.modules(), strict=True):
        for name, value in vars(mine).items():
            if isinstance(value, (dict, set)):
                assert type(value) is type(vars(other)[name])
                assert value is not vars(other)[name], name
    called = []
    copied[0].register_forward_hook(lambda *_: called.append(1))
    model(torch.zeros(1, 2))
    assert not called


def test_hooks_come_with_the_copy():
    model, called = nn.Sequential(nn.Linear(2, 2)), []
    model[0].register_forward_hook(lambda *_: called.append(1))
    deep_copy(model)(torch.zeros(1, 2))
    assert called == [1]


class OfItsOwn(nn.Linear):
    def __deepcopy__(self, memo):
        return "copied its own way"


class WithState(nn.Linear):
    def __setstate__(self, state):
        super().__setstate__(state)
        self.restored = True


def test_a_class_decides_how_it_is_copied():
    model = nn.Module()
    model.inside = nn.Sequential(WithState(2, 2))
    model.other = [OfItsOwn(2, 2)]
    copied = deep_copy(model)
    assert copied.inside[0].restored
    assert copied.other == ["copied its own way"]
    model.own = OfItsOwn(2, 2)
    assert deep_copy(model)._modules["own"] == "copied its own way"


def test_what_is_one_object_stays_one():
    model = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2))
    shared: OrderedDict[str, int] = OrderedDict()
    model[0].cache = model[1].cache = shared
    model[1].__dict__["first"] = model[0]  # refers to it without holding it as a submodule
    model[0].__dict__["parent"] = model
    copied = deep_copy(model)
    assert copied[1].first is copied[0]
    assert copied[0].parent is copied
    assert copied[0].cache is copied[1].cache
    assert copied[0].cache is not shared


def test_a_skeleton_keeps_ties_and_has_no_values():
    model = _made("tied")
    empty = skeleton(model)
    assert structure(empty) == structure(model)
    assert all(tensor.is_meta for tensor in (*empty.parameters(), *empty.buffers()))
