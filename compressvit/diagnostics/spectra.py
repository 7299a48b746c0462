"""What the weights say without an image: singular values, effective ranks, and what layers would lose by sharing one weight."""

from __future__ import annotations

import copy
import itertools
from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any, Literal

import numpy as np
from pydantic import Field, model_validator
from scipy.linalg import solve, svdvals
from torch import nn

from compressvit.charts.findings import Finding
from compressvit.diagnostics.base import EPOCHS, Context, Epochs, Measured, MeasuredOnImages, diagnostic
from compressvit.errors import UserError
from compressvit.fitting.moments import Source
from compressvit.model import linear
from compressvit.model.backbone import TRANSFORMERS, describe, family
from compressvit.transforms.align import matched_weights
from compressvit.transforms.low_rank.base import TARGETS

_POINTS = 48  # of a spectrum's curve


def effective_weight(layer: Any) -> np.ndarray:
    """The weight (out, in) that a linear layer computes with, its low-rank term included, in float64."""
    return linear.effective_weight(layer).detach().cpu().double().flatten(1).numpy()


def singular_values(model: nn.Module) -> dict[str, np.ndarray]:
    """Singular values of every linear layer of the blocks (attn.qkv, attn.proj, mlp.fc1, mlp.fc2), largest first, by path.

    Raises:
        UserError: the blocks of the model are not known, or a weight is not finite.
    """
    found = {}
    for info in describe(model, TRANSFORMERS).blocks:
        for target in TARGETS:
            path = f"{info.path}.{target}"
            weight = effective_weight(model.get_submodule(path))
            if not np.isfinite(weight).all():
                raise UserError(f"the weight of {path} holds numbers that are not finite, so it has no singular values")
            found[path] = svdvals(weight)
    return found


def effective_rank(values: np.ndarray) -> float:
    """`exp(H(σ / Σσ))`: how many singular values do the work (Roy and Vetterli, EUSIPCO 2007); 0 for a matrix of zeros."""
    total = values.sum()
    if total <= 0:
        return 0.0
    share = values[values > 0] / total
    return float(np.exp(-(share * np.log(share)).sum()))


def spectra_findings(models: Mapping[str, nn.Module]) -> list[Finding]:
    """Effective ranks along the depth, and the spectra themselves, of models by what they are called ('teacher', 'student')."""
    ranks: list[dict[str, Any]] = []
    curves: list[dict[str, Any]] = []
    for name, model in models.items():
        indices = {info.path: info.index for info in describe(model, TRANSFORMERS).blocks}
        for path, values in singular_values(model).items():
            block, kind = path.rsplit(".", 2)[0], ".".join(path.rsplit(".", 2)[1:])
            ranks.append(
                {
                    "block": indices[block],
                    "layer": kind,
                    "model": name,
                    "effective_rank": effective_rank(values),
                    "share_of_full": effective_rank(values) / len(values),
                    "stable_rank": float((values**2).sum() / values[0] ** 2) if values[0] > 0 else 0.0,
                    "full_rank": len(values),
                }
            )
            for i in sorted({round(v) for v in np.linspace(0, len(values) - 1, _POINTS)}):
                relative = float(values[i] / values[0]) if values[0] > 0 else 0.0
                place = {"weights": f"{kind} of the {name}", "block": indices[block], "layer": kind, "model": name}
                curves.append({**place, "index": i, "relative": relative})
    return [
        Finding(
            "effective_rank",
            "Effective rank of the weights",
            "How many directions a layer's weight really uses, as a share of those that it could: exp of the entropy of its singular "
            "values. Low layers can be factored cheaply; a student far below its teacher has lost directions.",
            "lines",
            ranks,
            {
                "x": "block",
                "y": "share_of_full",
                "colour": "model",
                "facet": "layer",
                "titles": {"share_of_full": "effective rank / full rank"},
            },
        ),
        Finding(
            "spectrum",
            "Singular values of the weights",
            "A line a block: how fast the singular values fall, relative to the largest. Steep lines lose little when they are cut off.",
            "lines",
            sorted(curves, key=lambda record: TARGETS.index(record["layer"])),
            {
                "x": "index",
                "y": "relative",
                "colour": "block",
                "facet": "weights",
                "points": False,
                "ramp": True,
                "titles": {"relative": "σ / largest σ", "index": "singular value"},
            },
        ),
    ]


def sharing_losses(model: nn.Module, *, source: Source | None = None, aligned: bool = False) -> list[dict[str, Any]]:
    """What two blocks of a stage would lose if a layer of theirs shared one weight.

    Without images the weight is the mean, and the error `‖(W_i − W_j) / 2‖ · √2 / √(‖W_i‖² + ‖W_j‖²)` that of the weights: 0 for equal
    ones, 0.71 for unrelated ones, 1 for opposite ones. With images it is the best for what both layers see,
    `W = (W_i S_i + W_j S_j) (S_i + S_j)⁻¹` of the second moments S of their inputs, and the error that of their outputs, relative.

    Args:
        source: the model's own values and its calibration images.
        aligned: put neurons and heads of the second block into the order that fits the first best, as the `align` step does (slower;
            without images).

    Returns:
        A record for every kind of layer and pair of blocks: layer, block, other, loss.

    Raises:
        UserError: the blocks of the model are not known, both options at once, or images that do not do.
    """
    if source is not None and aligned:
        raise UserError(
            "similarity: aligned compares weights, whose neurons have no order, and images what layers compute; give one"
        )
    records = []
    for stage in describe(model, TRANSFORMERS).stages:
        plain = {info.path: _weights(model, info.path) for info in stage}
        moments = {}
        if source is not None:
            seen = source.moments([f"{path}.{kind}" for path in plain for kind in TARGETS], outputs=False)
            moments = {name: moment.inputs.cpu().double().numpy() for name, moment in seen.items()}
        for one, other in itertools.product(plain, repeat=2):
            second = plain[other]
            if aligned and one != other:
                found = matched_weights(model, one, other)
                second = {kind: weight.cpu().double().numpy() for kind, weight in found.items()}
            for kind in TARGETS:
                s = [moments[f"{path}.{kind}"] for path in (one, other)] if moments else None
                loss = 0.0 if one == other else _lost(plain[one][kind], second[kind], s)
                records.append({"layer": kind, "block": one, "other": other, "loss": round(loss, 6)})
    return sorted(records, key=lambda record: TARGETS.index(record["layer"]))


def _lost(a: np.ndarray, b: np.ndarray, moments: Sequence[np.ndarray] | None) -> float:
    """The relative error of the two layers together, with one weight for both."""
    if moments is None:
        size = np.sqrt((a**2).sum() + (b**2).sum())
        return float(np.linalg.norm(a - b) / np.sqrt(2) / size) if size > 0 else 0.0
    first, second = moments
    both = first + second
    ridge = max(1e-5 * both.diagonal().max(), 1e-30) * np.eye(
        len(both)
    )  # above the rounding of moments that were summed in float32
    shared = solve(both + ridge, (a @ first + b @ second).T, assume_a="pos").T
    lost = sum(np.einsum("oi,ij,oj->", w - shared, s, w - shared, optimize=True) for w, s in ((a, first), (b, second)))
    whole = sum(np.einsum("oi,ij,oj->", w, s, w, optimize=True) for w, s in ((a, first), (b, second)))
    return float(np.sqrt(max(lost, 0.0) / whole)) if whole > 0 else 0.0


def _weights(model: nn.Module, path: str) -> dict[str, np.ndarray]:
    found = {kind: effective_weight(model.get_submodule(f"{path}.{kind}")) for kind in TARGETS}
    for kind, weight in found.items():
        if not np.isfinite(weight).all():
            raise UserError(
                f"the weight of {path}.{kind} holds numbers that are not finite; check the weights of the model"
            )
    return found


def sharing_finding(records: list[dict[str, Any]], *, outputs: bool) -> Finding:
    """A panel a kind of layer: dark pairs could share. `outputs`: the records are of errors of outputs, not of weights."""
    what = "outputs on the images" if outputs else "weights: 0 equal, 0.71 unrelated"
    return Finding(
        "similarity",
        "What two layers would lose by sharing one weight",
        f"Relative error of the {what}. Dark squares off the diagonal are layers that could share one weight; where there are none, share "
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


@diagnostic("spectra")
class Spectra(Measured):
    """Effective ranks and singular values of the weights of student and teacher; looks at no image."""

    epochs: Epochs = Field(("last",), min_length=1, description=EPOCHS)

    def measure(self, context: Context) -> list[Finding]:
        # a convolutional teacher has no such layers
        return spectra_findings({k: m for k, m in context.models.items() if family(m) in TRANSFORMERS})


@diagnostic("similarity")
class Similarity(MeasuredOnImages):
    """What the student's layers would lose by sharing one weight, pair by pair."""

    epochs: Epochs = Field(("last",), min_length=1, description=EPOCHS)
    metric: Literal["inputs", "weights"] = Field(
        "inputs", description="Error of the layers' outputs on images, or of the weights alone."
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
        source = Source(copy.deepcopy(context.student), images) if on_images else None
        records = sharing_losses(context.student, source=source, aligned=self.aligned)
        return [sharing_finding(records, outputs=on_images)]
