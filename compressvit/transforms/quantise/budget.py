"""How many bits every weight has, within so many bytes of a file."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import numpy as np
from torch import nn

from compressvit.errors import UnmetBudget, UserError
from compressvit.fitting.hull import Forms, choose
from compressvit.fitting.reference import Reference
from compressvit.fitting.rounding import Feedback, groups_of, nearest, values_of
from compressvit.log import progress
from compressvit.model import surgery
from compressvit.model.cost import file_bytes
from compressvit.transforms.quantise.fit import moment_of, moments_of, squared_error
from compressvit.transforms.quantise.packed import packed_size
from compressvit.transforms.quantise.plan import QuantisePlan
from compressvit.transforms.record import compression_of

_ROUNDS = 5  # of exact counts, after each of which the limit is corrected


def spend(
    model: nn.Module,
    paths: Sequence[str],
    choices: Sequence[int],
    limit: int,
    plan_of: Callable[[Mapping[str, int]], QuantisePlan],
    reference: Reference | None,
) -> QuantisePlan:
    """The plan whose weights lose least within a limit.

    Args:
        model: before it is rounded, possibly on the meta device.
        paths: of the layers that have a choice; those that share a weight share it.
        choices: numbers of bits.
        limit: bytes of the file.
        plan_of: the plan for the bits of all layers.
        reference: has values; without it what a weight loses is taken to be a quarter with every bit, and the same for every number.

    Raises:
        UnmetBudget: the limit is below what the fewest bits reach.
        UserError: the model as it is is no larger.
    """
    owners = _owners(model, paths)
    whole, least = file_bytes(model), _size(model, plan_of(_spread(owners, dict.fromkeys(owners, min(choices)))))
    if limit >= whole:
        raise UserError(
            f"quantise: a budget of {limit:,} bytes is no smaller than the model's file, which has {whole:,}; give less, or leave the step "
            "out"
        )
    narrowed = any(plan.transform == "shrink" for plan in compression_of(model).plans)
    too_small = UnmetBudget(
        f"quantise: a budget of {limit:,} bytes cannot be met: the smallest that {min(choices)} bits in each linear layer of a block reach "
        f"is {least:,} ({least / whole:.3f} of the model's {whole:,}); raise it, allow fewer bits (choices), or "
        + ("give `shrink` less" if narrowed else "put `shrink` before")
    )
    if limit < least:
        raise too_small
    plan = plan_of({})
    parts = {
        path: Forms(
            list(choices),
            np.array([[_price(model, path, bits, plan.group)] for bits in choices], dtype=float),
            np.array(_losses(model, owners[path], choices, plan, reference)),
        )
        for path in progress(owners, "measuring what bits each weight needs", len(owners))
    }
    wanted = limit - (least - sum(forms.prices.min() for forms in parts.values()))
    for _ in range(_ROUNDS):
        chosen = choose(parts, [wanted])
        if chosen is None:
            break
        plan = plan_of(_spread(owners, chosen))
        if (over := _size(model, plan) - limit) <= 0:
            return plan
        wanted -= over
    raise too_small


def _owners(model: nn.Module, paths: Sequence[str]) -> dict[str, list[str]]:
    """The layers of every weight, by the first of them."""
    found: dict[int, list[str]] = {}
    for path in paths:
        found.setdefault(id(model.get_submodule(path).get_parameter("weight")), []).append(path)
    return {members[0]: members for members in found.values()}


def _spread(owners: Mapping[str, Sequence[str]], bits: Mapping[str, int]) -> dict[str, int]:
    return {path: bits[first] for first, members in owners.items() for path in members}


def _size(model: nn.Module, plan: QuantisePlan) -> int:
    empty = surgery.skeleton(model)
    plan.apply(empty)
    return file_bytes(empty)


def _price(model: nn.Module, path: str, bits: int, group: int) -> int:
    """Bytes of codes and scales."""
    rows, *others = model.get_submodule(path).get_parameter("weight").shape
    groups, size = groups_of(int(np.prod(others)), group)
    return packed_size(rows * groups * size, bits) + 2 * rows * groups


def _losses(
    model: nn.Module, paths: Sequence[str], choices: Sequence[int], plan: QuantisePlan, reference: Reference | None
) -> list[float]:
    """What a weight loses with each number of bits: of the model's output, or of itself where there are no images."""
    if reference is None:
        numbers = model.get_submodule(paths[0]).get_parameter("weight").numel()
        return [numbers * 4.0**-bits for bits in choices]
    weight = reference.model.get_submodule(paths[0]).get_parameter("weight").detach().cpu().float().flatten(1)
    if plan.metric == "weights":
        found = [nearest(weight, bits, plan.group) for bits in choices]
        lost = [weight - values_of(codes, bits, plan.group) for codes, bits in zip(found, choices, strict=True)]
        return [(error.square().sum() / weight.square().sum().clamp(min=1e-30)).item() for error in lost]
    feedback = Feedback(moment_of(moments_of(reference, paths), paths, paths), plan.ridge)
    result = []
    for bits in choices:
        lost_here = weight - values_of(feedback.round(weight, bits, plan.group, 0), bits, plan.group)
        result.append(sum(squared_error(path, lost_here, reference) for path in paths))
    return result
