"""The plan of `quantise`: how many bits every weight has, its structure, and the way back."""

from __future__ import annotations

from typing import Annotated, Any, ClassVar, Literal

import torch
from pydantic import Field
from torch import nn

from compressvit.fitting.in_order import LayerFit
from compressvit.fitting.lowrank import TINY
from compressvit.fitting.reference import Reference
from compressvit.fitting.rounding import nearest
from compressvit.model import surgery, ties
from compressvit.transforms.base import LedgerEntry, Plan
from compressvit.transforms.quantise.fit import Rounding
from compressvit.transforms.quantise.packed import Packed, Rounded, RoundedPositions

Bits = Annotated[int, Field(ge=2, le=8)]


class QuantisePlan(Plan):
    """Weights in few bits, which the layers that had them compute anew in every forward pass.

    Attributes:
        bits: of the linear layers of blocks, by path; `others`: of other layers; `tables`: of position embeddings, by name.
        group: inputs that share a scale, at most.
        metric, sequential, ridge, sweeps: see `Quantise`.
    """

    foldable: ClassVar[bool] = True
    last: ClassVar[str] = "what it rounds is fitted to all that the other steps made, and cannot be trained or changed"
    starts: ClassVar[tuple[str, ...]] = ("metric", "sequential", "ridge", "sweeps")

    bits: dict[str, Bits]
    others: dict[str, Bits]
    tables: dict[str, Bits]
    group: Annotated[int, Field(ge=8)]
    metric: Literal["outputs", "weights"] = "outputs"
    sequential: bool = True
    ridge: float = 1e-2
    sweeps: int = 2

    @property
    def paths(self) -> list[str]:
        """All layers."""
        return [*self.bits, *self.others]

    def drops(self, model: nn.Module) -> set[str]:
        return {f"{path}.weight" for path in self.paths} | set(self.tables)

    def fitted(self) -> set[str]:
        return {f"{path}.rounded.codes" for path in self.paths}

    def apply(self, model: nn.Module) -> list[LedgerEntry]:
        owners = [_owner(name) for name in self.tables]
        before = ties.count_at_paths(model, [*self.paths, *owners])
        texts: dict[str, str] = {}
        made: dict[int, tuple[str, Packed]] = {}
        for path, bits in {**self.bits, **self.others}.items():
            layer: Any = model.get_submodule(path)
            weight = layer._parameters.pop("weight")
            first, packed = made.setdefault(id(weight), (path, _packed(weight, bits, self.group)))
            _fill(model, path, Rounded, "rounded", packed)
            texts[path] = f"weight in {bits} bits, groups of {packed.size}"
            if first != path:
                texts[path] = f"shares the rounded weight of {first}"
        for name, bits in self.tables.items():
            path = _owner(name)
            table = model.get_submodule(path)._parameters.pop(name.rpartition(".")[2])
            assert table is not None
            _fill(model, path, RoundedPositions, "rounded_positions", _packed(table, bits, self.group))
            texts[path] = f"position embeddings in {bits} bits, all else as it is"
        after = ties.count_at_paths(model, [*self.paths, *owners])
        return [LedgerEntry(path, text, before[path], after[path]) for path, text in texts.items()]

    def _rounding(self, student: nn.Module, reference: Reference) -> Rounding:
        return Rounding(student, list(self.bits), reference, self)

    def initialise(self, student: nn.Module, reference: Reference) -> None:
        for name, bits in self.tables.items():
            table = reference.model.get_parameter(name).detach().cpu().float()
            found: Any = student.get_submodule(_owner(name))
            found.rounded_positions.set(nearest(table.flatten(0, -2), bits, self.group))
        self._rounding(student, reference).start()

    def layer_fits(self, student: nn.Module, reference: Reference) -> dict[str, LayerFit]:
        return self._rounding(student, reference).fits()

    @torch.no_grad()
    def errors(self, student: nn.Module, reference: Reference) -> dict[str, tuple[float | None, float | None]]:
        found: dict[str, tuple[float | None, float | None]] = {}
        for path in self.paths:
            ours, theirs = (_weight(model, path) for model in (student, reference.model))
            found[path] = ((ours - theirs).norm() / theirs.norm().clamp(min=TINY)).item(), None
        return found

    @torch.no_grad()
    def fold(self, model: nn.Module) -> None:
        """Give every layer its weight as plain numbers, one that was shared to all that shared it."""
        made: dict[Packed, nn.Parameter] = {}

        def unfold(path: str, mixin: type, slot: str, name: str) -> None:
            module = model.get_submodule(path)
            packed = getattr(module, slot)
            weight = made.setdefault(packed, nn.Parameter(packed()))
            surgery.retract(model, path, mixin)
            module.register_parameter(name, weight)

        for path in self.paths:
            unfold(path, Rounded, "rounded", "weight")
        for name in self.tables:
            unfold(_owner(name), RoundedPositions, "rounded_positions", name.rpartition(".")[2])


def _owner(name: str) -> str:
    return name.rpartition(".")[0]


def _packed(weight: nn.Parameter, bits: int, group: int) -> Packed:
    return Packed(tuple(weight.shape), bits, group, device=weight.device, dtype=weight.dtype)


def _fill(model: nn.Module, path: str, mixin: type, slot: str, packed: Packed) -> None:
    surgery.extend(model, path, mixin)
    surgery.fill_slot(model, path, slot, packed)


def _weight(model: nn.Module, path: str) -> torch.Tensor:
    layer: Any = model.get_submodule(path)
    weight: torch.Tensor = layer.weight
    return weight.detach().cpu().double()
