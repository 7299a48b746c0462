"""Typed access to modules: torch declares every attribute of a module as `Tensor | Module`, and these give the actual types."""

from __future__ import annotations

from typing import Any, Protocol, TypeVar, cast

import torch
from torch import nn

M = TypeVar("M", bound=nn.Module)


class TimmModel(Protocol):
    """What every model of timm has besides being an `nn.Module`."""

    num_classes: int
    pretrained_cfg: dict[str, Any]

    def forward_features(self, x: torch.Tensor) -> torch.Tensor:
        """From images (B, C, H, W) to the output of the last block, after the final norm if there is one."""

    def forward_head(self, x: torch.Tensor, pre_logits: bool = False) -> torch.Tensor:
        """From the output of `forward_features` to logits (B, classes), or with `pre_logits` to pooled features (B, width)."""

    def get_classifier(self) -> nn.Module | tuple[nn.Module, ...]:
        """The classifier, or one per class and distillation token."""

    def reset_classifier(self, num_classes: int) -> None:
        """Replace the classifier by a newly initialised one; 0 classes removes it."""

    def init_weights(self) -> None:
        """Initialise all parameters at random."""


def as_timm(model: nn.Module) -> TimmModel:
    """The same object, typed with timm's attributes and methods."""
    return cast(TimmModel, model)


def module_at(model: nn.Module, path: str, kind: type[M]) -> M:
    """The module at `path`, which is a `kind` as the caller has made sure; a user's fault is found before."""
    module = model.get_submodule(path)
    assert isinstance(module, kind), f"{path} is a {type(module).__name__}, not a {kind.__name__}"
    return module
