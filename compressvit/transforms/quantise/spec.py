"""Weight-only rounding: the weights of linear layers in 2 to 8 bits, the last step of a recipe.

Inputs of a layer in groups share a scale in float16; there are no zero points, which gain less than the smaller groups that their bytes
buy. Rounding feeds back what it loses, in the metric of the inputs on calibration images (GPTQ, ICLR 2023, https://arxiv.org/abs/2210.17323;
`compressvit.fitting.rounding`), and layers are rounded in the order they run, each on what the rounded layers before it produce and
towards what the model before the step computes. Within a budget of bytes every layer has the number of bits that its part of the
model's error needs (`compressvit.fitting.hull`).

The student stores codes without a bit between them, and computes with weights that it makes of them in every forward pass: it saves
bytes, and costs time. `compressvit.load(FOLDER, materialise=True)` makes a model of plain layers with the rounded values.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from fnmatch import fnmatch
from typing import ClassVar, Literal

from pydantic import Field, model_validator
from torch import nn

from compressvit.fitting.reference import Reference
from compressvit.model.cost import file_bytes
from compressvit.spec import Spec
from compressvit.transforms.base import Transform, transform
from compressvit.transforms.quantise.budget import spend
from compressvit.transforms.quantise.fit import moments_of
from compressvit.transforms.quantise.plan import Bits, QuantisePlan
from compressvit.transforms.quantise.sites import Sites, require_roundable, sites


class Bytes(Spec):
    """What the file of the student may take."""

    bytes: float = Field(
        gt=0, description="Bytes of model.safetensors: up to 1 a fraction of those before this step, above 1 a number."
    )


@transform("quantise", QuantisePlan)
class Quantise(Transform):
    """Round the weights of linear layers to few bits, the last step of a recipe; the student's file is that much smaller."""

    needs = ()
    changes_at_start = True
    budget_units: ClassVar[tuple[str, ...]] = ("bytes",)

    bits: Bits | None = Field(
        None, description="Of every linear layer in the blocks. Alternatively give `budget`. Null and no budget: 4."
    )
    budget: Bytes | None = Field(
        None,
        description="Instead of bits: what the file may take. Every weight has the bits that the model's output needs most.",
    )
    choices: tuple[Bits, ...] = Field(
        (3, 4, 5, 6, 8), min_length=1, description="With a budget: numbers of bits to choose from."
    )
    outside: Bits = Field(
        8,
        description="Bits of what is outside the blocks (patch embedding, downsampling, classifier, a detector's decoder) and of position "
        "embeddings, which are rounded plainly.",
    )
    group: int = Field(64, ge=8, description="Inputs that share a scale, at most; fewer cost bytes and lose less.")
    skip: tuple[str, ...] = Field(
        (), description="Layers, or position embeddings, that stay as they are, by path; * matches any part."
    )
    metric: Literal["outputs", "weights"] = Field(
        "outputs",
        description="The metric of an error. outputs: with error feedback, on calibration images. weights: each number is rounded by "
        "itself, without images, which is nearly the same for 8 bits and loses much more for 4.",
    )
    sequential: bool = Field(
        True,
        description="Fit and round layers in the order they run, each on what the rounded layers before it produce. False: round each as "
        "if the others were not.",
    )
    ridge: float = Field(1e-2, ge=0, description="Regularisation of the inputs' second moment, relative to its mean.")
    sweeps: int = Field(
        2, ge=0, le=20, description="Rounds in which scales and codes are improved after the first rounding."
    )

    @model_validator(mode="after")
    def _bits_or_budget(self) -> Quantise:
        if self.bits is not None and self.budget is not None:
            raise ValueError("quantise needs bits or a budget, not both")
        return self

    @property
    def needs_images(self) -> bool:
        return self.metric != "weights"

    @property
    def provisional(self) -> tuple[str, ...]:
        if self.budget is None:
            return ()
        on = "on the calibration images" if self.needs_images else "in the weights"
        return (
            f"bits are those of equal layers in this plan; the run chooses those of every layer by the errors it measures {on}",
        )

    def with_budget(self, unit: str, value: float) -> Quantise:
        return self.model_copy(update={"bits": None, "budget": Bytes(bytes=value)})

    @classmethod
    def examples(cls) -> Sequence[Transform]:
        return (
            Quantise(bits=6, metric="weights"),
            Quantise(budget=Bytes(bytes=0.45), metric="weights", group=16, outside=5),
        )

    def plan(self, model: nn.Module, reference: Reference | None = None) -> QuantisePlan:
        where = sites(model, self.backbone(model), self.skip)
        if reference is not None:
            require_roundable(reference.model, where)
        if self.budget is None:
            return self._resolved(where, dict.fromkeys(where.layers, *self.options()))
        value = self.budget.bytes
        limit = int(value * file_bytes(model) if value <= 1 else value)
        if reference is not None and self.needs_images:
            reference.require_images(self.name)
            moments_of(reference, where.layers)  # of all layers in one pass over the images

        def plan_of(bits: Mapping[str, int]) -> QuantisePlan:
            return self._resolved(where, dict(bits))

        return spend(model, where.layers, self.options(), limit, plan_of, reference)

    def options(self) -> list[int]:
        """The numbers of bits that a layer of a block may have, rising."""
        return [self.bits or 4] if self.budget is None else sorted(set(self.choices))

    def with_bits(self, model: nn.Module, bits: Mapping[str, int], others: int) -> QuantisePlan:
        """The plan with these bits of the layers of blocks at paths, or within them, and of all others so many. What `skip` names need not
        be there."""
        there = [*(path for path, _ in model.named_modules()), *(name for name, _ in model.named_parameters())]
        skip = [pattern for pattern in self.skip if any(fnmatch(name, pattern) for name in there)]
        where = sites(model, self.backbone(model), skip)
        found = {
            path: next((own for outer, own in bits.items() if path == outer or path.startswith(f"{outer}.")), others)
            for path in where.layers
        }
        return self._resolved(where, found)

    def _resolved(self, where: Sites, bits: dict[str, int]) -> QuantisePlan:
        settings = self.model_dump(include={"group", "metric", "sequential", "ridge", "sweeps"})
        return QuantisePlan(
            bits={path: bits[path] for path in where.layers if path in bits},
            others=dict.fromkeys(where.others, self.outside),
            tables=dict.fromkeys(where.tables, self.outside),
            **settings,
        )
