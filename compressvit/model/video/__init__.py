"""Video models: a ViT of timm on tubelets, which gives a clip a class. Each is a model that timm builds by name."""

from __future__ import annotations

import importlib

VIDEOS = ("video",)


def register_videos() -> None:
    """Make timm know them (`timm.models.register_model`); a no-op the second time."""
    importlib.import_module(f"{__name__}.model")
