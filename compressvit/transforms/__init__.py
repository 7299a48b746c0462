"""What changes the structure of a model: one file or folder per method, with its layer.

To add one, write a file beside `lora.py` with a `Transform` and its `Plan`. It is discovered, and its class is a name of this
package: `from compressvit.transforms import LoRA`.
"""

from __future__ import annotations

from compressvit.transforms.base import TRANSFORMS, LedgerEntry, Plan, Transform, transform

__all__ = ["TRANSFORMS", "LedgerEntry", "Plan", "Transform", "transform"]


def __getattr__(name: str) -> type[Transform]:
    """The class of a registered transform, by its name."""
    spec = TRANSFORMS.class_called(name) if name[:1].isupper() else None
    if spec is None:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return spec
