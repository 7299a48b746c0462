"""The `prune` phase: train, remove neurons, train, …, always ending with a training (MiMi, algorithm 1)."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from torch import nn

from compressvit.log import RunLog
from compressvit.training.loop import Phase
from compressvit.training.optimisation import seed_everything
from compressvit.training.phases.prune.neurons import Widths, cycles, prices, prunable_plan, scores, select, shrink_
from compressvit.training.phases.prune.spec import Prune

TrainCycle = Callable[[nn.Module, Phase, dict[str, dict[str, Any]]], dict[str, Any]]


def prune_and_train(
    model: nn.Module,
    spec: Prune,
    phase: Phase,
    log: RunLog,
    *,
    train_cycle: TrainCycle,
    evaluate: Callable[[nn.Module], dict[str, Any]],
    gradients: Callable[[nn.Module], dict[str, torch.Tensor]],
) -> tuple[nn.Module, dict[str, Any], list[Widths]]:
    """Run all cycles. Each has a checkpoint of its own, so a run that was stopped goes on in the cycle where it was.

    Args:
        model: with prunable adapters; changed in place.
        phase: its checkpoint's name is that of the first training; those of the cycles carry their number.
        train_cycle: trains the model, from its checkpoint if there is one, with the optimiser's moments to begin with.
        evaluate: for a target of accuracy.
        gradients: for `score: gradient`.

    Returns:
        The model (an earlier, larger one where accuracy fell below the target), what the first training began with and the last one
        kept, and the widths of the adapters after every training.
    """
    plan = prunable_plan(model)
    start: Widths = dict(plan.widths)
    price = prices(model, plan)
    total = cycles(spec.target, spec.rate, start, price, spec.scope, plan.least)
    history = [start]
    good: tuple[nn.Module, dict[str, Any]] | None = None
    done, first = 0, None
    moments: dict[str, dict[str, Any]] = {}
    while True:
        file = phase.checkpoint.with_name(f"{phase.checkpoint.stem}_cycle{done}.pt") if done else phase.checkpoint
        if not file.is_file():  # a resumed run has said it before
            _tell(log, phase, done, history[-1])
        trained = train_cycle(
            model,
            replace(phase, name=f"{phase.name}_cycle{done}", number=phase.number + 1000 * done, checkpoint=file),
            moments,
        )
        moments = trained.pop("moments")
        first = first or trained["start"]
        if spec.target.accuracy is not None:
            top1 = evaluate(model)["top1"]
            if top1 < spec.target.accuracy:
                log.say(
                    f"{phase.name}: top-1 {top1:.2f}% is below the target of {spec.target.accuracy:g}%; "
                    + ("the adapters of the cycle before are kept" if good else "nothing was pruned")
                )
                if good:
                    model, trained = good
                    history.pop()
                break
            good = (copy.deepcopy(model), trained)
        left = sum(history[-1].values())
        if done == total or left <= plan.least * len(start) or left == 0:
            break
        done += 1
        plan = prunable_plan(model)
        seed_everything(phase.seed, phase.number, 1000 * done)  # the gradient's images are those of any run
        found = scores(
            model,
            plan,
            spec.score,
            seed=int(np.random.SeedSequence([phase.seed, done]).generate_state(1)[0]),
            gradients=gradients(model) if spec.score == "gradient" else None,
        )
        keep = select(found, done, spec, start, price, plan.least)
        if not any(len(chosen) for chosen in keep.values()):
            break
        history.append(shrink_(model, keep, moments))
    told = {"start": first, "kept_epoch": trained["kept_epoch"], "widths": history, "trainings": done + 1}
    return model, told, history


def _tell(log: RunLog, phase: Phase, done: int, widths: Widths) -> None:
    log.scalars(phase.name, "widths", done, dict(widths))
    gone = sum(not hidden for hidden in widths.values())
    if done:
        log.say(
            f"{phase.name}: after removal {done}, {sum(widths.values()):,} neurons in {len(widths) - gone} of {len(widths)} adapters"
        )
