"""The content of a checkpoint: the tensors of a model that training changes, a hash of those it does not, and optimiser state.

Where transforms only add to a frozen backbone, whoever resumes builds the same one again, so a checkpoint has kilobytes. Where one
changed the backbone itself, a checkpoint holds the whole model: fitted values need not be the same on another machine.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import nn

from compressvit.errors import UserError
from compressvit.files import require_keys
from compressvit.model import ties
from compressvit.model.weights import hash_tensors
from compressvit.transforms.record import only_adapted


class TrainedState:
    """The part of a model's state that a phase changes.

    Args:
        model: as the phase begins with it; whether a parameter is trained is looked at now.
    """

    def __init__(self, model: nn.Module):
        self._frozen: set[str] = set()
        if only_adapted(model):
            self._frozen = {n for n, p in model.named_parameters(remove_duplicate=False) if not p.requires_grad}
        state = ties.unique_state(model)
        self.frozen_hash = hash_tensors({name: state[name] for name in state if name in self._frozen})

    def of(self, model: nn.Module) -> dict[str, torch.Tensor]:
        """Trained parameters and all buffers, by canonical name; of the model, or of one that has its structure."""
        return {name: tensor for name, tensor in ties.unique_state(model).items() if name not in self._frozen}

    def copied(self, model: nn.Module) -> dict[str, torch.Tensor]:
        """The same, as it is now, on the CPU."""
        return {name: tensor.detach().cpu().clone() for name, tensor in self.of(model).items()}

    def load(self, saved: dict[str, Any], model: nn.Module, path: Path) -> None:
        """Give the model what a checkpoint holds.

        Raises:
            UserError: it is of a model that shares other layers, has other ranks, or another frozen backbone; what fits would be
                loaded, and nobody would know.
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
        model.load_state_dict(saved["model"], strict=False)


class Moments(dict[str, dict[str, Any]]):
    """Optimiser state of every trained parameter, e.g. Adam's moments, by the parameter's name."""

    @classmethod
    def of(cls, model: nn.Module, optimizer: torch.optim.Optimizer) -> Moments:
        """Those of an optimiser over the parameters of `model`."""
        return cls({n: dict(optimizer.state.get(p, {})) for n, p in model.named_parameters() if p.requires_grad})

    def give(self, model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
        """Load them into an optimiser, on the devices of the parameters (those of a checkpoint are on the CPU)."""
        names = {id(p): name for name, p in model.named_parameters()}
        ordered = [p for group in optimizer.param_groups for p in group["params"]]
        known = {i: self[names[id(p)]] for i, p in enumerate(ordered) if self.get(names[id(p)])}
        optimizer.load_state_dict({**optimizer.state_dict(), "state": known})
