"""Every registered transform at its examples, for tests beside the contract."""

from __future__ import annotations

from compressvit.testing.cases import Case, backbones_of, tried_on, with_files
from compressvit.testing.models import same_values, structure, teacher, values
from compressvit.transforms import TRANSFORMS

__all__ = [
    "ADAPTED_BACKBONES",
    "ADAPTERS",
    "EXAMPLES",
    "Case",
    "backbones_of",
    "same_values",
    "structure",
    "teacher",
    "values",
    "with_files",
]

ADAPTED_BACKBONES = tuple(tried_on(freezes=True))
EXAMPLES = {name: spec.examples() for name, spec in TRANSFORMS.items()}
ADAPTERS = tuple(name for name, spec in TRANSFORMS.items() if spec.freezes)
