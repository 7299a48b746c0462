"""Mask R-CNN: as Faster R-CNN, a detector whose backbone is a model of another family."""

from __future__ import annotations

from compressvit.model.detectors.mask_rcnn import MaskRCNN as Detector
from compressvit.model.families.faster_rcnn import FasterRCNN
from compressvit.model.family import family


@family("mask_rcnn")
class MaskRCNN(FasterRCNN):
    """No blocks of its own."""

    title = "Mask R-CNN"
    supports = ("Mask R-CNN (mask_rcnn) on a backbone of these",)
    models = (Detector,)
