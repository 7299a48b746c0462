"""The record of the transforms of a model, and of the parameters that phases may train."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field

from torch import nn

from compressvit.errors import UserError
from compressvit.model.backbone import head_names
from compressvit.transforms import claims
from compressvit.transforms.base import LedgerEntry, Plan
from compressvit.transforms.bottleneck import AdapterLinear
from compressvit.transforms.claims import Claim


@dataclass
class Compression:
    """The transforms that a model has been through. It stays with the model (also through `deepcopy`) and is stored in its artifact."""

    plans: list[Plan] = field(default_factory=list)
    ties: list[list[str]] = field(default_factory=list)
    ledger: list[LedgerEntry] = field(default_factory=list)
    materialised: bool = False  # its ties are no longer those of its plans
    claims: list[tuple[str, Claim]] = field(default_factory=list)  # what each step took, with its word


def compression_of(model: nn.Module) -> Compression:
    """The record of a compressed model; an empty one for a model that no transform has touched."""
    return getattr(model, "_compression", None) or Compression()


def set_compression(model: nn.Module, done: Compression | None) -> None:
    """Replace a model's record; None for a plain model."""
    vars(model)["_compression"] = done


def claims_of(plan: Plan, model: nn.Module) -> list[Claim]:
    """All claims of a plan on a model, including the keys that it drops."""
    stated = plan.claims(model)
    named = {name for claim in stated if claim.kind == "drop" for name in claim.paths}
    return [*stated, *claims.drops(plan.drops(model) - named)]


def require_free(model: nn.Module, step: str, wanted: Iterable[Claim]) -> None:
    """Check that a step's claims on a model can be granted.

    Raises:
        UserError: an earlier step took something that excludes it; the sentence names both and a way out.
    """
    text = claims.conflict(compression_of(model).claims, step, wanted)
    if text is not None:
        raise UserError(text)


def trained_names(model: nn.Module) -> set[str] | None:
    """Names of the parameters that phases change, the classifier's among them, where transforms freeze the others; else None."""
    asked = [names for plan in compression_of(model).plans if (names := plan.trains(model)) is not None]
    return set[str]().union(*asked, head_names(model)) if asked else None


def only_adapted(model: nn.Module) -> bool:
    """Whether all that was done to a model was to add to it and to freeze its own tensors but those that are trained."""
    plans = compression_of(model).plans
    return bool(plans) and all(plan.trains(model) is not None for plan in plans)


def trained_parameters(model: nn.Module) -> dict[str, int]:
    """How many parameters phases change: `trained_adapter`, without the classifier, and `trained_head`; a shared one once."""
    heads = head_names(model)
    counts = {"trained_adapter": 0, "trained_head": 0}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            counts["trained_head" if name in heads else "trained_adapter"] += parameter.numel()
    for module in model.modules():
        if isinstance(module, AdapterLinear) and module.mask is not None:  # where it is false, the weight stays zero
            left = module.kept if module.mask.is_meta else int(module.mask.sum())
            counts["trained_adapter"] -= module.mask.numel() - left
    return counts
