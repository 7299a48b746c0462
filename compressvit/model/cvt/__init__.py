"""CvT, which timm does not have: models that timm builds by name."""

from __future__ import annotations

import importlib

CVTS = ("cvt_13", "cvt_21", "cvt_w24")


def register_cvts() -> None:
    """Make timm know them (`timm.models.register_model`); a no-op the second time."""
    importlib.import_module(f"{__name__}.model")
