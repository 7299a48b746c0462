"""The record of the transforms applied to a model, and which parameters phases may train."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field

from torch import nn

from compressvit.errors import UserError
from compressvit.model import ties
from compressvit.model.backbone import head_names, head_paths
from compressvit.transforms import claims
from compressvit.transforms.base import LedgerEntry, Plan
from compressvit.transforms.bottleneck import AdapterLinear
from compressvit.transforms.claims import Claim


@dataclass
class Compression:
    """The transforms that were applied to a model. The record stays with the model (also in copies) and is stored in its artifact."""

    plans: list[Plan] = field(default_factory=list)
    ties: list[list[str]] = field(default_factory=list)
    ledger: list[LedgerEntry] = field(default_factory=list)
    materialised: bool = False  # the ties no longer match the plans
    claims: list[tuple[str, Claim]] = field(default_factory=list)  # the claims of every step, with its key


def compression_of(model: nn.Module) -> Compression:
    """The record of a compressed model; an empty one for a model without transforms."""
    return getattr(model, "_compression", None) or Compression()


def set_compression(model: nn.Module, done: Compression | None) -> None:
    """Replace a model's record; None removes it."""
    vars(model)["_compression"] = done


def claims_of(plan: Plan, model: nn.Module) -> list[Claim]:
    """All claims of a plan on a model, including the keys that the plan drops; none of the last plan, which keeps what is shared."""
    if plan.last:
        return []
    stated = plan.claims(model)
    named = {name for claim in stated if claim.kind == "drop" for name in claim.paths}
    return [*stated, *claims.drops(plan.drops(model) - named)]


def require_free(model: nn.Module, step: str, wanted: Iterable[Claim]) -> None:
    """Check that a step's claims on a model do not conflict with those of earlier steps.

    Raises:
        UserError: a claim of an earlier step excludes one of these; the message names both steps and an alternative.
    """
    text = claims.conflict(compression_of(model).claims, step, wanted)
    if text is not None:
        raise UserError(text)


def require_open(model: nn.Module, step: str) -> None:
    """Check that a step can come after those that were applied to a model.

    Raises:
        UserError: one of them must be the last.
    """
    last = next((plan for plan in compression_of(model).plans if plan.last), None)
    if last is not None:
        raise UserError(f"{step} comes after {last.transform}: {last.last}; put `{last.transform}` last")


def made_narrower(model: nn.Module, path: str) -> str:
    """Why the layer at `path` has another size than the teacher's, for messages; empty where it has the teacher's."""
    step = next(
        (word for word, claim in compression_of(model).claims if claim.kind == "narrow" and path in claim.paths), ""
    )
    return f" after the earlier {step}" if step else ""


def trained_names(model: nn.Module) -> set[str] | None:
    """Names of the parameters that phases train, including the classifier's, if transforms freeze the others; else None."""
    asked = [names for plan in compression_of(model).plans if (names := plan.trains(model)) is not None]
    return set[str]().union(*asked, head_names(model)) if asked else None


def only_adapted(model: nn.Module) -> bool:
    """Whether the transforms only added modules and froze the backbone, except for the parameters that are trained."""
    plans = compression_of(model).plans
    return bool(plans) and all(plan.trains(model) is not None for plan in plans)


def trained_parameters(model: nn.Module) -> dict[str, int]:
    """Numbers of trained parameters: `trained_adapter`, without the classifier, and `trained_head`. A shared one counts once."""
    heads = head_names(model)
    counts = {"trained_adapter": 0, "trained_head": 0}
    known = dict(model.named_parameters())
    for name, parameter in known.items():
        if parameter.requires_grad:
            counts["trained_head" if name in heads else "trained_adapter"] += parameter.numel()
    if trained_names(model) is None:  # what was rounded counts as what it was
        inside = tuple(f"{path}." for path in head_paths(model))
        for path, numbers in ties.named_sizes(model):
            if path not in known:
                counts["trained_head" if inside and path.startswith(inside) else "trained_adapter"] += numbers
    for module in model.modules():
        if isinstance(module, AdapterLinear) and module.mask is not None:  # masked weights stay zero
            left = module.kept if module.mask.is_meta else int(module.mask.sum())
            counts["trained_adapter"] -= module.mask.numel() - left
    return counts
