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
from pydantic import BaseModel, ConfigDict, ValidationError
from torch import Tensor, nn

from compressvit.errors import UserError
from compressvit.files import damaged_record, expanded
from compressvit.model import hugging_face
from compressvit.model.backbone import model_name
from compressvit.model.stored import read_safetensors
from compressvit.model.unwrapping import load_plain
from compressvit.notes import Note
from compressvit.reading import Unreadable, read_json
from compressvit.spec import first_fault

CONFIG, TENSORS = "adapter_config.json", ("adapter_model.safetensors", "adapter_model.bin")
PREFIX = "base_model.model."
_FACTOR = re.compile(r"(.+)\.lora_([AB])(?:\.(\w+))?\.(weight|bias)")
_MERGE = "merge it with PEFT (merge_and_unload), and give the weights"
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
_CHANGE_BASE = (
    "pissa",
    "olora",
    "corda",
    "loftq",
    "lora_ga",
)  # ways to start that take what they start from out of the weights
# Names of layers with a few of a regular expression's signs, which take no long time to match.
_PATTERN = re.compile(r"(?!.*\*.*\*.*\*)[\w.\\*^$-]{1,200}")


class _Config(BaseModel):
    """The part of `adapter_config.json` that says what is computed."""

    model_config = ConfigDict(extra="ignore", allow_inf_nan=False)

    lora_alpha: float = 8
    alpha_pattern: dict[str, float] | None = None
    use_rslora: bool = False
    init_lora_weights: bool | str | None = True


@dataclass
class _Term:
    """LoRA of one layer: A (r, in, …), B (out, r, …), and the bias of B, if it has one."""

    down: Tensor | None = None
    up: Tensor | None = None
    bias: Tensor | None = None

    @property
    def fault(self) -> str | None:
        """What is wrong with it."""
        if self.down is None or self.up is None:
            return "has one factor and not the other"
        if min(self.down.dim(), self.up.dim()) < 2 or self.up.shape[1] != len(self.down) or not self.down.numel():
            return f"has factors of {tuple(self.down.shape)} and {tuple(self.up.shape)}, which have no product"
        parts = (self.down, self.up) if self.bias is None else (self.down, self.up, self.bias)
        return None if all(bool(part.isfinite().all()) for part in parts) else "has numbers that are not finite"

    def product(self) -> Tensor:
        """B A, (out, in), in float64."""
        assert self.down is not None
        assert self.up is not None
        return self.up.flatten(1).double() @ self.down.flatten(1).double()


@dataclass
class Adapter:
    """What a folder of PEFT holds.

    Attributes:
        config: of `adapter_config.json`.
        terms: by the path of a layer.
        whole: tensors that replace the model's, by name.
    """

    config: _Config
    terms: dict[str, _Term] = field(default_factory=dict)
    whole: dict[str, Tensor] = field(default_factory=dict)

    @property
    def classes(self) -> int | None:
        """Of the classifier that was trained with it; None without one."""
        named = (n for n in self.whole if n.endswith(".weight") and hugging_face.is_classifier(n))
        return next((len(self.whole[name]) for name in named), None)

    def scale(self, layer: str, rank: int) -> float:
        """s of the term of a layer."""
        patterns = self.config.alpha_pattern or {}
        matching = (alpha for key, alpha in patterns.items() if re.match(rf"(.*\.)?({key})$", layer))
        alpha = next(matching, self.config.lora_alpha)
        return alpha / (rank**0.5 if self.config.use_rslora else rank)


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
        raise UserError(f"{where}: {folder} is of PEFT's method {kind}, and LORA alone is read; {_MERGE}")
    if others := [key for key in _OTHERS if config.get(key)]:
        raise UserError(f"{where}: {folder} was made with {' and '.join(others)}, which is not read; {_MERGE}")
    return _sorted(_tensors(folder, where), _checked(config, folder, where), folder, where)


def _checked(config: dict[str, Any], folder: Path, where: str) -> _Config:
    """The part of a configuration that is read."""
    try:
        found = _Config.model_validate(config)
    except ValidationError as error:
        raise UserError(f"{where}: {folder / CONFIG}: {first_fault(error)}") from error
    started = str(found.init_lora_weights).lower()
    if started.startswith(_CHANGE_BASE):
        raise UserError(
            f"{where}: {folder} has init_lora_weights={found.init_lora_weights}, which changed the weights that it was trained on; save it "
            "with PEFT's path_initial_model_for_weight_conversion, or merge it there (merge_and_unload) and give the weights"
        )
    if odd := next(
        (key for key in found.alpha_pattern or {} if not _PATTERN.fullmatch(key) or not _compiles(key)), None
    ):
        raise UserError(f"{where}: {folder} has an alpha_pattern {odd!r}, which is not read; name the layers there")
    return found


def _compiles(pattern: str) -> bool:
    try:
        re.compile(pattern)
    except re.error:
        return False
    return True


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


def _sorted(tensors: Mapping[str, Tensor], config: _Config, folder: Path, where: str) -> Adapter:
    """Factors by layer, and what replaces tensors of the model."""
    found = Adapter(config)
    names = set()
    for name, tensor in tensors.items():
        if factor := _FACTOR.fullmatch(name.removeprefix(PREFIX)):
            layer, part, adapter, kind = factor.groups()
            names.add(adapter)
            term = found.terms.setdefault(layer, _Term())
            setattr(term, "bias" if kind == "bias" else {"A": "down", "B": "up"}[part], tensor)
        elif ".lora_" in name:
            raise UserError(
                f"{where}: {folder} has {name}, and LoRA of linear layers and convolutions alone is read; {_MERGE}"
            )
        else:
            found.whole[_WRAPPED.sub("", name.removeprefix(PREFIX))] = tensor
    if len(names) > 1:
        raise UserError(
            f"{where}: {folder} holds more than one adapter ({', '.join(sorted(map(str, names)))}); save the one that is meant"
        )
    if not found.terms:
        raise UserError(f"{where}: {folder} holds no LoRA (no tensor is a lora_A or lora_B); it is not whole")
    for layer, term in found.terms.items():
        if term.fault:
            raise UserError(f"{where}: {folder}: LoRA of {layer} {term.fault}; it is damaged, or not whole")
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
        scale = adapter.scale(layer, len(term.down))
        _put(added, own, f"{layer}.weight", scale * term.product(), where, given, model, add=True)
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
        if place not in own and (beside := place.replace(".fc1.", ".fc1_x.")) in own:  # beside a gate
            place = beside
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
