"""The only code that changes the class of a module.

A module is specialised in place: it keeps its identity, its path, its parameters and its hooks, and becomes an instance of a
subclass of its own timm class. What a transform adds sits in *slots*: submodules named by the subclass, absent (None) until
something is put there. So several transforms can specialise one module, in any order.
"""

from __future__ import annotations

import copy
import copyreg
import functools
from collections import OrderedDict
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, TypeVar

import torch
from torch import nn

from compressvit.errors import UserError
from compressvit.model.calls import be_called

M = TypeVar("M", bound=nn.Module)

# The base of a class for `extend`: it has none of its own, but is put before the class of a module, so its `super()` is that one.
if TYPE_CHECKING:
    Mixin = nn.Module
else:
    Mixin = object


def slots_of(kind: type) -> tuple[str, ...]:
    """The slots that a class names; none for one of timm's or torch's own."""
    return getattr(kind, "slots", ())


def specialise(model: nn.Module, path: str, subclass: type[M]) -> M:
    """Turn the module at `path` into a `subclass` of its class, in place; a no-op if it already is one.

    `subclass.slots` names the submodules that transforms may fill; each starts as None and then has no state-dict key.
    """
    module = model.get_submodule(path)
    mixins, kind = _peel(type(module))
    if isinstance(module, subclass):
        return module
    if not issubclass(subclass, kind):
        raise UserError(
            f"{path} is a {kind.__name__}, which {subclass.__name__} does not extend: "
            "another transform has specialised it; apply only one of the two"
        )
    module.__class__ = _dress(subclass, mixins)
    be_called(model, path)
    for slot in slots_of(subclass):
        module.register_module(slot, None)
    assert isinstance(module, subclass)
    return module


def extend(model: nn.Module, path: str, mixin: type) -> nn.Module:
    """Put `mixin` before the class of the module at `path`, in place, whatever that class is; a no-op if it is there already.

    For what only acts on a module's inputs or outputs: `mixin.forward` calls `super().forward`, and `mixin.slots` are added to
    those that the module has. `retract` undoes it.
    """
    module = model.get_submodule(path)
    if not isinstance(module, mixin):
        module.__class__ = _extension(mixin, type(module))
        be_called(model, path)
        for slot in slots_of(mixin):
            module.register_module(slot, None)
    return module


def retract(model: nn.Module, path: str, mixin: type) -> None:
    """Undo `extend` and drop the contents of its slots. Other extensions stay."""
    module = model.get_submodule(path)
    mixins, kind = _peel(type(module))
    module.__class__ = _dress(kind, [other for other in mixins if other is not mixin])
    for slot in slots_of(mixin):
        del module._modules[slot]


def mixins_of(module: nn.Module) -> list[type]:
    """What `extend` put before the class of a module, the last one first."""
    return _peel(type(module))[0]


def kind_of(module: nn.Module) -> type[nn.Module]:
    """The class of a module without what `extend` put before it."""
    return _peel(type(module))[1]


_EXTENSIONS: dict[tuple[type, type], type[nn.Module]] = {}


def _extension(mixin: type, base: type) -> type[nn.Module]:
    if (mixin, base) not in _EXTENSIONS:
        slots = (*slots_of(mixin), *slots_of(base))
        content = {"slots": slots, "extended_by": mixin, "__module__": mixin.__module__, "__reduce_ex__": _reduce}
        _EXTENSIONS[mixin, base] = type(f"{mixin.__name__}{base.__name__}", (mixin, base), content)
    return _EXTENSIONS[mixin, base]


def _reduce(module: nn.Module, protocol: Any) -> tuple:
    """For pickle and deepcopy: the class was made here, so it is named by what it was made of."""
    mixins, kind = _peel(type(module))
    return _empty, (mixins, kind), module.__dict__


def _empty(mixins: list[type], kind: type[nn.Module]) -> nn.Module:
    made = _dress(kind, mixins)
    return made.__new__(made)


def _peel(kind: type[nn.Module]) -> tuple[list[type], type[nn.Module]]:
    """The mixins of an extended class, outermost first, and the class they extend."""
    mixins = []
    while "extended_by" in vars(kind):
        mixins.append(vars(kind)["extended_by"])
        kind = kind.__bases__[1]
    return mixins, kind


def _dress(kind: type[nn.Module], mixins: list[type]) -> type[nn.Module]:
    """The class `kind` with these mixins before it, outermost first."""
    for mixin in reversed(mixins):
        kind = _extension(mixin, kind)
    return kind


def train_only(model: nn.Module, names: set[str]) -> None:
    """Freeze all parameters except those named; a shared parameter is trained if any of its names is given."""
    wanted = {id(p) for name, p in model.named_parameters(remove_duplicate=False) if name in names}
    for parameter in model.parameters():
        parameter.requires_grad_(id(parameter) in wanted)


def fill_slot(model: nn.Module, path: str, slot: str, module: nn.Module) -> None:
    """Put `module` into a slot of the specialised module at `path`.

    Raises:
        UserError: the slot is taken, so two transforms ask for the same place.
    """
    owner = model.get_submodule(path)
    if getattr(owner, slot) is not None:
        raise UserError(
            f"{path}.{slot} is already there: an earlier step of the same kind put one; apply only one of the two"
        )
    setattr(owner, slot, module.train(owner.training))


def generalise(model: nn.Module, path: str, original: type[nn.Module]) -> None:
    """Undo `specialise`: the module at `path` becomes an `original` again, and its slots are gone with what they held."""
    module = model.get_submodule(path)
    mixins, kind = _peel(type(module))
    for slot in slots_of(kind):
        del module._modules[slot]
    module.__class__ = _dress(original, mixins)


def exchange(
    model: nn.Module,
    path: str,
    original: type[nn.Module],
    replacement: type[nn.Module],
    parameters: Mapping[str, nn.Parameter | None],
) -> None:
    """Make the module at `path`, an `original`, a `replacement` that need not extend it, in place.

    It keeps its identity, hooks, attributes and extensions. Its parameters are gone, and the slots of `original` with what they held;
    it has `parameters` instead, and the slots of `replacement`, empty.

    Raises:
        UserError: it is of another class, because another transform has specialised it.
    """
    module = model.get_submodule(path)
    mixins, kind = _peel(type(module))
    if kind is not original:
        raise UserError(
            f"{path} is a {kind.__name__}, which cannot become a {replacement.__name__}: "
            "another transform has specialised it; apply only one of the two"
        )
    for slot in slots_of(original):
        del module._modules[slot]
    module._parameters.clear()
    module.__class__ = _dress(replacement, mixins)
    be_called(model, path)
    for name, parameter in parameters.items():
        module.register_parameter(name, parameter)
    for slot in slots_of(replacement):
        module.register_module(slot, None)


def strip(model: nn.Module) -> None:
    """Undo every specialisation: each module is an instance of its original class again, and all slots are removed."""
    for module in list(model.modules()):
        kind = type(module)
        for slot in slots_of(kind):
            module._modules.pop(slot, None)
        module.__class__ = next(c for c in kind.__mro__ if not (_is_ours(c) or hasattr(c, "slots")))


_ARCHITECTURES = (
    "compressvit.model.cvt.",
    "compressvit.model.detectors.",
    "compressvit.model.of_torchvision",
    "compressvit.model.segmenters.",
    "compressvit.model.video.",
)


def _is_ours(kind: type) -> bool:
    """Whether a class is what a transform makes of a module, and no part of a model as it is built."""
    return kind.__module__.startswith("compressvit.") and not kind.__module__.startswith(_ARCHITECTURES)


def added_modules(model: nn.Module) -> set[str]:
    """Paths of the modules in slots and of all their submodules, i.e. what transforms added."""
    paths: set[str] = set()
    for path, module in model.named_modules():
        for slot in slots_of(type(module)):
            child = getattr(module, slot)
            if child is not None:
                prefix = f"{path}.{slot}" if path else slot
                paths.update(f"{prefix}.{name}" if name else prefix for name, _ in child.named_modules())
    return paths


def added_parameters(model: nn.Module) -> set[str]:
    """Names of the parameters that sit in slots, private to each layer; a shared one under all of them.

    Not those that a module had before and that its class names in `adopted`.
    """
    inside = added_modules(model)
    adopted = {f"{path}.{name}" for path, m in model.named_modules() for name in getattr(m, "adopted", ())}
    names = (name for name, _ in model.named_parameters(remove_duplicate=False))
    return {name for name in names if name.rpartition(".")[0] in inside and name not in adopted}


def added_buffers(model: nn.Module) -> set[str]:
    """Names of the persistent buffers that sit in slots."""
    inside = added_modules(model)
    parameters = {name for name, _ in model.named_parameters(remove_duplicate=False)}
    return {name for name in model.state_dict() if name not in parameters and name.rpartition(".")[0] in inside}


def deep_copy(model: M, memo: dict[int, object] | None = None) -> M:
    """The same as `copy.deepcopy(model, memo)`, in a quarter of the time.

    Most of what a module holds are empty dictionaries of hooks, and `deepcopy` takes longer for one of them than for a small tensor.
    """
    memo = {} if memo is None else memo
    for module in reversed(list(model.modules())):  # a module is copied after those inside it
        kind: Any = type(module)
        if id(module) in memo or "_compiled_call_impl" in vars(module) or not _copied_by_attributes(kind):
            continue
        copied = memo[id(module)] = kind.__new__(kind)
        attributes = vars(copied)
        for name, value in vars(module).items():
            attributes[name] = value if type(value) in _UNCHANGING else _copied(value, memo)
    return copy.deepcopy(model, memo)


def _copied(value: Any, memo: dict[int, object]) -> Any:
    kind = type(value)
    if kind in _UNCHANGING:
        return value
    known = memo.get(id(value))
    if known is not None:
        return known
    if kind in _HOLDERS and not value:
        copied = memo[id(value)] = kind()
        return copied
    if kind is tuple and all(type(inner) in _UNCHANGING for inner in value):
        return value
    if kind is dict and all(type(key) is str for key in value):  # the parameters, buffers and modules of a module
        copied = memo[id(value)] = {}
        copied.update({key: _copied(inner, memo) for key, inner in value.items()})
        return copied
    return copy.deepcopy(value, memo)


_UNCHANGING = {type(None), bool, int, float, str}
_HOLDERS = {OrderedDict, dict, set}
_FILL_IN = {"torch.nn.modules.conv", "torch.nn.modules.activation"}  # what files of an older torch lack
_COPYING = {
    *("__deepcopy__", "__reduce_ex__", "__reduce__", "__getstate__", "__setstate__", "__getnewargs_ex__"),
    *("__getnewargs__", "__slots__"),
}


@functools.cache
def _copied_by_attributes(kind: type[Any]) -> bool:
    """Whether a deep copy of a module of this class has copies of its attributes and nothing else: the class does not say otherwise."""
    classes = (c for c in kind.__mro__ if c not in (nn.Module, object))
    return kind not in copyreg.dispatch_table and not any(
        name in _COPYING and value is not _reduce and not (name == "__setstate__" and c.__module__ in _FILL_IN)
        for c in classes
        for name, value in vars(c).items()
    )


def skeleton(model: M) -> M:
    """A deep copy on the meta device: structure, shapes, ties and hooks, but no values and no memory for them."""
    memo: dict[int, object] = {}
    for parameter in model.parameters():
        empty = torch.empty_like(parameter, device="meta")
        memo[id(parameter)] = nn.Parameter(empty, requires_grad=parameter.requires_grad)
    for buffer in model.buffers():
        memo[id(buffer)] = torch.empty_like(buffer, device="meta")
    return deep_copy(model, memo)
