"""Narrower blocks: MLP neurons, head dimensions and whole heads are removed from the backbone, and what is left stands in for them.

The student is made of timm's own layers, with fewer outputs and inputs, under the same paths: parameters, bytes, MACs and latency all fall,
and nothing special runs. Which neurons and dimensions go, and what the others take over, is computed in closed form from unlabelled images:
see `compressvit.fitting.elimination` and `compressvit.fitting.narrow_heads`; layers are then fitted in the order they run
(`compressvit.fitting.in_order`). To choose widths and ranks of all layers within one budget, use `shrink`.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import Annotated, Any, ClassVar, Literal

from pydantic import Field, model_validator
from torch import nn

from compressvit.errors import UserError
from compressvit.fitting.reference import Reference
from compressvit.model.backbone import describe, model_name
from compressvit.model.family import Need
from compressvit.transforms.base import Transform, transform
from compressvit.transforms.claims import narrows, orders
from compressvit.transforms.narrow.form import LAYERS
from compressvit.transforms.narrow.places import Place, narrowable, places, why_not
from compressvit.transforms.narrow.plan import NarrowPlan, smaller
from compressvit.transforms.record import require_free

log = logging.getLogger("compressvit")

Share = Annotated[float, Field(gt=0, le=1)]
Count = Annotated[int, Field(ge=1)]  # in a list
Number = Annotated[int, Field(ge=2)]  # 1 is a share: all


class NarrowStep(Transform):
    """Options that `narrow` and `shrink` share."""

    changes_at_start = True

    metric: Literal["outputs", "weights"] = Field(
        "outputs",
        description="The metric of an error. outputs: the model's output on calibration images. weights: the weights themselves, without "
        "images, which loses much more.",
    )
    sequential: bool = Field(
        True,
        description="Fit layers in the order they run, each on the outputs of the fitted layers before it, towards the teacher's hidden "
        "states. False: fit each as if all other layers were the teacher's.",
    )
    ridge: float = Field(1e-3, ge=0, description="Regularisation of the inputs' second moment, relative to its mean.")
    output_ridge: float = Field(
        0.1, ge=0, description="The same for the gradients' second moment, relative to each entry of its diagonal."
    )

    @property
    def needs_images(self) -> bool:
        return self.metric != "weights"

    def places_of(self, model: nn.Module) -> list[Place]:
        """The blocks of a model.

        Raises:
            UserError: none of them can be made narrower.
        """
        found = places(model, self.backbone(model))
        layers = [f"{place.path}.{layer}" for place in found for layer in dict.fromkeys((*LAYERS, *place.layers))]
        require_free(model, self.name, [*map(narrows, layers), *(orders(place.path) for place in found)])
        _refuse_shared(model, self.name, layers)
        if not narrowable(found):
            raise UserError(
                f"{self.name}: {model_name(model)} has no block that can be made narrower: neither an MLP without a norm inside (timm's "
                "Mlp, GluMlp or SwiGLU) nor attention whose heads can be changed; low_rank works on it"
            )
        return found


class Narrowed(NarrowPlan):
    """A resolved `Narrow`."""


@transform("narrow", Narrowed)
class Narrow(NarrowStep):
    """Remove MLP neurons, head dimensions and whole heads from the backbone, compensated in closed form."""

    needs = ()

    neurons: Share | Number | tuple[Count, ...] | None = Field(
        None, description="Of every MLP: a share up to 1, a number, or one number per block. Null: all stay."
    )
    head_dim: Share | Number | tuple[Count, ...] | None = Field(
        None, description="Dimensions of every head, in the same way. Null: all stay."
    )
    heads: Share | Number | tuple[Count, ...] | None = Field(
        None, description="Heads of every attention, in the same way. Null: all stay."
    )
    multiple: int = Field(
        8, ge=1, description="Numbers that follow from a share of neurons or dimensions are rounded to multiples of it."
    )

    def needed(self) -> tuple[Need, ...]:
        asked: dict[Need, bool] = {
            "single_dims": self.head_dim is not None,
            "separate_heads": self.heads is not None,
        }
        found = tuple(need for need, wanted in asked.items() if wanted)
        return ("attention", *found) if found else self.needs

    OPTIONS: ClassVar[tuple[str, ...]] = ("neurons", "head_dim", "heads")

    @model_validator(mode="after")
    def _something(self) -> Narrow:
        if all(getattr(self, name) is None for name in self.OPTIONS):
            raise ValueError("narrow needs at least one of neurons, head_dim and heads, e.g. neurons: 0.5")
        return self

    @classmethod
    def examples(cls) -> Sequence[Transform]:
        return (
            Narrow(neurons=0.5, head_dim=0.5, metric="weights"),
            Narrow(neurons=0.75, metric="weights"),
            Narrow(neurons=0.5, heads=0.5, metric="weights"),
        )

    def plan(self, model: nn.Module, reference: Reference | None = None) -> Narrowed:
        found = self.places_of(model)
        forms = {
            place.path: place.form(**{name: self._size(model, found, index, name) for name in self.OPTIONS})
            for index, place in enumerate(found)
        }
        if not (changed := smaller(forms)):
            log.warning("narrow changes nothing: every width is that of %s; give smaller ones", model_name(model))
        settings = self.model_dump(include={"metric", "sequential", "ridge", "output_ridge"})
        return Narrowed(forms=changed, **settings)

    def _size(self, model: nn.Module, found: Sequence[Place], index: int, name: str) -> int | None:
        """The width of a block by one option; None where it stays as it is."""
        value: Any = getattr(self, name)
        place = found[index]
        whole: int = getattr(place, name)
        if value is None:
            return None
        if isinstance(value, tuple):
            if len(value) != len(found):
                raise UserError(
                    f"{self.name}.{name} lists {len(value)} numbers, but {model_name(model)} has {len(found)} blocks; give one number, or "
                    "one per block"
                )
            value = value[index]
        if not whole or (name != "neurons" and name not in place.options):
            raise UserError(
                f"{self.name}.{name}: {place.path} of {model_name(model)} has no {_what(name)} that can be removed"
                f"{why_not(model, place, describe(model).family, name)}; leave it out"
            )
        if isinstance(value, float):
            step = 1 if name == "heads" or whole < 2 * self.multiple else self.multiple
            value = max(step, round(value * whole / step) * step)
        if value > whole:
            raise UserError(
                f"{self.name}.{name}={value}: {place.path} of {model_name(model)} has {whole}; give at most that, or a share"
            )
        return None if value == whole else int(value)


def _refuse_shared(model: nn.Module, step: str, layers: Sequence[str]) -> None:
    """Raise a `UserError` if two of the layers share a weight in the model itself."""
    seen: dict[int, str] = {}
    modules = dict(model.named_modules(remove_duplicate=False))
    for path in layers:
        weight = getattr(modules.get(path), "weight", None)
        other = None if weight is None else seen.setdefault(id(weight), path)
        if other not in (None, path):
            raise UserError(
                f"{step}: {other} and {path} of {model_name(model)} are one weight; give a model whose blocks share none"
            )


def _what(name: str) -> str:
    return {"neurons": "neurons", "head_dim": "head dimensions", "heads": "heads"}[name]
