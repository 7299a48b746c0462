"""CvT of Hugging Face's transformers: its tensors under the names of the released code, and its `config.json` as arguments.

transformers computes GELU in the MLPs where the code that trained Microsoft's weights has QuickGELU. A folder is built as transformers
computes it; `act_layer: quick_gelu` among the arguments is what those weights were trained with.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping
from typing import Any

from compressvit.errors import UserError

KIND = "cvt"  # transformers' `model_type`

_MARK = re.compile(r"(?:\w+\.)*?encoder\.stages\.\d+\.embedding\.convolution_embeddings\.projection\.weight")
_STAGE = re.compile(r"(?:\w+\.)*?encoder\.stages\.(\d+)\.(.+)")
_IN_STAGE = {
    r"cls_token": "cls_token",
    r"embedding\.convolution_embeddings\.projection\.(\w+)": r"patch_embed.proj.\1",
    r"embedding\.convolution_embeddings\.normalization\.(\w+)": r"patch_embed.norm.\1",
    r"layers\.(\d+)\.attention\.attention\.convolution_projection_([qkv])\w+\.convolution_projection\.convolution\.(\w+)": (
        r"blocks.\1.attn.conv_proj_\2.conv.\3"
    ),
    r"layers\.(\d+)\.attention\.attention\.convolution_projection_([qkv])\w+\.convolution_projection\.normalization\.(\w+)": (
        r"blocks.\1.attn.conv_proj_\2.bn.\3"
    ),
    r"layers\.(\d+)\.attention\.attention\.projection_([qkv])\w+\.(\w+)": r"blocks.\1.attn.proj_\2.\3",
    r"layers\.(\d+)\.attention\.output\.dense\.(\w+)": r"blocks.\1.attn.proj.\2",
    r"layers\.(\d+)\.intermediate\.dense\.(\w+)": r"blocks.\1.mlp.fc1.\2",
    r"layers\.(\d+)\.output\.dense\.(\w+)": r"blocks.\1.mlp.fc2.\2",
    r"layers\.(\d+)\.layernorm_before\.(\w+)": r"blocks.\1.norm1.\2",
    r"layers\.(\d+)\.layernorm_after\.(\w+)": r"blocks.\1.norm2.\2",
}
_AFTER = {r"layernorm\.(\w+)": r"norm.\1", r"classifier\.(\w+)": r"head.\1"}
_NAMES: dict[Any, str] = {  # by depths, widths and heads
    ((1, 2, 10), (64, 192, 384), (1, 3, 6)): "cvt_13",
    ((1, 4, 16), (64, 192, 384), (1, 3, 6)): "cvt_21",
    ((2, 2, 20), (192, 768, 1024), (3, 12, 16)): "cvt_w24",
}
# What a config.json leaves out, by the name of the argument here.
_SIZES: dict[str, tuple[str, list[Any]]] = {
    "depths": ("depth", [1, 2, 10]),
    "embed_dims": ("embed_dim", [64, 192, 384]),
    "num_heads": ("num_heads", [1, 3, 6]),
    "mlp_ratio": ("mlp_ratio", [4.0, 4.0, 4.0]),
    "qkv_bias": ("qkv_bias", [True, True, True]),
    "patch_sizes": ("patch_sizes", [7, 3, 3]),
    "patch_strides": ("patch_stride", [4, 2, 2]),
    "patch_paddings": ("patch_padding", [2, 1, 1]),
    "kv_strides": ("stride_kv", [2, 2, 2]),
}
_ALONE = {  # the only values, of every stage, that the model has here
    "qkv_projection_method": "dw_bn",
    "kernel_qkv": 3,
    "padding_q": 1,
    "padding_kv": 1,
    "stride_q": 1,
}


def is_cvt(names: Collection[str]) -> bool:
    """Whether tensors have the names of transformers' CvT."""
    return any(_MARK.fullmatch(name) for name in names)


def name_in_cvt(name: str) -> str | None:
    """The released code's name of a tensor of transformers'; None where it has none."""
    stage = _STAGE.fullmatch(name)
    inner, patterns, start = (stage[2], _IN_STAGE, f"stage{stage[1]}.") if stage else (name, _AFTER, "")
    for pattern, new in patterns.items():
        if match := re.fullmatch(pattern, inner):
            return start + match.expand(new)
    return None


def arguments_of(config: Mapping[str, Any]) -> tuple[str, dict[str, Any]]:
    """Name and arguments of the model that a `config.json` describes, without its number of classes.

    Raises:
        UserError: it has something that the model has not here.
    """
    args: dict[str, Any] = {"act_layer": "gelu"}
    for own, (theirs, usual) in _SIZES.items():
        value = config.get(theirs, usual)
        kinds = (int, float) if own == "mlp_ratio" else (type(usual[0]),)
        if not isinstance(value, list) or not value or not all(type(one) in kinds for one in value):
            raise UserError(f"{theirs} is {value!r}, where transformers has e.g. {usual!r}")
        if value != usual:
            args[own] = tuple(value)
    for theirs, only in _ALONE.items():
        if any(one != only for one in _listed(config.get(theirs, [only]))):
            raise UserError(f"{theirs} is {config[theirs]!r}, and only a CvT with {only!r} in every stage is known")
    tokens = _listed(config.get("cls_token", [True]))
    if any(tokens[:-1]):
        raise UserError(f"cls_token is {tokens!r}, and only the last stage of a CvT that is known has a class token")
    if not tokens[-1]:
        args["class_token"] = False
    if config.get("num_channels", 3) != 3:
        args["in_chans"] = config["num_channels"]
    shape = tuple(tuple(args.get(name, _SIZES[name][1])) for name in ("depths", "embed_dims", "num_heads"))
    if known := _NAMES.get(shape):
        return known, {name: value for name, value in args.items() if name not in ("depths", "embed_dims", "num_heads")}
    return "cvt_13", args


def _listed(value: Any) -> list[Any]:
    return list(value) if isinstance(value, (list, tuple)) and value else [value]
