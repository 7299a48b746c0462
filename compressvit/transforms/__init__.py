"""Transforms, which change the structure of a model: one file or folder per method.

To add one, write a file beside `lora.py` with a `Transform` and its `Plan`. The file is discovered automatically, and the class can be
imported from this package: `from compressvit.transforms import LoRA`.
"""

from __future__ import annotations

from compressvit.transforms.base import TRANSFORMS, LedgerEntry, Plan, Transform, transform

__all__ = ["TRANSFORMS", "LedgerEntry", "Plan", "Transform", "transform"]


def __getattr__(name: str) -> type[Transform]:
    """Look up the class of a registered transform by its class name."""
    spec = TRANSFORMS.class_called(name) if name[:1].isupper() else None
    if spec is None:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return spec
