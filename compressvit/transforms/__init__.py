"""What changes the structure of a model: one file or folder a method, with its layer.

To add one: write a file beside `multiplex.py` with a `Transform` and its `Plan`, and import it here. The contract tests in
`tests/contract/` then run over it.
"""

from __future__ import annotations

from compressvit.transforms.adapters import Adapters
from compressvit.transforms.adaptformer import AdaptFormer
from compressvit.transforms.align import Align
from compressvit.transforms.base import TRANSFORMS, LedgerEntry, Plan, Transform, transform
from compressvit.transforms.compacter import Compacter
from compressvit.transforms.fact import FacT
from compressvit.transforms.freeze import BitFit, Freeze
from compressvit.transforms.head_norm import HeadNorm
from compressvit.transforms.irpe import IRPE
from compressvit.transforms.load_weights import LoadWeights
from compressvit.transforms.lora import LoRA
from compressvit.transforms.lors.spec import LORS
from compressvit.transforms.low_rank.spec import LowRank
from compressvit.transforms.multiplex import Multiplex
from compressvit.transforms.phm import PHM
from compressvit.transforms.repadapter import RepAdapter
from compressvit.transforms.ssf import SSF
from compressvit.transforms.vpt.spec import VPT

__all__ = [
    "IRPE",
    "LORS",
    "PHM",
    "SSF",
    "TRANSFORMS",
    "VPT",
    "AdaptFormer",
    "Adapters",
    "Align",
    "BitFit",
    "Compacter",
    "FacT",
    "Freeze",
    "HeadNorm",
    "LedgerEntry",
    "LoRA",
    "LoadWeights",
    "LowRank",
    "Multiplex",
    "Plan",
    "RepAdapter",
    "Transform",
    "transform",
]
