"""The values that a training loop accumulates over an epoch, and how they are logged.

Values stay on the device as tensors until they are read, because reading one waits until the device has finished its work.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch

from compressvit import processes
from compressvit.tasks.base import Task
from compressvit.tasks.quality import Quality


@dataclass(frozen=True)
class Reading:
    """The numbers of one batch.

    Attributes:
        step: the optimiser step that the batch is part of, from 1.
        loss: the weighted sum of the terms.
        terms: every weighted term, and the further values that terms log.
        gradient_norm: norm of the whole gradient before clipping; None unless an optimiser step followed the batch.
    """

    step: int
    loss: float
    terms: dict[str, float]
    gradient_norm: float | None


@dataclass
class _Waiting:
    """A batch whose numbers are still on the device."""

    step: int
    terms: Sequence[str]
    values: dict[str, torch.Tensor]
    gradient_norm: torch.Tensor | None = None
    lr: float = 0.0


class Meters:
    """Means over an epoch and the values of the last batch, as of the last `read`.

    Args:
        sums, count: from the `state` of an interrupted epoch that is continued.
    """

    def __init__(self, sums: dict[str, float] | None = None, count: int = 0) -> None:
        self.last: dict[str, float] = {}
        self._sums = dict(sums or {})
        self._count = count
        self._waiting: list[_Waiting] = []

    def add(
        self,
        step: int,
        loss: torch.Tensor,
        terms: Mapping[str, torch.Tensor],
        accuracies: Mapping[str, torch.Tensor],
    ) -> None:
        """Record the scalars of a batch without waiting for the device."""
        values = {"loss": loss, **terms, **accuracies}
        self._waiting.append(_Waiting(step, list(terms), {name: value.detach() for name, value in values.items()}))

    def add_update(self, step: int, gradient_norm: torch.Tensor, lr: float) -> None:
        """Record the optimiser step that followed the last batch, unless its batches were dropped."""
        if self._waiting and self._waiting[-1].step == step:
            self._waiting[-1].gradient_norm, self._waiting[-1].lr = gradient_norm.detach(), lr

    def drop(self, step: int) -> list[Reading]:
        """Wait for the device, and read the batches of an optimiser step that is left out; they are in no mean."""
        kept = [batch for batch in self._waiting if batch.step != step]
        dropped = [batch for batch in self._waiting if batch.step == step]
        apart = Meters()
        apart._waiting, self._waiting = dropped, kept
        return apart.read()

    def read(self) -> list[Reading]:
        """Wait for the device once, and accumulate the values recorded since the last call, batch by batch: means over the
        processes, of a value that not every batch has over those that have it."""
        waiting, self._waiting = self._waiting, []
        norms = [batch.gradient_norm for batch in waiting if batch.gradient_norm is not None]
        numbers = iter(_numbers([*(value for batch in waiting for value in batch.values.values()), *norms]))
        rows = processes.means([dict(zip(batch.values, numbers, strict=False)) for batch in waiting])
        readings = []
        for batch, row in zip(waiting, rows, strict=True):
            self._count += 1
            for name, value in row.items():
                self._sums[name] = self._sums.get(name, 0.0) + value
            norm = None if batch.gradient_norm is None else next(numbers)
            self.last = dict(row) if norm is None else {**row, "gradient_norm": norm, "lr": batch.lr}
            readings.append(Reading(batch.step, row["loss"], {name: row[name] for name in batch.terms}, norm))
        return readings

    def state(self) -> dict[str, Any]:
        """The state of an interrupted epoch, as keyword arguments for a new instance."""
        return {"sums": self._sums, "count": self._count}

    def means(self) -> dict[str, float]:
        """Mean of every value over the batches so far."""
        return {name: total / max(1, self._count) for name, total in self._sums.items()}

    def text(self, task: Task) -> str:
        """The epoch's mean loss in a few words, with the first metric that ranks models, for the model and for its teacher."""
        means = self.means()
        found = [f"loss {means['loss']:.4f}"] if "loss" in means else []
        first = next(iter(task.ranked(means)), None)
        if first is not None:
            found.append(f"train {first.roughly(means[first.key])}")
            theirs = means.get(f"teacher_{first.key}")
            found += [f"(teacher {first.roughly(theirs)})"] if theirs is not None else []
        return "  ".join(found)

    def details(self, qualities: Sequence[Quality]) -> str:
        """The values of the last step: the loss and its weighted terms, the metrics of the task, and the gradient norm."""
        names: dict[str, Callable[[float], str]] = {q.key: partial(_named, q.short, q.roughly) for q in qualities}
        names |= {f"teacher_{q.key}": partial(_named, f"teacher's {q.short}", q.roughly) for q in qualities}
        names |= {"gradient_norm": "gradient {:.3g}".format, "lr": "lr {:.2g}".format}
        terms = {key: f"{key} {{:.4g}}".format for key in self.last if key not in names}
        return "  ".join(text(self.last[key]) for key, text in (terms | names).items() if key in self.last)


def _named(name: str, text: Callable[[float], str], value: float) -> str:
    return f"{name} {text(value)}"


def _numbers(scalars: Sequence[torch.Tensor]) -> list[float]:
    if not scalars:
        return []
    device = scalars[0].device
    return torch.stack([scalar.to(device, _widest(device)) for scalar in scalars]).tolist()


def _widest(device: torch.device) -> torch.dtype:
    return torch.float32 if device.type == "mps" else torch.float64  # MPS has no float64
