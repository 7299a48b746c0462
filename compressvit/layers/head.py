"""What stands before a classifier.

Shapes: x is (B, M), pooled features, or (…, M) where the model does not pool.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from compressvit import surgery
from compressvit.backbone import head_paths


class PooledNorm(nn.BatchNorm1d):
    """Batch normalisation of features without a scale and shift of its own: (…, M) → (…, M)."""

    def __init__(self, features: int, device=None, dtype=None):
        super().__init__(features, eps=1e-6, affine=False, device=device, dtype=dtype)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        rows = x.flatten(0, -2)
        if len(rows) == 1:  # one image has no variance
            return F.batch_norm(rows, self.running_mean, self.running_var, eps=self.eps).view_as(x)
        return super().forward(rows).view_as(x)

    @torch.no_grad()
    def as_affine(self) -> tuple[torch.Tensor, torch.Tensor]:
        """R (M, M) and c (M,) in float64, so that `self(x) = R x + c` in eval mode."""
        assert self.running_mean is not None
        assert self.running_var is not None
        scale = (self.running_var.double() + self.eps).rsqrt()
        return torch.diag(scale), -scale * self.running_mean.double()


class WithHeadNorm:
    """Of a linear classifier: a norm before it."""

    slots = ("head_norm",)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return super().forward(self.head_norm(x))  # type: ignore[misc,attr-defined]


class KeepsHeadNorm:
    """Of a model: a classifier that timm puts in the place of another one has a norm, too, with fresh statistics."""

    slots = ()

    def reset_classifier(self: Any, *args, **kwargs) -> None:
        super().reset_classifier(*args, **kwargs)  # type: ignore[misc]
        for path in head_paths(self):
            put_norm(self, path)


def put_norm(model: nn.Module, path: str) -> None:
    """Put a norm with fresh statistics before the classifier at `path`."""
    head: Any = model.get_submodule(path)
    norm = PooledNorm(head.in_features, device=head.weight.device, dtype=head.weight.dtype)
    surgery.extend(model, path, WithHeadNorm)
    surgery.fill_slot(model, path, "head_norm", norm)
