"""Detectors: a backbone of timm and what stands on it. Each is a model that timm builds by name."""

from __future__ import annotations

import importlib

DETECTORS = ("adamixer", "faster_rcnn", "mask_rcnn")


def register_detectors() -> None:
    """Make timm know them (`timm.models.register_model`); a no-op the second time."""
    for name in DETECTORS:
        importlib.import_module(f"{__name__}.{name}")
