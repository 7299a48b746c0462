"""AdaMixer: a detector, whose backbone is a model of another family, and whose decoder's stages are its own blocks.

Shapes: B images, N queries, D width of a query.
"""

from __future__ import annotations

from collections.abc import Iterator

from torch import nn

from compressvit.model.detectors.adamixer import AdaMixer as Detector
from compressvit.model.detectors.decoder import DecoderStage, OverlapAttention
from compressvit.model.family import BlockInfo, Family, family


@family("adamixer")
class AdaMixer(Family):
    """`decoder.stages.I`, each with `attn`, `mixing` and `mlp`, in one stage."""

    title = "AdaMixer"
    supports = ("AdaMixer (adamixer) on a backbone of these",)
    models = (Detector,)
    block, attention = DecoderStage, OverlapAttention
    body = "backbone"
    layout = "sequence"

    def blocks(self, model: nn.Module) -> Iterator[BlockInfo]:
        assert isinstance(model, Detector)
        queries, dim = model.query.shape
        for i, stage in enumerate(model.decoder.stages):
            assert isinstance(stage, DecoderStage)
            yield BlockInfo(
                path=f"decoder.stages.{i}", index=i, stage=0, width=dim, heads=stage.attn.heads, resolution=(1, queries)
            )
