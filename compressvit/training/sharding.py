"""Models in shards: of student, average, teacher and optimiser state every process holds its part, by torch's `fully_shard` (FSDP2).

A block is a unit, whose whole tensors every process has only while it computes; blocks that share tensors are one unit, and what is in no
block is the root. `Divided` is one model, from a plain one to a plain one: its parameters are the same objects before and after, and empty
in between. The optimiser works on this process's parts, which are plain tensors; so it may only do what it does to every number by itself.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from compressvit import processes
from compressvit.errors import UserError
from compressvit.model.backbone import describe, family_of
from compressvit.training.stopping import Interrupted
from compressvit.training.terms.base import OF_TERMS

if TYPE_CHECKING:
    from compressvit.tasks.base import Task
    from compressvit.training.spec import Training

_divided: dict[int, Divided] = {}  # models in shards, by their identity
_HOOKS = (
    *("_forward_pre_hooks", "_forward_hooks", "_backward_pre_hooks", "_backward_hooks", "_state_dict_pre_hooks"),
    *("_state_dict_hooks", "_load_state_dict_pre_hooks", "_load_state_dict_post_hooks"),
)
# Optimisers of timm that do to every number what they would do to it alone, so that parts of tensors are enough for them.
BY_NUMBER = frozenset(
    "adabelief adadelta adam adamax adamc adamw adamwlegacy adan adanw adopt adoptc adoptw laprop lapropc lion lionc madgrad madgradw "
    "momentum nadam nadamc nadamlegacy nadamw nesterov nesterovw radabelief radam radamlegacy radamw rmsprop rmsproptf rmsproptfc "
    "rmsproptfw sgd sgdc sgdw".split()
)
_MARKS = ("_forward_pre_hooks_with_kwargs", "_forward_hooks_with_kwargs", "_forward_hooks_always_called")


def refuse(spec: Training, models: Mapping[str, nn.Module], task: Task) -> None:
    """Raise a `UserError` where `sharded` does not go together with other options of a phase, or with its models by name."""
    import torch.distributed.fsdp as fsdp

    cannot = {
        f"needs torch 2.6 or newer, and this is {torch.__version__}; install it": not hasattr(fsdp, "fully_shard"),
        "divides tensors that compile=true expects whole; set one of them to false": spec.compile,
        "cannot scale the loss as precision=fp16 does; set precision=bf16": spec.precision == "fp16",
        f"gives an optimiser parts of tensors, and {spec.optimizer} needs whole ones; take another, such as adamw, lion or sgd": (
            spec.optimizer not in BY_NUMBER
        ),
        "asks the teacher in all processes at once, and a cache only for what it lacks; leave cache out": (
            getattr(spec, "cache", None) is not None
        ),
        "does not go on from moments between the trainings of a phase that removes neurons; leave it out": (
            getattr(spec, "removal_scope", None) is not None
        ),
        f"needs every process to use the same layers, and those of the task {task.name!r} depend on the image; leave it out": (
            task.name == "detection"
        ),
    }
    for whose, model in models.items():
        scalar = next((name for name, p in model.named_parameters() if p.ndim == 0), None)
        cannot[f"cannot divide {scalar} of the {whose}, a single number; leave it out"] = scalar is not None
        mixed = len({p.dtype for p in model.parameters() if p.requires_grad}) > 1
        cannot[f"needs one precision of all that is trained, and the {whose} has several; leave it out"] = mixed
    for reason, so in cannot.items():
        if so:
            raise UserError(f"sharded=true {reason}")
    describe(models["student"], "blocks", asker="sharded")


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

        self.model, self._trained = model, trained
        self.parts: dict[int, nn.Parameter] = {}
        self._mesh = init_device_mesh(device.type, (processes.count(),))
        self.device = device
        processes.alike([*model.to(device).parameters(), *model.buffers()])
        self.divide()
        _divided[id(model)] = self

    @torch.no_grad()
    def divide(self) -> None:
        """From a plain model to shards."""
        modules = list(self.model.modules())
        before = [(module, type(module), set(vars(module))) for module in modules]
        self._places = [(m, name, p) for m in modules for name, p in m._parameters.items() if p is not None]
        for unit in units(self.model):
            self._shard(unit)
        self._shard([self.model])
        self.state._lazy_init()
        if not self._trained:
            self.model.set_reshard_after_forward(True, recurse=False)
        vars(self.model)["to"] = lambda *_, **__: self.model
        self._changed = [(module, kind, set(vars(module)) - known) for module, kind, known in before]
        self.shards = {id(original): getattr(module, name) for module, name, original in self._places}
        for _, _, original in self._places:
            local = self.shards[id(original)].to_local().detach()
            if (part := self.parts.get(id(original))) is None:
                self.parts[id(original)] = nn.Parameter(local, requires_grad=original.requires_grad)
            else:
                part.data = local

    def _shard(self, unit: list[nn.Module]) -> None:
        """Make modules one unit, and let go of its whole tensors."""
        from torch.distributed.fsdp import fully_shard

        fully_shard(unit if len(unit) > 1 else unit[0], mesh=self._mesh)
        if self.device.type == "cpu" and hasattr(unit[0], "set_force_sum_reduction_for_comms"):
            unit[0].set_force_sum_reduction_for_comms(True)  # gloo has no mean
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

    def end(self) -> None:
        """Let the model be a plain one for good."""
        if _divided.pop(id(self.model), None) is not None:
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
    """The blocks, those that share parameters with each other together, without those that share any with what is in no block; and what
    loss terms train, which works after the model has."""
    paths = [] if family_of(model) is None else [info.path for info in describe(model, "blocks", asker="sharded").blocks]
    blocks = [model.get_submodule(path) for path in paths]
    inside = {id(module): i for i, block in enumerate(blocks) for module in block.modules()}
    group = list(range(-1, len(blocks)))  # of the root, and of every block
    owner: dict[int, int] = {}
    terms = list(getattr(model, OF_TERMS, {}).values())
    apart = {id(module) for term in terms for module in term.modules()}
    for module in model.modules():
        place = inside.get(id(module), -1)
        for parameter in module._parameters.values():
            if parameter is None or id(module) in apart:
                continue
            first, second = group[owner.setdefault(id(parameter), place) + 1], group[place + 1]
            group = [min(first, second) if g in (first, second) else g for g in group]
    joined: dict[int, list[nn.Module]] = {}
    for block, g in zip(blocks, group[1:], strict=True):
        joined.setdefault(g, []).append(block)
    joined.pop(-1, None)
    return [*joined.values(), *([term] for term in terms)]


def _strip(module: nn.Module) -> None:
    """Take off what torch has put on a module."""
    from torch.distributed import _composable_state

    marks = [vars(module).get(name, {}) for name in _MARKS]
    for hooks in (vars(module).get(name) or {} for name in _HOOKS):
        for key in [key for key, hook in hooks.items() if getattr(hook, "__module__", "").startswith("torch.distributed")]:
            del hooks[key]
            for mark in marks:
                mark.pop(key, None)
    _composable_state._module_state_mapping.pop(module, None)


class Optimised:
    """The optimiser of a phase and the parameters that it changes, which every process has whole.

    Attributes:
        parameters: what the optimiser sees of them.
    """

    def __init__(self, optimizer: torch.optim.Optimizer, parameters: Sequence[nn.Parameter]):
        self.optimizer, self.parameters = optimizer, list(parameters)

    def collect(self) -> None:
        """Let the optimiser see the gradients."""

    def clip(self, most: float) -> torch.Tensor:
        """Scale the gradients so that the norm of all together is at most that; returns what it was."""
        return nn.utils.clip_grad_norm_(self.parameters, most)

    def state(self) -> dict[str, Any]:
        """The whole state of the optimiser, in the leader."""
        return self.optimizer.state_dict()

    def load(self, saved: dict[str, Any]) -> None:
        """Go on from a whole state."""
        self.optimizer.load_state_dict(saved)

    def end(self) -> None:
        """Let all models be plain ones."""

    @contextmanager
    def ending(self) -> Iterator[None]:
        """Within, models may be in shards. They are plain ones again after the end, and after a signal, on which all processes agree."""
        try:
            yield
        except Interrupted:
            self.end()
            raise
        self.end()


class Shards(Optimised):
    """The same where every process has a part of models and state.

    Args:
        optimizer: of whole parameters, without a state.
        others: models in shards that are not trained: average and teacher.
    """

    def __init__(self, optimizer: torch.optim.Optimizer, student: Divided, others: Sequence[Divided]):
        self._student, self._models = student, [student, *others]
        for group in optimizer.param_groups:
            group["params"] = [student.parts[id(p)] for p in group["params"]]
        super().__init__(optimizer, [p for p in dict.fromkeys(student.parts.values()) if p.requires_grad])

    def collect(self) -> None:
        for key, shard in self._student.shards.items():
            self._student.parts[key].grad = None if shard.grad is None else shard.grad.to_local()
            shard.grad = None

    def clip(self, most: float) -> torch.Tensor:
        import torch.distributed as dist

        gradients = [p.grad for p in self.parameters if p.grad is not None]
        total = nn.utils.get_total_norm(gradients).square()
        dist.all_reduce(total)
        norm = total.sqrt()
        nn.utils.clip_grads_with_norm_(self.parameters, most, norm)
        return norm

    def state(self) -> dict[str, Any]:
        saved = self.optimizer.state_dict()
        shards = self._in_order()
        saved["state"] = {
            i: {name: self._whole(value, shards[i]) for name, value in values.items()}
            for i, values in saved["state"].items()
        }
        return saved

    def _whole(self, value: Any, shard: Any) -> Any:
        from torch.distributed.tensor import DTensor

        if not _like(value, shard.to_local()):
            return value
        made = DTensor.from_local(
            value, shard.device_mesh, shard.placements, run_check=False, shape=shard.shape, stride=shard.stride()
        )
        return _gathered(made)

    def load(self, saved: dict[str, Any]) -> None:
        shards = self._in_order()
        states = {
            i: {name: _part(value, shards[i]) if _like(value, shards[i]) else value for name, value in values.items()}
            for i, values in saved["state"].items()
        }
        self.optimizer.load_state_dict({**saved, "state": states})

    def _in_order(self) -> list[Any]:
        """The shards of what the optimiser changes, in its order."""
        whose = {id(part): self._student.shards[key] for key, part in self._student.parts.items()}
        return [whose[id(part)] for group in self.optimizer.param_groups for part in group["params"]]

    def end(self) -> None:
        for model in self._models:
            model.end()


def optimised(
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    others: Sequence[nn.Module | None],
    device: torch.device,
    *,
    divided: bool,
) -> Optimised:
    """What an optimiser of whole parameters of a model changes, `divided` among the processes or not.

    Args:
        others: models that a phase needs beside, which are divided too.
    """
    if not divided or processes.count() == 1:
        return Optimised(optimizer, [p for p in model.parameters() if p.requires_grad])
    student = Divided(model, device, trained=True)
    return Shards(optimizer, student, [Divided(other, device, trained=False) for other in others if other is not None])


def _like(value: Any, tensor: torch.Tensor) -> bool:
    return isinstance(value, torch.Tensor) and value.ndim > 0 and value.shape == tensor.shape


def _is_shard(tensor: Any) -> bool:
    return hasattr(tensor, "full_tensor")


def _part(whole: torch.Tensor, shard: Any) -> torch.Tensor:
    """This process's part of a whole tensor, as that of a shard."""
    local = shard.to_local()
    parts = whole.chunk(processes.count())
    return parts[processes.rank()].to(local.device) if processes.rank() < len(parts) else local.new_empty(local.shape)


def _gathered(tensor: torch.Tensor) -> torch.Tensor:
    """A tensor whole and on the CPU in the leader; in the others nothing of it is left."""
    if not _is_shard(tensor):
        return tensor
    whole = tensor.detach().full_tensor()  # type: ignore[attr-defined]
    return whole.cpu() if processes.leads() else whole.new_empty(0)


def whole_in_leader(tensors: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Tensors by name as the leader writes them, gathered one after the other."""
    return {name: _gathered(tensor) for name, tensor in tensors.items()}


def kept(tensor: torch.Tensor) -> torch.Tensor:
    """A copy to come back to: on the CPU, or of a shard where it is."""
    return tensor.detach().clone() if _is_shard(tensor) else tensor.detach().cpu().clone()


def local(tensor: torch.Tensor) -> torch.Tensor:
    """What this process has of a tensor, without its gradient."""
    return tensor.detach().to_local() if _is_shard(tensor) else tensor.detach()  # type: ignore[attr-defined]


@torch.no_grad()
def load(model: nn.Module, tensors: Mapping[str, torch.Tensor]) -> None:
    """Give a model values by name, which may be whole ones, or shards like its own; what is not named stays."""
    if id(model) not in _divided:
        model.load_state_dict(tensors, strict=False)
        return
    own = model.state_dict()
    for name, value in tensors.items():
        shard = own[name]
        value = value.to_local() if _is_shard(value) else _part(value, shard) if _is_shard(shard) else value
        local(shard).copy_(value)


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
    ask: Callable[[torch.Tensor], Any], model: nn.Module, other: nn.Module | None, items: Iterator[tuple[torch.Tensor, Any]]
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


def enter_by(model: nn.Module, taps: Mapping[str, Mapping[str, Any]]) -> None:
    """Let the backward pass enter the units of a model in shards by what taps have seen inside, and not only by what the units return."""
    for path, seen in taps.items():
        parts = path.split(".")
        owners = (model.get_submodule(".".join(parts[:n])) for n in range(len(parts), -1, -1))
        state = next(owner for owner in owners if hasattr(owner, "_get_fsdp_state"))._get_fsdp_state()
        for value in seen.values():
            if isinstance(value, torch.Tensor) and value.requires_grad:
                value.register_hook(state._pre_backward)
