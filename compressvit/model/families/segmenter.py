"""Segmenters: their backbone is a model of another family, and their heads have no blocks."""

from __future__ import annotations

from collections.abc import Iterator

from torch import nn

from compressvit.model.family import BlockInfo, Family, Need, family
from compressvit.model.segmenters.segmenter import Segmenter as Model


@family("segmenter")
class Segmenter(Family):
    """No blocks of its own."""

    title = "segmenter"
    supports = ("segmenters (segmenter) on a backbone of these",)
    models = (Model,)
    block = nn.Module
    body = "backbone"
    features = "maps"

    def lacks(self, need: Need) -> Need | None:
        """What is asked of its backbone depends on that; it has no decoder, and no prompts join tokens that become a map."""
        return need if need in ("prompts", "decoder") else None

    def blocks(self, model: nn.Module) -> Iterator[BlockInfo]:
        return iter(())
