"""AdaMixer's decoder: queries that look at a pyramid, talk to one another, and refine their boxes stage by stage.

Paper: AdaMixer: A Fast-Converging Query-Based Object Detector, CVPR 2022, https://arxiv.org/abs/2203.16507

A stage has its own weights throughout, and nine tenths of them are in two layers: `mixing.generator`, which makes the mixing matrices
out of a query, and `mixing.projection`, which brings what was mixed back to a query. LORS (`compressvit.transforms`) shares those two.

Shapes: B images, N queries of D numbers, G groups, P points in and Q points out of each group, C / G channels of each group.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import NamedTuple, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from compressvit.model.detectors.boxes import log_overlap, position_embedding, refined
from compressvit.model.detectors.sampling import points_of, sample_pyramid

PRIOR = 0.01  # probability of a class at the start, as in the focal loss's paper


class AdaptiveMixing(nn.Module):
    """Mix a query's sampled features over channels, then over points, with matrices made out of the query (§3.3), and add the result.

    Args:
        dim: D, of a query.
        channels: C, of the features.
        groups: G, which mix channels and points apart from one another.
        points_in, points_out: P and Q.
    """

    def __init__(self, dim: int, channels: int, groups: int, points_in: int, points_out: int):
        super().__init__()
        self.groups, self.width = groups, channels // groups
        self.points_in, self.points_out = points_in, points_out
        self.generator = nn.Linear(dim, groups * sum(rows * columns for rows, columns in self.matrices))
        self.projection = nn.Linear(groups * points_out * self.width, dim)
        self.norm = nn.LayerNorm(dim)

    @property
    def matrices(self) -> tuple[tuple[int, int], tuple[int, int]]:
        """Rows and columns of a group's two matrices, in the order in which `generator` gives them, row by row: channels, points."""
        return (self.width, self.width), (self.points_out, self.points_in)

    def reset_parameters(self) -> None:
        """As in the released code: at first the same matrices for every query, those of the generator's bias."""
        nn.init.zeros_(self.generator.weight)

    def forward(self, features: Tensor, query: Tensor) -> Tensor:
        """
        Args:
            features: (B, N, G, P, C / G).
            query: (B, N, D).

        Returns:
            (B, N, D).
        """
        (rows, columns), (out, into) = self.matrices
        generated = self.generator(query).unflatten(-1, (self.groups, -1))
        channels, points = generated.split([rows * columns, out * into], dim=-1)
        mixed = features @ channels.unflatten(-1, (rows, columns))
        mixed = F.relu(F.layer_norm(mixed, mixed.shape[-2:]))
        mixed = points.unflatten(-1, (out, into)) @ mixed
        mixed = F.relu(F.layer_norm(mixed, mixed.shape[-2:]))
        return self.norm(query + self.projection(mixed.flatten(-3)))


class Sampling(nn.Module):
    """Where a query looks: points in and around its box, at sizes near its own (§3.2)."""

    def __init__(self, dim: int, groups: int, points: int):
        super().__init__()
        self.groups, self.points = groups, points
        self.offsets = nn.Linear(dim, groups * points * 3)

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """The same points for every query: a regular grid in the box where their number is a square, at random otherwise; one octave
        below the box's size."""
        nn.init.zeros_(self.offsets.weight)
        bias = self.offsets.bias.view(self.groups, self.points, 3)
        side = math.isqrt(self.points)
        if side * side == self.points:
            steps = (torch.arange(side, device=bias.device, dtype=bias.dtype) + 0.5) / side - 0.5
            bias[..., :2] = torch.cartesian_prod(steps, steps).view(-1, 2)
        else:
            bias[..., :2].uniform_(-0.5, 0.5)
        bias[..., 2] = -1.0

    def forward(self, maps: Sequence[Tensor], strides: Sequence[int], query: Tensor, xyzr: Tensor) -> Tensor:
        """(B, N, D) queries and their boxes (B, N, 4) -> features (B, N, G, P, C / G)."""
        offsets = self.offsets(query).unflatten(-1, (self.groups, self.points, 3)).to(xyzr.dtype)
        return sample_pyramid(maps, strides, points_of(offsets, xyzr)).to(query.dtype)


class OverlapAttention(nn.Module):
    """Self-attention of queries whose logits gain τ_h · log IoF of their boxes: head h looks within its own box the more, the larger τ_h.

    The parameters have the names of torch's `nn.MultiheadAttention`'s parts as timm has them: `qkv`, `proj`.
    """

    def __init__(self, dim: int, heads: int):
        super().__init__()
        self.heads = heads
        self.qkv = nn.Linear(dim, 3 * dim)
        self.proj = nn.Linear(dim, dim)
        self.tau = nn.Parameter(torch.empty(heads))

    def forward(self, query: Tensor, overlap: Tensor) -> Tensor:
        """(B, N, D) and log IoF (B, N, N) -> (B, N, D)."""
        q, k, v = self.qkv(query).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)  # (B, heads, N, D / heads)
        bias = overlap[:, None] * self.tau[:, None, None]
        mixed = F.scaled_dot_product_attention(q, k, v, attn_mask=bias.to(q.dtype))
        return self.proj(mixed.transpose(1, 2).flatten(-2))


class FeedForward(nn.Module):
    """Two linear layers, and what went in added."""

    def __init__(self, dim: int, hidden: int):
        super().__init__()
        self.fc1 = nn.Linear(dim, hidden)
        self.fc2 = nn.Linear(hidden, dim)

    def forward(self, x: Tensor) -> Tensor:  # (…, D)
        return x + self.fc2(F.relu(self.fc1(x)))


class Branch(nn.Module):
    """What reads a query: a hidden layer with LayerNorm and ReLU, and a linear layer."""

    def __init__(self, dim: int, outputs: int):
        super().__init__()
        self.fc = nn.Linear(dim, dim)
        self.norm = nn.LayerNorm(dim)
        self.head = nn.Linear(dim, outputs)

    def forward(self, x: Tensor) -> Tensor:  # (…, D) -> (…, outputs)
        return self.head(F.relu(self.norm(self.fc(x))))


class DecoderStage(nn.Module):
    """One stage: attention among queries, sampling, mixing, an MLP, and a refined box with its classes for each query.

    Args:
        dim: D, of a query.
        channels: C, of the pyramid.
        classes: logits of each query; there is none for 'no object'.
        heads: of the attention.
        hidden: of the MLP.
        groups, points_in, points_out: of the mixing.
    """

    def __init__(
        self,
        dim: int,
        channels: int,
        classes: int,
        heads: int,
        hidden: int,
        groups: int,
        points_in: int,
        points_out: int,
    ):
        super().__init__()
        self.attn = OverlapAttention(dim, heads)
        self.attn_norm = nn.LayerNorm(dim)
        self.sampling = Sampling(dim, groups, points_in)
        self.mixing = AdaptiveMixing(dim, channels, groups, points_in, points_out)
        self.mlp = FeedForward(dim, hidden)
        self.mlp_norm = nn.LayerNorm(dim)
        self.classifier = Branch(dim, classes)
        self.regressor = Branch(dim, 4)
        self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """As in the released code: Xavier-uniform matrices, τ uniform in [0, 4], boxes that do not change, classes of probability 0.01."""
        for parameter in self.parameters():
            if parameter.ndim > 1:
                nn.init.xavier_uniform_(parameter)
        nn.init.uniform_(self.attn.tau, 0.0, 4.0)
        nn.init.constant_(self.classifier.head.bias, -math.log((1 - PRIOR) / PRIOR))
        nn.init.zeros_(self.regressor.head.weight)
        nn.init.zeros_(self.regressor.head.bias)
        self.sampling.reset_parameters()
        self.mixing.reset_parameters()

    def forward(
        self, maps: Sequence[Tensor], strides: Sequence[int], query: Tensor, xyzr: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        """
        Args:
            maps, strides: of the pyramid, see `sample_pyramid`.
            query: (B, N, D).
            xyzr: (B, N, 4); no gradient runs through it.

        Returns:
            logits (B, N, classes), refined boxes (B, N, 4) as (x, y, z, r), and queries (B, N, D).
        """
        placed = query + position_embedding(xyzr, query.shape[-1]).to(query.dtype)
        query = self.attn_norm(placed + self.attn(placed, log_overlap(xyzr)))
        query = self.mixing(self.sampling(maps, strides, query, xyzr), query)
        query = self.mlp_norm(self.mlp(query))
        return self.classifier(query), refined(xyzr, self.regressor(query).to(xyzr.dtype)), query


class StageOutput(NamedTuple):
    """What one stage says of B images: logits (B, N, classes) and boxes (B, N, 4) as (x, y, z, r)."""

    logits: Tensor
    xyzr: Tensor


class Decoder(nn.Module):
    """A stack of `stages` stages (6 in the paper); the arguments are those of `DecoderStage`."""

    def __init__(self, stages: int, **stage: int):
        super().__init__()
        self.stages = nn.ModuleList(DecoderStage(**stage) for _ in range(stages))

    def each(self) -> Iterator[DecoderStage]:
        """The stages in order."""
        return (cast(DecoderStage, stage) for stage in self.stages)

    def forward(self, maps: Sequence[Tensor], strides: Sequence[int], query: Tensor, xyzr: Tensor) -> list[StageOutput]:
        """The output of every stage; for the arguments see `DecoderStage`."""
        found = []
        for stage in self.each():
            logits, boxes, query = stage(maps, strides, query, xyzr)
            found.append(StageOutput(logits, boxes))
            xyzr = boxes.detach()
        return found
