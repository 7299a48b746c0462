"""What compressvit knows of a family of backbones, and the registry of families.

One family is one file in `compressvit/model/families/`, or of a package that offers it (entry points `compressvit.families`). It may import
timm: the registry is first read when somebody asks about a model, so that words and settings do not wait for it.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

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
    projections: tuple[str, ...] = ("attn.qkv",)  # of queries, keys and values, within the block: one layer, or three
    # The module of its stage, which runs what stands between the stage before and its blocks (as patch merging), then the blocks one
    # after the other, and nothing else. "": nothing stands between stages.
    stage_path: str = ""
    key_stride: int = 1  # of how many tokens, along each side of the grid, attention has one key
    prefix_tokens: int = 0  # before those of the patches, as `describe` finds them by `Family.prefix_in`
    grids: int = 1  # of which `resolution` consists, one below the other: those of the times of a clip

    def holds(self, path: str) -> bool:
        """Whether a module, by its path, is in the block; all are in that of the empty path."""
        return not self.path or path.startswith(f"{self.path}.")

    def whole(self, name: str) -> str:
        """The path of a module that is called `name` within the block."""
        return f"{self.path}.{name}" if self.path else name


HeadOption = Literal["heads", "head_dim"]

# What a method may need of a family (`Family.lacks`).
Need = Literal[
    "blocks",
    "attention",
    "slotted_attention",
    "slotted_block",
    "no_position_table",
    "keys_at_queries",
    "single_dims",
    "separate_heads",
    "alike_blocks",
    "prompts",
    "decoder",
]

# By need, what a refusal says: the method needs ..., and the model is a Swin, ...
NEEDS: dict[Need, tuple[str, str]] = {
    "blocks": (
        "blocks that it knows",
        "of which compressvit knows only which layers run after which (low_rank, quantise, and neurons of narrow need no more)",
    ),
    "attention": ("attention", "whose blocks have none"),
    "slotted_attention": (
        "attention whose logits it can change",
        "for which compressvit has no such attention (`Family.slotted_attention`)",
    ),
    "slotted_block": (
        "a block to which it can add a layer or a branch",
        "for which compressvit has no such block (`Family.slotted_block`)",
    ),
    "no_position_table": (
        "attention without relative positions of its own",
        "which has a relative position table already",
    ),
    "keys_at_queries": (
        "attention whose keys stand where its queries do",
        "whose keys and values are on a coarser grid",
    ),
    "single_dims": (
        "heads of which single dimensions can go",
        "whose attention turns them in pairs by rotary positions, or norms them together (cosines), or pools queries, or has another layer "
        "before each of queries, keys and values; try `heads` instead of `head_dim`",
    ),
    "separate_heads": (
        "heads that work apart",
        "whose attention mixes them with each other (talking heads); try `head_dim` instead of `heads`",
    ),
    "alike_blocks": ("blocks of one shape in every stage", "whose stages begin with a block that widens the tokens"),
    "prompts": ("to know how prompts join the tokens", "which does not say so (`Family.prompts`)"),
    "decoder": ("a decoder that mixes features by matrices it generates (AdaMixer's)", "which has none"),
}
_OF_ATTENTION: set[Need] = {
    "slotted_attention",
    "no_position_table",
    "keys_at_queries",
    "single_dims",
    "separate_heads",
    "prompts",
}  # missing where there is no attention


@dataclass(frozen=True)
class Branch:
    """A residual branch of a block, `x + scale(branch(norm(x)))`: paths within the block."""

    norm: str  # its input is the residual stream
    branch: str
    scale: str  # a LayerScale, of which `gamma` (width,) is read, or that parameter; a block need not have one
    # Whether what the last layer gives stands where the stream does, token by token; else that is found out (Swin's windows).
    in_place: bool = False

    def gamma(self, block: nn.Module) -> torch.Tensor | None:
        """The LayerScale (width,) of a block after this branch, if it has one."""
        path, _, name = self.scale.rpartition(".")
        found = getattr(block.get_submodule(path), name, None) if name else None
        gamma = found if isinstance(found, torch.Tensor) else getattr(found, "gamma", None)
        return None if gamma is None else gamma.flatten()  # of maps it is (width, 1, 1)


# By the linear layer that ends each, of timm's pre-norm blocks; their LayerScale is a module, or a parameter of the block.
PRE_NORM_BRANCHES = {"attn.proj": Branch("norm1", "attn", "ls1"), "mlp.fc2": Branch("norm2", "mlp", "ls2")}
GAMMA_BRANCHES = {"attn.proj": Branch("norm1", "attn", "gamma_1"), "mlp.fc2": Branch("norm2", "mlp", "gamma_2")}


@dataclass(frozen=True)
class Example:
    """A small model of a family, on which the contract of transforms (`compressvit.testing`) is checked.

    Attributes:
        model: its name in timm.
        args: for `timm.create_model`; they make it small.
        tried: with every transform, only with those that train the whole model, only with those that freeze the backbone, which
            act at a few places, so that fewer models tell them apart, or only with those that need a decoder.
    """

    model: str
    args: Mapping[str, Any]
    tried: Literal["always", "whole", "frozen", "decoder"] = "always"


class Family(ABC):
    """Models of one architecture: their classes, where their blocks are, and what transforms can attach to them.

    A block has its MLP at `mlp` and, where there is attention, its attention at `attn`. What a family leaves out is not offered for its
    models: a transform that needs it (`Transform.needs`) refuses them and names the families that have it.
    """

    name: ClassVar[str]  # its word, set by `family`
    title: ClassVar[str]  # what messages call one such model, e.g. 'Swin'
    supports: ClassVar[tuple[str, ...]]  # for messages: each class, and the names of its models in timm
    models: ClassVar[
        tuple[type[nn.Module], ...]
    ]  # the classes of whole models; a subclass that timm defines must be named, too
    block: ClassVar[type[nn.Module]]
    # Of a block's `attn`: one class, or several; None: its blocks have only an MLP.
    attention: ClassVar[type[nn.Module] | tuple[type[nn.Module], ...] | None] = None
    # Subclasses of the two above with slots (`compressvit.model.slots`): what computes between attention and MLP, or inside attention;
    # of several classes of attention one each, in their order.
    slotted_block: ClassVar[type[nn.Module] | None] = None
    slotted_attention: ClassVar[type[nn.Module] | tuple[type[nn.Module], ...] | None] = None
    position_table: ClassVar[bool] = False  # its attention has a table of relative positions
    coarse_keys: ClassVar[bool] = False  # its keys and values are on a coarser grid than its queries
    # What stands between the input of its attention and the layers of queries, keys and values, for messages: 'a convolution'.
    before_qkv: ClassVar[str | None] = None
    # Of layers of its attention without a bias, the parameters of the attention that are the parts of one, in order. None: a part that no
    # output depends on, as where keys are shifted all alike, and nothing but a softmax over them reads that.
    biases_apart: ClassVar[Mapping[str, tuple[str | None, ...]]] = {}
    whole_heads: ClassVar[bool] = False  # its attention works on the dimensions of a head together
    widens: ClassVar[bool] = False  # the first block of a stage has other shapes than the rest
    mixed_heads: ClassVar[bool] = False  # its heads work on what the others give, so that none can go
    # How prompt tokens (VPT) join the others, by a word registered in `compressvit/transforms/vpt/`: `sequence`, as in timm's ViT,
    # `biased_sequence`, where positions are a bias of the logits, or `windows`, as in timm's Swin. None: they cannot.
    prompts: ClassVar[str | None] = None
    # What a block passes on: (B, N, C), (B, height, width, C) or (B, C, height, width).
    layout: ClassVar[Literal["sequence", "channels_last", "channels_first"]] = "sequence"
    in_rows: ClassVar[bool] = True  # its patches come row by row, after the tokens that are none
    # Whether its blocks are timm's, of which each has layers of the same names. Else those of a block are found as they are called.
    named_layers: ClassVar[bool] = True
    # Of a detector or segmenter: the path of the model of another family that transforms work on, unless they ask for its own blocks.
    body: ClassVar[str | None] = None
    # The method of that model, of timm's, whose results the rest of the detector or segmenter is given (`compressvit.model.cut`).
    body_method: ClassVar[str] = "forward_intermediates"
    # The path of the module whose outputs are a model's features, to distil them: tokens (or a grid) with channels last, or several maps
    # (B, C, H, W).
    features: ClassVar[str] = "norm"
    # By the linear layer that ends it, which is then fitted so that its sum with the residual stream is the teacher's.
    branches: ClassVar[Mapping[str, Branch]] = {}
    # By name, the first one standing for the family where one is enough. A family without is not under the contract.
    examples: ClassVar[Mapping[str, Example]] = {}
    latency: ClassVar[str | None] = None  # what the latency of one model depends on, beside the size of its images
    drop_paths: ClassVar[tuple[str, ...]] = ("drop_path1", "drop_path2")  # a block's stochastic depth

    @abstractmethod
    def blocks(self, model: nn.Module) -> Iterable[BlockInfo]:
        """The blocks in the order in which they run.

        Raises:
            UserError: the model is of this family, but was built with something in place of a block.
        """

    def patch_size(self, model: nn.Module) -> tuple[int, int]:
        """Height and width, in pixels, of the patch that becomes a token of the first block."""
        patch_embed: Any = model.patch_embed  # of timm
        height, width = patch_embed.patch_size
        return height, width

    def image_size(self, model: nn.Module) -> tuple[int, int] | int | None:
        """Height and width of the images that a model takes as it was built, or their one side; None where it does not know."""
        size: tuple[int, int] | int | None = getattr(getattr(model, "patch_embed", None), "img_size", None)
        return size

    def branches_in(self, model: nn.Module, path: str) -> Mapping[str, Branch]:
        """The residual branches of the block at `path`, by the linear layer that ends each."""
        return self.branches

    def changed_in(self, model: nn.Module, path: str) -> frozenset[str]:
        """The linear layers of the block at `path` whose outputs something changes in place, but for those that
        `compressvit.model.calls.adds_in_place` knows."""
        return frozenset()

    def title_of(self, model: nn.Module) -> str:
        """What messages call this model."""
        return self.title

    def lacks(self, need: Need) -> Need | None:
        """The need that is not met, None if it is. Where there is no attention, that is what any need of it lacks."""
        if need == "blocks":
            return None
        if need == "decoder":
            return None if self.body is not None else need
        if self.attention is None and need in _OF_ATTENTION:
            return "attention"
        lacking: dict[Need, bool] = {
            "no_position_table": self.position_table,
            "keys_at_queries": self.coarse_keys,
            "single_dims": self.whole_heads,
            "separate_heads": self.mixed_heads,
            "alike_blocks": self.widens,
        }
        has = not lacking[need] if need in lacking else getattr(self, need) is not None
        return None if has else need

    def prefix_tokens(self, model: nn.Module) -> int:
        """How many tokens before those of the patches the blocks have: class, distillation and register tokens."""
        return getattr(model, "num_prefix_tokens", 0)

    def prefix_in(self, model: nn.Module, path: str) -> int:
        """The same of the block at `path`, or of what is in it."""
        return self.prefix_tokens(model)

    def head_options(self, attention: nn.Module) -> tuple[HeadOption, ...]:
        """What can be changed of the heads of an attention of this family, whose `qkv` gives queries, keys and values of equal size, each
        head after head (or three layers do, `compressvit.model.calls.PARTS`: then whole heads alone), and whose `proj` reads the heads. By
        default nothing."""
        return ()

    def attention_of_heads(self, attention: nn.Module) -> type[nn.Module] | None:
        """The subclass that an attention must be of, for other heads than its class takes; None where that takes any."""
        return None

    def heads_stay(self, model: nn.Module, attention: nn.Module) -> str | None:
        """Why the heads of an attention can neither change places nor go, as an end of 'heads …'; None where they can."""
        return None

    # Of an attention, beside its layers: vectors with an entry for every dimension of the heads, as biases of queries, keys and values, in
    # this order, that it adds itself; and by name parameters with an entry for every head along some axes, as a position table.
    of_heads: ClassVar[tuple[str, ...]] = ()
    of_each_head: ClassVar[Mapping[str, tuple[int, ...]]] = {}

    def set_heads(self, attention: nn.Module, heads: int, head_dim: int) -> None:
        """Tell an attention, whose `qkv` and `proj` have been made narrower, how many heads of what dimension it has.

        Args:
            attention: one that `head_options` says can be changed so.
        """
        raise TypeError(f"the family {self.name!r} cannot change heads")

    def convert(self, tensors: dict[str, torch.Tensor], model: nn.Module) -> dict[str, torch.Tensor]:
        """A checkpoint as `model` takes it: original names to timm's, position tables resampled to its grid. May raise any exception."""
        return tensors


class OnBackbone(Family):
    """Models whose `backbone` is of another family, and whose own part has no blocks: detectors and segmenters."""

    block = nn.Module
    body = "backbone"

    def lacks(self, need: Need) -> Need | None:
        """What is asked of the backbone depends on that; there is no decoder, and no prompts join tokens that become a map."""
        return need if need in ("prompts", "decoder") else None

    def blocks(self, model: nn.Module) -> Iterable[BlockInfo]:
        return ()


FAMILIES: Registry[Family] = Registry("family", "compressvit.model.families")


def family(name: str) -> Callable[[type[Family]], type[Family]]:
    """Register a family under its word. A second one of the same word is refused at import."""

    def register(kind: type[Family]) -> type[Family]:
        kind.name = name
        FAMILIES.add(name, kind(), kind.__module__)
        return kind

    return register
