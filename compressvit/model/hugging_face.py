"""Models of Hugging Face's transformers as timm has them: their folders, and their tensors under timm's names.

ViT, DeiT, DINOv2 (also with registers), Swin v1, and the image towers of CLIP and SigLIP. Nothing of transformers is imported: a folder is
read as `config.json`, `preprocessor_config.json` and a file of tensors, and a file of tensors is known by its names.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping
from typing import Any

import torch

from compressvit.errors import UserError
from compressvit.model.detectors import is_model
from compressvit.notes import Note

# ------------------------------------------------------------------------------------------------------------- tensors

_MARK = re.compile(r"((?:\w+\.)*?)embeddings\.patch_embedding(?:s\.projection)?\.weight")
_PARTS = {  # outside of the blocks, and of a block after its number
    r"embeddings\.(?:cls_token|class_embedding)": "cls_token",
    r"embeddings\.distillation_token": "dist_token",
    r"embeddings\.register_tokens": "reg_token",
    r"embeddings\.position_embedding(?:s|\.weight)": "pos_embed",
    r"embeddings\.patch_embedding(?:s\.projection)?\.(\w+)": r"patch_embed.proj.\1",
    r"embeddings\.norm\.(\w+)": r"patch_embed.norm.\1",
    r"pre_layrnorm\.(\w+)": r"norm_pre.\1",  # sic
    r"(?:post_)?layernorm\.(\w+)": r"norm.\1",
    r"head\.probe": "attn_pool.latent",
    r"head\.attention\.out_proj\.(\w+)": r"attn_pool.proj.\1",
    r"head\.layernorm\.(\w+)": r"attn_pool.norm.\1",
    r"head\.mlp\.(fc[12]\.\w+)": r"attn_pool.mlp.\1",
}
_IN_BLOCK = {
    r"attention\.output\.dense\.(\w+)|attention\.o_proj\.(\w+)|self_attn\.out_proj\.(\w+)": "attn.proj.",
    r"(?:layernorm_before|layer_norm1|norm1)\.(\w+)": "norm1.",
    r"(?:layernorm_after|layer_norm2|norm2)\.(\w+)": "norm2.",
    r"(?:intermediate\.dense|mlp\.fc1|mlp\.weights_in)\.(\w+)": "mlp.fc1.",
    r"(?:output\.dense|mlp\.fc2|mlp\.weights_out)\.(\w+)": "mlp.fc2.",
    r"layer_scale([12])\.lambda1": "ls",
    r"attention\.(?:self|relative_position_bias)\.(relative_position_bias_table)": "attn.",
}
_BLOCK = re.compile(r"(?:encoder\.)?layers?\.(\d+)\.(?:blocks\.(\d+)\.)?(.+)")
_MERGING = re.compile(r"(?:encoder\.)?layers\.(\d+)\.(downsample\..+)")
_QKV = re.compile(
    r"(?:attention\.attention|attention\.self|attention|self_attn)\.(q|k|v)(?:uery|ey|alue|_proj)\.(weight|bias)"
)
_CLASSIFIERS = {"classifier": "head", "cls_classifier": "head", "distillation_classifier": "head_dist"}


def is_of_transformers(names: Collection[str]) -> bool:
    """Whether tensors have the names of one of these models of transformers."""
    return any(_MARK.fullmatch(name) for name in names)


def in_timms_names(
    tensors: Mapping[str, torch.Tensor], own: Collection[str], where: str
) -> tuple[dict[str, torch.Tensor], list[Note]]:
    """The tensors of a model of transformers as timm's has them, and notes on what was left out.

    Queries, keys and values become one `qkv`. The class token of a DINOv2 with registers takes over its position embedding, because timm's
    model has none for it.

    Args:
        own: names of the tensors of the model that they are for.
        where: the recipe path to speak of in a message.

    Raises:
        UserError: the classifier of a DINOv2, which reads more than timm's does, for a model that has one.
    """
    prefix = next(match[1] for name in tensors if (match := _MARK.fullmatch(name)))
    found: dict[str, torch.Tensor] = {}
    split: dict[str, dict[str, torch.Tensor]] = {}  # by name of qkv: q, k and v
    left: list[str] = []
    swin = any(".blocks." in name for name in tensors)
    for name, tensor in tensors.items():
        inner = name.removeprefix(prefix) if name.startswith(prefix) else ""
        classifier, _, kind = name.rpartition(".")
        if qkv := _of_qkv(inner):
            split.setdefault(qkv[0], {})[qkv[1]] = tensor
        elif new := _new_name(inner):
            found[new] = tensor
        elif inner.startswith("head.attention.in_proj_"):
            kind = inner.rpartition("_")[2]
            size = len(tensor) // 3
            found |= {f"attn_pool.q.{kind}": tensor[:size], f"attn_pool.kv.{kind}": tensor[size:]}
        elif classifier in _CLASSIFIERS:
            found[f"{_CLASSIFIERS[classifier]}{'.fc' * swin}.{kind}"] = tensor
        elif name == "visual_projection.weight":
            found |= {"head.weight": tensor, "head.bias": tensor.new_zeros(len(tensor))}
        elif not name.endswith("relative_position_index"):  # which follows from the window
            left.append(name)
    found |= {name: torch.cat([parts[part] for part in "qkv" if part in parts]) for name, parts in split.items()}
    _arrange(found)
    _refuse_wide_classifier(found, own, where)
    text = f"names of Hugging Face's transformers were turned into timm's, of {len(found)} tensors"
    if left:
        text += f", and {len(left)} were left out that timm's model has not ({', '.join(left[:3])}{', …' * (len(left) > 3)})"
    return found, [Note("transformers", len(found), text)]


def is_classifier(name: str) -> bool:
    """Whether a tensor belongs to a classifier, by timm's names or transformers'."""
    head = name.rpartition(".")[0].removesuffix(".fc")
    return head in _CLASSIFIERS or head in _CLASSIFIERS.values()


def place_in_timm(name: str) -> tuple[str, str | None] | None:
    """timm's name of a tensor of transformers', of which nothing else is known, and of a query, key or value which part of it it is.

    What stands before the name of a tower, such as `vit.`, is passed over. None where timm has none.
    """
    classifier, _, kind = name.rpartition(".")
    if classifier in _CLASSIFIERS:
        return f"{_CLASSIFIERS[classifier]}.{kind}", None
    inner = name
    while inner:
        if part := _of_qkv(inner):
            return part
        if new := _new_name(inner):
            return new, None
        inner = inner.partition(".")[2]
    return None


def _of_qkv(name: str) -> tuple[str, str] | None:
    """timm's name of the `qkv` that a query, key or value is a part of, and which part it is."""
    block = _BLOCK.fullmatch(name)
    part = _QKV.fullmatch(block[3]) if block else None
    return None if block is None or part is None else (f"{_place(block)}.attn.qkv.{part[2]}", part[1])


def _new_name(name: str) -> str | None:
    """timm's name of a tensor that has one by itself."""
    if merging := _MERGING.fullmatch(name):  # timm's stages begin with what transformers' end with
        return f"layers.{int(merging[1]) + 1}.{merging[2]}"
    if block := _BLOCK.fullmatch(name):
        for pattern, new in _IN_BLOCK.items():
            if match := re.fullmatch(pattern, block[3]):
                last = next(group for group in match.groups() if group is not None)
                return f"{_place(block)}.{new}{last}{'.gamma' * (new == 'ls')}"
        return None
    for pattern, new in _PARTS.items():
        if match := re.fullmatch(pattern, name):
            return match.expand(new)
    return None


def _place(block: re.Match[str]) -> str:
    return f"blocks.{block[1]}" if block[2] is None else f"layers.{block[1]}.blocks.{block[2]}"


def _arrange(found: dict[str, torch.Tensor]) -> None:
    """Give tokens and position embeddings their leading dimensions, and those of a DINOv2 with registers timm's arrangement."""
    for name in ("cls_token", "pos_embed"):
        while name in found and found[name].dim() < 3:
            found[name] = found[name][None]
    if "reg_token" in found and {"cls_token", "pos_embed"} <= found.keys():
        positions = found["pos_embed"]
        found["cls_token"], found["pos_embed"] = found["cls_token"] + positions[:, :1], positions[:, 1:]


def _refuse_wide_classifier(found: dict[str, torch.Tensor], own: Collection[str], where: str) -> None:
    if not {"head.weight", "norm.weight"} <= found.keys() & {*own}:
        return
    if found["head.weight"].shape[1] == 2 * len(found["norm.weight"]):
        raise UserError(
            f"{where}: the classifier of transformers' DINOv2 reads the class token beside the mean of the patch tokens, and timm's the "
            "class token alone, so it cannot be kept; set num_classes=0 for the backbone, or train a new head with `teacher.finetune`"
        )


# ------------------------------------------------------------------------------------------------------------- folders

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
# By transformers' `model_type`: timm's names with a size, and one whose arguments say the size where timm has no name for it.
_NAMES = {
    "vit": ("vit_{size}_patch{patch}_{image}", "vit_{size}_patch{patch}_224", "vit_base_patch16_224"),
    "deit": ("deit_{size}_distilled_patch{patch}_{image}", "deit_base_distilled_patch16_224"),
    "dinov2": ("vit_{size}_patch{patch}_dinov2", "vit_base_patch14_dinov2"),
    "dinov2_with_registers": ("vit_{size}_patch{patch}_reg4_dinov2", "vit_base_patch14_reg4_dinov2"),
    "clip_vision_model": ("vit_{size}_patch{patch}_clip_{act}{image}", "vit_base_patch16_clip_{act}224"),
    "siglip_vision_model": ("vit_{size}_patch{patch}_siglip_{image}", "vit_base_patch16_siglip_224"),
    "swin": ("swin_{size}_patch{patch}_window{window}_{image}", "swin_tiny_patch4_window7_224"),
}
KINDS = tuple(_NAMES)
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
    if kind not in _NAMES:
        return None
    tower = {**_DEFAULTS.get(kind, _VIT), **tower}
    _require_types(tower, _DEFAULTS.get(kind, _VIT))
    activation = _activation(tower, kind)
    words = {name: tower.get(f"{name}_size") for name in ("patch", "image", "window")}
    words |= {"size": _size(tower, kind), "act": "quickgelu_" * (tower["hidden_act"] == "quick_gelu")}
    *named, other = _NAMES[kind]
    known = next((name for name in (form.format(**words) for form in named) if is_model(name)), None)
    args = {"img_size": tower["image_size"], "num_classes": _number_of_classes({**tower, **config}, kind)}
    if tower["num_channels"] != 3:
        args["in_chans"] = tower["num_channels"]
    if activation is not None:
        args["act_layer"] = activation
    return (known, args) if known else (other.format(**words), args | _sizes(tower, kind))


def _require_types(tower: Mapping[str, Any], defaults: Mapping[str, Any]) -> None:
    for name, usual in defaults.items():
        value = tower[name]
        if isinstance(usual, list):
            fits = isinstance(value, list) and all(type(one) is int for one in value)
        else:
            fits = type(value) in ((int, float) if name == "mlp_ratio" else (type(usual),))
        if not fits:
            raise UserError(f"{name} is {value!r}, where transformers has e.g. {usual!r}")


def _size(tower: Mapping[str, Any], kind: str) -> str | None:
    if kind == "swin":
        return _SWINS.get((tower["embed_dim"], tuple(tower["depths"])))
    return _SIZES.get((tower["hidden_size"], tower["num_hidden_layers"], tower["num_attention_heads"]))


def _activation(tower: Mapping[str, Any], kind: str) -> str | None:
    """timm's name of an activation function that its model of this name does not have."""
    word = tower["hidden_act"]
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
    if config.get("do_center_crop") and size and crop:
        found["crop_pct"] = min(crop / size, 1.0)
    elif size and not config.get("do_center_crop", False):
        found |= {"crop_pct": 1.0, "crop_mode": "squash"}
    return found


def _edge(size: Any) -> int | None:
    """The shorter edge of a size, as transformers of any version writes it."""
    if isinstance(size, dict):
        size = size.get("shortest_edge", size.get("height"))
    return size if isinstance(size, int) and size > 0 else None
