"""Optimisers, schedules and weight averages of timm and torch, built from a phase's options."""

from __future__ import annotations

import math
import random
from collections.abc import Mapping, Sequence
from fnmatch import fnmatch
from typing import Any

import numpy as np
import timm.optim
import torch
from timm.layers import DropPath
from timm.scheduler import CosineLRScheduler, MultiStepLRScheduler, PolyLRScheduler, StepLRScheduler
from timm.scheduler.scheduler import Scheduler
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from compressvit.errors import UserError, did_you_mean
from compressvit.model import surgery
from compressvit.model.backbone import body_of, describe, model_name
from compressvit.tasks.base import Mixing, Task
from compressvit.training.sharding.divided import load, local
from compressvit.training.spec import Training


def build_optimizer(model: nn.Module, spec: Training, batch_size: int, device: torch.device) -> torch.optim.Optimizer:
    """Build timm's optimiser of that name for the parameters that require a gradient, each shared tensor once.

    Raises:
        UserError: timm has no optimiser of that name, or it does not take the options.
    """
    known = [str(name) for name in timm.optim.list_optimizers()]
    if spec.optimizer not in known:
        raise UserError(f"optimizer {spec.optimizer!r} is unknown to timm; {did_you_mean(spec.optimizer, known)}")
    lr = spec.peak_lr(batch_size)
    arguments = timm.optim.get_optimizer_info(spec.optimizer)
    if arguments.second_order:
        raise UserError(
            f"optimizer {spec.optimizer!r} needs second derivatives, which the training loop does not compute; "
            "use a first-order one such as adamw"
        )
    kwargs: dict[str, Any] = {"momentum": spec.momentum} if arguments.has_momentum else {}
    if arguments.has_betas:
        kwargs["betas"] = spec.betas
    if device.type == "cuda" and spec.optimizer in ("adamw", "adam", "sgd"):
        kwargs["fused"] = True
    groups = _with_rate_of_backbone(_groups(model, spec), model, spec.backbone_lr)
    try:
        return timm.optim.create_optimizer_v2(
            groups,
            opt=spec.optimizer,
            lr=lr,
            weight_decay=spec.weight_decay,
            **kwargs,
        )
    except (
        ImportError,
        RuntimeError,
        TypeError,
        ValueError,
    ) as error:  # e.g. timm's sgd uses Nesterov momentum, which must not be 0
        given = ", ".join(f"{k}={v}" for k, v in kwargs.items())
        raise UserError(
            f"optimizer {spec.optimizer!r} cannot be built with {given or 'its defaults'}: {error}"
        ) from error


def _groups(model: nn.Module, spec: Training) -> list[dict[str, Any]]:
    """The parameters in groups of one weight decay and, with `layer_decay`, of one layer, as timm makes them.

    timm excludes 1-D tensors and those that the model names; modules that transforms added name their own.
    """
    undecayed = _undecayed(model)
    if spec.layer_decay is None:
        return timm.optim.param_groups_weight_decay(model, spec.weight_decay, no_weight_decay_list=undecayed)
    if not hasattr(model, "group_matcher"):
        other = "; backbone_lr gives its backbone a rate of its own" if body_of(model) is not None else ""
        raise UserError(
            f"layer_decay={spec.layer_decay:g} needs a model that tells its layers (timm's group_matcher), and {model_name(model)} does "
            f"not; leave it out{other}"
        )
    return timm.optim.param_groups_layer_decay(
        model, spec.weight_decay, no_weight_decay_list=undecayed, layer_decay=spec.layer_decay
    )


def _with_rate_of_backbone(groups: list[dict[str, Any]], model: nn.Module, factor: float) -> list[dict[str, Any]]:
    """The groups of parameters, those of a detector's or segmenter's backbone in groups of their own with timm's `lr_scale`."""
    body = body_of(model)
    if body is None or factor in (0, 1):
        return groups
    inside = {id(parameter) for parameter in body.parameters()}
    divided = []
    for group in groups:
        for part, scale in ((True, {"lr_scale": factor}), (False, {})):
            chosen = [p for p in group["params"] if (id(p) in inside) is part]
            divided += [{**group, **scale, "params": chosen}] if chosen else []
    return divided


def frozen_modules(model: nn.Module, spec: Training) -> list[nn.Module]:
    """The modules that a phase does not train: those of `frozen`, and a detector's or segmenter's backbone with `backbone_lr: 0`.

    Raises:
        UserError: a pattern matches no module, there is no backbone apart from the model, or a parameter is shared with a module to train.
    """
    found: list[nn.Module] = []
    if spec.backbone_lr == 0:
        body = body_of(model)
        if body is None:
            raise UserError(
                f"backbone_lr=0 freezes the backbone of a detector or segmenter, and {model_name(model)} is none; leave it out"
            )
        found.append(body)
    known = {path: module for path, module in model.named_modules() if path}
    for pattern in spec.frozen:
        matches = [module for path, module in known.items() if fnmatch(path, pattern)]
        if not matches:
            hint = did_you_mean(pattern, known, list_at_most=0) or f"give the path of one, e.g. '{next(iter(known))}'"
            raise UserError(f"frozen: {pattern!r} matches no module of {model_name(model)}; {hint}")
        found += matches
    _refuse_shared(model, found)
    return found


def frozen_norms(model: nn.Module) -> list[nn.Module]:
    """Batch norms with parameters of which none is trained: their statistics are part of the frozen backbone, too."""
    norms = [module for module in model.modules() if isinstance(module, _BatchNorm)]
    own = [list(module.parameters(recurse=False)) for module in norms]
    return [norm for norm, given in zip(norms, own, strict=True) if given and not any(p.requires_grad for p in given)]


def _refuse_shared(model: nn.Module, frozen: Sequence[nn.Module]) -> None:
    """Raise a `UserError` where freezing these modules would also freeze a parameter of others, which hold the same tensor."""
    inside = {id(module) for each in frozen for module in each.modules()}
    names: dict[int, str] = {}  # of the frozen parameters
    others: list[tuple[str, nn.Parameter]] = []
    for path, module in model.named_modules():
        for name, parameter in module.named_parameters(recurse=False):
            full = f"{path}.{name}" if path else name
            if id(module) in inside:
                names.setdefault(id(parameter), full)
            elif parameter.requires_grad:
                others.append((full, parameter))
    for other, parameter in others:
        if id(parameter) in names:
            raise UserError(
                f"frozen: {names[id(parameter)]} is shared with {other}, which is to be trained; freeze the modules of both, or of neither"
            )


class Frozen:
    """Modules that a phase does not train: without gradients, and in eval mode, so that their statistics stay.

    Args:
        modules: what is frozen for the phase.
        norms: what is in eval mode, too; a module that was added to one may be trained.
    """

    def __init__(self, modules: Sequence[nn.Module], norms: Sequence[nn.Module] = ()):
        self._modules = [*modules, *norms]
        self._wanted = [p for module in modules for p in module.parameters() if p.requires_grad]
        for parameter in self._wanted:
            parameter.requires_grad_(False)

    def keep(self) -> None:
        """Put them in eval mode, after the model was put in training mode."""
        for module in self._modules:
            module.eval()

    def release(self) -> None:
        """Let them be trained again."""
        for parameter in self._wanted:
            parameter.requires_grad_(True)


def _undecayed(model: nn.Module) -> set[str]:
    """Names of the parameters without weight decay: those that the model and its modules return from `no_weight_decay()`."""
    return {
        f"{path}.{name}" if path else name
        for path, module in model.named_modules()
        if hasattr(module, "no_weight_decay")
        for name in module.no_weight_decay()
    }


def step_if(
    allowed: torch.Tensor,
    optimizer: torch.optim.Optimizer,
    scaler: torch.amp.GradScaler,
    parameters: Sequence[nn.Parameter],
) -> None:
    """Take an optimiser step that leaves the parameters unchanged if `allowed` (a boolean scalar on their device) is false.

    The decision is made on the device, so the host does not wait. A step that was not allowed may corrupt the optimiser's own state.
    """
    if getattr(optimizer, "_step_supports_amp_scaling", False) and not scaler.is_enabled():
        # Fused optimisers skip a step themselves if `found_inf` is set, as torch.amp.GradScaler does.
        optimizer.found_inf = (~allowed).float()  # type: ignore[attr-defined]
        optimizer.step()
        del optimizer.found_inf  # type: ignore[attr-defined]
        return
    before = [p.detach().clone() for p in parameters]
    scaler.step(optimizer)
    put_back_unless(allowed, parameters, before)


def put_back_unless(allowed: torch.Tensor, tensors: Sequence[torch.Tensor], before: Sequence[torch.Tensor]) -> None:
    """Restore the values `before` of tensors if `allowed` (a boolean scalar on their device) is false, without waiting for the device."""
    for tensor, old in zip(tensors, before, strict=True):
        kept = tensor.detach()
        torch.where(allowed, kept, old, out=kept)


class Buffers:
    """The buffers in a model's state dict that a forward pass in training mode may update, e.g. the running statistics of BatchNorm."""

    def __init__(self, model: nn.Module):
        state = model.state_dict(keep_vars=True).values()
        found = {id(tensor): tensor for tensor in state if isinstance(tensor, torch.Tensor)}
        self._tensors = [tensor for tensor in found.values() if not isinstance(tensor, nn.Parameter)]
        self._before: list[torch.Tensor] = []

    def remember(self) -> None:
        """Store a copy of the current values."""
        self._before = [tensor.clone() for tensor in self._tensors]

    def put_back_unless(self, allowed: torch.Tensor) -> None:
        """Restore the stored values if `allowed` (a boolean scalar on their device) is false."""
        put_back_unless(allowed, self._tensors, self._before)


def build_schedule(optimizer: torch.optim.Optimizer, spec: Training, steps_per_epoch: int) -> Scheduler:
    """Build timm's schedule, in optimiser steps; call `step_update(steps_done)` before every step."""
    warmup: dict[str, Any] = {
        "warmup_t": round(spec.warmup_epochs * steps_per_epoch),
        "warmup_lr_init": spec.warmup_lr,
        "t_in_epochs": False,
    }
    total = spec.epochs * steps_per_epoch
    if spec.schedule == "cosine":
        return CosineLRScheduler(optimizer, t_initial=total, lr_min=spec.min_lr, cycle_limit=1, **warmup)
    if spec.schedule == "poly":
        return PolyLRScheduler(optimizer, total, power=spec.power, lr_min=spec.min_lr, cycle_limit=1, **warmup)
    if spec.milestones is not None:
        # timm takes a milestone one step early, and would count from the end of the warm-up
        steps = [round(epoch * steps_per_epoch) + 1 for epoch in spec.milestones]
        return MultiStepLRScheduler(optimizer, decay_t=steps, decay_rate=spec.gamma, warmup_prefix=False, **warmup)
    decay = round(spec.decay_epochs * steps_per_epoch) if spec.schedule == "step" else total + 1
    return StepLRScheduler(optimizer, decay_t=max(1, decay), decay_rate=spec.gamma, **warmup)


def build_mixing(spec: Training, task: Task, outputs: int) -> Mixing | None:
    """Build the task's mixup and cutmix for a head with that many outputs; None if both are off."""
    if not (spec.mixup or spec.cutmix):
        return None
    return task.mixing(spec.mixup, spec.cutmix, spec.smoothing, outputs)


def risen(decay: float, updates: int) -> float:
    """The decay of an average after that many updates: `min(decay, (1 + updates) / (10 + updates))`."""
    return min(decay, (1 + updates) / (10 + updates))


def few_updates(decay: float, updates: int) -> str | None:
    """A note if a phase has too few updates for the decay of its average to be reached."""
    reached = risen(decay, updates)
    if reached >= decay:
        return None
    return f"{updates:,} updates are few for an average of the weights with ema {decay:g}; its decay rises with them, to {reached:.3g}"


class WeightAverage:
    """An exponential moving average of a model's weights. A shared tensor is updated once per step (in timm's ModelEmaV3, once per use).

    The decay rises with the number of updates t, `min(decay, (1 + t) / (10 + t))` (TensorFlow's ExponentialMovingAverage): with a
    constant decay of 0.9999, the average of 132 steps would still be 99 % of the first one. Buffers are copied, not averaged.

    Attributes:
        module: a copy of the model with the averaged weights.
        updates: number of updates so far. Counted on the host, so that no step waits for the device.
        rises: False for the rest of a phase that an earlier version began with a constant decay.
    """

    def __init__(self, model: nn.Module, decay: float):
        self.module = surgery.deep_copy(model)
        self.decay = decay
        self.updates = 0
        self.rises = True

    def decay_at(self, updates: int) -> float:
        """The decay after `updates` updates; 0 for the first update, which copies the model."""
        if not updates:
            return 0.0
        return risen(self.decay, updates) if self.rises else self.decay

    def note(self, updates: int) -> str | None:
        """A note if the number of updates is too small for the decay."""
        return few_updates(self.decay, updates) if self.rises else None

    def load(self, saved: Mapping[str, Any]) -> None:
        """Continue from a checkpoint: averaged tensors by name, the number of updates, and the kind of decay."""
        load(self.module, saved["average"])
        self.updates, self.rises = saved["n_averaged"], saved.get("average_rises", False)

    @torch.no_grad()
    def update(self, model: nn.Module) -> None:
        """Update the average with the model's current weights; the model must have the structure of the average."""
        averaged = [local(p) for p in self.module.parameters()]
        torch._foreach_lerp_(averaged, [local(p) for p in model.parameters()], 1 - self.decay_at(self.updates))
        for ours, theirs in zip(self.module.buffers(), model.buffers(), strict=True):
            ours.copy_(theirs)
        self.updates += 1


def build_average(model: nn.Module, decay: float | None) -> WeightAverage | None:
    """The weight average that `ema` asks for; None without `ema`."""
    return None if decay is None else WeightAverage(model, decay)


def set_drop_path(model: nn.Module, rate: float | None) -> None:
    """Set stochastic depth, increasing linearly from 0 in the first block to `rate` in the last; None leaves it unchanged."""
    if rate is None:
        return
    backbone = describe(model)
    for info in backbone.blocks:
        probability = rate * info.index / max(1, len(backbone.blocks) - 1)
        block = model.get_submodule(info.path)
        for name in backbone.family.drop_paths:
            setattr(block, name, DropPath(probability) if probability else nn.Identity())


def seed_everything(seed: int, *parts: int) -> None:
    """Seed python, numpy and torch from a seed and counters, so that the randomness of an epoch is independent of earlier ones."""
    mixed = int(np.random.SeedSequence([seed, *parts]).generate_state(1)[0])
    random.seed(mixed)
    np.random.seed(mixed)
    torch.manual_seed(mixed)


def random_state() -> dict:
    """The state of all generators, as plain values and tensors."""
    kind, keys, position, has_gauss, gauss = np.random.get_state()
    state = {
        "python": [random.getstate()[0], list(random.getstate()[1]), random.getstate()[2]],
        "numpy": [kind, torch.from_numpy(np.array(keys, dtype=np.int64)), position, has_gauss, gauss],
        "torch": torch.get_rng_state(),
    }
    if torch.cuda.is_available():
        state["cuda"] = torch.cuda.get_rng_state_all()
    return state


def restore_random_state(state: dict) -> None:
    """Set all generators to a state from `random_state()`."""
    version, values, gauss = state["python"]
    random.setstate((version, tuple(values), gauss))
    kind, keys, position, has_gauss, cached = state["numpy"]
    np.random.set_state((kind, keys.numpy().astype(np.uint32), position, has_gauss, cached))
    torch.set_rng_state(state["torch"])
    if "cuda" in state and torch.cuda.is_available():
        torch.cuda.set_rng_state_all(state["cuda"])


def steps_per_epoch(batches: int, accumulate: int) -> int:
    """Optimiser steps in an epoch; the last may accumulate fewer batches."""
    return math.ceil(batches / accumulate)
