"""What the weights say without an image: singular values, effective ranks, and what layers would lose by sharing one weight."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
from scipy.linalg import svdvals
from torch import nn

from compressvit.backbone import TRANSFORMERS, describe
from compressvit.diagnostics.findings import Finding
from compressvit.errors import UserError
from compressvit.transforms.align import matched_weights
from compressvit.transforms.lors import TARGETS

_POINTS = 48  # of a spectrum's curve


def effective_weight(layer: Any) -> np.ndarray:
    """The weight (out, in) that a linear layer computes with, its low-rank term included, in float64."""
    weight = layer.effective_weight() if hasattr(layer, "effective_weight") else layer.weight
    return weight.detach().cpu().double().flatten(1).numpy()


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
                curves.append({"block": indices[block], "layer": kind, "model": name, "index": i, "relative": relative})
    first = next(iter(models))
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
            f"Singular values of the {first}'s weights",
            "A line a block: how fast the singular values fall, relative to the largest. Steep lines lose little when they are cut off.",
            "lines",
            [record for record in curves if record["model"] == first],
            {
                "x": "index",
                "y": "relative",
                "colour": "block",
                "facet": "layer",
                "points": False,
                "ramp": True,
                "titles": {"relative": "σ / largest σ", "index": "singular value"},
            },
        ),
    ]


def sharing_losses(model: nn.Module, *, aligned: bool = False) -> list[dict[str, Any]]:
    """What two blocks of a stage would lose if a layer of theirs shared the mean of its two weights.

    The relative error `‖(W_i − W_j) / 2‖ · √2 / √(‖W_i‖² + ‖W_j‖²)`: 0 for equal weights, 0.71 for unrelated ones, 1 for opposite ones.

    Args:
        aligned: put neurons and heads of the second block into the order that fits the first best, as the `align` step does (slower).

    Returns:
        A record for every kind of layer and pair of blocks: layer, block, other, loss.

    Raises:
        UserError: the blocks of the model are not known.
    """
    records = []
    for stage in describe(model, TRANSFORMERS).stages:
        plain = [_weights(model, info.path) for info in stage]
        for i, one in enumerate(stage):
            for j, other in enumerate(stage):
                second = plain[j]
                if aligned and i != j:
                    second = {
                        k: v.cpu().double().numpy() for k, v in matched_weights(model, one.path, other.path).items()
                    }
                for kind in TARGETS:
                    a, b = plain[i][kind], second[kind]
                    size = np.sqrt((a**2).sum() + (b**2).sum())
                    loss = float(np.linalg.norm(a - b) / np.sqrt(2) / size) if size > 0 else 0.0
                    records.append({"layer": kind, "block": one.path, "other": other.path, "loss": loss})
    return sorted(records, key=lambda record: TARGETS.index(record["layer"]))


def _weights(model: nn.Module, path: str) -> dict[str, np.ndarray]:
    return {kind: effective_weight(model.get_submodule(f"{path}.{kind}")) for kind in TARGETS}


def sharing_finding(records: list[dict[str, Any]]) -> Finding:
    """A panel a kind of layer: dark pairs could share."""
    return Finding(
        "similarity",
        "What two layers would lose by sharing their mean weight",
        "Relative error of the weights: 0 equal, 0.71 unrelated. Dark squares off the diagonal are layers that could share one weight; "
        "where there are none, share with a private low-rank term, or use low rank alone.",
        "heatmap",
        records,
        {
            "x": "other",
            "y": "block",
            "colour": "loss",
            "facet": "layer",
            "domain": (0.0, 0.75),
            "titles": {"loss": "error"},
        },
    )
