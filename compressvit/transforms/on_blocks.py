"""Adapters on some blocks of a backbone alone."""

from __future__ import annotations

from typing import Annotated

from pydantic import Field, model_validator
from torch import nn

from compressvit.errors import UserError
from compressvit.model.backbone import model_name
from compressvit.model.family import BlockInfo
from compressvit.transforms.base import Transform

Index = Annotated[int, Field(ge=0)]
Range = Annotated[str, Field(pattern=r"^\d+-\d+$")]


class OnBlocks(Transform):
    """A transform that acts on every block, or on those that `blocks` or `stages` name."""

    blocks: tuple[Index | Range, ...] | None = Field(
        None,
        min_length=1,
        description="Blocks that are adapted, counted over the whole model from 0: numbers, or ranges with both ends, e.g. [0, 8-11]. "
        "Null for all.",
    )
    stages: tuple[Index, ...] | None = Field(
        None, min_length=1, description="Stages whose blocks are adapted, from 0, instead of `blocks`; a ViT has one."
    )

    @model_validator(mode="after")
    def _blocks_or_stages(self) -> OnBlocks:
        if self.blocks is not None and self.stages is not None:
            raise ValueError("blocks and stages are both given; remove one of them")
        for span in self.blocks or ():
            first, last = _ends(span)
            if first > last:
                raise ValueError(f"blocks: {span} ends before it begins; did you mean {last}-{first}?")
        return self

    def chosen(self, model: nn.Module) -> tuple[BlockInfo, ...]:
        """The blocks of a model that are adapted, in order.

        Raises:
            UserError: the model has no such block or stage.
        """
        backbone = self.backbone(model)
        found, name = backbone.blocks, model_name(model)
        if self.blocks is not None:
            spans = [_ends(span) for span in self.blocks]
            highest = max(
                last for _, last in spans
            )  # compared first: a range may name more numbers than fit into memory
            if highest >= len(found):
                raise UserError(
                    f"{self.name}.blocks asks for block {highest}, but {name} has {len(found)}: 0 to {len(found) - 1}"
                )
            return tuple(info for info in found if any(first <= info.index <= last for first, last in spans))
        if self.stages is not None:
            count = len(backbone.stages)
            if max(self.stages) >= count:
                have = f"{count}: 0 to {count - 1}" if count > 1 else "one, 0; choose by `blocks`"
                raise UserError(f"{self.name}.stages asks for stage {max(self.stages)}, but {name} has {have}")
            return tuple(info for info in found if info.stage in self.stages)
        return found


def _ends(span: int | str) -> tuple[int, int]:
    """The first and the last block of a number or a range."""
    if isinstance(span, int):
        return span, span
    first, last = map(int, span.split("-"))
    return first, last
