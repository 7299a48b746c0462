"""AdaMixer: a detector, whose backbone is a model of another family, and whose decoder's stages are its own blocks.

Shapes: B images, N queries, D width of a query.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any, ClassVar

from torch import nn

from compressvit.model.detectors.adamixer import AdaMixer as Detector
from compressvit.model.detectors.decoder import DecoderStage, OverlapAttention
from compressvit.model.families.vit import SMALL as VIT
from compressvit.model.family import BlockInfo, Example, Family, Need, family

SMALL: dict[str, Any] = {
    "backbone": "vit_tiny_patch16_224",
    "backbone_args": {key: value for key, value in VIT.items() if key not in ("img_size", "num_classes")},
    "img_size": 32,
    "num_classes": 5,
    "queries": 6,
    "stages": 3,
    "dim": 32,
    "channels": 16,
    "heads": 4,
    "hidden": 48,
    "groups": 2,
    "points_in": 4,
    "points_out": 8,
}


@family("adamixer")
class AdaMixer(Family):
    """`decoder.stages.I`, each with `attn`, `mixing` and `mlp`, in one stage."""

    title = "AdaMixer"
    supports = ("AdaMixer (adamixer) on a backbone of these",)
    models = (Detector,)
    block, attention = DecoderStage, OverlapAttention
    body = "backbone"
    features = "pyramid"
    layout = "sequence"
    examples: ClassVar[Mapping[str, Example]] = {"adamixer": Example("adamixer", SMALL, "decoder")}

    def lacks(self, need: Need) -> Need | None:
        """What is asked of its backbone depends on that; no prompts join tokens that become a pyramid."""
        return need if need == "prompts" else None

    def blocks(self, model: nn.Module) -> Iterator[BlockInfo]:
        assert isinstance(model, Detector)
        queries, dim = model.query.shape
        for i, stage in enumerate(model.decoder.stages):
            assert isinstance(stage, DecoderStage)
            yield BlockInfo(
                path=f"decoder.stages.{i}", index=i, stage=0, width=dim, heads=stage.attn.heads, resolution=(1, queries)
            )
