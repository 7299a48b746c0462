"""Small students of many kinds, and their files in the formats of `export`."""

from __future__ import annotations

import functools

import pytest
import timm
import torch
from torch import nn

from compressvit.artifacts.formats.base import FORMATS, Source
from compressvit.artifacts.merge import photograph_like
from compressvit.data.input import input_config
from compressvit.data.spec import Data
from compressvit.model import stored, surgery
from compressvit.model.families.adamixer import SMALL
from compressvit.model.weights import build
from compressvit.tasks.base import task_of
from compressvit.transforms import LORS, Adapters, LoRA, LowRank, Multiplex, Narrow, Quantise
from compressvit.transforms.applying import compress
from helpers.models import randomise

SIZE = 32
VIT = {"img_size": SIZE, "patch_size": 8, "embed_dim": 48, "depth": 2, "num_heads": 2}
SWIN = {"img_size": SIZE, "embed_dim": 16, "depths": (2, 2), "num_heads": (2, 2), "window_size": 2, "num_classes": 5}


def vit(classes: int = 5) -> nn.Module:
    torch.manual_seed(0)
    model = timm.create_model("vit_tiny_patch16_224", **VIT, num_classes=classes)
    randomise(model, 0.05)
    return model.eval()


def swin() -> nn.Module:
    torch.manual_seed(0)
    return timm.create_model("swin_tiny_patch4_window7_224", **SWIN).eval()


def adapted(model: nn.Module, *steps: object) -> nn.Module:
    made = compress(model, steps)
    added = surgery.added_parameters(made)
    randomise(nn.ParameterList(p for n, p in made.named_parameters() if n in added), 0.05)
    return made


def detector() -> nn.Module:
    torch.manual_seed(0)
    args = {"patch_size": 8, "embed_dim": 24, "depth": 1, "num_heads": 2}
    model = build("adamixer", **{**SMALL, "stages": 2, "backbone_args": args})
    randomise(model, 0.1)
    return model.eval()


def segmenter() -> nn.Module:
    torch.manual_seed(0)
    inside = {"patch_size": 8, "embed_dim": 24, "depth": 1, "num_heads": 2}
    args = {
        "backbone": "vit_tiny_patch16_224",
        "backbone_args": inside,
        "img_size": SIZE,
        "num_classes": 5,
        "channels": 8,
    }
    model = build("segmenter", args, head="pup")
    randomise(model, 0.1)
    return model.eval()


MODELS = {
    "plain": vit,
    "shared": lambda: compress(vit(), [Multiplex(share=2, mlp_conv=3)]),
    "low_rank": lambda: compress(vit(0), [LowRank(budget={"parameters": 0.5}, metric="weights")]),
    "lors": lambda: adapted(vit(), LORS(share=2, rank=4, init="scratch"), LoRA(rank=2)),
    "adapters": lambda: adapted(vit(), Adapters(width=4)),
    "lora": lambda: adapted(vit(), LoRA(rank=2, alpha=3.0, targets=("q", "v", "fc1"))),
    "narrow": lambda: compress(vit(), [Narrow(neurons=0.5, head_dim=0.5)], calibration=torch.randn(64, 3, SIZE, SIZE)),
    "swin": lambda: compress(swin(), [Multiplex(share=2)]),
    "quantised": lambda: compress(vit(0), [LowRank(rank=30, metric="weights"), Quantise(bits=5, metric="weights")]),
    "detector": detector,
    "segmenter": segmenter,
}
NEEDS = {"onnx": ("onnx", "onnxscript", "onnxruntime"), "openvino": ("openvino",), "peft": ("peft",)}


@functools.cache
def source_of(name: str, precision: str = "fp32") -> Source:
    model = MODELS[name]()
    config = input_config(model, Data(name="images"))
    if task_of(model).name == "classification":
        stored.name_classes(model, [f"class {i}" for i in range(5)])
    calibration = (photograph_like(16, config),) if precision == "int8-static" else ()
    return Source(model, task_of(model), config, precision, "run/student", calibration=calibration)


def written(tmp_path, name: str, fmt: str, precision: str = "fp32"):
    for package in NEEDS.get(fmt, ()):
        pytest.importorskip(package)
    file = tmp_path / f"student{FORMATS[fmt].suffix}"
    FORMATS[fmt].write(source_of(name, precision), file)
    return file
