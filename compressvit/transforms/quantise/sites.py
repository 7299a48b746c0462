"""Which weights of a model are rounded."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from fnmatch import fnmatch

import torch
from torch import nn

from compressvit.errors import UserError
from compressvit.fitting.moments import tokens_at
from compressvit.model import surgery
from compressvit.model.backbone import Backbone, model_name
from compressvit.model.linear import is_pointwise
from compressvit.transforms.low_rank.layer import Factored

LARGEST = 65504.0  # of float16
LEAST = 1024  # numbers; smaller weights stay as they are
_POSITIONS = "pos_embed"  # timm's


@dataclass(frozen=True)
class Sites:
    """What is rounded.

    Attributes:
        layers: paths of the linear layers of blocks, the parts of low-rank ones among them, in the order of the model.
        others: paths of other linear layers and convolutions: patch embedding, downsampling, classifier, the decoder of a detector.
        tables: names of position embeddings.
    """

    layers: tuple[str, ...]
    others: tuple[str, ...]
    tables: tuple[str, ...]


def sites(model: nn.Module, backbone: Backbone, skip: Sequence[str]) -> Sites:
    """The weights of a model that can be rounded, but for those that `skip` names; a weight that layers share only if all of them can.

    Raises:
        UserError: a pattern of `skip` matches nothing, or there is nothing to round.
    """
    added = _of_adapters(model)
    found = {path: module for path, module in model.named_modules() if path not in added and _has_weight(module)}
    tables = [name for name, table in model.named_parameters() if _is_table(name) and table.numel() >= LEAST]
    for pattern in skip:
        if not any(fnmatch(name, pattern) for name in (*found, *tables)):
            raise UserError(
                f"quantise.skip: {pattern!r} matches no layer of {model_name(model)} that would be rounded; leave it out"
            )
    kept = {path for path in found if not any(fnmatch(path, pattern) for pattern in skip)}
    kept -= _shared_with_others(model, kept)
    if not kept:
        raise UserError(
            f"quantise: {model_name(model)} has no linear layer of {LEAST:,} numbers or more that could be rounded; leave the step out"
        )
    linear = [path for path in found if isinstance(found[path], nn.Linear) or is_pointwise(found[path])]
    layers = [path for path in linear if path in kept and any(info.holds(path) for info in backbone.blocks)]
    called = tokens_at(model, layers)  # BEiT's attention uses the weight of a layer without calling it
    return Sites(
        tuple(path for path in layers if path in called),
        tuple(path for path in found if path in kept and path not in called),
        tuple(name for name in tables if not any(fnmatch(name, pattern) for pattern in skip)),
    )


@torch.no_grad()
def require_roundable(model: nn.Module, where: Sites) -> None:
    """Raise a `UserError` where a weight has numbers that are not finite, or larger than scales in float16 can be."""
    names = [*(f"{path}.weight" for path in (*where.layers, *where.others)), *where.tables]
    for name in names:
        largest = model.get_parameter(name).abs().max().item()
        if not largest <= LARGEST:
            fault = f"as large as {largest:.1e}" if math.isfinite(largest) else "that are not finite"
            raise UserError(
                f"quantise: {name} holds numbers {fault}, which cannot be rounded (scales are float16, up to {LARGEST:,.0f}); check the "
                "weights, or name it in quantise.skip"
            )


def _has_weight(module: nn.Module) -> bool:
    """Whether a module is a layer with a large weight of its own."""
    if not isinstance(module, nn.Linear) and not (isinstance(module, nn.Conv2d) and module.groups == 1):
        return False
    weight = module._parameters.get("weight")
    return weight is not None and weight.numel() >= LEAST


def _of_adapters(model: nn.Module) -> set[str]:
    """Paths of what earlier steps added, but for the parts of low-rank layers: it stays as it is."""
    factors = {
        f"{path}.{slot}"
        for path, module in model.named_modules()
        if isinstance(module, Factored)
        for slot in module.slots
    }
    return surgery.added_modules(model) - factors


def _is_table(name: str) -> bool:
    return name.rpartition(".")[2] == _POSITIONS


def _shared_with_others(model: nn.Module, paths: set[str]) -> set[str]:
    """Those of the layers whose weight something else has, too."""
    holders: dict[int, list[str]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        holders.setdefault(id(parameter), []).append(name)
    return {
        name.removesuffix(".weight")
        for names in holders.values()
        if len(names) > 1 and any(name.removesuffix(".weight") not in paths for name in names)
        for name in names
    }
