"""Fitting in several processes: each takes its share of the calibration images through the models of the one that leads.

The leader plans, solves and decides, as if it were alone. Of the others it asks the passes over images, `moments` and `fit`: they build the
same models from its plans, get its values, and their sums are added to its own.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from compressvit import processes
from compressvit.fitting.in_order import LayerFit, fit_in_order
from compressvit.fitting.reference import Images, Reference
from compressvit.fitting.regression import Regression
from compressvit.fitting.shares import as_the_leader_has
from compressvit.model import surgery
from compressvit.transforms.applying import apply_plans, without_what_is_set_aside
from compressvit.transforms.base import Plan
from compressvit.transforms.record import compression_of


@dataclass(frozen=True)
class Request:
    """A pass over the images.

    Attributes:
        what: its name.
        plans: of every model, those after the transforms that all processes know.
        about: what else it needs.
    """

    what: str
    plans: Sequence[Sequence[Plan]]
    about: Mapping[str, Any]


class Shares:
    """The passes over calibration images of one call of transforms.

    Args:
        begun: the student before these transforms, the same in all processes.
        images: a function that returns the batches of a process.
        tokens: of every image that are summed up; None for all.
        device: of this process.
    """

    def __init__(self, begun: nn.Module, images: Images, tokens: int | None, device: torch.device):
        self._begun, self._images, self._tokens, self._device = begun, images, tokens, device
        self._passes: dict[str, Callable[..., Any]] = {"moments": self._moments, "fit": self._fit}

    @contextmanager
    def asked(self, what: str, models: Sequence[nn.Module], **about: Any) -> Iterator[None]:
        """In the leader: within, the others do the same pass with the same models (`compressvit.fitting.shares.Asks`)."""
        known = len(compression_of(self._begun).plans)
        with processes.together(Request(what, [compression_of(model).plans[known:] for model in models], about)):
            self._alike(models)
            yield

    def help(self, request: Request) -> None:
        """In the others: take part in a pass."""
        self._passes[request.what]([self._made(plans) for plans in request.plans], **request.about)

    def _made(self, plans: Sequence[Plan]) -> nn.Module:
        """A model with these plans, whose values are still to come."""
        model = surgery.deep_copy(self._begun)
        apply_plans(model, plans)
        return model

    def _alike(self, models: Sequence[nn.Module]) -> None:
        for model in models:
            as_the_leader_has(model.to(self._device, torch.float32))

    def _reference(self, model: nn.Module) -> Reference:
        return Reference(model, self._images, self._tokens, self._device)

    def _moments(self, models: list[nn.Module], paths: Sequence[str], *, outputs: bool) -> None:
        self._alike(models)
        self._reference(models[0]).collect(paths, outputs=outputs)

    def _fit(self, models: list[nn.Module], prefix_weights: Mapping[str, float]) -> None:
        student, teacher = (without_what_is_set_aside(model) for model in models)
        self._alike([student, teacher])
        reference = self._reference(teacher)
        fits = {path: LayerFit(_by_the_leader, weight) for path, weight in prefix_weights.items()}
        fit_in_order(student, teacher, reference.batches(), fits, reference.held_out, reference.sample())


def _by_the_leader(layer: nn.Module, regression: Regression) -> float:
    raise AssertionError("the leader fits the layers")
