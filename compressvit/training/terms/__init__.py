"""The terms of the distillation loss: one file per term, with its key in a recipe, its taps and its formula.

To add one, write a file beside `prediction.py`. It is discovered automatically, and its name becomes a key of `losses`. Other packages
add terms through entry points of the group `compressvit.terms`. The loss functions themselves are in `compressvit.losses`.
"""

from __future__ import annotations

from compressvit.training.terms.base import TERMS, Batch, LossTerm, Term, TermSetting, loss_term, total_of, unread_by
from compressvit.training.terms.building import build_terms
from compressvit.training.terms.labels import labels_term

__all__ = [
    "TERMS",
    "Batch",
    "LossTerm",
    "Term",
    "TermSetting",
    "build_terms",
    "labels_term",
    "loss_term",
    "total_of",
    "unread_by",
]
