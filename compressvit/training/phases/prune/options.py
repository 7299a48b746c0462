"""Options of the `prune` phase (MiMi); the phase itself is in `spec.py`."""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar, Literal

from pydantic import Field, model_validator

from compressvit.spec import Spec
from compressvit.training.phases.base import PhaseSpec

if TYPE_CHECKING:
    from compressvit.tasks.base import Task


class PruneTarget(Spec):
    """When pruning ends: exactly one of these keys."""

    neurons: float | int | None = Field(
        None,
        gt=0,
        description="Neurons of all adapters together: below 1 a fraction of those at the start (σ), otherwise a number.",
    )
    parameters: float | int | None = Field(
        None,
        gt=0,
        description="Parameters of all adapters together: below 1 a fraction of those at the start, otherwise a number.",
    )
    macs: float | int | None = Field(
        None,
        gt=0,
        description="Multiply-accumulates of all adapters for one image: below 1 a fraction of those at the start, otherwise a number.",
    )
    accuracy: float | None = Field(
        None,
        gt=0,
        description="Keep pruning while the task's first figure (of classification: top-1 in percent) after a cycle's training is at "
        "least as good as this; the last adapters that reached it are kept. The figure is optimistic, because it was chosen on the "
        "evaluation set.",
    )

    @model_validator(mode="after")
    def _exactly_one(self) -> PruneTarget:
        given = [name for name in type(self).model_fields if getattr(self, name) is not None]
        if len(given) != 1:
            what = " and ".join(given) if given else "none"
            raise ValueError(f"a target is one of neurons, parameters, macs and accuracy; given: {what}")
        for name in ("neurons", "parameters", "macs"):
            value = getattr(self, name)
            if isinstance(value, float) and value >= 1:
                raise ValueError(
                    f"{name}={value} is neither a share below 1 nor a whole number; give e.g. 0.25, or {int(value)}"
                )
        return self


Score = Literal["magnitude", "sum", "shape", "relative", "down", "gradient", "taylor", "activation", "random"]


class PruneOptions(PhaseSpec):
    """The options of `prune`."""

    label_fields: ClassVar[tuple[str, ...] | None] = ("target", "score")

    target: PruneTarget = Field(
        description="When pruning ends; the model is always trained again after the last removal."
    )
    rate: float = Field(0.5, gt=0, lt=1, description="ρ: fraction of the remaining neurons that a cycle removes.")
    score: Score = Field(
        "magnitude",
        description="Score of neuron j of an adapter of width M. magnitude: (|D_j|₁ + |U_j|₁) / 2M, the paper's; sum: not divided by 2M; "
        "shape: divided by M + h' instead; relative: divided by the largest of its adapter; down: |D_j|₁ / M; gradient: "
        "|∂L/∂D_j|₁ + |∂L/∂U_j|₁, as the paper words it (in earlier versions `gradient` was today's `taylor`); taylor: sum of |θ·∂L/∂θ|; "
        "activation: mean size of what leaves its activation function; random.",
    )
    scope: Literal["global", "local"] = Field(
        "global", description="global: rank all neurons together; local: remove the same fraction of every adapter."
    )
    gradient_batches: int = Field(
        10, ge=1, description="Training batches used by `score: gradient`, `taylor` and `activation`."
    )

    def unfit_for(self, task: Task) -> str | None:
        wanted, quality = self.target.accuracy, task.main_quality
        if wanted is None or quality.unit != "%":
            return None
        if wanted <= 1:
            return f"target.accuracy={wanted:g} is in percent; for {wanted:.0%} give {100 * wanted:g}"
        return None if wanted <= 100 else f"target.accuracy={wanted:g} is in percent, so it is at most 100"
