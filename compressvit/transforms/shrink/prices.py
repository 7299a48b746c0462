"""What the forms of a block cost: parameters, bytes, multiply-accumulates, and milliseconds by a table that was measured."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import torch
from torch import nn

from compressvit.errors import UserError
from compressvit.fitting.moments import tokens_at
from compressvit.model import cost, surgery, ties
from compressvit.model.backbone import describe, input_size
from compressvit.model.family import BlockInfo
from compressvit.model.linear import weight_shape
from compressvit.transforms.low_rank.budget import original_macs, original_parameters
from compressvit.transforms.narrow.form import FC2, PROJ, BlockForm
from compressvit.transforms.narrow.places import Place
from compressvit.transforms.quantise.spec import Quantise
from compressvit.transforms.shrink.latency import LatencyTable

Unit = Literal["parameters", "bytes", "macs", "latency"]
Row = np.ndarray[Any, Any]  # (units,)


@dataclass(frozen=True)
class Shapes:
    """Of one block, as the teacher has it.

    Attributes:
        layers: (out, in) of those that can be changed, by name.
        biases: which of them have one.
    """

    place: Place
    layers: Mapping[str, tuple[int, int]]
    biases: frozenset[str]

    @classmethod
    def of(cls, model: nn.Module, place: Place) -> Shapes:
        layers = {name: model.get_submodule(f"{place.path}.{name}") for name in place.layers}
        shapes = {name: weight_shape(layer) for name, layer in layers.items()}
        return cls(
            place, shapes, frozenset(n for n, layer in layers.items() if layer._parameters.get("bias") is not None)
        )

    def narrowed(self, form: BlockForm) -> dict[str, tuple[int, int]]:
        """(out, in) of the layers in a form."""
        place, found = self.place, dict(self.layers)
        if PROJ in found:
            width = (form.heads or place.heads) * (form.head_dim or place.head_dim)
            for name in place.qkv:
                found[name] = (width * (3 if len(place.qkv) == 1 else 1), found[name][1])
            found[PROJ] = (found[PROJ][0], width)
        if FC2 in found:
            neurons = form.neurons or place.neurons
            for name in place.fc1:
                found[name] = (neurons * (2 if place.gated else 1), found[name][1])
            found[FC2] = (found[FC2][0], neurons)
        return found

    def key(self) -> tuple[Any, ...]:
        """Equal for blocks of one shape."""
        place = self.place
        return place.neurons, place.gated, place.heads, place.head_dim, place.options, *self.layers.items(), self.biases


@dataclass(frozen=True)
class Prices:
    """Prices of what blocks are made of, in the units of a budget.

    Attributes:
        units: of the budget.
        itemsize: bytes of a number as it is stored.
        tokens: that a block's attention and its MLP see of one image, by the path of the layer.
        keys: that a query of a block's attention is compared with, by the block's path.
        shapes: of the blocks, by path.
        table: of latency, where that is a unit.
        pivoted: the form of low-rank layers; auto: pivoted, or where latency is a unit whichever is faster.
        rounding: a step after this one, whose file bytes are of, with the fewest `bits` of a weight where nothing else is said. None:
            weights are stored as they are.
    """

    units: tuple[Unit, ...]
    itemsize: int
    tokens: Mapping[str, int]
    keys: Mapping[str, int]
    shapes: Mapping[str, Shapes]
    table: LatencyTable | None = None
    pivoted: Literal["auto"] | bool = True
    rounding: Quantise | None = None

    @classmethod
    def of(
        cls,
        model: nn.Module,
        found: Sequence[Place],
        units: Sequence[Unit],
        table: LatencyTable | None = None,
        pivoted: Literal["auto"] | bool = True,
        rounding: Quantise | None = None,
    ) -> Prices:
        """Those of a model's blocks; nothing is computed. Without a table latency has no price."""
        paths = [f"{place.path}.{layer}" for place in found for layer in place.layers]
        tokens = tokens_at(model, paths)
        blocks = {info.path: info for info in describe(model).blocks}
        seen = {p.path: tokens[f"{p.path}.{PROJ if len(p.qkv) == 1 else p.qkv[1]}"] for p in found if p.options}
        keys = {path: _keys(blocks[path], count) for path, count in seen.items()}
        shapes = {place.path: Shapes.of(model, place) for place in found}
        known = tuple(unit for unit in units if table is not None or unit != "latency")
        whole = next(model.parameters()).element_size()
        return cls(known, whole, tokens, keys, shapes, table, pivoted, rounding)

    @property
    def bits(self) -> list[int]:
        """That a weight may have, rising; none where it is stored as it is."""
        return [] if self.rounding is None else self.rounding.options()

    def row(self, parameters: float = 0, products: float = 0, milliseconds: float = 0, other_bytes: float = 0) -> Row:
        """(units,): of so many parameters, multiply-accumulates, milliseconds, and bytes of what is no parameter."""
        size = self.itemsize * parameters + other_bytes
        each = {"parameters": parameters, "bytes": size, "macs": products, "latency": milliseconds}
        return np.array([each[unit] for unit in self.units], dtype=float)

    def dense(self, block: str, layer: str, outputs: int, inputs: int) -> Row:
        """A layer of a block with a dense weight, without its bias."""
        return self._layer(block, layer, outputs, inputs, None, False)

    def low_rank(self, block: str, layer: str, outputs: int, inputs: int, rank: int) -> list[tuple[bool, Row]]:
        """The forms that a low-rank layer may have: whether it is pivoted, and its price. One that another is below in every unit, and one
        that is no smaller or, where latency is a unit, no faster than the dense layer, is left out."""
        whole = self.dense(block, layer, outputs, inputs)
        both = (True, False) if self.pivoted == "auto" and self.table is not None else (bool(self.pivoted),)
        found: list[tuple[bool, Row]] = []
        for pivoted in both:
            own = self._layer(block, layer, outputs, inputs, rank, pivoted)
            if rank_price(outputs, inputs, rank, pivoted) >= outputs * inputs:
                continue
            if "latency" in self.units and own[(i := self.units.index("latency"))] >= whole[i]:
                continue
            if found and (found[0][1] <= own).all():
                continue
            found = [other for other in found if not (own <= other[1]).all()]
            found.append((pivoted, own))
        return found

    def _layer(self, block: str, layer: str, outputs: int, inputs: int, rank: int | None, pivoted: bool) -> Row:
        numbers = outputs * inputs if rank is None else rank_price(outputs, inputs, rank, pivoted)
        order = torch.int64.itemsize * min(outputs, inputs) if rank is not None and pivoted else 0
        time = 0.0
        if self.table is not None:
            time = self.table.layer(block, outputs, inputs, rank, pivoted=pivoted) * self._share(block, layer)
        if self.bits:
            order += round(numbers * (self._rounded(self.bits[0]) - self.itemsize))
        return self.row(numbers, numbers * self.tokens[f"{block}.{layer}"], time, order)

    def _share(self, block: str, layer: str) -> float:
        """The tokens that a layer sees, in parts of those that layers of its block were timed with (`stopwatch`)."""
        place = self.shapes[block].place
        timed = (place.fc1 if place.neurons else place.qkv)[0]
        return self.tokens[f"{block}.{layer}"] / self.tokens[f"{block}.{timed}"]

    def rounded(self, price: Row, numbers: int) -> list[tuple[int | None, Row]]:
        """A layer whose weights have so many numbers with each of the `bits`, and its price, from that with the fewest."""
        if not self.bits or "bytes" not in self.units:
            return [(None, price)]
        more = [round(numbers * (self._rounded(bits) - self._rounded(self.bits[0]))) for bits in self.bits]
        return [(bits, price + self.row(other_bytes=size)) for bits, size in zip(self.bits, more, strict=True)]

    def products(self, block: str, heads: int, head_dim: int) -> Row:
        """What an attention computes besides its linear layers: queries with keys, and what they say with values."""
        macs = 2 * self.tokens[f"{block}.{PROJ}"] * self.keys[block] * heads * head_dim
        return self.row(0, macs, 0.0 if self.table is None else self.table.attention(block, heads, head_dim))

    def hidden(self, block: str, neurons: int) -> Row:
        """What an MLP computes besides its linear layers."""
        return self.row(milliseconds=0.0 if self.table is None else self.table.mlp(block, neurons))

    def part(self, block: str, part: str, form: BlockForm | None = None) -> Row:
        """The attention (`attn`) or the MLP (`mlp`) of a block in a form; None: as the teacher has it."""
        form, own = form or BlockForm(), self.shapes[block]
        price, place = self.row(), own.place
        for name, (outputs, inputs) in own.narrowed(form).items():
            if not name.startswith(f"{part}."):
                continue
            rank = form.ranks.get(name)
            pivoted = bool(self.pivoted) and name not in form.factored
            price = price + self._layer(block, name, outputs, inputs, rank, pivoted)
            price = price + self.row(outputs * (name in own.biases))
        if part == "attn":
            return price + self.products(block, form.heads or place.heads, form.head_dim or place.head_dim)
        return price + self.hidden(block, form.neurons or place.neurons)

    def parts(self) -> list[tuple[str, str]]:
        """Block and part of everything that has a price."""
        return [
            (path, part)
            for path, own in self.shapes.items()
            for part in dict.fromkeys(name.partition(".")[0] for name in own.layers)
        ]

    def key(self, block: str) -> tuple[Any, ...]:
        """Equal for blocks whose forms have equal prices."""
        layers = self.shapes[block].layers
        tokens = tuple(self.tokens[f"{block}.{layer}"] for layer in layers)
        return self.shapes[block].key(), tokens, self.keys.get(block), self.table and self.table.like[block]

    def student(self, empty: nn.Module, forms: Mapping[str, BlockForm], bits: Mapping[str, int] = {}) -> Row:
        """(units,): of a student, whose values do not matter, with these forms of blocks.

        Args:
            bits: of layers, by path, where a step after this one rounds them.
        """
        each: dict[Unit, Callable[[], float]] = {
            "parameters": lambda: ties.count_parameters(empty),
            "bytes": lambda: self._bytes(empty, bits),
            "macs": lambda: cost.macs(empty, input_size(empty)),
            "latency": lambda: self._latency(forms),
        }
        return np.array([each[unit]() for unit in self.units], dtype=float)

    def _rounded(self, bits: int) -> float:
        """Bytes of a number in so many bits, with its part of a scale."""
        assert self.rounding is not None
        return bits / 8 + torch.float16.itemsize / self.rounding.group

    def _bytes(self, model: nn.Module, bits: Mapping[str, int]) -> int:
        """Of the file of a model, where it is rounded with these bits of the layers at paths, or within them, and elsewhere the fewest."""
        if self.rounding is None:
            return cost.file_bytes(model)
        empty = surgery.skeleton(model)
        with suppress(
            UserError
        ):  # nothing is large enough to be rounded; where the student is so, the step itself says it
            self.rounding.with_bits(empty, bits, self.bits[0]).apply(empty)
        return cost.file_bytes(empty)

    def _latency(self, forms: Mapping[str, BlockForm]) -> float:
        assert self.table is not None
        alone = Prices(("latency",), self.itemsize, self.tokens, self.keys, self.shapes, self.table, self.pivoted)
        saved = sum(
            (alone.part(block, part) - alone.part(block, part, forms[block]))[0]
            for block, part in self.parts()
            if block in forms
        )
        return self.table.whole - float(saved)

    def of_teacher(self, model: nn.Module) -> Row:
        """(units,): of the model before any step."""
        parameters = original_parameters(model)
        each = {
            "parameters": parameters,
            "bytes": self.itemsize * parameters + cost.header_bytes(model),
            "macs": original_macs(model) if "macs" in self.units else 0,
            "latency": 0.0 if self.table is None else self.table.whole,
        }
        return np.array([each[unit] for unit in self.units], dtype=float)


def _keys(info: BlockInfo, tokens: int) -> int:
    return tokens if info.window is None else info.window[0] * info.window[1]


def rank_price(outputs: int, inputs: int, rank: int, pivoted: bool) -> int:
    """Numbers in a layer of a rank."""
    return rank * (outputs + inputs - rank * pivoted)
