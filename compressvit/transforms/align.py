"""Align the layers of a share group before they share weights: permute neurons and heads to match, without changing the function.

The order of an MLP's hidden neurons and of attention heads is arbitrary: permuting the rows of fc1 with the columns of fc2, or the
heads of q, k and v with the columns of proj, leaves what a block computes unchanged. So the neurons and heads of the blocks of a group
are first permuted to bring the blocks' weights as close to each other as possible, by linear assignment (weight matching as in Git
Re-Basin, https://arxiv.org/abs/2209.04836, with the first block, then the mean of the aligned ones, as the reference).

The step adds no structure. Put it before `multiplex` or `lors` with the same `share`, which then lose less.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, ClassVar

import torch
from pydantic import Field
from torch import nn
from torch.nn.utils import skip_init

from compressvit.errors import UserError
from compressvit.fitting.reference import Reference
from compressvit.model import surgery, ties
from compressvit.model.backbone import describe, model_name, share_groups
from compressvit.model.calls import layers_for
from compressvit.model.family import Family, Need
from compressvit.model.linear import effective_weight, weight_shape
from compressvit.transforms.base import LedgerEntry, Plan, Transform, transform
from compressvit.transforms.claims import Claim, orders
from compressvit.transforms.record import require_free

_LAYERS = ("attn.qkv", "attn.proj", "mlp.fc1", "mlp.fc2")


class AlignPlan(Plan):
    """A resolved `Align`: the groups of blocks whose neurons and heads are matched."""

    loads_values: ClassVar[bool] = True

    groups: tuple[tuple[str, ...], ...]
    heads: bool
    neurons: bool
    rounds: int

    def claims(self, model: nn.Module) -> list[Claim]:
        return [orders(path) for group in self.groups for path in group]

    def apply(self, model: nn.Module) -> list[LedgerEntry]:
        return []

    @torch.no_grad()
    def initialise(self, student: nn.Module, reference: Reference) -> None:
        family = describe(student).family
        for group in self.groups:
            blocks: list[Any] = [student.get_submodule(path) for path in group]
            for path, block in zip(group, blocks, strict=True):
                for name, parameter in block.named_parameters():
                    if not torch.isfinite(parameter).all():
                        raise UserError(f"{path}.{name} holds numbers that are not finite; check the teacher's weights")
            found = [[_neurons(block) for block in blocks]] if self.neurons else []
            found += [[_heads(block, family) for block in blocks]] if self.heads else []
            for layers in found:
                _align([_features(own) for own in layers], self.rounds, [partial(_permute, own) for own in layers])

    def fold(self, model: nn.Module) -> None:
        """Nothing to fold: no structure was added."""


def _align(units: list[torch.Tensor], rounds: int, permute: list[Any]) -> None:
    """Permute the units of every layer, (units, features) each, to match the first layer's, then the mean of the aligned layers."""
    from scipy.optimize import linear_sum_assignment

    orders = [torch.arange(len(u)) for u in units]
    reference = units[0]
    for _ in range(rounds):
        for i, unit in enumerate(units):
            _, order = linear_sum_assignment((reference @ unit.mT).numpy(), maximize=True)
            orders[i] = torch.from_numpy(order)
        reference = torch.stack([u[o] for u, o in zip(units, orders, strict=True)]).mean(dim=0)
    for order, change in zip(orders, permute, strict=True):
        change(order)


@torch.no_grad()
def matched_weights(model: nn.Module, first: str, second: str) -> dict[str, torch.Tensor]:
    """The linear weights of the block at `second`, with its neurons and heads permuted to best match the block at `first`."""
    family = describe(model).family
    reference, block = (_dense_copy(model.get_submodule(path)) for path in (first, second))
    for units in (_neurons, partial(_heads, family=family)):
        theirs, own = units(reference), units(block)
        _align([_features(theirs), _features(own)], 1, [lambda _: None, partial(_permute, own)])
    return {name: block.get_submodule(name).weight.detach() for name in _layers(block)}


def _layers(block: nn.Module) -> list[str]:
    return [name for whole in _LAYERS for name in layers_for(block, whole)]


def _dense_copy(block: nn.Module) -> Any:
    """A copy of a block in which every linear layer is plain and has its effective weight."""
    block = surgery.deep_copy(block)
    for name in _layers(block):
        layer: Any = block.get_submodule(name)
        weight = effective_weight(layer)
        dense = skip_init(nn.Linear, *reversed(weight.shape), bias=False, device=weight.device, dtype=weight.dtype)
        dense.weight.copy_(weight)
        dense.bias = None if layer.bias is None else nn.Parameter(layer.bias.detach())
        block.set_submodule(name, dense)
    return block


@dataclass(frozen=True)
class _Units:
    """A tensor that belongs to the units of a layer, its neurons or heads.

    Attributes:
        axis: along which they lie, in `parts` equal parts (queries, keys and values; gates and what they gate), in each unit after unit.
    """

    tensor: torch.Tensor
    axis: int = 0
    parts: int = 1

    def split(self, count: int) -> torch.Tensor:
        """With an axis of `count` units after `axis`."""
        return self.tensor.unflatten(self.axis, (self.parts, count, -1))

    def permute_(self, order: torch.Tensor) -> None:
        own = self.split(len(order)).index_select(self.axis + 1, order.to(self.tensor.device))
        self.tensor.copy_(own.flatten(self.axis, self.axis + 2))


@dataclass(frozen=True)
class _Layer:
    """The units of a layer: how many there are, and the tensors that belong to them."""

    count: int
    tensors: list[_Units]


def _features(layer: _Layer) -> torch.Tensor:
    """(units, features)."""
    found = [units.split(layer.count).movedim(units.axis + 1, 0).flatten(1) for units in layer.tensors]
    return torch.cat([own.detach().double().cpu() for own in found], dim=1)


def _permute(layer: _Layer, order: torch.Tensor) -> None:
    for units in layer.tensors:
        units.permute_(order)


def _neurons(block: Any) -> _Layer:
    """The input weights, biases and output weights of the hidden neurons."""
    count = weight_shape(block.mlp.fc2)[1]
    first = [block.get_submodule(name) for name in layers_for(block, "mlp.fc1")]
    tensors = [_Units(p, 0, len(p) // count) for layer in first for p in (layer.weight, layer.bias) if p is not None]
    return _Layer(count, [*tensors, _Units(block.mlp.fc2.weight, 1)])


def _heads(block: Any, family: Family) -> _Layer:
    """The q, k, v and output weights of the heads, and what else of the attention belongs to them."""
    attn = block.attn
    names = layers_for(block, "attn.qkv")
    found = [block.get_submodule(name) for name in names]
    parts = 3 if len(names) == 1 else 1
    tensors = [_Units(p, 0, parts) for layer in found for p in (layer.weight, layer.bias) if p is not None]
    tensors.append(_Units(attn.proj.weight, 1))
    if getattr(attn, "gate", None) is not None:
        tensors += [_Units(parameter) for parameter in attn.gate.parameters()]
    given = {**dict(attn.named_parameters()), **dict(attn.named_buffers())}
    tensors += [_Units(given[name]) for name in family.of_heads if name in given]
    tensors += [_Units(given[n], axis) for n, axes in family.of_each_head.items() if n in given for axis in axes]
    return _Layer(attn.num_heads, tensors)


@transform("align", AlignPlan)
class Align(Transform):
    """Match the neurons and heads of the blocks that a later step shares, without changing the function."""

    needs: ClassVar[tuple[Need, ...]] = ("attention", "alike_blocks")

    share: int | tuple[int, ...] = Field(
        description="Blocks in a group, as in the step that shares them: one number, or one per stage."
    )
    heads: bool = Field(True, description="Match attention heads.")
    neurons: bool = Field(True, description="Match the hidden neurons of the MLPs.")
    rounds: int = Field(
        3, ge=1, description="Rounds of matching: first to the first block, then to the mean of the aligned blocks."
    )

    @classmethod
    def examples(cls) -> Sequence[Transform]:
        return (Align(share=2), Align(share=2, heads=False, rounds=1))

    def plan(self, model: nn.Module, reference: Reference | None = None) -> AlignPlan:
        from timm.layers import GluMlp, Mlp, SwiGLU

        backbone = self.backbone(model)
        groups = [group for group in share_groups(model, self.share, "align.share") if len(group) > 1]
        require_free(model, self.name, (orders(path) for group in groups for path in group))
        tied = {name for group in ties.tied_groups(model) for name in group}
        added = surgery.added_parameters(model)
        infos = {info.path: info for info in backbone.blocks}
        known = {path: model.get_submodule(path) for path in infos}
        for path in (path for group in groups for path in group):
            block: Any = known[path]
            names = [f"{path}.{n}" for n, _ in block.named_parameters()]
            changed = [n for n in names if n in tied or n in added]
            if changed or f"{_layers(block)[0]}.weight" not in dict(block.named_parameters()):
                raise UserError(
                    f"align comes before the steps that share or add, and {changed[0] if changed else path} was changed by an earlier one; "
                    "put `align` first"
                )
            known_mlps = (Mlp, GluMlp, SwiGLU)
            if self.neurons and (type(block.mlp) not in known_mlps or not isinstance(block.mlp.norm, nn.Identity)):
                raise UserError(
                    f"align knows the neurons of timm's Mlp, GluMlp and SwiGLU without a norm; {path}.mlp of {model_name(model)} is a "
                    f"{type(block.mlp).__name__}; set align.neurons=false"
                )
            first = next(group[0] for group in groups if path in group)
            unlike = [
                name
                for name, parameter in block.named_parameters()
                if known[first].get_parameter(name).shape != parameter.shape
            ] + ["attn"] * (infos[path].heads != infos[first].heads)
            if unlike:
                raise UserError(
                    f"align matches blocks of one shape: {path}.{unlike[0]} has another shape than that of {first}; give an "
                    "align.share that groups blocks of one shape"
                )
            if self.heads and not isinstance(getattr(block.attn, "norm", nn.Identity()), nn.Identity):
                raise UserError(
                    f"align cannot permute the heads of {path}.attn of {model_name(model)}, which are normed together; "
                    "set align.heads=false"
                )
            stay = backbone.family.heads_stay(model, block.attn)
            if self.heads and stay is not None:
                raise UserError(
                    f"align cannot permute the heads of {path}.attn of {model_name(model)}, {stay}; set align.heads=false"
                )
        return AlignPlan(groups=tuple(groups), **self.model_dump(include={"heads", "neurons", "rounds"}))
