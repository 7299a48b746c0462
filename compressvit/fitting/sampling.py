"""Sums over a sample of the tokens of every image: tokens of one image repeat each other, those of another say something new."""

from __future__ import annotations

import zlib
from dataclasses import dataclass, field

import torch

from compressvit.fitting.lowrank import Tensor


@dataclass
class TokenSample:
    """Draws the tokens of every image that are summed up.

    Attributes:
        count: tokens of an image besides its prefix (class and register) tokens, which are always among them; None for all.
        seed: what is drawn is the same for the same seed and sizes.
    """

    count: int | None
    seed: int = 0
    _generator: torch.Generator = field(init=False, repr=False)

    def __post_init__(self) -> None:
        self._generator = torch.Generator().manual_seed(self.seed)

    def begin(self, batch: int) -> None:
        """What is drawn next is for the batch of this number, whatever was drawn for others, which another process may have."""
        self._generator.manual_seed(seed_of(self.seed, batch))

    def of(self, name: str) -> TokenSample:
        """Another sample of as many, the same whatever was drawn before."""
        return TokenSample(self.count, self.seed ^ zlib.crc32(name.encode()))

    def draw(self, images: int, tokens: int, prefix: int) -> tuple[Tensor | None, Tensor]:
        """Of a batch whose images have `tokens` tokens, the first `prefix` of which are prefix tokens.

        Returns:
            The places (images, n) that were drawn, None for all of them in order; and (images, n, 2): how many tokens each stands for, and
            1 for a prefix token.
        """
        others = tokens - prefix
        count = others if self.count is None else min(self.count, others)
        weights = torch.ones(images, prefix + count, 2)
        weights[:, prefix:, 0] = others / max(count, 1)
        weights[:, prefix:, 1] = 0.0
        if count == others:
            return None, weights
        drawn = torch.rand(images, others, generator=self._generator).argsort(dim=1)[:, :count] + prefix
        return torch.cat([torch.arange(prefix).expand(images, prefix), drawn], dim=1), weights


def seed_of(seed: int, batch: int) -> int:
    """A seed for what is drawn for one batch; that of the first is `seed`."""
    return (seed + batch * 0x9E3779B97F4A7C15) % 2**63


def gathered(tokens: Tensor, places: Tensor | None) -> Tensor:
    """Those of the tokens (B, T, C) at `places` (B, n): (B, n, C); all of them for None."""
    if places is None:
        return tokens
    return tokens.gather(1, places.to(tokens.device)[..., None].expand(-1, -1, tokens.shape[-1]))
