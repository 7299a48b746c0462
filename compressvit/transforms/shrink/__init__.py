"""One budget over neurons, heads and ranks of the whole backbone."""

from compressvit.transforms.shrink.spec import Shrink

__all__ = ["Shrink"]
