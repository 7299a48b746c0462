"""t-SNE of the pooled features: images with similar features lie together (AdaptFormer, figure 5).

Computed by scikit-learn: https://scikit-learn.org/stable/modules/generated/sklearn.manifold.TSNE.html
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np
import torch
from pydantic import Field
from torch import nn

from compressvit.charts.findings import Finding
from compressvit.data.input import InputConfig, Side
from compressvit.diagnostics.base import EPOCHS, Context, Epochs, MeasuredOnImages, diagnostic
from compressvit.errors import UserError
from compressvit.model.backbone import model_name
from compressvit.model.modes import evaluating
from compressvit.model.modules import as_timm
from compressvit.tasks.targets import NO_LABEL, at_least
from compressvit.training.spec import Training

LEAST = 10  # images


def require_pooled(model: nn.Module) -> None:
    """Raise a `UserError` if a model has no pooled features."""
    if not hasattr(model, "forward_head"):
        raise UserError(
            f"t-SNE needs pooled features, which {model_name(model)} does not give: it has no timm forward_head; leave embedding out of "
            "diagnostics"
        )


@torch.no_grad()
def pooled_features(
    side: Side,
    batches: Iterable[tuple[torch.Tensor, torch.Tensor]],
    device: torch.device,
    *,
    images: int,
    source: InputConfig | None = None,
) -> tuple[np.ndarray, np.ndarray]:
    """The inputs of a timm model's classifier (images, width), and the labels (images,), −1 for none.

    Args:
        batches: (images, targets), as yielded by `compressvit.data.loaders.eval_loader`; broken files (target −2) are skipped.
        images: maximum number of images.
        source: size and normalisation of the images in the batches; None: those of the model.

    Raises:
        UserError: the model is not from timm, there are too few images, or features are not finite.
    """
    model, convert = side.model, side.converter(source or side.input)
    require_pooled(model)
    features, labels = [], []
    left = images
    with evaluating(model.to(device)):
        for batch, targets in batches:
            keep = at_least(targets, NO_LABEL)
            batch, targets = batch[keep][:left], _classes(targets)[keep][:left]
            if len(batch):
                hidden = as_timm(model).forward_features(convert(batch.to(device)))
                features.append(as_timm(model).forward_head(hidden, pre_logits=True).float().cpu().flatten(1))
                labels.append(targets.cpu())
            left -= len(batch)
            if left <= 0:
                break
    if images - left < LEAST:
        raise UserError(
            f"t-SNE: {images - left} images are too few to show groups; it needs at least {LEAST}, better some hundreds"
        )
    found = torch.cat(features).numpy()
    if not np.isfinite(found).all():
        raise UserError("t-SNE: the pooled features are not finite; check the weights of the model")
    return found, torch.cat(labels).numpy()


def _classes(targets: Any) -> torch.Tensor:
    """Targets (B,) if they are classes; otherwise −1 for every image."""
    plain = isinstance(targets, torch.Tensor) and targets.ndim == 1 and not targets.is_floating_point()
    return targets if plain else torch.full((len(at_least(targets, NO_LABEL)),), NO_LABEL)


def embedding_finding(
    features: Mapping[str, np.ndarray], labels: np.ndarray, *, perplexity: float = 30.0, seed: int = 0
) -> Finding:
    """A chart with one panel per model and one point per image, coloured by class.

    Args:
        features: (images, width) of the same images, by model name.
        labels: (images,).
        perplexity: effective number of neighbours of an image; at most a third of the images.

    Raises:
        UserError: the features do not vary.
    """
    from sklearn.manifold import TSNE

    records: list[dict[str, Any]] = []
    for name, values in features.items():
        if (
            values.shape[1] < 2 or not (values.std(axis=0) > 1e-6 * np.abs(values).max()).any()
        ):  # scikit-learn crashes on constant features
            raise UserError(
                f"t-SNE: the features of {name} are the same for all images, or of width 1: there is nothing to draw"
            )
        near = min(perplexity, (len(values) - 1) / 3)
        placed = TSNE(perplexity=near, init="pca", random_state=seed).fit_transform(values)
        records += [
            {"model": name, "x": round(float(x), 3), "y": round(float(y), 3), "class": str(label)}
            for (x, y), label in sorted(zip(placed.tolist(), labels.tolist(), strict=True), key=lambda row: row[1])
        ]
    return Finding(
        "embedding",
        "Features of the images, by t-SNE",
        "Images with similar features lie close together; colours are the true classes. Compact groups of one colour are easy to classify. "
        "The distance between groups and the axes have no meaning.",
        "points",
        records,
        {"x": "x", "y": "y", "colour": "class", "facet": "model", "titles": {"x": "", "y": ""}},
    )


@diagnostic("embedding")
class Embedding(MeasuredOnImages):
    """t-SNE of the pooled features of student and teacher: one point per image, coloured by class."""

    epochs: Epochs = Field(("last",), min_length=1, description=EPOCHS)
    perplexity: float = Field(
        30.0, gt=0, description="t-SNE's perplexity: roughly the number of neighbours of an image."
    )

    def refuse(self, phase: Training, student: Side, teacher: Side | None) -> None:
        for side in filter(None, (student, teacher)):
            require_pooled(side.model)

    def measure(self, context: Context) -> list[Finding]:
        features, labels = {}, np.empty(0)
        for name, side in context.sides.items():
            batches = context.labelled(self.images)
            features[name], labels = pooled_features(
                side, batches, context.device, images=self.images, source=context.student.input
            )
        return [embedding_finding(features, labels, perplexity=self.perplexity)]
