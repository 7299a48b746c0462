"""Where a model keeps its stages, blocks, attention and MLP.

A transform calls `describe(model)` and works with the `Backbone` that it returns; what differs between
families is in `compressvit.model.families`.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Literal

from torch import nn

from compressvit.errors import UserError
from compressvit.model.calls import layers_for
from compressvit.model.family import FAMILIES, NEEDS, BlockInfo, Family, Need
from compressvit.model.modules import as_timm

# Which blocks of a detector: those of its backbone, or the stages of its decoder. Other models have only a backbone.
Part = Literal["backbone", "decoder"]


@dataclass(frozen=True)
class Backbone:
    """What a transform needs to know about a model."""

    family: Family
    blocks: tuple[BlockInfo, ...]
    num_prefix_tokens: int  # class, distillation and register tokens, which are not on the token grid; of the features

    @property
    def parts(self) -> tuple[str, ...]:
        """Names of the sublayers of a block: 'attn' and 'mlp', or 'mlp' alone."""
        return ("attn", "mlp") if self.family.attention is not None else ("mlp",)

    def slotted_attention(self, attention: nn.Module) -> type[nn.Module]:
        """The family's attention with slots in place of this one; only after `describe` was called with this need."""
        known, slotted = _classes(self.family.attention), _classes(self.family.slotted_attention)
        return dict(zip(known, slotted, strict=True))[class_in_timm(attention, *known)]

    @property
    def slotted_block(self) -> type[nn.Module]:
        """The family's block with slots; only after `describe` was called with this need."""
        assert self.family.slotted_block is not None
        return self.family.slotted_block

    @property
    def stages(self) -> tuple[tuple[BlockInfo, ...], ...]:
        """The blocks grouped by stage, in order."""
        count = self.blocks[-1].stage + 1
        return tuple(tuple(b for b in self.blocks if b.stage == stage) for stage in range(count))


def share_groups(
    model: nn.Module, share: int | tuple[int, ...], asker: str, part: Part = "backbone"
) -> list[tuple[str, ...]]:
    """Paths of the blocks of each share group: `share` consecutive blocks of one stage.

    Args:
        model: a timm model.
        part: which blocks of a detector.
        share: blocks in a group, one number for every stage or one per stage; must divide the stage's depth.
        asker: the option's name in messages, e.g. 'multiplex.share'.

    Raises:
        UserError: a number does not divide its stage, or there are not as many numbers as stages.
    """
    stages = describe(model, "attention", asker=asker, part=part).stages
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
    from timm.data import resolve_model_data_config

    channels, *size = resolve_model_data_config(model)["input_size"]
    family = family_of(model)
    own = getattr(getattr(model, "patch_embed", None), "img_size", None) if family is None else family.image_size(model)
    now = own or size
    height, width = (now, now) if isinstance(now, int) else now
    return getattr(model, "in_chans", channels), height, width


def class_in_timm(module: nn.Module, *known: type) -> type:
    """The class that `module` has in timm, or the one of `known` that it is an instance of, whatever we specialised it to."""
    kinds = type(module).__mro__
    return next((kind for kind in kinds if kind in known or kind.__module__.startswith("timm.")), type(module))


def model_name(model: nn.Module) -> str:
    """The architecture's timm name if the model knows it, else its class."""
    config = getattr(model, "pretrained_cfg", None) or {}
    return config.get("architecture") or type(model).__name__


def family_of(model: nn.Module) -> Family | None:
    """The family of a model; None where no transform works on it (it can still be a teacher)."""
    known = {kind: family for family in FAMILIES.values() for kind in family.models}
    return known.get(class_in_timm(model, *known))


def prefix_tokens(model: nn.Module) -> int:
    """How many tokens before those of the patches the blocks of a model have; of one that is in no family as many as its features."""
    family = family_of(model)
    found: int = getattr(model, "num_prefix_tokens", 0) if family is None else family.prefix_tokens(model)
    return found


def prefix_in(model: nn.Module, path: str) -> int:
    """The same of the block at `path`, or of what is in it: a model may have them in its last stage alone."""
    family = family_of(model)
    return prefix_tokens(model) if family is None else family.prefix_in(model, path)


def body_of(model: nn.Module) -> nn.Module | None:
    """The backbone of a detector or segmenter; None of any other model."""
    family = family_of(model)
    return None if family is None or family.body is None else model.get_submodule(family.body)


def supported(*needs: Need) -> str:
    """The models that compressvit works on, for messages; with `needs`, those of the families that meet them."""
    families = [
        family
        for family in FAMILIES.values()
        if family.named_layers and family.body is None and not any(map(family.lacks, needs))
    ]
    with_attention = [text for family in families if family.attention is not None for text in family.supports]
    others = [text for family in families if family.attention is None for text in family.supports]
    if needs:
        return f"timm's {_and(with_attention + others)}, at any size"
    return f"timm's {_and(with_attention)}, at any size; methods that need no attention also on {_and(others)}"


def _and(words: list[str]) -> str:
    return " and ".join([", ".join(words[:-1]), words[-1]] if len(words) > 1 else words)


def describe(
    model: nn.Module, *needs: Need, asker: str = "this", instead: str = "", part: Part = "backbone"
) -> Backbone:
    """Find the blocks of a model.

    Args:
        model: a model of one of the families.
        needs: what the caller requires; a family that lacks one is refused.
        asker: what messages call the caller, e.g. 'multiplex'.
        instead: what a refused user can do, where that is better than to know which models it works on.
        part: which blocks of a detector; paths are from the detector.

    Raises:
        UserError: the family is not known or lacks what is needed, or a block or its attention is of a class that is not known.
    """
    family = family_of(model) or FAMILIES["generic"]
    of_itself = next((lack for lack in map(family.lacks, needs) if lack is not None), None)
    if family.body is not None and part == "backbone" and "decoder" not in needs and of_itself is None:
        body = model.get_submodule(family.body)
        if family_of(body) is None:
            raise UserError(
                f"{asker}: the backbone {model_name(body)} is of no family that compressvit knows, which it can change alone, but not in a "
                f"detector; there it works on {supported(*needs)}"
            )
        return _inside(family.body, describe(body, *needs, asker=asker, instead=instead))
    if of_itself is not None:
        needed, lack = NEEDS[of_itself]
        raise UserError(
            f"{asker} needs {needed}, and {model_name(model)} is a {family.title_of(model)}, {lack}; "
            + ((instead if of_itself != "blocks" else "") or f"it works on {supported(*needs)}")
        )
    if family.body is None and part != "backbone":
        raise UserError(f"{asker}: {model_name(model)} is no detector, so it has no {part}; leave `of` out")
    blocks = tuple(
        replace(
            info,
            projections=layers_for(model.get_submodule(info.path), "attn.qkv"),
            prefix_tokens=family.prefix_in(model, info.path),
        )
        for info in family.blocks(model)
    )
    if not blocks:
        raise UserError(
            f"{model_name(model)} was built with no blocks, so there is nothing to compress; give it a depth of at least 1"
        )
    stranger = _strange_part(model, family, blocks) if family.named_layers else None
    if stranger is not None:
        if any(map(FAMILIES["generic"].lacks, needs)):
            raise UserError(f"{stranger}; {asker} works on {supported(*needs)}")
        family, blocks = FAMILIES["generic"], tuple(FAMILIES["generic"].blocks(model))
    return Backbone(family, blocks, num_prefix_tokens=family.prefix_tokens(model))


def _strange_part(model: nn.Module, family: Family, blocks: Sequence[BlockInfo]) -> str | None:
    """Of a model that was built with something in place of its family's blocks or attention, which that is."""
    for info in blocks:
        if family.attention is not None and getattr(model.get_submodule(info.path), "attn", None) is None:
            return f"{model_name(model)}: {info.path} is a {type(model.get_submodule(info.path)).__name__} without an `attn`"
        for module, path, expected in _parts(model, family, info.path):
            found = class_in_timm(module, *expected)
            if found not in expected:
                known = " or ".join(kind.__name__ for kind in expected)
                return f"{model_name(model)}: {path} is a {found.__name__}, compressvit knows {known} there"
    return None


def changed_in_place(model: nn.Module) -> frozenset[str]:
    """Paths of linear layers whose outputs something changes in place, as far as that can be known."""
    try:
        return describe(model).family.changed_in(model, "")
    except UserError:  # no images can be sent through it without values
        return frozenset()


def _inside(path: str, found: Backbone) -> Backbone:
    """The blocks of the model at `path` within another, by their paths from that one."""
    blocks = tuple(
        replace(info, path=f"{path}.{info.path}", stage_path=info.stage_path and f"{path}.{info.stage_path}")
        for info in found.blocks
    )
    return replace(found, blocks=blocks)


def _classes(kinds: type[nn.Module] | tuple[type[nn.Module], ...] | None) -> tuple[type[nn.Module], ...]:
    return kinds if isinstance(kinds, tuple) else () if kinds is None else (kinds,)


def _parts(model: nn.Module, family: Family, path: str) -> Iterator[tuple[nn.Module, str, tuple[type, ...]]]:
    """A block and its attention, each with its path and the classes that the family has there."""
    yield model.get_submodule(path), path, (family.block,)
    if family.attention is not None:
        yield model.get_submodule(f"{path}.attn"), f"{path}.attn", _classes(family.attention)


def projection(model: nn.Module, path: str, asker: str) -> nn.Module:
    """The layer at `path`, e.g. blocks.0.mlp.fc1.

    Raises:
        UserError: the sublayer has none of that name.
    """
    parent, _, name = path.rpartition(".")
    sublayer = model.get_submodule(parent)
    if getattr(sublayer, name, None) is None:
        have = [child for child, module in sublayer.named_children() if getattr(module, "weight", None) is not None]
        raise UserError(
            f"{asker}: {parent} of {model_name(model)} is a {class_in_timm(sublayer).__name__}, which has no {name} but {', '.join(have)}; "
            "adapters, adaptformer, ssf, lora on q and v, and repadapter with place=attention work on it"
        )
    return model.get_submodule(path)


def head_paths(model: nn.Module) -> list[str]:
    """Paths of a timm model's classifier (both, where it has one for a distillation token); none where it has no parameters, or where
    the model, an encoder alone, knows of none."""
    if not hasattr(model, "get_classifier"):
        return []
    heads = as_timm(model).get_classifier()
    heads = heads if isinstance(heads, tuple) else (heads,)
    paths = {id(m): p for p, m in model.named_modules()}
    return [paths[id(h)] for h in heads if id(h) in paths and any(True for _ in h.parameters())]


def head_names(model: nn.Module) -> set[str]:
    """Names of the parameters of a timm model's classifier."""
    inside = {p: model.get_submodule(p).named_parameters(remove_duplicate=False) for p in head_paths(model)}
    return {f"{path}.{name}" for path, parameters in inside.items() for name, _ in parameters}
