"""The optimiser of a phase, of whole parameters or of this process's parts of them, which are plain tensors.

Of parts an optimiser may only do what it does to every number by itself (`refusals.BY_NUMBER`).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from compressvit import processes
from compressvit.training.sharding.divided import Divided, gathered, is_shard, local, part_of
from compressvit.training.stopping import Interrupted

if TYPE_CHECKING:
    from compressvit.data.input import Side
    from compressvit.training.optimisation import WeightAverage


class Optimised:
    """The optimiser of a phase and the parameters that it changes, which every process has whole.

    Attributes:
        parameters: what the optimiser sees of them.
    """

    def __init__(self, optimizer: torch.optim.Optimizer, parameters: Sequence[nn.Parameter]):
        self.optimizer, self.parameters = optimizer, list(parameters)

    def collect(self) -> None:
        """Let the optimiser see the gradients."""

    def clip(self, most: float) -> torch.Tensor:
        """Scale the gradients so that the norm of all together is at most that; returns what it was."""
        return nn.utils.clip_grad_norm_(self.parameters, most)

    def state(self) -> dict[str, Any]:
        """The whole state of the optimiser, in the leader."""
        return self.optimizer.state_dict()

    def load(self, saved: dict[str, Any]) -> None:
        """Go on from a whole state."""
        self.optimizer.load_state_dict(saved)

    def end(self) -> None:
        """Let all models be plain ones."""

    @contextmanager
    def ending(self) -> Iterator[None]:
        """Within, models may be in shards. They are plain ones again after the end, and after a signal, on which all processes agree."""
        try:
            yield
        except Interrupted:
            self.end()
            raise
        self.end()


class Shards(Optimised):
    """The same where every process has a part of models and state.

    Args:
        optimizer: of whole parameters, without a state.
        others: models in shards that are not trained: average and teacher.
    """

    def __init__(self, optimizer: torch.optim.Optimizer, student: Divided, others: Sequence[Divided]):
        self._student, self._models = student, [student, *others]
        for group in optimizer.param_groups:
            group["params"] = [student.parts[id(p)] for p in group["params"]]
        super().__init__(optimizer, [p for p in dict.fromkeys(student.parts.values()) if p.requires_grad])

    def collect(self) -> None:
        import torch.distributed as dist

        for key, shard in self._student.shards.items():
            if shard.grad is not None and not is_shard(shard):
                dist.all_reduce(shard.grad)
                shard.grad /= processes.count()
            self._student.parts[key].grad = None if shard.grad is None else local(shard.grad)
            shard.grad = None

    def clip(self, most: float) -> torch.Tensor:
        import torch.distributed as dist

        mine = (
            self.parameters if processes.rank() == 0 else [p for p in self.parameters if p.ndim]
        )  # of what all have, once
        gradients = [p.grad for p in mine if p.grad is not None]
        total = nn.utils.get_total_norm(gradients).square()
        dist.all_reduce(total)
        norm = total.sqrt()
        nn.utils.clip_grads_with_norm_(self.parameters, most, norm)
        return norm

    def state(self) -> dict[str, Any]:
        saved = self.optimizer.state_dict()
        shards = self._in_order()
        saved["state"] = {
            i: {name: self._whole(value, shards[i]) for name, value in values.items()}
            for i, values in saved["state"].items()
        }
        return saved

    def _whole(self, value: Any, shard: Any) -> Any:
        from torch.distributed.tensor import DTensor

        if not _like(value, local(shard)):
            return value
        made = DTensor.from_local(
            value, shard.device_mesh, shard.placements, run_check=False, shape=shard.shape, stride=shard.stride()
        )
        return gathered(made)

    def load(self, saved: dict[str, Any]) -> None:
        shards = self._in_order()
        states = {
            i: {name: part_of(value, shards[i]) if _like(value, shards[i]) else value for name, value in values.items()}
            for i, values in saved["state"].items()
        }
        self.optimizer.load_state_dict({**saved, "state": states})

    def _in_order(self) -> list[Any]:
        """The shards of what the optimiser changes, in its order."""
        whose = {id(part): self._student.shards[key] for key, part in self._student.parts.items()}
        return [whose[id(part)] for group in self.optimizer.param_groups for part in group["params"]]

    def end(self) -> None:
        for model in self._models:
            model.end()


def optimised(
    optimizer: torch.optim.Optimizer,
    student: nn.Module,
    average: WeightAverage | None,
    teacher: Side | None,
    device: torch.device,
    *,
    divided: bool,
) -> Optimised:
    """What an optimiser of whole parameters of the student changes; with `divided` in shards, as average and teacher are then, too."""
    if not divided or processes.count() == 1:
        return Optimised(optimizer, [p for p in student.parameters() if p.requires_grad])
    ours = Divided(student, device, trained=True)
    others = (None if average is None else average.module, None if teacher is None else teacher.model)
    return Shards(optimizer, ours, [Divided(m, device, trained=False) for m in others if m is not None])


def _like(value: Any, tensor: torch.Tensor) -> bool:
    """Whether a value of the optimiser's state is of every number of a tensor that can be divided."""
    return isinstance(value, torch.Tensor) and value.ndim > 0 and value.shape == tensor.shape
