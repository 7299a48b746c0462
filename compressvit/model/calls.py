"""Layers that timm reads without calling them, and layers that it has several of where other blocks have one.

timm's attention of EVA, BEiT and Swin v2 has no bias for its keys. It gives the other two to `F.linear` with the weight of a `qkv` that it
never calls, so that neither a hook there nor another class of the layer does anything; unless its `qkv_bias_separate` is set: then it calls
the layer and adds the biases in place.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from torch import nn

_SWITCH = "qkv_bias_separate"

# Within a block: a layer as transforms know it, and the layers that some blocks have in its place, in the order of its outputs.
PARTS = {
    "attn.qkv": (
        ("attn.q_proj", "attn.k_proj", "attn.v_proj"),
        ("attn.proj_q", "attn.proj_k", "attn.proj_v"),
    ),  # the latter of CvT
    "mlp.fc1": (("mlp.fc1_g", "mlp.fc1_x"),),  # of timm's SwiGLU
}


def layers_for(block: nn.Module, name: str) -> tuple[str, ...]:
    """The layers of a block that do what `name` does in others: itself, or where it is split the parts that it has there.

    Args:
        name: within the block, e.g. attn.qkv. One that the block has neither whole nor in parts is returned as it is.
    """
    part, _, last = name.partition(".")
    sublayer = getattr(block, part, None)
    return (name,) if sublayer is None else tuple(f"{part}.{own}" for own in layers_within(sublayer, part, last))


def layers_within(sublayer: nn.Module, part: str, name: str) -> tuple[str, ...]:
    """The same within a sublayer that is called `part` in its block, e.g. attn and qkv."""
    if getattr(sublayer, name, None) is not None:
        return (name,)
    for known in PARTS.get(f"{part}.{name}", ()):
        parts = tuple(own.partition(".")[2] for own in known)
        if all(getattr(sublayer, own, None) is not None for own in parts):
            return parts
    return (name,)


def whole_layer(name: str) -> str:
    """The name, within a block, that transforms know a layer by: of a part that of the whole."""
    return next((whole for whole, known in PARTS.items() if any(name in parts for parts in known)), name)


def be_called(model: nn.Module, path: str) -> None:
    """Have the layer at `path` called from now on."""
    owner = model.get_submodule(path.rpartition(".")[0])
    if getattr(owner, _SWITCH, True) is False:
        setattr(owner, _SWITCH, True)


def adds_in_place(model: nn.Module, path: str) -> bool:
    """Whether biases are added in place to what the layer at `path` returns."""
    owner, _, name = path.rpartition(".")
    return name == "qkv" and bool(getattr(model.get_submodule(owner), _SWITCH, False))


@contextmanager
def called(*models: nn.Module) -> Iterator[None]:
    """Within, every layer of these models is called, so that it can be hooked."""
    changed = [module for model in models for module in model.modules() if getattr(module, _SWITCH, True) is False]
    for module in changed:
        setattr(module, _SWITCH, True)
    try:
        yield
    finally:
        for module in changed:
            setattr(module, _SWITCH, False)
