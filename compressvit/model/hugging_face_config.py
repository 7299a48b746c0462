"""Folders of models of Hugging Face's transformers as timm has them: `config.json`, `preprocessor_config.json`."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from compressvit.errors import UserError
from compressvit.model import hugging_face_cvt
from compressvit.model.names import is_model

_SIZES = {
    (192, 12, 3): "tiny",
    (384, 12, 6): "small",
    (768, 12, 12): "base",
    (1024, 24, 16): "large",
    (1280, 32, 16): "huge",
}
_SIZES |= {(1536, 40, 24): "giant"}
_SWINS = {
    (96, (2, 2, 6, 2)): "tiny",
    (96, (2, 2, 18, 2)): "small",
    (128, (2, 2, 18, 2)): "base",
    (192, (2, 2, 18, 2)): "large",
}
_DINOV3 = {  # by width, depth, heads, and whether the MLPs have gates
    (384, 12, 6, False): "small",
    (384, 12, 6, True): "small_plus",
    (768, 12, 12, False): "base",
    (1024, 24, 16, False): "large",
    (1280, 32, 20, True): "huge_plus",
    (4096, 40, 32, True): "7b",
}
# By transformers' `model_type`: timm's names with a size, and one whose arguments say the size where timm has no name for it.
_NAMES = {
    "vit": ("vit_{size}_patch{patch}_{image}", "vit_{size}_patch{patch}_224", "vit_base_patch16_224"),
    "deit": ("deit_{size}_distilled_patch{patch}_{image}", "deit_base_distilled_patch16_224"),
    "dinov2": ("vit_{size}_patch{patch}_dinov2", "vit_base_patch14_dinov2"),
    "dinov2_with_registers": ("vit_{size}_patch{patch}_reg4_dinov2", "vit_base_patch14_reg4_dinov2"),
    "clip_vision_model": ("vit_{size}_patch{patch}_clip_{act}{image}", "vit_base_patch16_clip_{act}224"),
    "siglip_vision_model": ("vit_{size}_patch{patch}_siglip_{image}", "vit_base_patch16_siglip_224"),
    "dinov3_vit": ("vit_{size}_patch{patch}_dinov3{bias}", "vit_small{plus}_patch16_dinov3{bias}"),
    "swin": ("swin_{size}_patch{patch}_window{window}_{image}", "swin_tiny_patch4_window7_224"),
}
KINDS = (*_NAMES, hugging_face_cvt.KIND)
_TOWERS = {"clip": "clip_vision_model", "siglip": "siglip_vision_model"}  # of models of images and texts
# What a config.json leaves out.
_VIT: dict[str, Any] = {
    "hidden_size": 768,
    "num_hidden_layers": 12,
    "num_attention_heads": 12,
    "image_size": 224,
    "patch_size": 16,
}
_VIT |= {"mlp_ratio": 4, "hidden_act": "gelu", "num_channels": 3, "projection_dim": 512}
_DEFAULTS: dict[str, dict[str, Any]] = {"clip_vision_model": {**_VIT, "patch_size": 32, "hidden_act": "quick_gelu"}}
_DEFAULTS["siglip_vision_model"] = {**_VIT, "hidden_act": "gelu_pytorch_tanh"}
_DEFAULTS["dinov2"] = {**_VIT, "patch_size": 14}
_DEFAULTS["dinov3_vit"] = {
    "hidden_size": 384,
    "num_hidden_layers": 12,
    "num_attention_heads": 6,
    "intermediate_size": 1536,
    "image_size": 224,
    "patch_size": 16,
    "hidden_act": "gelu",
    "num_channels": 3,
    "num_register_tokens": 0,
    "rope_theta": 100.0,
    "use_gated_mlp": False,
    "query_bias": True,
    "key_bias": False,
    "value_bias": True,
    "proj_bias": True,
    "mlp_bias": True,
}
_DEFAULTS["swin"] = {
    "embed_dim": 96,
    "depths": [2, 2, 6, 2],
    "num_heads": [3, 6, 12, 24],
    "window_size": 7,
    "image_size": 224,
}
_DEFAULTS["swin"] |= {"patch_size": 4, "mlp_ratio": 4, "hidden_act": "gelu", "num_channels": 3}
_ACTIVATIONS = {
    "gelu": None,
    "quick_gelu": "quick_gelu",
    "gelu_pytorch_tanh": "gelu_tanh",
}  # in timm's words; None is its default
_CLASSES = re.compile(r"\w+ForImageClassification(WithTeacher)?")
_WARPED = 384  # images of this side and more are not cropped, where a share of them would be
_PILLOW = {0: "nearest", 1: "lanczos", 2: "bilinear", 3: "bicubic"}


def timms_model(config: Mapping[str, Any]) -> tuple[str, dict[str, Any]] | None:
    """timm's name and arguments of the model that a `config.json` of transformers describes; None of another kind of model.

    Raises:
        UserError: it has something that timm's model has not.
    """
    kind, tower = str(config.get("model_type")), config
    if kind in _TOWERS:
        kind, inner = _TOWERS[kind], config.get("vision_config")
        tower = inner if isinstance(inner, dict) else {}
    if kind == hugging_face_cvt.KIND:
        name, args = hugging_face_cvt.arguments_of(config)
        return name, {**args, "num_classes": _number_of_classes(config, kind)}
    if kind not in _NAMES:
        return None
    tower = {**_DEFAULTS.get(kind, _VIT), **tower}
    _require_types(tower, _DEFAULTS.get(kind, _VIT))
    activation = _activation(tower, kind)
    words = {name: tower.get(f"{name}_size") for name in ("patch", "image", "window")}
    words |= {"size": _size(tower, kind), "act": "quickgelu_" * (tower["hidden_act"] == "quick_gelu")}
    words |= {"bias": "_qkvb" * bool(tower.get("query_bias")), "plus": "_plus" * bool(tower.get("use_gated_mlp"))}
    *named, other = _NAMES[kind]
    known = next((name for name in (form.format(**words) for form in named) if is_model(name)), None)
    args = {"img_size": tower["image_size"], "num_classes": _number_of_classes({**tower, **config}, kind)}
    if tower["num_channels"] != 3:
        args["in_chans"] = tower["num_channels"]
    if activation is not None:
        args["act_layer"] = activation
    if kind == "dinov3_vit":
        args |= _of_dinov3(tower)
    return (known, args) if known else (other.format(**words), args | _sizes(tower, kind))


def _require_types(tower: Mapping[str, Any], defaults: Mapping[str, Any]) -> None:
    for name, usual in defaults.items():
        value = tower[name]
        if isinstance(usual, list):
            fits = isinstance(value, list) and all(type(one) is int for one in value)
        else:
            fits = type(value) in ((int, float) if type(usual) is float or name == "mlp_ratio" else (type(usual),))
        if not fits:
            raise UserError(f"{name} is {value!r}, where transformers has e.g. {usual!r}")


def _size(tower: Mapping[str, Any], kind: str) -> str | None:
    if kind == "swin":
        return _SWINS.get((tower["embed_dim"], tuple(tower["depths"])))
    sizes = (tower["hidden_size"], tower["num_hidden_layers"], tower["num_attention_heads"])
    return _DINOV3.get((*sizes, tower["use_gated_mlp"])) if kind == "dinov3_vit" else _SIZES.get(sizes)


def _of_dinov3(tower: Mapping[str, Any]) -> dict[str, Any]:
    """What timm's DINOv3 needs to compute what transformers' does; its names have 4 registers.

    Raises:
        UserError: other layers have biases than in timm's.
    """
    biases = {name: tower[f"{name}_bias"] for name in ("query", "key", "value", "proj", "mlp")}
    if biases["key"] or biases["query"] != biases["value"] or not (biases["proj"] and biases["mlp"]):
        had = ", ".join(name for name, has in biases.items() if has)
        raise UserError(
            f"it is a DINOv3 with biases at {had} alone, where timm's has them at all but keys, or not at queries and values"
        )
    found: dict[str, Any] = {"global_pool": "token"}
    if tower["num_register_tokens"] != 4:
        found["num_reg_tokens"] = tower["num_register_tokens"]
    if tower["rope_theta"] != 100:
        found["rope_temperature"] = tower["rope_theta"]
    return found


def _activation(tower: Mapping[str, Any], kind: str) -> str | None:
    """timm's name of an activation function that its model of this name does not have."""
    word = tower["hidden_act"]
    if tower.get("use_gated_mlp"):
        if word == "silu":
            return None
        raise UserError(f"its MLPs have gates of {word!r}, and those of timm's model of silu")
    if kind == "clip_vision_model" and word == "quick_gelu":
        return None  # the name says it
    if word not in _ACTIVATIONS:
        raise UserError(
            f"hidden_act is {word!r}, and of transformers' models those with {', '.join(_ACTIVATIONS)} are known"
        )
    return _ACTIVATIONS[word]


def _sizes(tower: Mapping[str, Any], kind: str) -> dict[str, Any]:
    """Arguments of a model of a size that timm has no name for."""
    if tower.get("use_swiglu_ffn"):
        raise UserError("it is a DINOv2 with SwiGLU of another size than ViT-g, which timm has no name for")
    if kind == "swin":
        same = {name: tower[name] for name in ("embed_dim", "window_size", "patch_size", "mlp_ratio")}
        return {**same, "depths": tuple(tower["depths"]), "num_heads": tuple(tower["num_heads"])}
    inner = tower.get("intermediate_size")
    ratio = inner / tower["hidden_size"] if type(inner) is int and tower["hidden_size"] else tower["mlp_ratio"]
    return {
        "patch_size": tower["patch_size"],
        "embed_dim": tower["hidden_size"],
        "depth": tower["num_hidden_layers"],
        "num_heads": tower["num_attention_heads"],
        "mlp_ratio": ratio,
    }


def _number_of_classes(config: Mapping[str, Any], kind: str) -> int:
    """Outputs of the model after its pooling: classes, or the dimensions that CLIP compares with texts; 0 without."""
    given = config.get("architectures")
    architecture = str(given[0]) if isinstance(given, list) and given else ""
    if kind == "clip_vision_model":
        return config["projection_dim"] if architecture in ("CLIPModel", "CLIPVisionModelWithProjection") else 0
    if not _CLASSES.fullmatch(architecture) or kind in (
        "dinov2",
        "dinov2_with_registers",
        "dinov3_vit",
    ):  # see _refuse_wide_classifier
        return 0
    labels = config.get("id2label")
    return len(labels) if isinstance(labels, dict) and labels else 2  # as transformers leaves it out


def label_names(config: Mapping[str, Any]) -> list[str] | None:
    """Names of the classes, in the order of the outputs; None where there are none but numbers."""
    labels = config.get("id2label")
    if not isinstance(labels, dict) or not all(str(i) in labels for i in range(len(labels))):
        return None
    names = [str(labels[str(i)]) for i in range(len(labels))]
    return None if all(name == f"LABEL_{i}" for i, name in enumerate(names)) else names


def input_of(config: Mapping[str, Any]) -> dict[str, Any]:
    """What images must look like after a `preprocessor_config.json`, as far as it says: mean, std, interpolation, crop_pct, crop_mode."""
    found: dict[str, Any] = {}
    for name, none in (("mean", 0.0), ("std", 1.0)):
        if config.get("do_normalize") is False:
            found[name] = [none] * 3
        elif isinstance(value := config.get(f"image_{name}"), list) and all(type(one) in (int, float) for one in value):
            found[name] = value
    resample = config.get("resample")
    if type(resample) is int and resample in _PILLOW:
        found["interpolation"] = _PILLOW[resample]
    size, crop = (_edge(config.get(name)) for name in ("size", "crop_size"))
    if size and type(share := config.get("crop_pct")) is float and 0 < share <= 1:  # of ConvNeXt, which CvT has, too
        found |= {"crop_pct": share} if size < _WARPED else {"crop_pct": 1.0, "crop_mode": "squash"}
    elif config.get("do_center_crop") and size and crop:
        found["crop_pct"] = min(crop / size, 1.0)
    elif size and not config.get("do_center_crop", False):
        found |= {"crop_pct": 1.0, "crop_mode": "squash"}
    return found


def image_size(config: Mapping[str, Any]) -> int | None:
    """The side of the images after a `preprocessor_config.json`, as far as it says."""
    return _edge(config.get("crop_size")) or _edge(config.get("size"))


def _edge(size: Any) -> int | None:
    """The shorter edge of a size, as transformers of any version writes it."""
    if isinstance(size, dict):
        size = size.get("shortest_edge", size.get("height"))
    return size if isinstance(size, int) and size > 0 else None
