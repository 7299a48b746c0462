"""VPT: prompt tokens."""

from compressvit.transforms.vpt.spec import VPT

__all__ = ["VPT"]
