"""LORS: linear layers that share a weight and keep a private low-rank term each."""

from compressvit.transforms.lors.spec import LORS

__all__ = ["LORS"]
