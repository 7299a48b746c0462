"""The `prune` phase: train, remove neurons, train, …, always ending with training (MiMi, algorithm 1)."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import nn

from compressvit import processes
from compressvit.log import RunLog
from compressvit.model import surgery
from compressvit.tasks.quality import Quality
from compressvit.training.phase import Phase
from compressvit.training.phases.prune.neurons import (
    Widths,
    cycles,
    prices,
    prunable_plan,
    scores,
    select,
    shrink_,
)
from compressvit.training.phases.prune.options import PruneOptions
from compressvit.training.state import Moments

TrainCycle = Callable[[nn.Module, Phase, Moments], dict[str, Any]]
Measure = Callable[[nn.Module], dict[str, torch.Tensor]]


def prune_and_train(
    model: nn.Module,
    spec: PruneOptions,
    phase: Phase,
    log: RunLog,
    *,
    train_cycle: TrainCycle,
    evaluate: Callable[[nn.Module], dict[str, Any]],
    gradients: Measure,
    activations: Measure,
    quality: Quality,
) -> tuple[nn.Module, dict[str, Any], list[Widths]]:
    """Run all cycles. Each has its own checkpoint, so an interrupted run resumes in the cycle it had reached.

    Args:
        model: with prunable adapters; changed in place.
        phase: its checkpoint's name is that of the first training; those of the cycles carry their number.
        train_cycle: trains the model, from its checkpoint if there is one, with the optimiser's moments to begin with.
        evaluate: for a target of accuracy.
        gradients: of the loss on some training batches, by parameter name, for `score: gradient` and `taylor`.
        activations: of every neuron on them, by the adapter's path, for `score: activation`.
        quality: the figure that a target of accuracy is about.

    Returns:
        The model (an earlier, larger one if accuracy fell below the target), the initial scores of the first training and the epoch
        kept by the last one, and the widths of the adapters after every training.
    """
    plan = prunable_plan(model)
    start, price = dict(plan.widths), prices(model, plan)
    total = cycles(spec.target, spec.rate, start, price, spec.scope, plan.least)
    history: list[Widths] = [start]
    good: tuple[nn.Module, dict[str, Any]] | None = None
    done, first = 0, None
    moments = Moments()
    while True:
        cycle = _cycle(phase, done)
        if not cycle.begun:  # already reported before the run was resumed
            _report(log, phase, done, history[-1])
        trained = train_cycle(model, cycle, moments)
        moments = trained.pop("moments")
        first = first or trained["start"]
        if spec.target.accuracy is not None:
            otherwise = "the adapters of the cycle before are kept" if good else "nothing was pruned"
            if not _reaches(spec.target.accuracy, evaluate(model), quality, log, phase, otherwise):
                if good:
                    model, trained = good
                    history.pop()
                break
            good = (surgery.deep_copy(model), trained)
        left = sum(history[-1].values())
        if done == total or left <= plan.least * len(start) or left == 0:
            break
        done += 1
        scored = processes.led(partial(_scores, model, spec, phase, done, gradients, activations))  # one choice for all
        keep = select(scored, done, spec, start, price, plan.least)
        if not any(len(chosen) for chosen in keep.values()):
            break
        history.append(shrink_(model, keep, moments))
    kept = {"start": first, "kept_epoch": trained["kept_epoch"], "widths": history, "trainings": done + 1}
    return model, kept, history


def _cycle(phase: Phase, done: int) -> Phase:
    """The training that follows removal number `done`."""
    first = phase.checkpoint
    file = first.with_name(f"{first.stem}_cycle{done}.pt") if done else first
    return replace(phase, name=f"{phase.name}_cycle{done}", number=phase.number + 1000 * done, checkpoint=file)


def _reaches(
    wanted: float, result: Mapping[str, Any], quality: Quality, log: RunLog, phase: Phase, otherwise: str
) -> bool:
    value = result[quality.key]
    if quality.reaches(value, wanted):
        return True
    side = "above" if quality.lower_is_better else "below"
    found = f"{quality.in_text} {quality.number(value)}{quality.unit}"
    log.say(f"{phase.name}: {found} is {side} the target of {wanted:g}{quality.unit}; {otherwise}")
    return False


def _scores(
    model: nn.Module, spec: PruneOptions, phase: Phase, done: int, gradients: Measure, activations: Measure
) -> dict[str, torch.Tensor]:
    """Of the neurons, before removal number `done`."""
    from compressvit.training.optimisation import seed_everything

    seed_everything(phase.seed, phase.number, 1000 * done)  # the images that are measured on are those of any run
    return scores(
        model,
        prunable_plan(model),
        spec.score,
        seed=int(np.random.SeedSequence([phase.seed, done]).generate_state(1)[0]),
        gradients=gradients(model) if spec.score in ("gradient", "taylor") else None,
        activations=activations(model) if spec.score == "activation" else None,
    )


def _report(log: RunLog, phase: Phase, done: int, widths: Widths) -> None:
    log.scalars(phase.name, "widths", done, dict(widths))
    gone = sum(not hidden for hidden in widths.values())
    if done:
        log.say(
            f"{phase.name}: after removal {done}, {sum(widths.values()):,} neurons in {len(widths) - gone} of {len(widths)} adapters"
        )
