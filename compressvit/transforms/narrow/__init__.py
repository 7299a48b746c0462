"""Narrower blocks: `narrow`, and what `shrink` builds on."""

from compressvit.transforms.narrow.spec import Narrow

__all__ = ["Narrow"]
