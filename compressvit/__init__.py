"""compressvit: compress pretrained vision transformers, distil the student, and show the evidence.

The public names are imported on first use, so that `import compressvit` and `compressvit --help` do not wait for torch.
"""

from __future__ import annotations

import importlib
from typing import Any

__version__ = "0.1.0"

_PUBLIC = {
    "apply": "compressvit.runs.apply",
    "compress": "compressvit.transforms.applying",
    "distill": "compressvit.runs.distill",
    "save": "compressvit.artifacts.artifact",
    "load": "compressvit.artifacts.artifact",
    "materialise": "compressvit.transforms.applying",
    "merge": "compressvit.artifacts.merge",
    "count_parameters": "compressvit.model.ties",
    "save_adapter": "compressvit.artifacts.adapter",
    "load_adapter": "compressvit.artifacts.adapter",
    "remove_adapter": "compressvit.artifacts.adapter",
    "Align": "compressvit.transforms.align",
    "Multiplex": "compressvit.transforms.multiplex",
    "IRPE": "compressvit.transforms.irpe",
    "LORS": "compressvit.transforms.lors.spec",
    "Adapters": "compressvit.transforms.adapters",
    "AdaptFormer": "compressvit.transforms.adaptformer",
    "BitFit": "compressvit.transforms.freeze",
    "Compacter": "compressvit.transforms.compacter",
    "FacT": "compressvit.transforms.fact",
    "Freeze": "compressvit.transforms.freeze",
    "HeadNorm": "compressvit.transforms.head_norm",
    "LoRA": "compressvit.transforms.lora",
    "PHM": "compressvit.transforms.phm",
    "RepAdapter": "compressvit.transforms.repadapter",
    "SSF": "compressvit.transforms.ssf",
    "VPT": "compressvit.transforms.vpt.spec",
    "Recipe": "compressvit.recipe.recipe",
    "UserError": "compressvit.errors",
}

__all__ = ["__version__", "losses", *_PUBLIC]


def __getattr__(name: str) -> Any:
    if name == "losses":
        return importlib.import_module("compressvit.training.losses")
    if name in _PUBLIC:
        return getattr(importlib.import_module(_PUBLIC[name]), name)
    raise AttributeError(f"module 'compressvit' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted(__all__)
