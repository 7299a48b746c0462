"""Tensors of models of Hugging Face's transformers under timm's names; `hugging_face_config` is about their folders.

ViT, DeiT, DINOv2 (also with registers), DINOv3, Swin v1, CvT (`hugging_face_cvt`), and the image towers of CLIP and SigLIP. Nothing of
transformers is imported: a file of tensors is known by its names.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping

import torch

from compressvit.errors import UserError
from compressvit.model.hugging_face_cvt import is_cvt, name_in_cvt
from compressvit.notes import Note

_MARK = re.compile(r"((?:\w+\.)*?)embeddings\.patch_embedding(?:s\.projection|s)?\.weight")
_PARTS = {  # outside of the blocks, and of a block after its number
    r"embeddings\.(?:cls_token|class_embedding)": "cls_token",
    r"embeddings\.distillation_token": "dist_token",
    r"embeddings\.register_tokens": "reg_token",
    r"embeddings\.position_embedding(?:s|\.weight)": "pos_embed",
    r"embeddings\.patch_embedding(?:s\.projection|s)?\.(\w+)": r"patch_embed.proj.\1",
    r"embeddings\.norm\.(\w+)": r"patch_embed.norm.\1",
    r"pre_layrnorm\.(\w+)": r"norm_pre.\1",  # sic
    r"(?:(?:post_)?layernorm|norm)\.(\w+)": r"norm.\1",
    r"head\.probe": "attn_pool.latent",
    r"head\.attention\.out_proj\.(\w+)": r"attn_pool.proj.\1",
    r"head\.layernorm\.(\w+)": r"attn_pool.norm.\1",
    r"head\.mlp\.(fc[12]\.\w+)": r"attn_pool.mlp.\1",
}
_IN_BLOCK = {
    r"attention\.output\.dense\.(\w+)|attention\.o_proj\.(\w+)|self_attn\.out_proj\.(\w+)": "attn.proj.",
    r"(?:layernorm_before|layer_norm1|norm1)\.(\w+)": "norm1.",
    r"(?:layernorm_after|layer_norm2|norm2)\.(\w+)": "norm2.",
    r"(?:intermediate\.dense|mlp\.fc1|mlp\.weights_in|mlp\.up_proj)\.(\w+)": "mlp.fc1.",  # up_proj beside a gate: `_dinov3`
    r"(?:output\.dense|mlp\.fc2|mlp\.weights_out|mlp\.down_proj)\.(\w+)": "mlp.fc2.",
    r"mlp\.gate_proj\.(\w+)": "mlp.fc1_g.",
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
    return any(_MARK.fullmatch(name) for name in names) or is_cvt(names)


def in_timms_names(
    tensors: Mapping[str, torch.Tensor], own: Collection[str], where: str
) -> tuple[dict[str, torch.Tensor], list[Note]]:
    """The tensors of a model of transformers as timm's has them, and notes on what was left out.

    Queries, keys and values become one `qkv`, or the three layers that the model has. The class token of a DINOv2 with registers takes over
    its position embedding, because timm's model has none for it.

    Args:
        own: names of the tensors of the model that they are for.
        where: the recipe path to speak of in a message.

    Raises:
        UserError: the classifier of a DINOv2, which reads more than timm's does, for a model that has one; or biases of queries and values,
            for a model that has none.
    """
    if is_cvt(tensors):
        named = {name: new for name in tensors if (new := name_in_cvt(name))}
        of_cvt = {new: tensors[name] for name, new in named.items()}
        return of_cvt, _told(of_cvt, [name for name in tensors if name not in named])
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
    for name, parts in split.items():
        found |= _joined(name, parts, own, where)
    _arrange(found)
    found = {_of_eva(name, found, own): tensor for name, tensor in found.items()}
    _refuse_wide_classifier(found, own, where)
    return found, _told(found, left)


def _told(found: Collection[str], left: list[str]) -> list[Note]:
    text = f"names of Hugging Face's transformers were turned into timm's, of {len(found)} tensors"
    if left:
        text += f", and {len(left)} were left out that timm's model has not ({', '.join(left[:3])}{', …' * (len(left) > 3)})"
    return [Note("transformers", len(found), text)]


def _joined(name: str, parts: Mapping[str, torch.Tensor], own: Collection[str], where: str) -> dict[str, torch.Tensor]:
    """A `qkv` of its parts: one tensor, three, or of biases in a model whose keys have none those of queries and values."""
    attention, _, kind = name.rpartition("qkv.")
    if f"{attention}q_proj.{kind}" in own:
        return {f"{attention}{part}_proj.{kind}": tensor for part, tensor in parts.items()}
    if kind == "weight" or "k" in parts:
        return {name: torch.cat([parts[part] for part in "qkv" if part in parts])}
    if f"{attention}q_bias" not in own and any(tensor.any() for tensor in parts.values()):
        raise UserError(
            f"{where}: queries and values have biases at {attention}q_proj and {attention}v_proj, and the model has none; give the name "
            "of timm's model with them (vit_*_dinov3_qkvb), or build it with qkv_bias=True"
        )
    return {f"{attention}{part}_bias": tensor for part, tensor in parts.items() if f"{attention}{part}_bias" in own}


def _of_eva(name: str, found: Collection[str], own: Collection[str]) -> str:
    """The name of a tensor of DINOv3 in timm's Eva: LayerScale is a parameter of the block, and what a gate lets through has a name."""
    block, _, last = name.partition(".ls")
    if last and f"{block}.gamma_{last[0]}" in own:
        return f"{block}.gamma_{last[0]}"
    return name.replace(".fc1.", ".fc1_x.") if name.replace(".fc1.", ".fc1_g.") in found else name


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
    if of_cvt := name_in_cvt(name):
        return of_cvt, None
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
