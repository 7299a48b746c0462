"""How prompts are added to the tokens of a model: one file per kind of attention, registered under the word that families name."""

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
    """Adds prompts to a model, in place.

    Attributes:
        model: changed in place.
        backbone: the paths of its blocks.
        count: P, the number of prompts.
        dropout: of the elements of prompts, in training.
    """

    model: nn.Module
    backbone: Backbone
    count: int
    dropout: float

    @property
    def at(self) -> int:
        """Number of tokens before the prompts."""
        return self.backbone.num_prefix_tokens

    def enter(self, path: str, mixin: type, block: str, kind: type[Prompts] = Prompts) -> None:
        """Add new prompts of the width of `block`, in the slot `vpt` of `mixin` at `path`."""
        like, width = sublayer_width(self.model, f"{block}.attn")
        surgery.extend(self.model, path, mixin)
        prompts = kind(self.count, width, self.at, self.dropout, device=like.device, dtype=like.dtype)
        surgery.fill_slot(self.model, path, "vpt", prompts)

    def leave(self, path: str, mixin: type, drop: DropPrompts) -> None:
        """Remove the prompts with the slot `vpt_end` of `mixin` at `path`."""
        surgery.extend(self.model, path, mixin)
        surgery.fill_slot(self.model, path, "vpt_end", drop)

    def travel(self, mixin: type[TravellingPrompts], kind: type[Prompts], drop: DropPrompts) -> str:
        """Add one set of prompts before the first block and remove it after the last, whose path is returned; `mixin` extends the model."""
        first, last = self.backbone.blocks[0].path, self.backbone.blocks[-1].path
        surgery.extend(self.model, "", mixin)
        surgery.fill_slot(self.model, "", "vpt_drop", drop)
        self.enter(first, WithPrompts, first, kind)
        self.leave(last, WithoutPrompts, drop)
        return last


class Way(ABC):
    """How prompts are added to the tokens, for families that name this way (`Family.prompts`)."""

    @abstractmethod
    def missing(self, model: nn.Module, deep: bool) -> str | None:
        """What the model lacks for such prompts, in words; None if nothing."""

    @abstractmethod
    def deep(self, joining: Joining, path: str) -> None:
        """Give the block at `path` prompts of its own, added before its attention and removed after it."""

    @abstractmethod
    def shallow(self, joining: Joining) -> str:
        """Add one set of prompts before the first block and remove it after the last, whose path is returned."""


WAYS: Registry[Way] = Registry("way of prompts", "compressvit.transforms.vpt")
_Kind = TypeVar("_Kind", bound=type[Way])


def way(name: str) -> Callable[[_Kind], _Kind]:
    """Register a way under the word that families name."""

    def register(kind: _Kind) -> _Kind:
        WAYS.add(name, kind(), kind.__module__)
        return kind

    return register
