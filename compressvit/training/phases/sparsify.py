"""Unstructured pruning of adapters: a mask over the individual weights of their projections (SparseAdapter, SNIP, GraSP).

Papers: SparseAdapter, EMNLP Findings 2022, https://arxiv.org/abs/2210.04284; SNIP, ICLR 2019, https://arxiv.org/abs/1810.02340;
GraSP, ICLR 2020, https://arxiv.org/abs/2002.07376

A masked weight stays zero and is not trained. In contrast to `prune`, no tensor shrinks: fewer weights count as trained, but
time, memory and file size do not change.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial, reduce
from typing import TYPE_CHECKING, Any, ClassVar, Literal

import torch
from pydantic import Field, field_validator
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from compressvit import processes
from compressvit.errors import UserError
from compressvit.tasks.base import Task, task_of
from compressvit.training.phases.base import PhasePlan, PhaseSpec, Setting, phase
from compressvit.training.phases.prune.neurons import prunable_plan
from compressvit.transforms.bottleneck import BottleneckPlan
from compressvit.transforms.record import compression_of

if TYPE_CHECKING:
    from compressvit.training.stage import Stage

Batches = Callable[[], Sequence[tuple[torch.Tensor, Any]]]


@phase("sparsify")
class Sparsify(PhaseSpec):
    """Mask all but the best individual weights of adapters, then train those (SparseAdapter, SNIP, GraSP). Tensors do not shrink.

    With `keep: best`, the evaluation before training is that of the masked model, so the weights kept are always masked.
    """

    label_fields: ClassVar[tuple[str, ...] | None] = ("density", "score")

    density: float = Field(gt=0, le=1, description="Fraction of the weights of all adapters together that is kept.")
    score: Literal["magnitude", "snip", "grasp", "random"] = Field(
        "magnitude",
        description="|θ| (SparseAdapter), |g⊙θ| (SNIP) or θ⊙Hg (GraSP), with gradient g and Hessian H of the task's loss. New "
        "adapters have no gradient yet: put a finetune step before it.",
    )
    gradient_batches: int = Field(10, ge=1, description="Training batches used by snip and grasp.")

    @field_validator("keep", mode="before")
    @classmethod
    def _is_no_share(cls, keep: Any) -> Any:
        if isinstance(keep, float | int):
            raise ValueError(
                f"is which epoch's weights the phase ends with, last or best; the share is density={keep:g} now"
            )
        return keep

    def plan(self, setting: Setting) -> PhasePlan:
        plan = super().plan(setting)
        # which weights stay depends on values; for counting them, any choice will do
        sparsify_(setting.student.model, self.model_copy(update={"score": "random"}), list)
        plan.summary += f"; keeps {self.density:.0%} of the weights of adapters"
        return plan

    def run(self, model: nn.Module, stage: Stage) -> tuple[nn.Module, dict[str, Any]]:
        from compressvit.training.optimisation import seed_everything

        name = stage.phase.name
        seed_everything(stage.phase.seed, stage.phase.number, 1000)  # the same images in every run, resumed or not
        images = partial(stage.labelled_batches, model, self.gradient_batches)
        left = sparsify_(model, self, images, stage.phase.seed, stage.task)
        if stage.fresh:
            stage.log.say(f"{name}: {sum(left.values()):,} weights of adapters are left ({self.score})")
            stage.log.scalars(name, "weights", 0, dict(left))
        model, report = super().run(model, replace(stage, start=None))  # `start` is from before masking
        return model, {**report, "weights_left": left}


def sparsify_(
    model: nn.Module, spec: Sparsify, batches: Batches, seed: int = 0, task: Task | None = None
) -> dict[str, int]:
    """Mask all but the best weights over all adapters together, in place; of equal scores the earlier weight is kept.

    Args:
        model: with `adapters` or `adaptformer`.
        spec: provides `density` and `score`.
        batches: images and labels, on the model's device, for scores that need a gradient; called at most once.
        seed: for `random`.
        task: `snip` and `grasp` differentiate its loss; None: classes of a model with a classifier.

    Returns:
        The number of remaining weights of every adapter.

    Raises:
        UserError: the model has no such adapters, or all scores are zero.
    """
    plan = prunable_plan(model)
    weights = _weights(model, plan)
    with torch.enable_grad():
        scored = _scores(model, weights, spec, batches, seed, task or task_of(model))
    flat = processes.told(torch.cat([s.flatten() for s in scored.values()]))  # which may differ in rounding
    count = max(1, int(spec.density * flat.numel() + 1e-9))
    order = torch.argsort(flat, descending=True, stable=True)
    alive = int((flat != 0).sum())
    if alive < count:
        raise UserError(
            f"sparsify.density={spec.density:g} asks for {count:,} weights, but only {alive:,} have a score ({spec.score}) that is not "
            "zero: fresh adapters have upper projections of zero, which pass no gradient back. Put a finetune step before it"
        )
    chosen = torch.zeros(flat.numel(), dtype=torch.bool)
    chosen[order[:count]] = True
    masks = dict(zip(scored, chosen.split([s.numel() for s in scored.values()]), strict=True))
    left: dict[str, int] = {}
    for path, adapter in plan.bottlenecks(model).items():
        for side, layer in zip(("down", "up"), adapter.dense(), strict=True):
            mask = masks[f"{plan.prefix(path)}.{side}.weight"].reshape(layer.weight.shape)
            layer.kept = int(mask.sum())  # a mask on the meta device could not be counted
            left[path] = left.get(path, 0) + layer.kept
            layer.mask = mask.to(layer.weight.device)
            with torch.no_grad():
                layer.weight.mul_(layer.mask)
    done = compression_of(model)
    done.plans[done.plans.index(plan)] = plan.model_copy(update={"masked": True})
    return left


def _weights(model: nn.Module, plan: BottleneckPlan) -> dict[str, torch.Tensor]:
    return {
        f"{plan.prefix(path)}.{side}.weight": layer.weight
        for path, adapter in plan.bottlenecks(model).items()
        for side, layer in zip(("down", "up"), adapter.dense(), strict=True)
    }


def _scores(
    model: nn.Module, weights: dict[str, torch.Tensor], spec: Sparsify, batches: Batches, seed: int, task: Task
) -> dict[str, torch.Tensor]:
    """Scores |θ|, |g⊙θ| or θ⊙Hg by weight name, in the weight's shape, float64 on the CPU; g and H of the loss over all batches."""
    if spec.score == "magnitude":
        return {name: w.detach().abs().cpu().double() for name, w in weights.items()}
    if spec.score == "random":
        generator = torch.Generator().manual_seed(seed)
        return {n: torch.rand(w.shape, generator=generator, dtype=torch.float64) for n, w in weights.items()}
    model.eval()
    sums = [torch.zeros_like(w) for w in weights.values()]
    images = list(batches())
    for _ in range(1 if spec.score == "snip" else 2):
        gradient, sums = sums, [torch.zeros_like(w) for w in weights.values()]
        second = spec.score == "grasp" and any(g.any() for g in gradient)
        for pixels, targets in images:
            with sdpa_kernel(SDPBackend.MATH):  # fused attention kernels have no second derivative
                loss = task.loss(model(pixels), targets) / len(images)
                slopes = torch.autograd.grad(loss, list(weights.values()), create_graph=second)
                if second:  # H g, where g is the gradient over all batches
                    along = reduce(torch.add, ((s * g).sum() for s, g in zip(slopes, gradient, strict=True)))
                    slopes = torch.autograd.grad(along, list(weights.values()))
            sums = [total + s.detach() for total, s in zip(sums, slopes, strict=True)]
    scored = {n: (w.detach() * s).cpu().double() for (n, w), s in zip(weights.items(), sums, strict=True)}
    return {n: s.abs() for n, s in scored.items()} if spec.score == "snip" else scored
