"""Where a timm model keeps its stages, blocks, attention and MLP.

This is the only file that knows the names of timm's classes. A transform asks `describe(model)` and works with what it gets.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from timm.data import resolve_model_data_config
from timm.layers import Attention
from timm.models.convnext import ConvNeXt, ConvNeXtBlock
from timm.models.deit import VisionTransformerDistilled
from timm.models.swin_transformer import SwinTransformer, SwinTransformerBlock, WindowAttention
from timm.models.vision_transformer import Block, VisionTransformer
from torch import nn

from compressvit.errors import UserError

SUPPORTED = (
    "timm's VisionTransformer (vit_*, deit_*, deit3_*, DINOv2 with LayerScale and register tokens), "
    "VisionTransformerDistilled (deit_*_distilled_*) and SwinTransformer (swin_*, version 1), at any size"
)

TRANSFORMERS = ("vit", "swin")  # the families that a transform works on unless it says more
ALL_FAMILIES = (*TRANSFORMERS, "convnext")
_FAMILIES: dict[type, str] = {
    VisionTransformer: "vit",
    VisionTransformerDistilled: "vit",
    SwinTransformer: "swin",
    ConvNeXt: "convnext",
}
_BLOCKS: dict[str, type] = {"vit": Block, "swin": SwinTransformerBlock, "convnext": ConvNeXtBlock}
_ATTENTION: dict[str, type] = {"vit": Attention, "swin": WindowAttention}
SUPPORTED_BY_ADAPTERS = "; adapters also on ConvNeXt (convnext_*, versions 1 and 2)"


@dataclass(frozen=True)
class BlockInfo:
    """One block. Sizes are in tokens; `width` is that of its MLP's input, `heads` those of its attention (0 without one)."""

    path: str
    index: int  # over the whole model, from 0
    stage: int  # from 0; a ViT has one stage
    width: int
    heads: int
    resolution: tuple[int, int]
    window: tuple[int, int] | None  # None: attention over all tokens
    shift: tuple[int, int]


@dataclass(frozen=True)
class Backbone:
    """What a transform needs to know about a model."""

    family: str  # 'vit', 'swin' or 'convnext'
    blocks: tuple[BlockInfo, ...]
    num_prefix_tokens: int  # class, distillation and register tokens, which are not on the token grid

    @property
    def parts(self) -> tuple[str, ...]:
        """Names of the sublayers of a block: 'attn' and 'mlp', or 'mlp' alone."""
        return ("attn", "mlp") if self.family in _ATTENTION else ("mlp",)

    @property
    def stages(self) -> tuple[tuple[BlockInfo, ...], ...]:
        """The blocks grouped by stage, in order."""
        count = self.blocks[-1].stage + 1
        return tuple(tuple(b for b in self.blocks if b.stage == stage) for stage in range(count))


def share_groups(model: nn.Module, share: int | tuple[int, ...], asker: str) -> list[tuple[str, ...]]:
    """Paths of the blocks of each share group: `share` consecutive blocks of one stage.

    Args:
        model: a timm model.
        share: blocks in a group, one number for every stage or one per stage; must divide the stage's depth.
        asker: what messages call the option, e.g. 'multiplex.share'.

    Raises:
        UserError: a number does not divide its stage, or there are not as many numbers as stages.
    """
    stages = describe(model).stages
    counts = (share,) * len(stages) if isinstance(share, int) else share
    if len(counts) != len(stages):
        raise UserError(
            f"{asker} gives {len(counts)} numbers, {list(counts)}, but {model_name(model)} has {len(stages)} "
            f"stage{'s' * (len(stages) > 1)} of depth {[len(s) for s in stages]}; give one number, or one per stage"
        )
    groups = []
    for stage, (blocks, count) in enumerate(zip(stages, counts, strict=True)):
        if len(blocks) % count:
            divisors = [d for d in range(1, len(blocks) + 1) if len(blocks) % d == 0]
            raise UserError(
                f"{asker}={count} does not divide the {len(blocks)} blocks of stage {stage} of {model_name(model)}; "
                f"it can be one of {divisors} there"
            )
        paths = [block.path for block in blocks]
        groups += [tuple(paths[i : i + count]) for i in range(0, len(paths), count)]
    return groups


def input_size(model: nn.Module) -> tuple[int, int, int]:
    """(C, H, W) of the images the model takes at its present size; timm's configuration keeps the pretrained one."""
    channels, *size = resolve_model_data_config(model)["input_size"]
    now = getattr(getattr(model, "patch_embed", None), "img_size", None) or size
    height, width = (now, now) if isinstance(now, int) else now
    return getattr(model, "in_chans", channels), height, width


def timm_class(module: nn.Module) -> type:
    """The timm class that `module` is an instance of, looking through our own specialisations of it."""
    return next((c for c in type(module).__mro__ if c.__module__.startswith("timm.")), type(module))


def model_name(model: nn.Module) -> str:
    """The architecture's timm name if the model knows it, else its class."""
    config = getattr(model, "pretrained_cfg", None) or {}
    return config.get("architecture") or type(model).__name__


def family(model: nn.Module) -> str | None:
    """'vit', 'swin', 'convnext', or None for a model that no transform works on (it can still be a teacher)."""
    return _FAMILIES.get(timm_class(model))


def describe(model: nn.Module, families: Sequence[str] = TRANSFORMERS) -> Backbone:
    """Find the blocks of a timm model.

    Args:
        model: a timm model.
        families: what the asker works on, of `ALL_FAMILIES`.

    Raises:
        UserError: the model, its blocks or its attention are of a class that the asker does not know.
    """
    kind = family(model)
    supported = SUPPORTED + (SUPPORTED_BY_ADAPTERS if "convnext" in families else "")
    if kind is None or kind not in families:
        only = " with this transform" if kind else " yet"
        raise UserError(
            f"{model_name(model)} is a {type(model).__name__}, which compressvit cannot transform{only}; it works on {supported}"
        )
    found = {"vit": _vit_blocks, "swin": _swin_blocks, "convnext": _convnext_blocks}[kind]
    blocks = tuple(found(model))
    if not blocks:
        raise UserError(
            f"{model_name(model)} was built with no blocks, so there is nothing to compress; give it a depth of at least 1"
        )
    for info in blocks:
        block = model.get_submodule(info.path)
        known = [(block, info.path, _BLOCKS[kind])]
        if kind in _ATTENTION:
            known.append((block.attn, f"{info.path}.attn", _ATTENTION[kind]))
        for module, path, expected in known:
            if timm_class(module) is not expected:
                raise UserError(
                    f"{model_name(model)}: {path} is a {timm_class(module).__name__}, "
                    f"compressvit knows {expected.__name__} there; it works on {supported}"
                )
    return Backbone(kind, blocks, num_prefix_tokens=getattr(model, "num_prefix_tokens", 0))


def _convnext_blocks(model: nn.Module):
    index = 0
    height, width = input_size(model)[1:]
    features: Any = model.feature_info
    for stage, layer in enumerate(model.stages):
        reduction = features[stage]["reduction"]
        for i, block in enumerate(layer.blocks):
            yield BlockInfo(
                path=f"stages.{stage}.blocks.{i}",
                index=index,
                stage=stage,
                width=block.mlp.fc1.in_channels if block.use_conv_mlp else block.mlp.fc1.in_features,
                heads=0,
                resolution=(height // reduction, width // reduction),
                window=None,
                shift=(0, 0),
            )
            index += 1


def _vit_blocks(model: nn.Module):
    for i, block in enumerate(model.blocks):
        attention = getattr(block, "attn", None)
        if attention is None:
            raise UserError(
                f"{model_name(model)}: blocks.{i} is a {type(block).__name__} without an `attn`; compressvit works on {SUPPORTED}"
            )
        yield BlockInfo(
            path=f"blocks.{i}",
            index=i,
            stage=0,
            width=model.embed_dim,
            heads=getattr(attention, "num_heads", 0),
            resolution=tuple(model.patch_embed.grid_size),
            window=None,
            shift=(0, 0),
        )


def _swin_blocks(model: nn.Module):
    index = 0
    for stage, layer in enumerate(model.layers):
        for i, block in enumerate(layer.blocks):
            yield BlockInfo(
                path=f"layers.{stage}.blocks.{i}",
                index=index,
                stage=stage,
                width=block.dim,
                heads=block.attn.num_heads,
                resolution=tuple(block.input_resolution),
                window=tuple(block.window_size),
                shift=tuple(block.shift_size),
            )
            index += 1


def projection(model: nn.Module, path: str, asker: str) -> Any:
    """The layer at `path`, e.g. blocks.0.mlp.fc1.

    Raises:
        UserError: the sublayer has none of that name, as an MLP with gates (SwiGLU) has no one fc1.
    """
    parent, _, name = path.rpartition(".")
    sublayer = model.get_submodule(parent)
    if not hasattr(sublayer, name):
        have = [child for child, module in sublayer.named_children() if getattr(module, "weight", None) is not None]
        raise UserError(
            f"{asker}: {parent} of {model_name(model)} is a {timm_class(sublayer).__name__}, which has no {name} but {', '.join(have)}; "
            "adapters, adaptformer, ssf, lora on q and v, and repadapter with place=attention work on it"
        )
    return getattr(sublayer, name)


def head_paths(model: nn.Module) -> list[str]:
    """Paths of a timm model's classifier (both, where it has one for a distillation token); none where it has no parameters."""
    heads = model.get_classifier()
    heads = heads if isinstance(heads, tuple) else (heads,)
    paths = {id(m): p for p, m in model.named_modules()}
    return [paths[id(h)] for h in heads if id(h) in paths and any(True for _ in h.parameters())]


def head_names(model: nn.Module) -> set[str]:
    """Names of the parameters of a timm model's classifier."""
    inside = {p: model.get_submodule(p).named_parameters(remove_duplicate=False) for p in head_paths(model)}
    return {f"{path}.{name}" for path, parameters in inside.items() for name, _ in parameters}
