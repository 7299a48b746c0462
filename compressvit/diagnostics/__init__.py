"""Diagnostics of how compression changed a model: one file per diagnostic.

To add one, write a file beside `gradients.py` with a subclass of `Measured` or `Watched`. It is discovered automatically; recipes, their
schema and `plan` then include it.
"""

from __future__ import annotations

import importlib
from typing import Any

# Public functions, imported on first use.
_PUBLIC = {
    "cka": "compressvit.diagnostics.kernel_alignment",
    "MinibatchCKA": "compressvit.diagnostics.kernel_alignment",
    "DIAGNOSTICS": "compressvit.diagnostics.base",
    "Context": "compressvit.diagnostics.base",
    "Measured": "compressvit.diagnostics.base",
    "MeasuredOnImages": "compressvit.diagnostics.base",
    "Watched": "compressvit.diagnostics.base",
    "Diagnostic": "compressvit.diagnostics.base",
    "Watch": "compressvit.training.watch",
    "CKA": "compressvit.diagnostics.cka_layers",
    "Drift": "compressvit.diagnostics.drift",
    "Embedding": "compressvit.diagnostics.embedding",
    "Gradients": "compressvit.diagnostics.gradients",
    "Similarity": "compressvit.diagnostics.similarity",
    "Spectra": "compressvit.diagnostics.spectra",
    "diagnostic": "compressvit.diagnostics.base",
    "Finding": "compressvit.charts.findings",
}

__all__ = list(_PUBLIC)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})


def __getattr__(name: str) -> Any:
    if name in _PUBLIC:
        return getattr(importlib.import_module(_PUBLIC[name]), name)
    raise AttributeError(f"module 'compressvit.diagnostics' has no attribute {name!r}")
