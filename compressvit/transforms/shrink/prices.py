"""What the forms of a block cost: parameters, bytes and multiply-accumulates."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
from torch import nn

from compressvit.fitting.moments import tokens_at
from compressvit.model import cost
from compressvit.model.backbone import describe, input_size
from compressvit.model.family import BlockInfo
from compressvit.transforms.low_rank.budget import original_macs, original_parameters
from compressvit.transforms.narrow.places import FC1, PROJ, QKV, Place

Unit = Literal["parameters", "bytes", "macs"]


@dataclass(frozen=True)
class Prices:
    """Prices of layers, in the units of a budget.

    Attributes:
        units: of the budget.
        itemsize: bytes of a number as it is stored.
        tokens: that a block's attention and its MLP see of one image, by the path of the layer.
        keys: that a query of a block's attention is compared with, by the block's path.
    """

    units: tuple[Unit, ...]
    itemsize: int
    tokens: dict[str, int]
    keys: dict[str, int]

    @classmethod
    def of(cls, model: nn.Module, found: Sequence[Place], units: Sequence[Unit]) -> Prices:
        """Those of a model's blocks; nothing is computed."""
        paths = [f"{place.path}.{layer}" for place in found for layer in _of_sublayers(place)]
        tokens = tokens_at(model, paths)
        blocks = {info.path: info for info in describe(model).blocks}
        keys = {p.path: _keys(blocks[p.path], tokens[f"{p.path}.{QKV}"]) for p in found if p.options}
        return cls(tuple(units), next(model.parameters()).element_size(), tokens, keys)

    def row(self, parameters: float, products: float) -> np.ndarray:
        """(units,): of so many parameters, and so many multiply-accumulates."""
        each = {"parameters": parameters, "bytes": self.itemsize * parameters, "macs": products}
        return np.array([each[unit] for unit in self.units], dtype=float)

    def attention(self, path: str, width: int) -> int:
        """Multiply-accumulates of the products of queries with keys, and of what they say with values, of a block's heads together."""
        return 2 * self.tokens[f"{path}.{QKV}"] * self.keys[path] * width

    def whole(self, model: nn.Module) -> np.ndarray:
        """(units,): of the model as it is."""
        own = cost.cost(model, input_size(model)).as_dict()
        return np.array([own[unit] for unit in self.units], dtype=float)

    def of_teacher(self, model: nn.Module) -> np.ndarray:
        """(units,): of the model before any step."""
        parameters = original_parameters(model)
        each = {
            "parameters": parameters,
            "bytes": self.itemsize * parameters + cost.header_bytes(model),
            "macs": original_macs(model) if "macs" in self.units else 0,
        }
        return np.array([each[unit] for unit in self.units], dtype=float)


def _of_sublayers(place: Place) -> list[str]:
    return [QKV, PROJ] * bool(place.options) + [FC1] * bool(place.neurons)


def _keys(info: BlockInfo, tokens: int) -> int:
    return tokens if info.window is None else info.window[0] * info.window[1]


def rank_price(outputs: int, inputs: int, rank: int, pivoted: bool) -> int:
    """Numbers in a layer of a rank."""
    return rank * (outputs + inputs - rank * pivoted)
