"""Models of no other family: whatever takes images and gives a tensor, as a chain of modules (`compressvit.model.chain`)."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any, ClassVar

from torch import nn

from compressvit.errors import UserError
from compressvit.model.backbone import model_name
from compressvit.model.chain import chain_of, is_within
from compressvit.model.family import BlockInfo, Branch, Example, Family, Need, family

SMALL: dict[str, Any] = {"depths": (1, 2), "embed_dims": (16, 32), "num_heads": (2, 4), "num_classes": 5}


@family("generic")
class Generic(Family):
    """Its blocks are the links of the chain. What is in them is not known by name, so only methods for any linear layer work."""

    title = ""  # that of the class
    supports = ("every other model that takes images and gives a tensor",)
    models = ()
    block = nn.Module
    named_layers = False
    examples: ClassVar[Mapping[str, Example]] = {"davit": Example("davit_tiny", SMALL)}

    def title_of(self, model: nn.Module) -> str:
        return type(model).__name__

    def lacks(self, need: Need) -> Need | None:
        return need if need == "decoder" else "blocks"

    def blocks(self, model: nn.Module) -> Iterator[BlockInfo]:
        chain = chain_of(model)
        if not chain.layers:
            first = chain.uncalled[0] if chain.uncalled else ""
            stay = f" (the weight of {first} is read without a call, or it is of a class of its own)" if first else ""
            raise UserError(
                f"{model_name(model)} calls no linear layer that another could replace{stay}, so there is nothing to change"
            )
        for index, path in enumerate(chain.links):
            yield BlockInfo(path=path, index=index, stage=0, width=0, heads=0, resolution=(0, 0))

    def branches_in(self, model: nn.Module, path: str) -> dict[str, Branch]:
        ends = chain_of(model).ends
        return {
            _within(layer, path): Branch(
                _within(reader, path), _within(layer, path), _within(scale, path), in_place=True
            )
            for layer, (reader, scale) in ends.items()
            if is_within(layer, path)
        }

    def changed_in(self, model: nn.Module, path: str) -> frozenset[str]:
        return frozenset(_within(layer, path) for layer in chain_of(model).changed if is_within(layer, path))


def _within(path: str, block: str) -> str:
    """The name, within a block, of a module in it."""
    return path.removeprefix(f"{block}.") if block else path
