"""Faster R-CNN: a detector, whose backbone is a model of another family; its heads have no blocks."""

from __future__ import annotations

from compressvit.model.detectors.faster_rcnn import FasterRCNN as Detector
from compressvit.model.family import OnBackbone, family


@family("faster_rcnn")
class FasterRCNN(OnBackbone):
    """No blocks of its own."""

    title = "Faster R-CNN"
    supports = ("Faster R-CNN (faster_rcnn) on a backbone of these",)
    models = (Detector,)
    features = "fpn"
    latency = "how many objects it finds: compare models that find about as many"
