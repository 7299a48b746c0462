"""Align the layers of a share group before they share weights: permute neurons and heads to match, without changing the function.

The order of an MLP's hidden neurons and of attention heads is arbitrary: permuting the rows of fc1 with the columns of fc2, or the
heads of q, k and v with the columns of proj, leaves what a block computes unchanged. So the neurons and heads of the blocks of a group
are first permuted to bring the blocks' weights as close to each other as possible, by linear assignment (weight matching as in Git
Re-Basin, https://arxiv.org/abs/2209.04836, with the first block, then the mean of the aligned ones, as the reference).

The step adds no structure. Put it before `multiplex` or `lors` with the same `share`, which then lose less.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar

import torch
from einops import rearrange
from pydantic import Field
from torch import nn
from torch.nn.utils import skip_init

from compressvit.errors import UserError
from compressvit.fitting.reference import Reference
from compressvit.model import surgery, ties
from compressvit.model.backbone import model_name, share_groups
from compressvit.model.family import Need
from compressvit.model.linear import effective_weight
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
        for group in self.groups:
            blocks: list[Any] = [student.get_submodule(path) for path in group]
            for path, block in zip(group, blocks, strict=True):
                for name, parameter in block.named_parameters():
                    if not torch.isfinite(parameter).all():
                        raise UserError(f"{path}.{name} holds numbers that are not finite; check the teacher's weights")
            if self.neurons:
                _align([_neurons(block) for block in blocks], self.rounds, [_permute_neurons(b) for b in blocks])
            if self.heads:
                _align([_heads(block) for block in blocks], self.rounds, [_permute_heads(b) for b in blocks])

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
    reference, block = (_dense_copy(model.get_submodule(path)) for path in (first, second))
    for units, permute in ((_neurons, _permute_neurons), (_heads, _permute_heads)):
        _align([units(reference), units(block)], 1, [lambda _: None, permute(block)])
    return {name: block.get_submodule(name).weight.detach() for name in _LAYERS}


def _dense_copy(block: nn.Module) -> Any:
    """A copy of a block in which every linear layer is plain and has its effective weight."""
    block = surgery.deep_copy(block)
    for name in _LAYERS:
        layer: Any = block.get_submodule(name)
        weight = effective_weight(layer)
        dense = skip_init(nn.Linear, *reversed(weight.shape), bias=False, device=weight.device, dtype=weight.dtype)
        dense.weight.copy_(weight)
        dense.bias = None if layer.bias is None else nn.Parameter(layer.bias.detach())
        block.set_submodule(name, dense)
    return block


def _neurons(block: Any) -> torch.Tensor:
    """The input weights, bias and output weights of each hidden neuron: (neurons, in + 1 + out)."""
    mlp = block.mlp
    parts = [mlp.fc1.weight, mlp.fc2.weight.mT]
    if mlp.fc1.bias is not None:
        parts.append(mlp.fc1.bias[:, None])
    return torch.cat([p.detach().double().cpu() for p in parts], dim=1)


def _permute_neurons(block: Any):
    def permute(order: torch.Tensor) -> None:
        fc1, fc2 = block.mlp.fc1, block.mlp.fc2
        order = order.to(fc1.weight.device)
        fc1.weight.copy_(fc1.weight[order])
        if fc1.bias is not None:
            fc1.bias.copy_(fc1.bias[order])
        fc2.weight.copy_(fc2.weight[:, order])

    return permute


def _heads(block: Any) -> torch.Tensor:
    """The q, k, v and output weights of each head: (heads, features)."""
    attn, h = block.attn, block.attn.num_heads
    parts = [rearrange(attn.qkv.weight, "(three h d) c -> h (three d c)", three=3, h=h)]
    if attn.qkv.bias is not None:
        parts.append(rearrange(attn.qkv.bias, "(three h d) -> h (three d)", three=3, h=h))
    parts.append(rearrange(attn.proj.weight, "c (h d) -> h (d c)", h=h))
    if getattr(attn, "gate", None) is not None:
        parts += [
            rearrange(p.flatten(1) if p.ndim > 1 else p[:, None], "(h d) c -> h (d c)", h=h)
            for p in attn.gate.parameters()
        ]
    table = getattr(attn, "relative_position_bias_table", None)
    if table is not None:
        parts.append(table.mT)
    return torch.cat([p.detach().double().cpu() for p in parts], dim=1)


def _permute_heads(block: Any):
    def permute(order: torch.Tensor) -> None:
        attn, h = block.attn, block.attn.num_heads
        order = order.to(attn.qkv.weight.device)
        for tensor in (attn.qkv.weight, attn.qkv.bias):
            if tensor is not None:
                split = rearrange(tensor, "(three h d) ... -> three h d ...", three=3, h=h)[:, order]
                tensor.copy_(rearrange(split, "three h d ... -> (three h d) ..."))
        for tensor in attn.gate.parameters() if getattr(attn, "gate", None) is not None else ():
            tensor.copy_(rearrange(rearrange(tensor, "(h d) ... -> h d ...", h=h)[order], "h d ... -> (h d) ..."))
        columns = rearrange(attn.proj.weight, "c (h d) -> c h d", h=h)[:, order]
        attn.proj.weight.copy_(rearrange(columns, "c h d -> c (h d)"))
        table = getattr(attn, "relative_position_bias_table", None)
        if table is not None:
            table.copy_(table[:, order])

    return permute


@transform("align", AlignPlan)
class Align(Transform):
    """Match the neurons and heads of the blocks that a later step shares, without changing the function."""

    needs: ClassVar[tuple[Need, ...]] = ("attention",)

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
        from timm.layers import Mlp

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
            if changed or "attn.qkv.weight" not in dict(block.named_parameters()):
                raise UserError(
                    f"align comes before the steps that share or add, and {changed[0] if changed else path} was changed by an earlier one; "
                    "put `align` first"
                )
            if self.neurons and (type(block.mlp) is not Mlp or not isinstance(block.mlp.norm, nn.Identity)):
                raise UserError(
                    f"align knows the neurons of timm's Mlp; {path}.mlp of {model_name(model)} is a {type(block.mlp).__name__}; "
                    "set align.neurons=false"
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
        return AlignPlan(groups=tuple(groups), **self.model_dump(include={"heads", "neurons", "rounds"}))
