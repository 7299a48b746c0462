"""Segmenters: a backbone of timm and what gives every pixel a class. Each is a model that timm builds by name."""

from __future__ import annotations

import importlib

SEGMENTERS = ("segmenter",)


def register_segmenters() -> None:
    """Make timm know them (`timm.models.register_model`); a no-op the second time."""
    for name in SEGMENTERS:
        importlib.import_module(f"{__name__}.{name}")
