"""Modules by their types. torch declares every attribute of a module as `Tensor | Module`; these say what is really there."""

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
        """Images (B, C, H, W) to what the last block passes on."""

    def forward_head(self, x: torch.Tensor, pre_logits: bool = False) -> torch.Tensor:
        """What `forward_features` gives to logits (B, classes), or with `pre_logits` to pooled features (B, width)."""

    def get_classifier(self) -> nn.Module | tuple[nn.Module, ...]:
        """The classifier, or one per class and distillation token."""

    def reset_classifier(self, num_classes: int) -> None:
        """Put a fresh classifier in the place of the model's; 0 for none."""

    def init_weights(self) -> None:
        """Start all parameters anew from noise."""


def as_timm(model: nn.Module) -> TimmModel:
    """The same model, for its attributes and methods that torch has no types for."""
    return cast(TimmModel, model)


def module_at(model: nn.Module, path: str, kind: type[M]) -> M:
    """The module at `path`, which is a `kind` as the caller has made sure; a user's fault is found before."""
    module = model.get_submodule(path)
    assert isinstance(module, kind), f"{path} is a {type(module).__name__}, not a {kind.__name__}"
    return module
