"""The form of a block that is made smaller: plain data, which a plan stores and a model is rebuilt from."""

from __future__ import annotations

from itertools import chain
from typing import Annotated

from pydantic import Field

from compressvit.model.calls import PARTS
from compressvit.spec import Frozen

FC1, FC2, QKV, PROJ = "mlp.fc1", "mlp.fc2", "attn.qkv", "attn.proj"

# Of timm's blocks, in the order they run; of those that a block may have in parts also these.
LAYERS = (QKV, *chain(*PARTS[QKV]), PROJ, FC1, *chain(*PARTS[FC1]), FC2)

Size = Annotated[int, Field(ge=1)]


class BlockForm(Frozen):
    """What is left of one block; None where it is as in the teacher.

    Attributes:
        neurons: of the MLP.
        heads, head_dim: of the attention.
        ranks: of layers that are low rank besides, by their name in the block.
        factored: those of them that are two factors where the plan's others are pivoted.
        parts: those of `attn.qkv` and `mlp.fc1` in whose place the block has several layers (`compressvit.model.calls.PARTS`).
        mlp: the names of the two layers of its MLP; empty where they are timm's.
        qkv: the names of the three layers that give queries, keys and values; empty where they are one, or timm's.
    """

    neurons: Size | None = None
    heads: Size | None = None
    head_dim: Size | None = None
    ranks: dict[str, Size] = Field(default_factory=dict)
    factored: tuple[str, ...] = ()
    parts: tuple[str, ...] = ()
    mlp: tuple[()] | tuple[str, str] = ()
    qkv: tuple[()] | tuple[str, str, str] = ()

    def layers(self) -> set[str]:
        """The names of the layers that it changes."""
        found = set(self.ranks)
        if self.neurons:
            found |= {*self.own(FC1), *self.own(FC2)}
        if self.heads or self.head_dim:
            found |= {*self.own(QKV), PROJ}
        return found

    def in_order(self) -> list[str]:
        """The same in the order they run."""
        found = self.layers()
        return [layer for layer in dict.fromkeys((*LAYERS, *self.mlp)) if layer in found]

    def own(self, layer: str) -> tuple[str, ...]:
        """The layers of the block that do what `layer` does."""
        if self.mlp and layer in (FC1, FC2):
            return (self.mlp[layer == FC2],)
        if self.qkv and layer == QKV:
            return self.qkv
        return PARTS[layer][0] if layer in self.parts else (layer,)
