"""Models in shards: every process holds its part of the parameters, by torch's `fully_shard` (FSDP2).

A block is a unit, whose whole tensors every process has only while it computes; blocks that share tensors are one unit, and what is in no
block is the root. `Divided` is one model, from a plain one to a plain one: its parameters are the same objects before and after, and empty
in between.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, TypeVar

import torch
from torch import nn

from compressvit import processes
from compressvit.model.backbone import describe, family_of

T = TypeVar("T", bound=dict[str, torch.Tensor] | None)

_divided: dict[int, Divided] = {}  # models in shards, by their identity
_HOOKS = (
    *("_forward_pre_hooks", "_forward_hooks", "_backward_pre_hooks", "_backward_hooks", "_state_dict_pre_hooks"),
    *("_state_dict_hooks", "_load_state_dict_pre_hooks", "_load_state_dict_post_hooks"),
)
_MARKS = ("_forward_pre_hooks_with_kwargs", "_forward_hooks_with_kwargs", "_forward_hooks_always_called")


class Divided:
    """A model in shards, from here to `end`. All processes make it, and call its methods, together.

    Args:
        model: whole, with the same values in every process; it stays the same module, with other parameters.
        device: where it works.
        trained: a backward pass follows forward passes, for which the root's whole tensors are kept.

    Attributes:
        parts: of every parameter this process's part, by the identity of the parameter; they stay the same objects.
    """

    def __init__(self, model: nn.Module, device: torch.device, *, trained: bool):
        from torch.distributed.device_mesh import init_device_mesh

        self.model: Any = model
        self._trained = trained
        self.parts: dict[int, nn.Parameter] = {}
        self._mesh = init_device_mesh(device.type, (processes.count(),))
        self.device = device
        processes.alike([*model.to(device).parameters(), *model.buffers()])
        self.divide()

    @torch.no_grad()
    def divide(self) -> None:
        """From a plain model to shards."""
        modules = list(self.model.modules())
        before = [(module, type(module), set(vars(module))) for module in modules]
        self._places = [(m, name, p) for m in modules for name, p in m._parameters.items() if p is not None]
        for unit in units(self.model):
            self._shard(unit)
        self._shard([self.model], None if self._trained else True)
        self.state._lazy_init()
        vars(self.model)["to"] = lambda *_, **__: self.model
        self._changed = [(module, kind, set(vars(module)) - known) for module, kind, known in before]
        self.shards = {id(original): getattr(module, name) for module, name, original in self._places}
        for _, _, original in self._places:
            held = local(self.shards[id(original)])
            if (part := self.parts.get(id(original))) is None:
                self.parts[id(original)] = nn.Parameter(held, requires_grad=original.requires_grad)
            else:
                part.data = held
        _divided[id(self.model)] = self

    def _shard(self, unit: list[nn.Module], again: bool | None = True) -> None:
        """Make modules one unit, and let go of its whole tensors, `again` after every forward pass; None: as torch does with a root, whose
        are kept for the backward pass."""
        from torch.distributed.fsdp import fully_shard

        shard: Any = fully_shard
        first: Any = unit[0]
        single = {p for p in self.model.parameters() if p.ndim == 0}  # which cannot be divided: every process has them
        modules = unit if len(unit) > 1 else first
        shard(modules, mesh=self._mesh, reshard_after_forward=again, ignored_params=single)
        if self.device.type == "cpu":
            first.set_force_sum_reduction_for_comms(True)  # gloo has no mean
        for module, name, original in self._places:
            if module._parameters[name] is not original and original.numel():
                original.data = original.data.new_empty(0)

    @torch.no_grad()
    def join(self) -> None:
        """From shards to a plain model."""
        self.rest()
        for _, _, original in self._places:
            if not original.numel():
                original.data = self.shards[id(original)].full_tensor()
        for module, kind, added in self._changed:
            _strip(module)
            module.__class__ = kind
            for key in added:
                del vars(module)[key]
        for module, name, original in self._places:
            module._parameters[name] = original
        self.shards = {}
        del _divided[id(self.model)]

    def end(self) -> None:
        """Let the model be a plain one for good."""
        if is_divided(self.model):
            self.join()

    @property
    def state(self) -> Any:
        """What torch keeps of the root."""
        return self.model._get_fsdp_state()

    def ready(self) -> None:
        """Have the root's whole tensors, for a forward pass that does not begin with the model itself."""
        self.model.unshard()

    def rest(self) -> None:
        """Let go of whole tensors that a forward pass without a backward pass has left."""
        for module in self.model.modules():
            if hasattr(module, "reshard"):
                module.reshard()


def units(model: nn.Module) -> list[list[nn.Module]]:
    """The blocks, those that share parameters with each other together, without those that share any with what is in no block."""
    paths = (
        [] if family_of(model) is None else [info.path for info in describe(model, "blocks", asker="sharded").blocks]
    )
    blocks = [model.get_submodule(path) for path in paths]
    inside = {id(module): i for i, block in enumerate(blocks) for module in block.modules()}
    group = list(range(-1, len(blocks)))  # of the root, and of every block
    owner: dict[int, int] = {}
    for module in model.modules():
        place = inside.get(id(module), -1)
        for parameter in module._parameters.values():
            if parameter is None:
                continue
            first, second = group[owner.setdefault(id(parameter), place) + 1], group[place + 1]
            group = [min(first, second) if g in (first, second) else g for g in group]
    joined: dict[int, list[nn.Module]] = {}
    for block, g in zip(blocks, group[1:], strict=True):
        joined.setdefault(g, []).append(block)
    joined.pop(-1, None)
    return list(joined.values())


def _strip(module: nn.Module) -> None:
    """Take off what torch has put on a module."""
    from torch.distributed import _composable_state

    marks = [vars(module).get(name, {}) for name in _MARKS]
    for hooks in (vars(module).get(name) or {} for name in _HOOKS):
        for key in [
            key for key, hook in hooks.items() if getattr(hook, "__module__", "").startswith("torch.distributed")
        ]:
            del hooks[key]
            for mark in marks:
                mark.pop(key, None)
    _composable_state._module_state_mapping.pop(module, None)


def is_shard(tensor: Any) -> bool:
    return hasattr(tensor, "full_tensor")


def part_of(whole: torch.Tensor, shard: Any) -> torch.Tensor:
    """This process's part of a whole tensor, as that of a shard."""
    own, parts = local(shard), whole.chunk(processes.count())
    return parts[processes.rank()].to(own.device) if processes.rank() < len(parts) else own.new_empty(own.shape)


def gathered(tensor: torch.Tensor) -> torch.Tensor:
    """A tensor whole and on the CPU in the leader; in the others nothing of it is left."""
    if not is_shard(tensor):
        return tensor
    whole = tensor.detach().full_tensor()  # type: ignore[attr-defined]
    return whole.cpu() if processes.leads() else whole.new_empty(0)


def whole_in_leader(tensors: T) -> T:
    """Tensors by name, if there are any, as the leader writes them, gathered one after the other."""
    return tensors if tensors is None else {name: gathered(tensor) for name, tensor in tensors.items()}  # type: ignore[return-value]


def kept(tensor: torch.Tensor) -> torch.Tensor:
    """A copy to come back to: on the CPU, or of a shard where it is."""
    return tensor.detach().clone() if is_shard(tensor) else tensor.detach().cpu().clone()


def local(tensor: torch.Tensor) -> torch.Tensor:
    """What this process has of a tensor, without its gradient."""
    return tensor.detach().to_local() if is_shard(tensor) else tensor.detach()  # type: ignore[attr-defined]


@torch.no_grad()
def load(model: nn.Module, tensors: Mapping[str, torch.Tensor]) -> None:
    """Give a model values by name, which may be whole ones, or shards like its own; what is not named stays."""
    if id(model) not in _divided:
        model.load_state_dict(tensors, strict=False)
        return
    own = model.state_dict()
    for name, value in tensors.items():
        shard = own[name]
        local(shard).copy_(part_of(value, shard) if is_shard(shard) and not is_shard(value) else local(value))


def is_divided(*models: nn.Module | None) -> bool:
    return any(id(model) in _divided for model in models)


@contextmanager
def whole(*models: nn.Module | None) -> Iterator[None]:
    """Within, models are plain ones in every process, for what one of them does alone."""
    found = [_divided[id(model)] for model in models if id(model) in _divided]
    for model in found:
        model.join()
    try:
        yield
    finally:
        for model in found:
            model.divide()


@contextmanager
def evaluating(*models: nn.Module | None) -> Iterator[None]:
    """Within, models compute without gradients: in inference mode, which torch's shards do not know."""
    if not is_divided(*models):
        with torch.inference_mode():
            yield
        return
    try:
        with torch.inference_mode(False), torch.no_grad():
            yield
    finally:
        for model in models:
            if is_divided(model):
                _divided[id(model)].rest()


def in_step(
    ask: Callable[[torch.Tensor], Any],
    model: nn.Module,
    other: nn.Module | None,
    items: Iterator[tuple[torch.Tensor, Any]],
) -> Iterator[tuple[torch.Tensor, Any, Any] | None]:
    """Items (images, targets), each with what `ask` makes of its images by the models.

    A forward pass of a model in shards needs all processes: one that has no item left takes part with a black image, and gives None.
    """
    found = [_divided[id(each)] for each in (model, other) if id(each) in _divided]
    if not found:
        yield from ((images, targets, ask(images)) for images, targets in items)
        return
    while True:
        item = next(items, None)
        forms = processes.gathered(None if item is None else (tuple(item[0].shape[1:]), item[0].dtype))
        form = next((form for form in forms if form is not None), None)
        if form is None:
            return
        for each in found:
            each.ready()
        if item is None:
            ask(torch.zeros(1, *form[0], dtype=form[1], device=found[0].device))
            yield None
        else:
            yield (*item, ask(item[0]))


@contextmanager
def unwarned() -> Iterator[None]:
    """Within, torch does not warn of blocks that return a view, which nothing behind them changes in place."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "FSDP2-wrapped module")
        yield


def enter_by(model: nn.Module, taps: Mapping[str, Mapping[str, Any]]) -> None:
    """Let the backward pass enter the units of a model in shards by what taps have seen inside, and not only by what the units return."""
    for path, seen in taps.items():
        parts = path.split(".")
        owners: Iterator[Any] = (model.get_submodule(".".join(parts[:n])) for n in range(len(parts), -1, -1))
        state = next(owner for owner in owners if hasattr(owner, "_get_fsdp_state"))._get_fsdp_state()
        for value in seen.values():
            if isinstance(value, torch.Tensor) and value.requires_grad:
                value.register_hook(state._pre_backward)
