"""Adapters of Hugging Face's PEFT: a folder of LoRA, merged into the weights of the model that it was trained on.

LoRA of linear layers and convolutions, with any scale and rank of each, and modules that were trained as a whole. Layers have the names
of timm, or of transformers' models that `hugging_face` knows. Nothing of PEFT is imported, and nothing is unpickled.

    W + s · B A      s = α / r, or α / √r for rank-stabilised LoRA (https://arxiv.org/abs/2312.03732)
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from compressvit.errors import UserError
from compressvit.files import damaged_record, expanded
from compressvit.model import hugging_face
from compressvit.model.backbone import model_name
from compressvit.model.stored import read_safetensors
from compressvit.model.unwrapping import load_plain
from compressvit.notes import Note
from compressvit.reading import Unreadable, read_json

CONFIG, TENSORS = "adapter_config.json", ("adapter_model.safetensors", "adapter_model.bin")
PREFIX = "base_model.model."
_FACTOR = re.compile(r"(.+)\.lora_([AB])(?:\.\w+)?\.(weight|bias)")
_WRAPPED = re.compile(r"\.(?:base_layer|modules_to_save(?:\.\w+)?|original_module)(?=\.)")
# What makes it another function than LoRA's, or puts it where linear layers are not.
_OTHERS = (
    "use_dora",
    "use_qalora",
    "use_bdlora",
    "fan_in_fan_out",
    "layer_replication",
    "target_parameters",
    "trainable_token_indices",
    "alora_invocation_tokens",
    "monteclora_config",
)


@dataclass
class _Term:
    """LoRA of one layer: A (r, in, …), B (out, r, …), and the bias of B, if it has one."""

    down: Tensor | None = None
    up: Tensor | None = None
    bias: Tensor | None = None


@dataclass
class Adapter:
    """What a folder of PEFT holds.

    Attributes:
        config: of `adapter_config.json`.
        terms: by the path of a layer.
        whole: tensors that replace the model's, by name.
    """

    config: Mapping[str, Any]
    terms: dict[str, _Term] = field(default_factory=dict)
    whole: dict[str, Tensor] = field(default_factory=dict)

    @property
    def classes(self) -> int | None:
        """Of the classifier that was trained with it; None without one."""
        named = (n for n in self.whole if n.endswith(".weight") and hugging_face.is_classifier(n))
        return next((len(self.whole[name]) for name in named), None)

    def scale(self, layer: str, rank: int) -> float:
        """s of the term of a layer."""
        patterns = self.config.get("alpha_pattern") or {}
        matching = (alpha for key, alpha in patterns.items() if re.match(rf"(.*\.)?({key})$", layer))
        alpha = float(next(matching, self.config.get("lora_alpha", 8)))
        return alpha / (rank**0.5 if self.config.get("use_rslora") else rank)


def is_peft(folder: Path) -> bool:
    """Whether PEFT wrote a folder."""
    return (folder / CONFIG).is_file()


def read_peft(given: str | Path, where: str) -> Adapter:
    """What is in a folder of LoRA that PEFT wrote.

    Args:
        where: the recipe path to speak of in a message.

    Raises:
        UserError: there is none, it is of another method, or it cannot be read.
    """
    folder = expanded(given, where)
    if not is_peft(folder):
        raise UserError(f"{where}: {given} is no folder that PEFT wrote, which has an {CONFIG}")
    try:
        config = read_json(folder / CONFIG)
    except Unreadable as error:
        raise UserError(f"{where}: {error}") from error
    if not isinstance(config, dict) or config.get("peft_type") != "LORA":
        kind = config.get("peft_type") if isinstance(config, dict) else None
        raise UserError(
            f"{where}: {folder} is of PEFT's method {kind}, and LORA alone is read; merge it with PEFT (merge_and_unload), and give the "
            "weights"
        )
    if others := [key for key in _OTHERS if config.get(key)]:
        raise UserError(
            f"{where}: {folder} was made with {' and '.join(others)}, which is not read; merge it with PEFT (merge_and_unload), and give "
            "the weights"
        )
    return _sorted(_tensors(folder, where), config, folder, where)


def _tensors(folder: Path, where: str) -> Mapping[str, Tensor]:
    file = next((folder / name for name in TENSORS if (folder / name).is_file()), None)
    if file is None:
        raise UserError(f"{where}: {folder} has no {' or '.join(TENSORS)}")
    if file.suffix == ".safetensors":
        return read_safetensors(file)
    try:
        content = load_plain(file)
    except Exception as error:  # torch raises whatever a damaged or foreign file leads to
        reason = damaged_record(file) or "it holds other things than tensors"
        raise UserError(f"{where}: {file} cannot be read: {reason}; nothing is unpickled") from error
    if not isinstance(content, dict) or not all(isinstance(value, Tensor) for value in content.values()):
        raise UserError(f"{where}: {file} holds no state dict of tensors")
    return content


def _sorted(tensors: Mapping[str, Tensor], config: Mapping[str, Any], folder: Path, where: str) -> Adapter:
    """Factors by layer, and what replaces tensors of the model."""
    found = Adapter(config)
    for name, tensor in tensors.items():
        if factor := _FACTOR.fullmatch(name.removeprefix(PREFIX)):
            layer, part, kind = factor.groups()
            term = found.terms.setdefault(layer, _Term())
            setattr(term, "bias" if kind == "bias" else {"A": "down", "B": "up"}[part], tensor)
        elif ".lora_" in name:
            raise UserError(
                f"{where}: {folder} has {name}, and LoRA of linear layers and convolutions alone is read; merge it with PEFT "
                "(merge_and_unload), and give the weights"
            )
        else:
            found.whole[_WRAPPED.sub("", name.removeprefix(PREFIX))] = tensor
    half = [layer for layer, term in found.terms.items() if term.down is None or term.up is None]
    if half:
        raise UserError(f"{where}: {folder} has one factor of {half[0]} and not the other; it is not whole")
    return found


@torch.no_grad()
def merge_peft_(model: nn.Module, given: str | Path, where: str) -> list[Note]:
    """Merge a folder of LoRA that PEFT wrote into the weights of a model, in place.

    Args:
        model: with the weights that the adapter was trained on; a classifier that was trained with it is replaced.
        given: the folder.
        where: the recipe path to speak of in a message.

    Returns:
        What was merged.

    Raises:
        UserError: as `read_peft`, or the adapter is of layers that the model has not. The model is then unchanged.
    """
    adapter = read_peft(given, where)
    own = model.state_dict()
    added: dict[str, Tensor] = {}
    for layer, term in adapter.terms.items():
        assert term.down is not None
        assert term.up is not None
        scale = adapter.scale(layer, len(term.down))
        product = term.up.flatten(1).double() @ term.down.flatten(1).double()
        _put(added, own, f"{layer}.weight", scale * product, where, given, model, add=True)
        if term.bias is not None:
            _put(added, own, f"{layer}.bias", scale * term.bias.double(), where, given, model, add=True)
    for name, tensor in adapter.whole.items():
        _put(added, own, name, tensor.double(), where, given, model, add=False)
    for name, value in added.items():
        own[name].copy_(value)
    text = f"{where}: {given}: LoRA of {len(adapter.terms)} layers was merged into the weights"
    if adapter.whole:
        text += f", and {len(adapter.whole)} tensors that were trained with it were taken over"
    return [Note("peft", len(adapter.terms), text)]


def _put(
    found: dict[str, Tensor],
    own: Mapping[str, Tensor],
    name: str,
    value: Tensor,
    where: str,
    given: str | Path,
    model: nn.Module,
    *,
    add: bool,
) -> None:
    """Add `value` to what a tensor of the model will be, or put it in its place; of a query, key or value to its rows."""
    place, part = name, None
    if name not in own:
        place, part = hugging_face.place_in_timm(name) or (name, None)
    if place not in own:
        raise UserError(
            f"{where}: {given} is for {name}, which {model_name(model)} has not; give the model that it was trained on"
        )
    whole = found.setdefault(place, own[place].detach().cpu().double().clone())
    rows = whole if part is None else whole.chunk(3)["qkv".index(part)]
    if rows.numel() != value.numel() or rows.shape[0] != value.shape[0]:
        hint = "; set num_classes to its classes" if place.startswith("head") else ""
        raise UserError(
            f"{where}: {given} has {name} of {tuple(value.shape)}, and {model_name(model)} one of {tuple(rows.shape)}{hint}"
        )
    if add:
        rows += value.view(rows.shape)
    else:
        rows.copy_(value.view(rows.shape))
