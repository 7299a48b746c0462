"""What compression did to a model: similarity of layers, drift from the teacher, gradients, allocation.

`DIAGNOSTICS` maps a recipe's word to its spec. To add one: write a file beside `gradients.py` with a `Measured` or `Watched`, and import
it here. Recipes, their schema and `plan` then know it.
"""

from __future__ import annotations

from compressvit.diagnostics.base import DIAGNOSTICS, Context, Diagnostic, Measured, Watch, Watched, diagnostic
from compressvit.diagnostics.findings import Finding
from compressvit.diagnostics.gradients import Gradients

__all__ = [
    "DIAGNOSTICS",
    "Context",
    "Diagnostic",
    "Finding",
    "Gradients",
    "Measured",
    "Watch",
    "Watched",
    "diagnostic",
]
