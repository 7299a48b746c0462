"""A batch normalisation without parameters before the classifier of a frozen backbone.

Source: the code of AdaptFormer, https://arxiv.org/abs/2205.13535, which takes it from the linear probes of MAE,
https://arxiv.org/abs/2111.06377

`y = W (x − μ) / sqrt(σ² + 1e-6) + b` for pooled features x. μ and σ² are the statistics of the batch in training mode, and running
statistics (initially 0 and 1) in eval mode. The running statistics are buffers: they are saved with the adapter, and do not count as
parameters. The norm merges exactly: `W' = W diag(σ)⁻¹`, `b' = b − W' μ`.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import nn

from compressvit.errors import UserError
from compressvit.fitting.reference import Reference
from compressvit.model import surgery
from compressvit.model.affine import merge_before_, owns_weight
from compressvit.model.backbone import head_paths, model_name
from compressvit.model.modules import module_at
from compressvit.transforms.base import LedgerEntry, Plan, Transform, record, transform
from compressvit.transforms.claims import Claim, slot


class PooledNorm(nn.BatchNorm1d):
    """Batch normalisation of features without learned scale and shift: (…, M) → (…, M)."""

    def __init__(self, features: int, device=None, dtype=None):
        super().__init__(features, eps=1e-6, affine=False, device=device, dtype=dtype)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        rows = x.flatten(0, -2)
        if not self.training or len(rows) == 1:  # a single image has no variance
            return F.batch_norm(rows, self.running_mean, self.running_var, eps=self.eps).view_as(x)
        return super().forward(rows).view_as(x)

    @torch.no_grad()
    def as_affine(self) -> tuple[torch.Tensor, torch.Tensor]:
        """R (M, M) and c (M,) in float64, so that `self(x) = R x + c` in eval mode."""
        assert self.running_mean is not None
        assert self.running_var is not None
        scale = (self.running_var.double() + self.eps).rsqrt()
        return torch.diag(scale), -scale * self.running_mean.double()


class WithHeadNorm(surgery.Mixin):
    """Mixin for a linear classifier: applies a norm to its input."""

    slots = ("head_norm",)

    head_norm: nn.Module

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return super().forward(self.head_norm(x))


class KeepsHeadNorm(surgery.Mixin):
    """Mixin for a model: after timm's `reset_classifier`, the new classifier gets a norm with fresh statistics."""

    slots = ()

    def reset_classifier(self, *args, **kwargs) -> None:
        super().reset_classifier(*args, **kwargs)  # type: ignore[misc]  # of every model in timm, by no common class
        for path in head_paths(self):
            put_norm(self, path)


def put_norm(model: nn.Module, path: str) -> None:
    """Put a norm with fresh statistics before the classifier at `path`."""
    head = module_at(model, path, nn.Linear)
    norm = PooledNorm(head.in_features, device=head.weight.device, dtype=head.weight.dtype)
    surgery.extend(model, path, WithHeadNorm)
    surgery.fill_slot(model, path, "head_norm", norm)


class HeadNormPlan(Plan):
    """A resolved `HeadNorm`: paths of the classifiers, some of which the model may no longer have."""

    foldable = True
    folds_last = True  # `W R` needs the complete W, updates included

    heads: tuple[str, ...]

    def _present(self, model: nn.Module) -> list[str]:
        return [path for path in head_paths(model) if path in self.heads]

    def claims(self, model: nn.Module) -> list[Claim]:
        return [slot(path, "head_norm") for path in self.heads]

    def apply(self, model: nn.Module) -> list[LedgerEntry]:
        surgery.extend(model, "", KeepsHeadNorm)
        return record(model, self._present(model), lambda path: self._add(model, path))

    def _add(self, model: nn.Module, path: str) -> str:
        put_norm(model, path)
        return "+ batch normalisation without parameters before it"

    def initialise(self, student: nn.Module, reference: Reference) -> None:
        """Nothing to initialise: the statistics start at 0 and 1."""

    def trains(self, model: nn.Module) -> set[str]:
        return set()

    def fold(self, model: nn.Module) -> None:
        """Merge the norm into the classifier."""
        for path in self._present(model):
            head = model.get_submodule(path)
            if not owns_weight(head):
                raise UserError(
                    f"head_norm cannot be folded: {path} is low rank, so it has no dense weight to absorb the scale. Fold the "
                    "low-rank step first, as compressvit.materialise does, or keep it unmerged"
                )
            r, c = module_at(head, "head_norm", PooledNorm).as_affine()
            surgery.retract(model, path, WithHeadNorm)
            merge_before_(head, r, c)
        surgery.retract(model, "", KeepsHeadNorm)


@transform("head_norm", HeadNormPlan)
class HeadNorm(Transform):
    """A batch normalisation without parameters before the classifier; the backbone is frozen (AdaptFormer's code)."""

    needs = ()
    freezes = True

    def plan(self, model: nn.Module, reference: Reference | None = None) -> HeadNormPlan:
        paths = head_paths(model)
        if not paths:
            raise UserError(
                f"head_norm stands before the classifier, but {model_name(model)} has none; give the student one with student.head=new"
            )
        for path in paths:
            head = model.get_submodule(path)
            if not isinstance(head, nn.Linear):
                raise UserError(
                    f"head_norm stands before a linear classifier, but {path} of {model_name(model)} is a {type(head).__name__}"
                )
        return HeadNormPlan(heads=tuple(paths))
