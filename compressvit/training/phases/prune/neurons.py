"""Structured pruning of adapters: scoring neurons, choosing those to keep within a target, and removing the others (MiMi).

Paper: Mini but Mighty: Finetuning ViTs with Mini Adapters, WACV 2024, https://arxiv.org/abs/2311.03873

Neuron j of an adapter is row j of its down projection D (h', M) and column j of its up projection U (M, h').
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Literal

import torch
from torch import nn

from compressvit.errors import UserError
from compressvit.fitting.moments import tokens_at
from compressvit.model import ties
from compressvit.training.phases.prune.options import PruneOptions, PruneTarget, Score
from compressvit.training.state import Moments
from compressvit.transforms import TRANSFORMS, Plan
from compressvit.transforms.bottleneck import BottleneckPlan
from compressvit.transforms.record import compression_of

Widths = dict[str, int]


@dataclass(frozen=True)
class Price:
    """The cost of one neuron of an adapter, in the units of the possible targets: parameters, neurons and MACs.

    Attributes:
        fixed: parameters of an adapter that do not depend on its number of neurons: the up projection's bias and a learnable scale.
    """

    parameters: int
    macs: int
    fixed: int = 0


def prunable_plan(model: nn.Module) -> BottleneckPlan:
    """The plan of the model's prunable adapters.

    Raises:
        UserError: the model has no such plan, or more than one.
    """
    found = [plan for plan in compression_of(model).plans if isinstance(plan, BottleneckPlan) and plan.prunable]
    names = [name for name, spec in TRANSFORMS.items() if spec.plan_class.prunable]
    if len(found) == 1 and found[0].masked:
        raise UserError(
            f"the weights of {found[0].transform} were masked by an earlier `sparsify`; remove neurons (`prune`) before masking, "
            "and mask once"
        )
    if len(found) == 1:
        return found[0]
    if found:
        raise UserError(
            f"prune finds the adapters of {len(found)} steps, {', '.join(p.transform for p in found)}; leave one of them"
        )
    have = ", ".join(p.transform for p in compression_of(model).plans) or "no transform"
    raise UserError(
        f"prune removes neurons of adapters ({' or '.join(names)}), and the model has none: it was made by {have}; put such a step "
        "before it"
    )


def scores(
    model: nn.Module,
    plan: BottleneckPlan,
    kind: Score,
    *,
    seed: int = 0,
    gradients: Mapping[str, torch.Tensor] | None = None,
    activations: Mapping[str, torch.Tensor] | None = None,
) -> dict[str, torch.Tensor]:
    """Importance of every neuron, (h',) float64 by adapter path.

    Args:
        model: has the adapters of `plan`.
        kind: see `PruneOptions.score`.
        seed: of `random`.
        gradients: by parameter name, for `gradient` and `taylor`.
        activations: for `activation`, what `mean_activations` returns.
    """
    generator = torch.Generator().manual_seed(seed)
    found = {}
    for path, adapter in plan.bottlenecks(model).items():
        down, up = (layer.weight.detach().cpu().double() for layer in adapter.dense())
        width, hidden = up.shape
        if kind in ("gradient", "taylor"):
            assert gradients is not None, "the caller computes them"
            prefix = plan.prefix(path)
            slopes = [gradients[f"{prefix}.{side}.weight"].cpu().double() for side in ("down", "up")]
            down, up = slopes if kind == "gradient" else (down * slopes[0], up * slopes[1])
        total = down.abs().sum(dim=1) + up.abs().sum(dim=0)
        if kind == "activation":
            assert activations is not None, "the caller computes them"
            total = activations[path].cpu().double()
        found[path] = {
            "magnitude": total / (2 * width),
            "sum": total,
            "shape": total / (width + hidden),
            "relative": total / total.max().clamp(min=torch.finfo(total.dtype).tiny),
            "down": down.abs().sum(dim=1) / width,
            "gradient": total,
            "taylor": total,
            "activation": total,
            "random": torch.rand(hidden, generator=generator, dtype=torch.float64),
        }[kind]
    return found


@torch.no_grad()
def mean_activations(
    model: nn.Module, plan: BottleneckPlan, batches: Iterable[torch.Tensor]
) -> dict[str, torch.Tensor]:
    """Mean over images and tokens of the size of what each neuron passes on, (h',) float64 by the adapter's path.

    Args:
        model: with the adapters of `plan`; it is put in eval mode.
        batches: images on the model's device; at least one batch.
    """
    sums: dict[str, torch.Tensor] = {}
    counts: dict[str, int] = {}

    def add(path: str, hidden: torch.Tensor) -> None:
        sizes = hidden.detach().abs().flatten(0, -2).double()
        sums[path] = sums.get(path, 0) + sizes.sum(dim=0)
        counts[path] = counts.get(path, 0) + len(sizes)

    adapters = plan.bottlenecks(model)
    hooks = [
        adapter.up.register_forward_pre_hook(lambda _, inputs, path=path: add(path, inputs[0]))
        for path, adapter in adapters.items()
    ]
    model.eval()
    try:
        for images in batches:
            model(images)
    finally:
        for hook in hooks:
            hook.remove()
    return {path: sums[path] / counts[path] for path in adapters}


def prices(model: nn.Module, plan: BottleneckPlan) -> dict[str, Price]:
    """The cost of one neuron, by adapter path."""
    bottlenecks = plan.bottlenecks(model)
    tokens = tokens_at(model, [f"{plan.prefix(path)}.down" for path in bottlenecks])
    result = {}
    for path, adapter in bottlenecks.items():
        down, up = adapter.dense()
        width = up.weight.shape[0]
        each = 2 * width + (down.bias is not None)
        fixed = sum(p.numel() for p in adapter.parameters()) - up.weight.shape[1] * each
        result[path] = Price(each, 2 * width * tokens[f"{plan.prefix(path)}.down"], fixed)
    return result


def cycles(
    target: PruneTarget,
    rate: float,
    start: Widths,
    price: Mapping[str, Price],
    scope: Literal["global", "local"] = "global",
    least: int = 0,
) -> int | None:
    """Number of removals at rate ρ that reach the target: ceil(ln(target / start) / ln(1 − ρ)); None if only accuracy ends pruning.

    Raises:
        UserError: the target exceeds the initial size, or may leave no neuron.
    """
    if target.accuracy is not None:
        return None
    unit, wanted, have = amounts(target, start, price)
    if wanted > have:
        raise UserError(
            f"prune.target.{unit}={_short(getattr(target, unit))} is above the {have:,} that the adapters have; "
            f"it can be up to {have:,}, or a share below 1"
        )
    costs = [_cost(p, unit) for p in price.values()]
    if least:
        need, why = (
            least * sum(costs) + _fixed(price, unit),
            f"too few neurons: each of {len(costs)} adapters keeps {least}",
        )
    elif scope == "local":
        need, why = -(-have // max(start.values())), "no neuron: that share is less than one of any adapter"
    else:
        need, why = max(costs), f"no neuron: the best can cost {max(costs):,} {unit}"
    if wanted < need:
        share = math.ceil(1e4 * need / have) / 1e4  # rounded up, so that the target is reached
        raise UserError(
            f"prune.target.{unit}={_short(getattr(target, unit))} leaves {why}; "
            f"give at least {need:,} of the {have:,} there are, or a share of {share:g}"
        )
    if wanted == have:
        return 0
    quotient = math.log(_share(target, start, price)) / math.log(1 - rate)
    return max(1, math.ceil(quotient * (1 - 1e-12)))


def select(
    scored: Mapping[str, torch.Tensor],
    done: int,
    spec: PruneOptions,
    start: Widths,
    price: Mapping[str, Price],
    least: int = 0,
) -> dict[str, torch.Tensor]:
    """Sorted indices of the neurons that each adapter keeps after removal number `done` (from 1).

    Keeps `floor((1−ρ)^done · start)` in the unit of the target (neurons for an accuracy), but no less than the target. Of equal scores
    the earlier neuron is kept. Every adapter keeps at least `least` neurons.
    """
    share = (1 - spec.rate) ** done
    unit, limit = _limit(share, spec, start, price)
    if spec.scope == "local":
        widths = _local_widths(list(scored), share, spec, start, price, least)
        costs = {path: _cost(price[path], unit) for path in scored}
        while sum(widths[path] * costs[path] for path in scored) > max(limit, least * sum(costs.values())):
            widths[max(widths, key=lambda path: widths[path])] -= 1  # others keep `least`, more than their share
        return {path: _best(s, widths[path]) for path, s in scored.items()}
    paths = list(scored)
    kept = {path: _best(s, least).tolist() for path, s in scored.items()}
    spent = sum(len(chosen) * _cost(price[path], unit) for path, chosen in kept.items())
    order = sorted((-float(value), i, j) for i, path in enumerate(paths) for j, value in enumerate(scored[path]))
    for _, i, j in order:
        if j in kept[paths[i]]:
            continue
        cost = _cost(price[paths[i]], unit)
        if spent + cost > limit:
            break  # no cheaper neuron of lower score instead: the neurons kept are always a prefix of the ranking
        spent += cost
        kept[paths[i]].append(j)
    return {path: torch.tensor(sorted(chosen), dtype=torch.long) for path, chosen in kept.items()}


def _limit(share: float, spec: PruneOptions, start: Widths, price: Mapping[str, Price]) -> tuple[str, int]:
    """The unit, and how much of it a cycle keeps in neurons: the paper's share of the initial amount, but at least the target."""
    if spec.target.accuracy is not None:
        return "neurons", _floor(share * sum(start.values()))
    unit, wanted, have = amounts(spec.target, start, price)
    fixed = _fixed(price, unit)
    return unit, max(wanted - fixed, _floor(share * (have - fixed)))


def _local_widths(
    paths: list[str], share: float, spec: PruneOptions, start: Widths, price: Mapping[str, Price], least: int
) -> Widths:
    if spec.target.accuracy is None:  # the same share of neurons in every adapter is also that share of any other unit
        share = max(share, _share(spec.target, start, price))
    return {path: max(least, _floor(share * start[path])) for path in paths}


def amounts(target: PruneTarget, start: Widths, price: Mapping[str, Price]) -> tuple[str, int, int]:
    """The unit of a target other than accuracy, the amount that may stay, and the initial amount, each including fixed costs."""
    unit = next(name for name in ("neurons", "parameters", "macs") if getattr(target, name) is not None)
    have = sum(hidden * _cost(price[path], unit) for path, hidden in start.items() if hidden) + _fixed(price, unit)
    asked = getattr(target, unit)
    return unit, _floor(asked * have) if asked < 1 else int(asked), have


def _share(target: PruneTarget, start: Widths, price: Mapping[str, Price]) -> float:
    """The share of neurons that may stay: the given share, or the given number as a share."""
    unit, wanted, have = amounts(target, start, price)
    asked, fixed = getattr(target, unit), _fixed(price, unit)
    return asked if asked < 1 and not fixed else (wanted - fixed) / (have - fixed)


def _floor(number: float) -> int:
    """Round down, with a tolerance for rounding errors: 0.7 · 0.7 · 100 gives 49."""
    return math.floor(number * (1 + 1e-12))


def _cost(price: Price, unit: str) -> int:
    return 1 if unit == "neurons" else getattr(price, unit)


def _fixed(price: Mapping[str, Price], unit: str) -> int:
    """The amount of a unit that all adapters have independently of their neurons."""
    return sum(p.fixed for p in price.values()) if unit == "parameters" else 0


def _best(scored: torch.Tensor, count: int) -> torch.Tensor:
    """Sorted indices of the highest scores; of equal scores, the earlier ones."""
    order = sorted(range(len(scored)), key=lambda j: (-float(scored[j]), j))
    return torch.tensor(sorted(order[:count]), dtype=torch.long)


def shrink_(model: nn.Module, keep: Mapping[str, torch.Tensor], moments: Moments | None = None) -> Widths:
    """Keep only the given neurons of the adapters, in place; an adapter without neurons is removed from the forward pass.

    The result computes the same as the original model with the removed neurons' columns of U set to zero. The new widths are recorded in
    the model, so its artifact loads without any data.

    Args:
        model: has prunable adapters.
        keep: sorted indices of the neurons to keep, by path.
        moments: the optimiser's state by parameter name, reduced in the same way.

    Returns:
        The new width of every adapter.
    """
    plan = prunable_plan(model)
    before = _counts(model, plan)
    for path, adapter in plan.bottlenecks(model).items():
        down, up = adapter.dense()
        chosen = keep[path].to(down.weight.device)
        prefix = plan.prefix(path)
        _gather(down, "weight", 0, chosen, f"{prefix}.down", moments)
        if down.bias is not None:
            _gather(down, "bias", 0, chosen, f"{prefix}.down", moments)
        _gather(up, "weight", 1, chosen, f"{prefix}.up", moments)
        down.out_features = up.in_features = len(chosen)
        if not len(chosen):
            for name, _ in adapter.named_parameters():
                if moments is not None:
                    moments.pop(f"{prefix}.{name}", None)
            plan.remove(model, path)
    widths = {**plan.widths, **{path: len(chosen) for path, chosen in keep.items()}}
    _record(model, plan, plan.model_copy(update={"widths": widths}), before)
    return widths


def _gather(
    layer: nn.Module,
    name: str,
    dim: int,
    chosen: torch.Tensor,
    prefix: str,
    moments: Moments | None,
) -> None:
    old = getattr(layer, name)
    setattr(layer, name, nn.Parameter(old.detach().index_select(dim, chosen), requires_grad=old.requires_grad))
    state = moments.get(f"{prefix}.{name}", {}) if moments is not None else {}
    sized = [value for value in state.values() if not isinstance(value, (int, float, str)) and value is not None]
    if all(isinstance(value, torch.Tensor) and value.shape in (old.shape, (), (1,)) for value in sized):
        for key, value in state.items():
            if isinstance(value, torch.Tensor) and value.shape == old.shape:
                state[key] = value.index_select(dim, chosen.to(value.device))
    else:  # sums over rows or preconditioners, which have no entries for single neurons
        state.clear()


def _counts(model: nn.Module, plan: Plan) -> dict[str, int]:
    paths = [entry.path for entry in compression_of(model).ledger if entry.step == plan.transform]
    return ties.count_at_paths(model, paths)


def _record(model: nn.Module, old: BottleneckPlan, new: BottleneckPlan, before: Mapping[str, int]) -> None:
    """Replace the old plan and its parameter counts by the new ones in the model's record."""
    done = compression_of(model)
    done.plans[done.plans.index(old)] = new
    done.ties = ties.tied_groups(model)
    now = _counts(model, new)
    for i, entry in enumerate(done.ledger):
        if entry.step == new.transform and entry.path in new.widths:
            words = entry.change.split(";")[0]
            left = new.widths[entry.path]
            text = f"{words}; {left} neuron{'s' * (left > 1)} left" if left else f"{words}; pruned away"
            # a later step may have added to the same path, and has its own entry for that
            after = entry.after + now[entry.path] - before[entry.path]
            done.ledger[i] = replace(entry, change=text, after=after)


def _short(number: float) -> str:
    return f"{number:,}" if isinstance(number, int) else f"{number:g}"
