"""The compression transforms, one file a method. `TRANSFORMS` maps a recipe's word to its spec.

To add one: write a file beside `multiplex.py` with a `Transform` and its `Plan`, and import it here. The contract tests in
`tests/test_transforms*.py` then run over it.
"""

from __future__ import annotations

from compressvit.transforms.align import Align
from compressvit.transforms.base import TRANSFORMS, LedgerEntry, Plan, Transform, transform
from compressvit.transforms.irpe import IRPE
from compressvit.transforms.load_weights import LoadWeights
from compressvit.transforms.lors import LORS
from compressvit.transforms.multiplex import Multiplex

__all__ = [
    "IRPE",
    "LORS",
    "TRANSFORMS",
    "Align",
    "LedgerEntry",
    "LoadWeights",
    "Multiplex",
    "Plan",
    "Transform",
    "transform",
]
