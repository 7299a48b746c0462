"""The `spectra` diagnostic: singular values and effective ranks of the weights; needs no images."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
from pydantic import Field
from torch import nn

from compressvit.charts.findings import Finding
from compressvit.diagnostics.base import EPOCHS, Context, Epochs, Measured, diagnostic
from compressvit.errors import UserError
from compressvit.model import linear
from compressvit.model.backbone import describe, family_of
from compressvit.model.calls import layers_for, whole_layer
from compressvit.transforms.low_rank.base import TARGETS

_POINTS = 48  # points per spectrum


def effective_weight(layer: Any) -> np.ndarray:
    """The effective weight (out, in) of a linear layer, including its low-rank term, in float64."""
    return linear.effective_weight(layer).detach().cpu().double().flatten(1).numpy()


def singular_values(model: nn.Module) -> dict[str, np.ndarray]:
    """Singular values of every linear layer of the blocks (attn.qkv, attn.proj, mlp.fc1, mlp.fc2), largest first, by path.

    Raises:
        UserError: the model's family is unknown, or a weight is not finite.
    """
    from scipy.linalg import svdvals

    found = {}
    for info in describe(model, "attention").blocks:
        block = model.get_submodule(info.path)
        for target in (name for whole in TARGETS for name in layers_for(block, whole)):
            path = f"{info.path}.{target}"
            weight = effective_weight(model.get_submodule(path))
            if not np.isfinite(weight).all():
                raise UserError(f"the weight of {path} holds numbers that are not finite, so it has no singular values")
            found[path] = svdvals(weight)
    return found


def effective_rank(values: np.ndarray) -> float:
    """Effective rank `exp(H(σ / Σσ))` with the entropy H (Roy and Vetterli, EUSIPCO 2007); 0 for a zero matrix."""
    total = values.sum()
    if total <= 0:
        return 0.0
    share = values[values > 0] / total
    return float(np.exp(-(share * np.log(share)).sum()))


def spectra_findings(models: Mapping[str, nn.Module]) -> list[Finding]:
    """Effective ranks over depth, and the spectra, of models by name ('teacher', 'student')."""
    ranks: list[dict[str, Any]] = []
    curves: list[dict[str, Any]] = []
    for name, model in models.items():
        indices = {info.path: info.index for info in describe(model, "attention").blocks}
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
            "Effective rank (exp of the entropy of the singular values) of a layer's weight, as a fraction of its full rank. "
            "Layers with low values can be factored cheaply; a student far below its teacher has lost directions.",
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
            "One line per block: how fast the singular values fall, relative to the largest. Steep spectra lose little by truncation.",
            "lines",
            sorted(curves, key=lambda record: TARGETS.index(whole_layer(record["layer"]))),
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


@diagnostic("spectra")
class Spectra(Measured):
    """Effective ranks and singular values of the weights of student and teacher; needs no images."""

    epochs: Epochs = Field(("last",), min_length=1, description=EPOCHS)

    def measure(self, context: Context) -> list[Finding]:
        models = {key: side.model for key, side in context.sides.items()}
        families = {key: family_of(model) for key, model in models.items()}
        attends = {key for key, known in families.items() if known is not None and known.attention is not None}
        # a convolutional teacher has no such layers
        return spectra_findings({key: model for key, model in models.items() if key in attends})
