"""The only code that changes what a module is.

A module is specialised in place: it keeps its identity, its path, its parameters and its hooks, and becomes an instance of a
subclass of its own timm class. What a transform adds sits in *slots*: submodules named by the subclass, absent (None) until
something is put there. So several transforms can specialise one module, in any order.
"""

from __future__ import annotations

import copy
from typing import Any, ClassVar, Protocol

import torch
from torch import nn

from compressvit.errors import UserError


class Slotted(Protocol):
    """A specialisation: a module class that names its slots."""

    slots: ClassVar[tuple[str, ...]]


def specialise(model: nn.Module, path: str, subclass: type[Slotted]) -> Any:
    """Turn the module at `path` into a `subclass` of its class, in place; a no-op if it already is one.

    `subclass.slots` names the submodules that transforms may fill; each starts as None and then has no state-dict key.
    """
    module = model.get_submodule(path)
    if isinstance(module, subclass):
        return module
    if not issubclass(subclass, type(module)):
        raise UserError(
            f"{path} is a {type(module).__name__}, which {subclass.__name__} does not extend: "
            "another transform has specialised it; apply only one of the two"
        )
    module.__class__ = subclass
    for slot in subclass.slots:
        module.register_module(slot, None)
    return module


def fill_slot(model: nn.Module, path: str, slot: str, module: nn.Module) -> None:
    """Put `module` into a slot of the specialised module at `path`.

    Raises:
        UserError: the slot is taken, so two transforms ask for the same place.
    """
    owner = model.get_submodule(path)
    if getattr(owner, slot) is not None:
        raise UserError(f"{path}.{slot} is already there: the same transform was applied to this block before")
    setattr(owner, slot, module.train(owner.training))


def generalise(model: nn.Module, path: str, original: type[nn.Module]) -> None:
    """Undo `specialise`: the module at `path` becomes an `original` again, and its slots are gone with what they held."""
    module: Any = model.get_submodule(path)
    for slot in module.slots:
        del module._modules[slot]
    module.__class__ = original


def drop_parameter(model: nn.Module, path: str, name: str) -> None:
    """Remove a parameter of the module at `path`, and its key with it."""
    del model.get_submodule(path)._parameters[name]


def added_parameters(model: nn.Module) -> set[str]:
    """Names of the parameters that sit in slots: what transforms added, private to each layer."""
    names: set[str] = set()
    for path, module in model.named_modules():
        for slot in getattr(module, "slots", ()):
            child = getattr(module, slot)
            if child is not None:
                names.update(f"{path}.{slot}.{n}" for n, _ in child.named_parameters())
    return names


def skeleton(model: nn.Module) -> nn.Module:
    """A deep copy on the meta device: structure, shapes, ties and hooks, but no values and no memory for them."""
    memo: dict[int, object] = {}
    for parameter in model.parameters():
        empty = torch.empty_like(parameter, device="meta")
        memo[id(parameter)] = nn.Parameter(empty, requires_grad=parameter.requires_grad)
    for buffer in model.buffers():
        memo[id(buffer)] = torch.empty_like(buffer, device="meta")
    return copy.deepcopy(model, memo)
