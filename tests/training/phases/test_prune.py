"""Scores of neurons, and which ones stay. Taking out the others is in test_prune_shrinking.py, the phase in test_prune_runs.py."""

from __future__ import annotations

import pytest
import torch
from helpers.adapted import SPECS, adapted
from helpers.training import tiny_vit
from torch import nn

from compressvit.errors import UserError
from compressvit.model.backbone import input_size
from compressvit.training.phases.prune.neurons import (
    Price,
    amounts,
    cycles,
    mean_activations,
    prunable_plan,
    scores,
    select,
)
from compressvit.training.phases.prune.spec import Prune, PruneTarget
from compressvit.transforms import Adapters
from compressvit.transforms.applying import compress


def prune(rate=0.5, scope="global", **target) -> Prune:
    return Prune(target=PruneTarget(**target or {"accuracy": 50}), rate=rate, scope=scope)


# --------------------------------------------------------------------------------------------------------------------- scores


@pytest.mark.parametrize("score", ["magnitude", "sum", "shape", "relative", "down", "gradient", "taylor"])
def test_scores_are_those_of_a_loop_over_neurons(score):
    model = adapted("swin")
    plan = prunable_plan(model)
    slopes = {n: torch.randn(p.shape) for n, p in model.named_parameters() if ".adapter." in n}
    found = scores(model, plan, score, gradients=slopes)
    assert list(found) == list(plan.widths)
    for path, hidden in plan.widths.items():
        adapter = model.get_submodule(path).adapter
        D, U = adapter.down.weight.tolist(), adapter.up.weight.tolist()
        gD, gU = (slopes[f"{path}.adapter.{side}.weight"].tolist() for side in ("down", "up"))
        M = len(U)
        by_hand = []
        for j in range(hidden):
            lower, upper = sum(abs(D[j][m]) for m in range(M)), sum(abs(U[m][j]) for m in range(M))
            slope = sum(abs(gD[j][m]) + abs(gU[m][j]) for m in range(M))
            change = sum(abs(D[j][m] * gD[j][m]) + abs(U[m][j] * gU[m][j]) for m in range(M))
            size = {"magnitude": 2 * M, "shape": M + hidden, "down": M}.get(score, 1)
            value = {"down": lower, "gradient": slope, "taylor": change}.get(score, lower + upper)
            by_hand.append(value / size)
        if score == "relative":
            by_hand = [value / max(by_hand) for value in by_hand]
        assert found[path].tolist() == pytest.approx(by_hand, rel=1e-12)  # measured up to 3e-16


@pytest.mark.wide_unless(lambda family: family == "vit")
@pytest.mark.parametrize("kind", SPECS)
@pytest.mark.parametrize("family", ["vit", "swin", "convnext_conv_mlp"])
def test_the_score_of_activations_is_their_mean_size(family, kind):
    model = adapted(family, SPECS[kind])
    plan = prunable_plan(model)
    batches = [torch.randn(n, 3, *input_size(model)[1:]) for n in (3, 1)]
    seen: dict[str, list[torch.Tensor]] = {path: [] for path in plan.widths}
    hooks = [
        adapter.down.register_forward_hook(lambda m, i, o, path=path, act=adapter.act: seen[path].append(act(o)))
        for path, adapter in plan.bottlenecks(model).items()
    ]
    found = scores(model, plan, "activation", activations=mean_activations(model.train(), plan, batches))
    for hook in hooks:
        hook.remove()
    assert list(found) == list(plan.widths)
    for path, hidden in plan.widths.items():
        each = torch.cat([h.reshape(-1, hidden) for h in seen[path]]).double().abs().mean(dim=0)
        assert found[path].tolist() == pytest.approx(each.tolist(), rel=1e-6)
        assert len(set(each.tolist())) > 1
    assert not any(adapter.up._forward_pre_hooks for adapter in plan.bottlenecks(model).values())


def test_random_scores_follow_the_seed():
    model = adapted("vit")
    plan = prunable_plan(model)
    first, again, other = ({p: s.tolist() for p, s in scores(model, plan, "random", seed=n).items()} for n in (1, 1, 2))
    assert first == again != other
    assert len({tuple(s) for s in first.values()}) == len(first)


@pytest.mark.parametrize("score", ["relative", "magnitude"])
def test_adapters_of_zeros_have_scores(score):
    model = compress(tiny_vit(), [Adapters(width=2)])
    for parameter in prunable_plan(model).bottlenecks(model)["blocks.0.mlp"].parameters():
        nn.init.zeros_(parameter)
    assert scores(model, prunable_plan(model), score)["blocks.0.mlp"].tolist() == [0, 0]


# ------------------------------------------------------------------------------------------------------------------ selection

START = {"a": 16, "b": 8, "c": 32, "d": 8}
PRICE = {"a": Price(20, 400), "b": Price(40, 200), "c": Price(40, 800), "d": Price(21, 100)}
UNITS = {"neurons": lambda p: 1, "parameters": lambda p: p.parameters, "macs": lambda p: p.macs}


def marks(seed=0, start=START, levels=None) -> dict[str, torch.Tensor]:
    """Random scores; of few values, if `levels` says how many."""
    generator = torch.Generator().manual_seed(seed)
    draw = {p: torch.rand(n, generator=generator, dtype=torch.float64) for p, n in start.items()}
    return {p: (s * levels).floor() if levels else s for p, s in draw.items()}


def pairs(keep) -> set[tuple[str, int]]:
    return {(path, j) for path, chosen in keep.items() for j in chosen.tolist()}


def ranking(scored) -> list[tuple[str, int]]:
    """Best first; the earlier of equal ones first."""
    everyone = [(path, j) for path, s in scored.items() for j in range(len(s))]
    return sorted(everyone, key=lambda n: -float(scored[n[0]][n[1]]))  # sorted is stable


def amount(keep, unit, price=PRICE) -> int:
    return sum(UNITS[unit](price[path]) * len(chosen) for path, chosen in keep.items())


@pytest.mark.parametrize("rate", [0.5, 0.3, 0.1])
def test_a_cycle_keeps_the_floor_of_the_papers_share(rate):
    total = sum(START.values())
    for c in range(1, 12):
        keep = select(marks(c), c, prune(rate), START, PRICE)
        assert len(pairs(keep)) == int((1 - rate) ** c * total + 1e-9)
        assert len(pairs(select(marks(c), c, prune(rate, neurons=9), START, PRICE))) == max(9, len(pairs(keep)))
        assert all(chosen.tolist() == sorted(set(chosen.tolist())) for chosen in keep.values())


def test_shares_that_are_whole_numbers_lose_nothing_to_rounding():
    start = {"a": 100}
    keep = select(marks(start=start), 2, prune(0.3), start, {"a": Price(1, 1)})
    assert 0.7**2 * 100 < 49 == len(keep["a"])


@pytest.mark.parametrize("levels", [1, 3, None])
@pytest.mark.parametrize("unit", [*UNITS, "accuracy"])
def test_what_stays_is_a_prefix_of_the_ranking_and_ties_keep_the_earlier(levels, unit):
    scored = marks(levels=levels)
    for c in range(1, 7):
        asked = {unit: 10 if unit == "accuracy" else 0.1}
        keep = pairs(select(scored, c, prune(**asked), START, PRICE))
        assert keep == set(ranking(scored)[: len(keep)])
    if levels == 1:
        assert keep <= {("a", j) for j in range(16)}


@pytest.mark.parametrize("asked", [0.06, 0.3, 0.51, 0.999, "number"])
@pytest.mark.parametrize("unit", UNITS)
@pytest.mark.parametrize("seed", range(4))
def test_a_target_is_reached_within_a_neuron_and_never_exceeded(unit, asked, seed):
    have = sum(UNITS[unit](PRICE[path]) * n for path, n in START.items())
    asked = have // 3 if asked == "number" else asked
    spec, scored = prune(0.4, **{unit: asked}), marks(seed)
    wanted = asked if asked > 1 else int(asked * have)
    assert amounts(spec.target, START, PRICE) == (unit, wanted, have)
    last = cycles(spec.target, 0.4, START, PRICE)
    keep = select(scored, last, spec, START, PRICE)
    spent = amount(keep, unit)
    following = ranking(scored)[len(pairs(keep))][0]
    assert spent <= wanted < spent + UNITS[unit](PRICE[following])
    assert pairs(keep) == pairs(select(scored, last + 3, spec, START, PRICE)), "there it stays"
    assert amount(select(scored, last - 1, spec, START, PRICE), unit) >= spent


@pytest.mark.parametrize("c", [1, 2, 3])
def test_local_keeps_the_same_share_of_every_adapter(c):
    scored = marks(levels=3)
    keep = select(scored, c, prune(scope="local"), START, PRICE)
    assert {path: len(chosen) for path, chosen in keep.items()} == {path: n // 2**c for path, n in START.items()}
    for path, chosen in keep.items():
        assert chosen.tolist() == sorted(scored[path].argsort(descending=True, stable=True)[: len(chosen)].tolist())


@pytest.mark.parametrize("unit", UNITS)
def test_a_local_target_is_a_share_of_every_adapter_in_any_unit(unit):
    for asked in (0.25, 0.3, 0.7):
        keep = select(marks(), 9, prune(scope="local", **{unit: asked}), START, PRICE)
        assert {p: len(chosen) for p, chosen in keep.items()} == {p: int(asked * n) for p, n in START.items()}


@pytest.mark.parametrize("scope", ["global", "local"])
@pytest.mark.parametrize(
    ("unit", "asked"), [("neurons", 4), ("neurons", 0.2), ("parameters", 0.1), ("macs", 0.1), ("accuracy", 9)]
)
def test_every_adapter_keeps_the_least_it_must(scope, unit, asked):
    scored = {path: s + 10 * (path == "c") for path, s in marks().items()}  # one outshines all
    keep = select(scored, 9, prune(scope=scope, **{unit: asked}), START, PRICE, least=1)
    assert all(len(chosen) >= 1 for chosen in keep.values())
    assert all(scored[path].argmax() in chosen for path, chosen in keep.items())
    if unit in UNITS:
        assert amount(keep, unit) <= amounts(PruneTarget(**{unit: asked}), START, PRICE)[1]
    else:
        assert len(pairs(keep)) == len(START)


# --------------------------------------------------------------------------------------------------------------------- cycles

THOUSAND = {"a": 512, "b": 512}
SAME = {"a": Price(10, 70), "b": Price(10, 70)}


# share that is asked for, ρ, removals
TABLE = [(0.5, 0.5, 1), (0.25, 0.5, 2), (0.125, 0.5, 3), (0.13, 0.5, 3), (0.12, 0.5, 4), (0.9, 0.5, 1)]
TABLE += [
    (0.999, 0.1, 1),
    (0.81, 0.1, 2),
    (0.729, 0.1, 3),
    (0.49, 0.3, 2),
    (0.343, 0.3, 3),
    (0.01, 0.9, 2),
    (0.001, 0.9, 3),
]


@pytest.mark.wide_unless(lambda unit: unit == "neurons")
@pytest.mark.parametrize(("asked", "rate", "expected"), TABLE)
@pytest.mark.parametrize("unit", UNITS)
def test_how_many_removals_reach_a_target(unit, asked, rate, expected):
    assert cycles(PruneTarget(**{unit: asked}), rate, THOUSAND, SAME) == expected
    spec, scored = prune(rate, **{unit: asked}), marks(start=THOUSAND)
    kept = [amount(select(scored, c, spec, THOUSAND, SAME), unit, SAME) for c in range(expected + 1)]
    wanted = amounts(spec.target, THOUSAND, SAME)[1]
    assert kept[-1] <= wanted < kept[-2]


def test_cycles_of_shares_do_not_depend_on_what_there_is():
    for total in (10, 11, 13, 1023):
        assert cycles(PruneTarget(neurons=0.25), 0.5, {"a": total}, {"a": Price(1, 1)}) == 2


def test_a_target_that_is_met_needs_no_removal_and_accuracy_no_number():
    assert cycles(PruneTarget(neurons=1024), 0.5, THOUSAND, SAME) == 0
    assert cycles(PruneTarget(macs=1024 * 70), 0.5, THOUSAND, SAME) == 0
    assert cycles(PruneTarget(neurons=1023), 0.5, THOUSAND, SAME) == 1
    assert cycles(PruneTarget(accuracy=90), 0.5, THOUSAND, SAME) is None


REFUSED = [
    (
        {"neurons": 65},
        "global",
        0,
        "neurons=65 is above the 64 that the adapters have; it can be up to 64, or a share below 1",
    ),
    ({"macs": 99_999}, "global", 0, "prune.target.macs=99,999 is above the 34,400 that"),
    (
        {"neurons": 0.01},
        "global",
        0,
        "neurons=0.01 leaves no neuron: the best can cost 1 neurons; give at least 1 of the 64",
    ),
    (
        {"macs": 300},
        "global",
        0,
        "macs=300 leaves no neuron: the best can cost 800 macs; give at least 800 of the 34,400",
    ),
    ({"parameters": 1e-4}, "global", 0, "no neuron: the best can cost 40 parameters; give at least 40 of the 2,088"),
    ({"neurons": 1}, "local", 0, "no neuron: that share is less than one of any adapter; give at least 2 of"),
    ({"neurons": 3}, "global", 1, "leaves too few neurons: each of 4 adapters keeps 1; give at least 4 of the 64"),
    ({"macs": 0.04}, "local", 1, "too few neurons: each of 4 adapters keeps 1; give at least 1,500 of the 34,400"),
]


@pytest.mark.parametrize(("target", "scope", "least", "words"), REFUSED)
def test_targets_that_cannot_be_are_refused_and_the_advice_works(target, scope, least, words):
    with pytest.raises(UserError) as caught:
        cycles(PruneTarget(**target), 0.5, START, PRICE, scope, least)
    assert words in str(caught.value)
    if "give" in words:
        number = int(str(caught.value).split("at least ")[1].split()[0].replace(",", ""))
        share = float(str(caught.value).split("a share of ")[1])
        for asked in (number, share):
            better = {next(iter(target)): asked}
            last = cycles(PruneTarget(**better), 0.5, START, PRICE, scope, least)
            for seed in range(5):
                assert pairs(select(marks(seed), last, prune(scope=scope, **better), START, PRICE, least))
