"""Shared by LoRA, SSF, FacT and RepAdapter: a small trained module in a slot of an existing module, which can be merged."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, ClassVar

import torch
from einops import rearrange
from torch import nn
from torch.fx import wrap

from compressvit.errors import UserError
from compressvit.fitting.reference import Reference
from compressvit.model import surgery
from compressvit.model.affine import owns_weight, refuse_tied
from compressvit.model.linear import ChannelsFirst
from compressvit.transforms.base import LedgerEntry, Plan, record
from compressvit.transforms.claims import Claim, slot

wrap("rearrange")  # torch.fx records the call: einops does not take its proxies


def with_term(y: torch.Tensor, x: torch.Tensor, term: nn.Module | None, layer: object) -> torch.Tensor:
    if term is None:
        return y
    if isinstance(layer, (nn.Conv2d, ChannelsFirst)):
        return y + rearrange(term(rearrange(x, "b c h w -> b h w c")), "b h w c -> b c h w")
    return y + term(x)


@torch.no_grad()
def add_to_weight_(layer: nn.Module, product: torch.Tensor) -> None:
    """`weight += product`, (out, in), of a linear layer or 1×1 convolution, in place.

    Raises:
        UserError: the layer is low rank, so it has no full weight to add to.
    """
    if not owns_weight(layer):
        raise UserError(
            f"nothing can be added to the weight of a {type(layer).__name__}, which is low rank; fold that step first, as "
            "compressvit.materialise does"
        )
    weight = layer.get_parameter("weight")
    weight.copy_(weight.double() + product.double().reshape(weight.shape))


class TermPlan(Plan):
    """A resolved transform that extends modules by `mixin` and fills its slot with a term."""

    foldable = True
    mixin: ClassVar[type]
    slot: ClassVar[str]  # the slot of the mixin

    @property
    def extension(self) -> tuple[type, str]:
        """The mixin, and the slot of it that is filled."""
        return self.mixin, self.slot

    @property
    def sites(self) -> Iterable[str]:
        """Paths of the modules that get a term."""
        raise TypeError(f"{type(self).__name__} does not define sites")

    def term(self, module: nn.Module, path: str) -> tuple[nn.Module, str]:
        """A new term for a module, and its ledger text."""
        raise TypeError(f"{type(self).__name__} does not define term")

    def fold_term(self, module: nn.Module, term: Any, path: str) -> None:
        """Merge a term into the weights of its module."""
        raise TypeError(f"{type(self).__name__} does not define fold_term")

    def folds_into(self, path: str) -> list[str]:
        """Names of the tensors that `fold_term` changes."""
        return [f"{path}.weight"]

    def claims(self, model: nn.Module) -> list[Claim]:
        return [slot(path, self.extension[1]) for path in self.sites]

    def apply(self, model: nn.Module) -> list[LedgerEntry]:
        return record(model, self.sites, lambda path: self.add(model, path))

    def add(self, model: nn.Module, path: str) -> str:
        """Add a term at a path; returns its ledger text."""
        term, text = self.term(model.get_submodule(path), path)
        mixin, name = self.extension
        surgery.extend(model, path, mixin)
        surgery.fill_slot(model, path, name, term)
        return text

    def terms(self, model: nn.Module) -> dict[str, Any]:
        """The terms, by path of their module."""
        return {path: getattr(model.get_submodule(path), self.extension[1]) for path in self.sites}

    @torch.no_grad()
    def initialise(self, student: nn.Module, reference: Reference) -> None:
        for term in self.terms(student).values():
            term.reset()

    def trains(self, model: nn.Module) -> set[str]:
        return {
            f"{path}.{self.extension[1]}.{name}"
            for path, term in self.terms(model).items()
            for name, _ in term.named_parameters()
        }

    @torch.no_grad()
    def fold(self, model: nn.Module) -> None:
        """Merge every term and remove it."""
        refuse_tied(model, self.transform, [name for path in self.sites for name in self.folds_into(path)])
        for path, term in self.terms(model).items():
            self.fold_term(model.get_submodule(path), term, path)
            surgery.retract(model, path, self.extension[0])


def new_like(tensor: torch.Tensor) -> dict[str, Any]:
    """Device and dtype of a tensor, as keyword arguments for a new module."""
    return {"device": tensor.device, "dtype": tensor.dtype}
