"""What compression did to a model: one file a diagnostic.

`DIAGNOSTICS` maps a recipe's word to its spec. To add one: write a file beside `gradients.py` with a `Measured` or `Watched`, and import
it here. Recipes, their schema and `plan` then know it.
"""

from __future__ import annotations

from compressvit.charts.findings import Finding
from compressvit.diagnostics.base import (
    DIAGNOSTICS,
    Context,
    Diagnostic,
    Measured,
    MeasuredOnImages,
    Watched,
    diagnostic,
)
from compressvit.diagnostics.cka_layers import CKA
from compressvit.diagnostics.drift import Drift
from compressvit.diagnostics.embedding import Embedding
from compressvit.diagnostics.gradients import Gradients
from compressvit.diagnostics.kernel_alignment import MinibatchCKA, cka
from compressvit.diagnostics.similarity import Similarity
from compressvit.diagnostics.spectra import Spectra
from compressvit.training.watch import Watch

__all__ = [
    "CKA",
    "DIAGNOSTICS",
    "Context",
    "Diagnostic",
    "Drift",
    "Embedding",
    "Finding",
    "Gradients",
    "Measured",
    "MeasuredOnImages",
    "MinibatchCKA",
    "Similarity",
    "Spectra",
    "Watch",
    "Watched",
    "cka",
    "diagnostic",
]
