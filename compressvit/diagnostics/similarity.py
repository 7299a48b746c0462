"""The `similarity` diagnostic: the error that two layers would have if they shared one weight."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from functools import partial
from typing import Any, Literal

import numpy as np
from pydantic import Field, model_validator
from torch import nn

from compressvit.charts.findings import Finding
from compressvit.diagnostics.base import EPOCHS, Context, Epochs, MeasuredOnImages, diagnostic
from compressvit.diagnostics.spectra import effective_weight
from compressvit.errors import UserError
from compressvit.fitting.reference import Reference
from compressvit.model import surgery
from compressvit.model.backbone import describe
from compressvit.model.calls import layers_for, whole_layer
from compressvit.transforms.align import matched_weights
from compressvit.transforms.low_rank.base import TARGETS


def sharing_losses(
    model: nn.Module, *, reference: Reference | None = None, aligned: bool = False
) -> list[dict[str, Any]]:
    """The error that every pair of blocks of a stage would have if their layers of one kind shared a weight.

    Without images, the shared weight is the mean, and the error is that of the weights,
    `‖(W_i − W_j) / 2‖ · √2 / √(‖W_i‖² + ‖W_j‖²)`: 0 for equal weights, 0.71 for unrelated ones, 1 for opposite ones. With images, the
    shared weight is the optimum for the inputs of both layers, `W = (W_i S_i + W_j S_j) (S_i + S_j)⁻¹` with the second moments S of the
    inputs, and the error is the relative error of the outputs.

    Args:
        reference: the model's values and its calibration images.
        aligned: first permute the neurons and heads of the second block to match the first, as the `align` step does (slower; only
            without images).

    Returns:
        A record per kind of layer and pair of blocks: layer, block, other, loss.

    Raises:
        UserError: the model's family is unknown, both options were given, or the images are unsuitable.
    """
    if reference is not None and aligned:
        raise UserError(
            "similarity: aligned compares weights, whose neurons have no order, and images what layers compute; give one"
        )
    records = []
    for stage in describe(model, "attention").stages:
        plain = {info.path: _weights(model, info.path) for info in stage}
        moments = {}
        if reference is not None:
            seen = reference.moments(
                [f"{path}.{kind}" for path, found in plain.items() for kind in found], outputs=False
            )
            moments = {name: moment.inputs.cpu().double().numpy() for name, moment in seen.items()}
        for one, other in itertools.product(plain, repeat=2):
            second = plain[other]
            if aligned and one != other:
                found = matched_weights(model, one, other)
                second = {kind: weight.cpu().double().numpy() for kind, weight in found.items()}
            for kind in second:
                s = [moments[f"{path}.{kind}"] for path in (one, other)] if moments else None
                loss = 0.0 if one == other else _lost(plain[one][kind], second[kind], s)
                records.append({"layer": kind, "block": one, "other": other, "loss": round(loss, 6)})
    return sorted(records, key=lambda record: TARGETS.index(whole_layer(record["layer"])))


def _lost(a: np.ndarray, b: np.ndarray, moments: Sequence[np.ndarray] | None) -> float:
    """The relative error of two layers together if they share one weight."""
    if moments is None:
        size = np.sqrt((a**2).sum() + (b**2).sum())
        return float(np.linalg.norm(a - b) / np.sqrt(2) / size) if size > 0 else 0.0
    from scipy.linalg import solve

    first, second = moments
    both = first + second
    ridge = max(1e-5 * both.diagonal().max(), 1e-30) * np.eye(
        len(both)
    )  # larger than the rounding errors of moments summed in float32
    shared = solve(both + ridge, (a @ first + b @ second).T, assume_a="pos").T
    lost = sum(np.einsum("oi,ij,oj->", w - shared, s, w - shared, optimize=True) for w, s in ((a, first), (b, second)))
    whole = sum(np.einsum("oi,ij,oj->", w, s, w, optimize=True) for w, s in ((a, first), (b, second)))
    return float(np.sqrt(max(lost, 0.0) / whole)) if whole > 0 else 0.0


def _weights(model: nn.Module, path: str) -> dict[str, np.ndarray]:
    block = model.get_submodule(path)
    kinds = [name for whole in TARGETS for name in layers_for(block, whole)]
    found = {kind: effective_weight(block.get_submodule(kind)) for kind in kinds}
    for kind, weight in found.items():
        if not np.isfinite(weight).all():
            raise UserError(
                f"the weight of {path}.{kind} holds numbers that are not finite; check the weights of the model"
            )
    return found


def sharing_finding(records: list[dict[str, Any]], *, outputs: bool) -> Finding:
    """A chart with one panel per kind of layer; dark pairs could share. `outputs`: errors are those of outputs, not of weights."""
    what = "outputs on the images" if outputs else "weights: 0 equal, 0.71 unrelated"
    return Finding(
        "similarity",
        "What two layers would lose by sharing one weight",
        f"Relative error of the {what}. Dark squares off the diagonal are layers that could share one weight; if there are none, share "
        "with a private low-rank term, or use low rank alone.",
        "heatmap",
        records,
        {
            "x": "other",
            "y": "block",
            "colour": "loss",
            "facet": "layer",
            "domain": None if outputs else (0.0, 0.75),
            "titles": {"loss": "error"},
        },
    )


@diagnostic("similarity")
class Similarity(MeasuredOnImages):
    """How much each pair of the student's layers would lose by sharing one weight."""

    epochs: Epochs = Field(("last",), min_length=1, description=EPOCHS)
    metric: Literal["inputs", "weights"] = Field(
        "inputs", description="inputs: error of the layers' outputs on images; weights: error of the weights alone."
    )
    aligned: bool = Field(
        False,
        description="Match neurons and heads first, as the align step does; with metric: weights (slower).",
    )

    @model_validator(mode="after")
    def _one_way(self) -> Similarity:
        if self.aligned and self.metric != "weights":
            raise ValueError(
                "aligned compares weights, whose neurons have no order: set metric: weights, or aligned: false"
            )
        return self

    def measure(self, context: Context) -> list[Finding]:
        on_images = self.metric == "inputs"
        images = partial(context.images, self.images)
        reference = Reference(surgery.deep_copy(context.student.model), images) if on_images else None
        records = sharing_losses(context.student.model, reference=reference, aligned=self.aligned)
        return [sharing_finding(records, outputs=on_images)]
