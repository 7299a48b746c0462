"""Faster R-CNN: a detector, whose backbone is a model of another family; its heads have no blocks."""

from __future__ import annotations

from collections.abc import Iterator

from torch import nn

from compressvit.model.detectors.faster_rcnn import FasterRCNN as Detector
from compressvit.model.family import BlockInfo, Family, Need, family


@family("faster_rcnn")
class FasterRCNN(Family):
    """No blocks of its own."""

    title = "Faster R-CNN"
    supports = ("Faster R-CNN (faster_rcnn) on a backbone of these",)
    models = (Detector,)
    block = nn.Module
    body = "backbone"
    features = "fpn"
    latency = "how many objects it finds: compare models that find about as many"

    def lacks(self, need: Need) -> Need | None:
        """What is asked of its backbone depends on that; it has no decoder, and no prompts join tokens that become a pyramid."""
        return need if need in ("prompts", "decoder") else None

    def blocks(self, model: nn.Module) -> Iterator[BlockInfo]:
        return iter(())
