"""How prompts join the tokens of a model: one file for each way of attention, registered under the word that families name."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from typing import TypeVar

from torch import nn

from compressvit.model import surgery
from compressvit.model.backbone import Backbone
from compressvit.registry import Registry
from compressvit.transforms.bottleneck import sublayer_width
from compressvit.transforms.vpt.prompts import DropPrompts, Prompts, TravellingPrompts, WithoutPrompts, WithPrompts


@dataclass(frozen=True)
class Joining:
    """Prompts that are to join the tokens of a model.

    Attributes:
        model: changed in place.
        backbone: where its blocks are.
        count: P, the number of prompts.
        dropout: of their elements, in training.
    """

    model: nn.Module
    backbone: Backbone
    count: int
    dropout: float

    @property
    def at(self) -> int:
        """How many tokens of the sequence come before the prompts."""
        return self.backbone.num_prefix_tokens

    def enter(self, path: str, mixin: type, block: str, kind: type[Prompts] = Prompts) -> None:
        """New prompts of the width of `block`, in the slot `vpt` of `mixin` at `path`."""
        like, width = sublayer_width(self.model, f"{block}.attn")
        surgery.extend(self.model, path, mixin)
        prompts = kind(self.count, width, self.at, self.dropout, device=like.device, dtype=like.dtype)
        surgery.fill_slot(self.model, path, "vpt", prompts)

    def leave(self, path: str, mixin: type, drop: DropPrompts) -> None:
        """Take them out by the slot `vpt_end` of `mixin` at `path`."""
        surgery.extend(self.model, path, mixin)
        surgery.fill_slot(self.model, path, "vpt_end", drop)

    def travel(self, mixin: type[TravellingPrompts], kind: type[Prompts], drop: DropPrompts) -> str:
        """One set of prompts from before the first block to after the last, with `mixin` on the model; returns the last one's path."""
        first, last = self.backbone.blocks[0].path, self.backbone.blocks[-1].path
        surgery.extend(self.model, "", mixin)
        surgery.fill_slot(self.model, "", "vpt_drop", drop)
        self.enter(first, WithPrompts, first, kind)
        self.leave(last, WithoutPrompts, drop)
        return last


class Way(ABC):
    """How prompts join the tokens of models whose family names it (`Family.prompts`)."""

    @abstractmethod
    def missing(self, model: nn.Module, deep: bool) -> str | None:
        """What a model must have for such prompts and has not, in words; None where nothing is missing."""

    @abstractmethod
    def deep(self, joining: Joining, path: str) -> None:
        """Prompts of its own for the block at `path`: before its attention, and out after it."""

    @abstractmethod
    def shallow(self, joining: Joining) -> str:
        """One set of prompts, before the first block and out after the last, the path of which is returned."""


WAYS: Registry[Way] = Registry("way of prompts", "compressvit.transforms.vpt")
_Kind = TypeVar("_Kind", bound=type[Way])


def way(name: str) -> Callable[[_Kind], _Kind]:
    """Register a way under the word that families name."""

    def register(kind: _Kind) -> _Kind:
        WAYS.add(name, kind(), kind.__module__)
        return kind

    return register
