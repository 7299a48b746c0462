"""The `prune` phase: its plan and its run."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from compressvit.tasks.base import task_of
from compressvit.tasks.quality import Quality
from compressvit.training.phases.base import PhasePlan, Setting, phase
from compressvit.training.phases.prune.neurons import amounts, cycles, prices, prunable_plan, select, shrink_
from compressvit.training.phases.prune.options import PruneOptions, PruneTarget

if TYPE_CHECKING:
    from compressvit.training.phase import Phase
    from compressvit.training.stage import Stage
    from compressvit.training.state import Moments

__all__ = ["Prune", "PruneTarget"]


@phase("prune")
class Prune(PruneOptions):
    """Train adapters, remove their least important neurons, train again, … (MiMi). `epochs` and the schedule apply to each cycle.

    With `keep: best` a cycle hands on the weights of its best evaluation, and the optimiser's moments of its last step.
    """

    @property
    def removal_scope(self) -> str:
        return self.scope

    def plan(self, setting: Setting) -> PhasePlan:
        self.refuse(setting)
        task = setting.task or task_of(setting.student.model)
        return PhasePlan(self._removals(setting.student.model, task.main_quality))

    def _removals(self, student: nn.Module, quality: Quality) -> str:
        """Shrinks the student as if every adapter lost the same share: which neurons go is known after training."""
        plan = prunable_plan(student)
        start, price = dict(plan.widths), prices(student, plan)
        total = cycles(self.target, self.rate, start, price, self.scope, plan.least)
        if total is None:
            limit = "at most" if quality.lower_is_better else "at least"
            accuracy = f"{self.target.accuracy:g} {quality.unit}".rstrip()
            return f"removes {self.rate:.0%} of the neurons per cycle while {quality.in_text} is {limit} {accuracy}"
        unit, wanted, have = amounts(self.target, start, price)
        keep = {path: torch.arange(hidden) for path, hidden in start.items() if hidden}
        if total:
            nothing = {path: torch.zeros(hidden) for path, hidden in start.items() if hidden}
            keep = select(nothing, total, self.model_copy(update={"scope": "local"}), start, price, plan.least)
        shrink_(student, keep)
        return (
            f"{total + 1} trainings and {total} removals: {have:,} → at most {wanted:,} {unit} of adapters "
            f"(estimated as the same fraction of each; scores decide)"
        )

    def run(self, model: nn.Module, stage: Stage) -> tuple[nn.Module, dict[str, Any]]:
        from compressvit.training.phases.prune.cycles import prune_and_train
        from compressvit.training.terms import labels_term

        def train_cycle(m: nn.Module, cycle: Phase, moments: Moments) -> dict[str, Any]:
            return stage.train(m, self, [labels_term(1.0, self.smoothing, stage.task)], phase=cycle, moments=moments)

        model, report, history = prune_and_train(
            model,
            self,
            stage.phase,
            stage.log,
            train_cycle=train_cycle,
            evaluate=stage.evaluate,
            gradients=lambda m: self._gradients(m, stage),
            quality=stage.task_of(model).main_quality,
        )
        stage.widths(stage.phase.name, self.scope, history)
        return model, report

    def _gradients(self, model: nn.Module, stage: Stage) -> dict[str, torch.Tensor]:
        """Sum of the gradients of the task's loss over some training batches, by name of the trained parameters."""
        task = stage.task_of(model)
        model.eval().zero_grad()
        for images, targets in stage.labelled_batches(model, self.gradient_batches):
            task.loss(model(images), targets).backward()
        found = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
        model.zero_grad()
        return found
