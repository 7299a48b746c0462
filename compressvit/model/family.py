"""What compressvit knows of a family of backbones, and the registry of families.

One family is one file in `compressvit/model/families/`, or of a package that offers it (entry points `compressvit.families`). It may import
timm: the registry is first read when somebody asks about a model, so that words and settings do not wait for it.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import nn

from compressvit.registry import Registry


@dataclass(frozen=True)
class BlockInfo:
    """One block. Sizes are in tokens; `width` is that of its MLP's input, `heads` those of its attention (0 without one)."""

    path: str
    index: int  # over the whole model, from 0
    stage: int  # from 0; a ViT has one stage
    width: int
    heads: int
    resolution: tuple[int, int]
    window: tuple[int, int] | None = None  # None: attention over all tokens
    shift: tuple[int, int] = (0, 0)


class Family(ABC):
    """Models of one architecture: their classes, where their blocks are, and what transforms can attach to them.

    A block has its MLP at `mlp` and, where there is attention, its attention at `attn`. What a family leaves out is not offered for its
    models: a transform that needs it refuses them and names the families that have it.
    """

    name: ClassVar[str]  # its word, set by `family`
    title: ClassVar[str]  # what messages call one such model, e.g. 'Swin'
    supports: ClassVar[tuple[str, ...]]  # for messages: each class, and the names of its models in timm
    models: ClassVar[
        tuple[type[nn.Module], ...]
    ]  # the classes of whole models; a subclass that timm defines must be named, too
    block: ClassVar[type[nn.Module]]
    attention: ClassVar[type[nn.Module] | None] = None  # of a block's `attn`; None: its blocks have only an MLP
    # Subclasses of the two above with slots (`compressvit.model.slots`): what computes between attention and MLP, or inside attention.
    slotted_block: ClassVar[type[nn.Module] | None] = None
    slotted_attention: ClassVar[type[nn.Module] | None] = None
    position_table: ClassVar[bool] = False  # its attention has a table of relative positions
    # How prompt tokens (VPT) can join: in the sequence, as in timm's ViT, or in each window, as in timm's Swin. None: they cannot.
    prompts: ClassVar[Literal["sequence", "windows"] | None] = None
    # What a block passes on: (B, N, C), (B, height, width, C) or (B, C, height, width).
    layout: ClassVar[Literal["sequence", "channels_last", "channels_first"]] = "sequence"
    drop_paths: ClassVar[tuple[str, ...]] = ("drop_path1", "drop_path2")  # a block's stochastic depth

    @abstractmethod
    def blocks(self, model: nn.Module) -> Iterable[BlockInfo]:
        """The blocks in the order in which they run.

        Raises:
            UserError: the model is of this family, but was built with something in place of a block.
        """

    def convert(self, tensors: dict[str, torch.Tensor], model: nn.Module) -> dict[str, torch.Tensor]:
        """A checkpoint as `model` takes it: original names to timm's, position tables resampled to its grid. May raise any exception."""
        return tensors


FAMILIES: Registry[Family] = Registry("family", "compressvit.model.families")


def family(name: str) -> Callable[[type[Family]], type[Family]]:
    """Register a family under its word. A second one of the same word is refused at import."""

    def register(kind: type[Family]) -> type[Family]:
        kind.name = name
        FAMILIES.add(name, kind(), kind.__module__)
        return kind

    return register
