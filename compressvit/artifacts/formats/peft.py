"""A folder for `peft.PeftModel.from_pretrained(MODEL, FOLDER)`: the terms of a student with `lora`, and the classifier trained with them.

The backbone is not in it: PEFT adds them to timm's model with the weights that `lora` was added to. Those are the teacher's, unless an
earlier phase of the run or `student.weights` gave it others.
"""

from __future__ import annotations

import importlib
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from compressvit.artifacts.export import PRECISIONS
from compressvit.artifacts.formats.base import Format, Opened, Source, format_of_files
from compressvit.errors import UserError, option
from compressvit.files import usual_mode, write_json
from compressvit.model import surgery
from compressvit.model.backbone import head_names
from compressvit.model.peft import CONFIG, PREFIX
from compressvit.model.peft import TENSORS as NAMES
from compressvit.transforms.lora import LoRAPlan, LoRATerm
from compressvit.transforms.record import compression_of, trained_names

TENSORS = NAMES[0]


@format_of_files("peft")
class Peft(Format):
    """A folder with adapter_config.json and adapter_model.safetensors, and the metadata in export.json."""

    title = "PEFT"
    inside = (CONFIG, TENSORS)
    packages = ("peft",)
    install = "'compressvit[peft]'"
    computes = False
    any_model = False
    runtime = "peft"

    def refuse(self, source: Source) -> None:
        _plan(source.model)

    def write(self, source: Source, path: Path) -> None:
        model, plan = source.model, _plan(source.model)
        path.mkdir()
        tensors: dict[str, Tensor] = {}
        ranks = {}
        for layer in plan.layers:
            module = model.get_submodule(layer)
            down, up = as_one(module.lora)  # type: ignore[arg-type]
            ranks[layer] = len(down)
            convolution = isinstance(module, nn.Conv2d)
            for part, factor in (("A", down), ("B", up)):
                shaped = factor[:, :, None, None] if convolution else factor
                tensors[f"{PREFIX}{layer}.lora_{part}.weight"] = shaped
        state = model.state_dict()
        heads = sorted(head_names(model) & (trained_names(model) or set()))
        tensors |= {f"{PREFIX}{name}": state[name] for name in heads}
        dtype = PRECISIONS[source.precision]
        save_file({name: tensor.detach().to(dtype).contiguous() for name, tensor in tensors.items()}, path / TENSORS)
        usual_mode(path / TENSORS)
        scale = plan.alpha / plan.rank
        config = {
            "peft_type": "LORA",
            "task_type": None,
            "base_model_name_or_path": None,
            "inference_mode": True,
            "r": plan.rank,
            "lora_alpha": plan.alpha,
            "rank_pattern": {layer: rank for layer, rank in ranks.items() if rank != plan.rank},
            "alpha_pattern": {layer: scale * rank for layer, rank in ranks.items() if rank != plan.rank},
            "target_modules": list(plan.layers),
            "modules_to_save": sorted({name.rpartition(".")[0] for name in heads}) or None,
            "bias": "none",
            "lora_dropout": 0.0,
            "fan_in_fan_out": False,
            "use_rslora": False,
            "use_dora": False,
        }
        write_json(path / CONFIG, config)
        source.seal(path)

    def open(self, path: Path, source: Source) -> nn.Module:
        plain = surgery.deep_copy(source.model)
        surgery.strip(plain)
        for name, parameter in plain.named_parameters():
            if name in head_names(plain):
                nn.init.zeros_(parameter)  # that of the folder takes its place
        return Opened(importlib.import_module("peft").PeftModel.from_pretrained(plain, str(path)).eval())

    def how(self, path: Path) -> str:
        return f"peft.PeftModel.from_pretrained(MODEL, '{path}')   (MODEL: timm's, with the weights that lora was added to)"


@torch.no_grad()
def as_one(term: LoRATerm) -> tuple[Tensor, Tensor]:
    """A (p·r, in) and B (out, p·r) of a term whose p parts have factors of their own, without its scale."""
    up = term.up.new_zeros(term.num_parts, term.up.shape[1], *term.up.shape[::2])  # (parts, outputs of a part, p, r)
    for i, part in enumerate(term.parts):
        up[part, :, i] = term.up[i]
    return term.down.flatten(0, 1), up.flatten(2).flatten(0, 1)


def _plan(model: nn.Module) -> LoRAPlan:
    """The one transform of a model that PEFT has.

    Raises:
        UserError: it has others, or none.
    """
    plans = [plan for plan in compression_of(model).plans if not plan.loads_values]
    if len(plans) == 1 and isinstance(plans[0], LoRAPlan):
        return plans[0]
    names = ", ".join(plan.transform for plan in plans) or "none"
    raise UserError(
        f"{option('to', 'peft')} takes the terms of a student with lora alone, and the steps of this one are {names}; "
        f"{option('to')} safetensors or onnx take it as it is"
    )
