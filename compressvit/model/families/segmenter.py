"""Segmenters: their backbone is a model of another family, and their heads have no blocks."""

from __future__ import annotations

from compressvit.model.family import OnBackbone, family
from compressvit.model.segmenters.segmenter import Segmenter as Model


@family("segmenter")
class Segmenter(OnBackbone):
    """No blocks of its own."""

    title = "segmenter"
    supports = ("segmenters (segmenter) on a backbone of these",)
    models = (Model,)
    features = "maps"
