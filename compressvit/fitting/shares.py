"""What the processes of a run, each with its share of the calibration images, find together.

Batches are dealt out in turn. What is drawn for one depends on its number alone, so that all processes draw what one process would.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import fields
from itertools import chain, zip_longest
from typing import Any, TypeVar

from torch import nn

from compressvit import processes

S = TypeVar("S")
T = TypeVar("T")
# A pass over the images, by name, with the models it takes them through and whatever else the others have to know.
Asks = Callable[..., AbstractContextManager[Any]]


def unasked(what: str, models: Sequence[nn.Module], **about: Any) -> AbstractContextManager[None]:
    """Ask nobody: one process has all images."""
    return nullcontext()


def number(batch: int) -> int:
    """Which of all batches the one of this number is among those of this process."""
    return processes.rank() + batch * processes.count()


def summed(sums: S) -> S:
    """Of a dataclass of numbers and tensors, the sums over all processes."""
    if processes.count() == 1:
        return sums
    return type(sums)(*processes.totals([getattr(sums, field.name) for field in fields(sums)]))  # type: ignore[arg-type]


def in_order(parts: Sequence[Sequence[T]]) -> list[T]:
    """What each process has of its batches, in the order of the batches."""
    nothing: Any = object()
    return [item for item in chain.from_iterable(zip_longest(*parts, fillvalue=nothing)) if item is not nothing]


def own(items: Sequence[T], counts: Sequence[int] | None = None) -> list[T]:
    """Of items for all batches in their order, those for the batches of this process.

    Args:
        counts: of the batches that each process has, where broken files have left out some; None where none is left out.
    """
    if counts is None:
        return list(items[processes.rank() :: processes.count()])
    owners = in_order([[rank] * count for rank, count in enumerate(counts)])
    return [item for item, owner in zip(items, owners, strict=True) if owner == processes.rank()]


def as_the_leader_has(module: nn.Module) -> None:
    """Give all values of a module those of the leader's, in place."""
    processes.alike([*module.parameters(), *module.buffers()])
