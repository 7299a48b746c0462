"""Low rank alone: each linear layer becomes two smaller ones, fitted to the teacher within a budget."""

from compressvit.transforms.low_rank.spec import LowRank

__all__ = ["LowRank"]
