"""Weights in few bits: `quantise`, the last step of a recipe."""

from compressvit.transforms.quantise.spec import Quantise

__all__ = ["Quantise"]
