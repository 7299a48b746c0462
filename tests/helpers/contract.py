"""Every registered transform on every backbone: the cases of the contract tests (`test_transforms*.py`).

A new transform needs an entry in `EXAMPLES` and nothing else to be held to all of them.
"""

from __future__ import annotations

import functools

import pytest
import torch
from torch import Tensor, nn

from compressvit.model import ties
from compressvit.transforms import (
    IRPE,
    LORS,
    PHM,
    SSF,
    TRANSFORMS,
    VPT,
    Adapters,
    AdaptFormer,
    Align,
    BitFit,
    Compacter,
    FacT,
    Freeze,
    HeadNorm,
    LoadWeights,
    LoRA,
    LowRank,
    Multiplex,
    RepAdapter,
    Transform,
)
from helpers.models import BACKBONES, build

ARTIFACT = "an artifact that fits, made by the test"

# Every registered transform, at settings that between them use everything it has.
EXAMPLES: dict[str, list[Transform]] = {
    "multiplex": [
        Multiplex(share=2, mixing_bias=True, mlp_conv=3),
        Multiplex(share=2, mlp_conv=3, form="reference", init="first"),
        Multiplex(share=1, head_mixing=False, mlp_conv=5),
    ],
    "irpe": [IRPE()],
    "align": [Align(share=2), Align(share=2, heads=False, rounds=1)],
    "lors": [
        LORS(rank=2, share=2, metric="weights"),
        LORS(rank=3, terms=2, share=2, targets=("mlp.*",), init="first", metric="weights"),
        LORS(rank=2, targets=("attn.qkv", "attn.proj"), init="scratch"),
    ],
    "low_rank": [
        LowRank(rank=2, metric="weights"),
        LowRank(rank=3, targets=("mlp.*",), init="scratch"),
    ],
    "load_weights": [LoadWeights(artifact=ARTIFACT)],
    "adapters": [Adapters(ratio=0.25), Adapters(width=3, places=("mlp",), bias=True, act="relu")],
    "phm": [PHM(n=2, ratio=0.25)],
    "compacter": [Compacter(n=2, ratio=0.25)],
    "adaptformer": [AdaptFormer(width=4), AdaptFormer(width=3, scale="learnable", input="residual")],
    "repadapter": [RepAdapter(width=4, scale=0.5)],
    "lora": [LoRA(rank=2, targets=("v", "fc1", "fc2")), LoRA(rank=2, alpha=1.0, targets=("fc1",))],
    "ssf": [SSF()],
    "fact": [FacT(rank=3), FacT(rank=2, form="tt", scale=0.5)],
    "freeze": [Freeze(train="mlp")],
    "bitfit": [BitFit()],
    "head_norm": [HeadNorm()],
    "vpt": [VPT(prompts=3), VPT(prompts=2, dropout=0.1)],
}

# Where a transform is tried: adapters on one model of every family, the others on every variant of the transformers.
ADAPTERS = tuple(name for name, spec in TRANSFORMS.items() if spec.freezes)
ADAPTED_BACKBONES = ("vit", "dinov2_registers", "swin", "convnext", "convnext_conv_mlp", "clip")


def backbones_of(name: str, example: int = 0) -> tuple[str, ...]:
    """The backbones that an example of a transform is tested on: further ones of adapters on fewer."""
    if name not in ADAPTERS:
        return tuple(BACKBONES)
    return ADAPTED_BACKBONES if example == 0 else ("vit", "swin")


# What a transform does not do, and the words that say so. Everything else must work.
_NO_SEQUENCE = "prompts need a token sequence that attention runs over"
_NO_CONVNEXT = "is a ConvNeXt, which compressvit cannot transform with this transform; it works on"
REFUSED = {
    ("irpe", "swin"): "is a Swin, which has a relative position table already",
    ("multiplex", "convnext"): _NO_CONVNEXT,
    ("irpe", "convnext"): _NO_CONVNEXT,
    ("align", "convnext"): _NO_CONVNEXT,
    ("lors", "convnext"): _NO_CONVNEXT,
    ("low_rank", "convnext"): _NO_CONVNEXT,
    ("fact", "convnext"): _NO_CONVNEXT,
    ("fact", "convnext_conv_mlp"): _NO_CONVNEXT,
    ("vpt", "convnext"): _NO_SEQUENCE,
    ("vpt", "convnext_conv_mlp"): _NO_SEQUENCE,
}

# Parameters that cannot have a gradient when training starts, by the end of their names, and why.
BLIND_AT_START = {
    "mlp_conv.norm.weight": "the convolution behind it starts at zero",
    "mlp_conv.norm.bias": "the convolution behind it starts at zero",
    "low_rank.down": "where the shared weight is exact, or noise, the factor behind it starts at zero",
    "down.weight": "the upper projection of an adapter starts at zero",
    "down.bias": "the upper projection of an adapter starts at zero",
    "down.rule": "the upper projection of an adapter starts at zero",
    "up.rule": "the factors it multiplies start at zero",
    "down.left": "the upper projection of an adapter starts at zero",
    "down.right": "the upper projection of an adapter starts at zero",
    "up.right": "the factor behind it starts at zero",
    "adaptformer.scale": "what it scales starts at zero",
    "lora.down": "the factor behind it starts at zero",
    "fact.u": "V starts at zero",
    "fact.core": "V starts at zero",
    "fact.mix": "V starts at zero",
    "fact.sigma": "V starts at zero",
}
BLIND_FOREVER = {"logit_mix.bias": "the softmax does not see a constant added to a row"}

CASES = [
    pytest.param(spec, backbone, id=f"{name}{index}-{backbone}")
    for name, specs in EXAMPLES.items()
    for index, spec in enumerate(specs)
    for backbone in backbones_of(name, index)
    if (name, backbone) not in REFUSED
]
every_case = pytest.mark.parametrize(("spec", "backbone"), CASES)
# For what depends on the layers and not on their settings: the first example of each is enough.
_FEW = ("vit", "swin", "convnext")  # and adapters, which act at a few places, on fewer backbones
every_transform = pytest.mark.parametrize(
    ("spec", "backbone"),
    [c for c in CASES if "0-" in c.id and (c.values[0].name not in ADAPTERS or c.values[1] in _FEW)],
)


@functools.cache
def teacher(backbone: str) -> nn.Module:
    """Not to be changed: `test_compress_leaves_the_teacher_alone` and its like say who did."""
    return build(backbone)


def structure(model: nn.Module) -> dict[str, object]:
    """Everything about a model but its values."""
    return {
        "modules": [(path, type(module)) for path, module in model.named_modules()],
        "tensors": {name: (tuple(t.shape), t.dtype) for name, t in model.state_dict().items()},
        "ties": ties.tied_groups(model),
    }


def values(model: nn.Module) -> dict[str, Tensor]:
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


def same_values(a: dict[str, Tensor], b: dict[str, Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)
