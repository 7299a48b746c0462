"""The values that a training loop accumulates over an epoch, and how they are logged.

Values stay tensors on the device until somebody reads them, because a device that is asked for a number has to finish its work first.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch


@dataclass(frozen=True)
class Reading:
    """The numbers of one batch.

    Attributes:
        step: the optimiser step that the batch is part of, from 1.
        loss: the weighted sum of the terms.
        terms: every term after weighting, and what else the terms say of themselves.
        gradient_norm: of the whole gradient before clipping; None unless an optimiser step followed the batch.
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
        sums, count: the `state` of the interrupted epoch that this one continues.
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

    def add_update(self, gradient_norm: torch.Tensor, lr: float) -> None:
        """Record the optimiser step that followed the last batch."""
        self._waiting[-1].gradient_norm, self._waiting[-1].lr = gradient_norm.detach(), lr

    def read(self) -> list[Reading]:
        """Wait for the device once, and accumulate the values recorded since the last call, batch by batch."""
        waiting, self._waiting = self._waiting, []
        norms = [batch.gradient_norm for batch in waiting if batch.gradient_norm is not None]
        numbers = iter(_numbers([*(value for batch in waiting for value in batch.values.values()), *norms]))
        rows = [dict(zip(batch.values, numbers, strict=False)) for batch in waiting]
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

    def text(self) -> str:
        """The epoch's mean loss and accuracies in a few words."""
        return words(
            self.means(), {"loss": "loss {:.4f}", "top1": "train {:.1f}%", "teacher_top1": "(teacher {:.1f}%)"}
        )

    def details(self) -> str:
        """Everything about the last step: the loss and its terms after weighting, accuracies, the gradient's norm."""
        names = {"top1": "top-1 {:.1f}%", "top5": "top-5 {:.1f}%"}
        names |= {f"teacher_{k}": f"teacher's {text}" for k, text in names.items()}
        names |= {"gradient_norm": "gradient {:.3g}", "lr": "lr {:.2g}"}
        terms = {k: f"{k} {{:.4g}}" for k in self.last if k not in names}
        return words(self.last, terms | names)


def words(values: dict[str, Any], names: dict[str, str]) -> str:
    return "  ".join(text.format(values[k]) for k, text in names.items() if values.get(k) is not None)


def _numbers(scalars: Sequence[torch.Tensor]) -> list[float]:
    if not scalars:
        return []
    device = scalars[0].device
    return torch.stack([scalar.to(device, _widest(device)) for scalar in scalars]).tolist()


def _widest(device: torch.device) -> torch.dtype:
    return torch.float32 if device.type == "mps" else torch.float64  # it has no float64
