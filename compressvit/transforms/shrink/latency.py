"""What the modules of a backbone take on one device: a table that is measured once, and what follows from it for any form of a block.

A block is its linear layers, what its attention computes besides (the products of tokens, by heads and their dimension), and what its MLP
computes besides (the activation function, by neurons); the rest of the model is what the whole takes less all that. Sizes between those
measured are interpolated. See `compressvit.transforms.shrink.stopwatch` for how it is measured.
"""

from __future__ import annotations

import platform
from functools import cached_property, lru_cache
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from pydantic import Field

from compressvit.spec import Frozen

Kind = Literal["linear", "split", "join", "attention", "mlp"]


def device_name(device: torch.device) -> str:
    """The device in words, as 'cpu (AMD EPYC)'."""
    if device.type == "cuda":
        return f"cuda ({torch.cuda.get_device_name(device)})"
    if device.type != "cpu":
        return device.type
    described = Path("/proc/cpuinfo")
    lines = described.read_text(errors="replace").splitlines() if described.is_file() else []
    name = next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), "")
    name = name or platform.processor() or platform.machine()
    return f"cpu ({name})" if name else "cpu"


class Timed(Frozen):
    """A row: how long one module took.

    Attributes:
        kind: linear: a dense layer. split, join: what a pivoted layer does besides its two dense ones, as it has few inputs or few outputs
            (`compressvit.transforms.low_rank.pivoted_layer`). attention, mlp: without their linear layers.
        of: the path of the block whose tokens it saw.
        sizes: (in, out) of a dense layer; the channels that are put in order; (heads, head_dim); (neurons,).
        milliseconds: for a batch.
    """

    kind: Kind
    of: str
    sizes: tuple[int, ...]
    milliseconds: float = Field(ge=0)


class LatencyTable(Frozen):
    """What was measured, and where.

    Attributes:
        device: in words.
        threads: of PyTorch, where that is a CPU.
        batch: images at once.
        dtype: of the weights, in words.
        whole: milliseconds of the whole model.
        like: for every block, the block whose rows stand for it, which has the same shape.
        rows: the table.
    """

    device: str
    threads: int
    batch: int
    dtype: str
    whole: float = Field(gt=0)
    like: dict[str, str]
    rows: tuple[Timed, ...]

    def where(self) -> str:
        """The device and what else the figures depend on, in words."""
        threads = f", {self.threads} thread{'s' * (self.threads != 1)}" if self.device.startswith("cpu") else ""
        return f"{self.device}{threads}, batch {self.batch}, {self.dtype}"

    def is_of(self, device: torch.device) -> bool:
        """Whether it was measured on this device, with as many threads."""
        return (self.device, self.threads) == (device_name(device), torch.get_num_threads())

    def linear(self, block: str, inputs: int, outputs: int) -> float:
        """Milliseconds of a dense layer that sees the tokens of a block."""
        return self._grids["linear", self.like[block]].at((inputs, outputs))

    def layer(self, block: str, outputs: int, inputs: int, rank: int | None = None, *, pivoted: bool = False) -> float:
        """Milliseconds of a layer as `compressvit.transforms.low_rank` builds it."""
        if rank is None:
            return self.linear(block, inputs, outputs)
        if not pivoted:
            return self.linear(block, inputs, rank) + self.linear(block, rank, outputs)
        if inputs <= outputs:
            both = self.linear(block, inputs - rank, rank) + self.linear(block, rank, outputs)
            return both + self._of("split", block, inputs)
        both = self.linear(block, inputs, rank) + self.linear(block, rank, outputs - rank)
        return both + self._of("join", block, outputs)

    def attention(self, block: str, heads: int, head_dim: int) -> float:
        """Milliseconds of what an attention computes besides its linear layers."""
        return self._of("attention", block, heads, head_dim)

    def mlp(self, block: str, neurons: int) -> float:
        """Milliseconds of what an MLP computes besides its linear layers."""
        return self._of("mlp", block, neurons)

    def _of(self, kind: Kind, block: str, *sizes: int) -> float:
        return self._grids[kind, self.like[block]].at(sizes)

    @cached_property
    def _grids(self) -> dict[tuple[Kind, str], Grid]:
        found: dict[tuple[Kind, str], dict[tuple[int, ...], float]] = {}
        for row in self.rows:
            found.setdefault((row.kind, row.of), {})[row.sizes] = row.milliseconds
        return {key: Grid(values) for key, values in found.items()}


class Grid:
    """Values measured at some sizes, one or two to each. Of two sizes, at each first one some of the second ones need be there."""

    def __init__(self, values: dict[tuple[int, ...], float]):
        lines: dict[int, list[tuple[int, float]]] = {}
        for sizes, value in sorted(values.items()):
            lines.setdefault(sizes[0], []).append((sizes[-1], value))
        self.flat = all(len(sizes) == 1 for sizes in values)
        self.lines: dict[int, tuple[list[int], list[float]]] = {
            first: ([size for size, _ in line], [value for _, value in line]) for first, line in lines.items()
        }
        self.at = lru_cache(maxsize=None)(self._at)

    def _at(self, sizes: tuple[int, ...]) -> float:
        if self.flat:
            firsts = sorted(self.lines)
            return float(np.interp(sizes[0], firsts, [self.lines[first][1][0] for first in firsts]))
        # those lines that reach as far as the second size; a table of (few, many) and (many, few) has no (many, many)
        usable = [first for first, (places, _) in sorted(self.lines.items()) if places[-1] >= sizes[1]]
        if not usable or usable[-1] < sizes[0]:
            usable = sorted(self.lines)
        return float(np.interp(sizes[0], usable, [np.interp(sizes[1], *self.lines[first]) for first in usable]))
