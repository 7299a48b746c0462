"""The content of a checkpoint: the tensors that training changes, a hash of those it does not, and the optimiser state.

If transforms only add to a frozen backbone, a resumed run can rebuild that backbone, so a checkpoint has only kilobytes. If a transform
changed the backbone itself, a checkpoint contains the whole model, because fitted values may differ on another machine.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from pydantic import BaseModel, ConfigDict, NonNegativeInt, ValidationError
from torch import Tensor, nn

from compressvit import processes
from compressvit.errors import UserError
from compressvit.files import load_checkpoint, require_keys, save_checkpoint
from compressvit.model import ties
from compressvit.model.old import current_checkpoint
from compressvit.model.weights import hash_tensors
from compressvit.spec import first_fault
from compressvit.training.phase import Phase
from compressvit.training.sharding.divided import kept, load
from compressvit.transforms.record import only_adapted

_UNFINISHED = ("epoch", "batch_index", "steps", "optimizer", "scaler", "random_state", "meters")


class _Sums(BaseModel):
    sums: dict[str, float] = {}
    count: NonNegativeInt = 0


class _Best(BaseModel):
    model_config = ConfigDict(arbitrary_types_allowed=True)

    score: float
    epoch: NonNegativeInt
    model: dict[str, Tensor] | None


class _Checkpoint(BaseModel):
    """The types of what a checkpoint holds, as far as they can be checked without the model."""

    model_config = ConfigDict(strict=True, arbitrary_types_allowed=True)

    done: bool
    model: dict[str, Tensor]
    frozen: str
    epoch: NonNegativeInt = 0
    steps: NonNegativeInt = 0
    batch_index: NonNegativeInt = 0
    skipped: NonNegativeInt = 0
    kept_epoch: NonNegativeInt | None = None
    start: dict[str, Any] | None = None
    best: _Best | None = None
    meters: _Sums = _Sums()
    optimizer: dict[str, Any] = {}
    scaler: dict[str, Any] = {}
    random_state: dict[str, Any] | None = None
    average: dict[str, Tensor] = {}
    n_averaged: NonNegativeInt = 0
    average_rises: bool = False
    moments: dict[str, dict[str, Any]] = {}


def read_checkpoint(path: Path, model: nn.Module, batches: int) -> dict[str, Any]:
    """The content of a phase's checkpoint, under the current names of the model's tensors.

    Args:
        batches: of an epoch.

    Raises:
        UserError: it is damaged, or lacks what is needed to continue.
    """
    saved = current_checkpoint(load_checkpoint(path), model.state_dict().keys())
    require_keys(saved, ("done", "model", "frozen"), path)
    if not saved["done"]:
        require_keys(saved, _UNFINISHED, path)
    try:
        known = _Checkpoint.model_validate(
            {key: value for key, value in saved.items() if key in _Checkpoint.model_fields}
        )
    except ValidationError as error:
        raise _damaged(path, first_fault(error)) from error
    if known.batch_index > batches:
        raise _damaged(path, f"batch_index: {known.batch_index:,}, and an epoch has {batches:,} batches")
    return saved


def write_checkpoint(phase: Phase, content: dict[str, Any]) -> None:
    """Write a checkpoint, in the leader, and, until the phase is done, keep the one before."""
    if not processes.leads():
        return
    save_checkpoint(phase.checkpoint, content, keep=None if content["done"] else phase.before)
    if content["done"]:
        phase.before.unlink(missing_ok=True)


def taken_up(phase: Phase, model: nn.Module, batches: int) -> tuple[Path, dict[str, Any], str]:
    """The last checkpoint of a phase, or where it is damaged or not there the one before, and in words what was wrong with the last. A
    damaged one is removed, since the next one would keep it in place of the one before; so is the one before of a phase that is done.

    Raises:
        UserError: as `read_checkpoint`, of the last one, where none can be read.
    """
    path, saved, damage = _either(phase, model, batches)
    if damage:
        phase.checkpoint.unlink()
        damage = f"{damage}; {path.name}, the one before, is used"
    elif saved["done"]:  # of a run that was killed right after it was
        phase.before.unlink(missing_ok=True)
    return path, saved, damage


def _either(phase: Phase, model: nn.Module, batches: int) -> tuple[Path, dict[str, Any], str]:
    try:
        return phase.checkpoint, read_checkpoint(phase.checkpoint, model, batches), ""
    except UserError as error:
        if not phase.before.is_file():
            raise
        damage = str(error).partition(";")[0] if phase.checkpoint.exists() else ""
        try:
            return phase.before, read_checkpoint(phase.before, model, batches), damage
        except UserError as worse:
            raise error if phase.checkpoint.exists() else worse from None


@contextmanager
def restoring(path: Path) -> Iterator[None]:
    """Around code that gives a checkpoint's content to objects of torch and Python, which fail in their own ways on a damaged one."""
    try:
        yield
    except UserError:
        raise
    except (AttributeError, ArithmeticError, LookupError, RuntimeError, TypeError, ValueError) as error:
        raise _damaged(path, (str(error).splitlines() or [type(error).__name__])[0]) from error


def _damaged(path: Path, fault: str) -> UserError:
    return UserError(f"{path} is damaged ({fault}); remove it to begin its phase again")


class TrainedState:
    """The part of a model's state that a phase changes.

    Args:
        model: the model at the start of the phase; which parameters are trained is determined now.
    """

    def __init__(self, model: nn.Module):
        self._frozen: set[str] = set()
        if only_adapted(model):
            self._frozen = {n for n, p in model.named_parameters(remove_duplicate=False) if not p.requires_grad}
        state = ties.unique_state(model)
        self.frozen_hash = hash_tensors({name: state[name] for name in state if name in self._frozen})

    def of(self, model: nn.Module) -> dict[str, torch.Tensor]:
        """Trained parameters and all buffers by canonical name, of the model or of another one with its structure."""
        return {name: tensor for name, tensor in ties.unique_state(model).items() if name not in self._frozen}

    def copied(self, model: nn.Module) -> dict[str, torch.Tensor]:
        """A copy of the current state (see `of`), on the CPU where it is not in shards."""
        return {name: kept(tensor) for name, tensor in self.of(model).items()}

    def load(self, saved: dict[str, Any], model: nn.Module, path: Path) -> None:
        """Load the state from a checkpoint into the model.

        Raises:
            UserError: the checkpoint is from a model that shares other layers, or has other ranks or another frozen backbone. Loading
                only the matching tensors would go unnoticed.
        """
        require_keys(saved, ("model", "frozen"), path)
        own = {name: tensor.shape for name, tensor in self.of(model).items()}
        theirs = {name: tensor.shape for name, tensor in saved["model"].items()}
        if own != theirs:
            name = next(n for n in [*own, *theirs] if own.get(n) != theirs.get(n))
            raise UserError(
                f"{path} belongs to a different student: {name} is {tuple(theirs[name]) if name in theirs else 'not in it'}, and here "
                f"{tuple(own[name]) if name in own else 'not there'}. Ranks and groups that are chosen by errors follow the images; "
                "restore the original ones, or start again in another folder"
            )
        if saved["frozen"] != self.frozen_hash:
            raise UserError(
                f"{path} was trained with another backbone: the frozen weights have changed since the run started. Restore the file "
                "that teacher.weights (or student.weights) named then, or start again in another folder"
            )
        load(model, saved["model"])


class Moments(dict[str, dict[str, Any]]):
    """Optimiser state of every trained parameter, e.g. Adam's moments, by the parameter's name."""

    @classmethod
    def of(cls, model: nn.Module, optimizer: torch.optim.Optimizer) -> Moments:
        """The state of an optimiser over the parameters of `model`."""
        return cls({n: dict(optimizer.state.get(p, {})) for n, p in model.named_parameters() if p.requires_grad})

    def give(self, model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
        """Load the state into an optimiser, moving it to the devices of the parameters (in a checkpoint it is on the CPU)."""
        names = {id(p): name for name, p in model.named_parameters()}
        ordered = [p for group in optimizer.param_groups for p in group["params"]]
        known = {i: self[names[id(p)]] for i, p in enumerate(ordered) if self.get(names[id(p)])}
        optimizer.load_state_dict({**optimizer.state_dict(), "state": known})
