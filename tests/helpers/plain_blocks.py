"""Multiplexed blocks and iRPE in plain arithmetic, one token and one head at a time."""

from __future__ import annotations

import itertools
import math

import torch
from torch import Tensor, nn

from compressvit.transforms.multiplex import HeadMixing


def naive_mlp(mlp: nn.Module, x: Tensor) -> Tensor:
    hidden = x @ mlp.fc1.weight.T + mlp.fc1.bias
    hidden = 0.5 * hidden * (1 + torch.erf(hidden / math.sqrt(2)))
    return hidden @ mlp.fc2.weight.T + mlp.fc2.bias


def naive_norm(norm: nn.Module, x: Tensor) -> Tensor:
    centred = x - x.mean(-1, keepdim=True)
    return centred / torch.sqrt(centred.square().mean(-1, keepdim=True) + norm.eps) * norm.weight + norm.bias


def naive_convolution(conv: nn.Conv2d, grid: Tensor) -> Tensor:
    """Depth-wise, zeros around the grid. grid: (height, width, C)."""
    height, width, _ = grid.shape
    reach = conv.kernel_size[0] // 2
    out = conv.bias.expand_as(grid).clone()
    for i, j in itertools.product(range(height), range(width)):
        for di, dj in itertools.product(range(-reach, reach + 1), repeat=2):
            if 0 <= i + di < height and 0 <= j + dj < width:
                out[i, j] += conv.weight[:, 0, di + reach, dj + reach] * grid[i + di, j + dj]
    return out


def naive_mix(mix: HeadMixing, maps: list[Tensor]) -> list[Tensor]:
    bias = mix.bias if mix.bias is not None else torch.zeros(len(maps), dtype=maps[0].dtype)
    return [sum(mix.weight[g, h] * maps[h] for h in range(len(maps))) + bias[g] for g in range(len(maps))]


def naive_attention(attn: nn.Module, x: Tensor, position: list[Tensor], mask: Tensor | None) -> Tensor:
    """x: (N, C). Add the position terms, mix, add the shift mask, softmax, mix."""
    width = x.shape[-1] // attn.num_heads
    qkv = x @ attn.qkv.weight.T + attn.qkv.bias
    q, k, v = qkv.chunk(3, dim=-1)
    heads = [slice(h * width, (h + 1) * width) for h in range(attn.num_heads)]
    logits = [q[:, h] @ k[:, h].T / math.sqrt(width) + p for h, p in zip(heads, position, strict=True)]
    logits = naive_mix(attn.logit_mix, logits)
    if mask is not None:
        logits = [a + mask for a in logits]
    maps = naive_mix(attn.prob_mix, [a.softmax(-1) for a in logits])
    out = torch.cat([a @ v[:, h] for a, h in zip(maps, heads, strict=True)], dim=-1)
    return out @ attn.proj.weight.T + attn.proj.bias


def naive_mlp_conv(token_conv: nn.Module, grid: Tensor, reference: bool) -> Tensor:
    normed = naive_norm(token_conv.norm, grid)
    return (normed if reference else grid) + naive_convolution(token_conv.conv, normed)


def naive_bucket(distance: int, alpha: float = 1.9) -> int:
    beta, gamma = 2 * alpha, 8 * alpha
    if abs(distance) <= alpha:
        return distance
    size = round(alpha + math.log(abs(distance) / alpha) / math.log(gamma / alpha) * (beta - alpha))
    return int(math.copysign(min(beta, size), distance))


def naive_irpe(table: Tensor, q: Tensor, grid: tuple[int, int], skip: int) -> Tensor:
    """q: (N, D), scaled. A pair with a token that is not on the grid has the last bucket."""
    height, width = grid
    out = q.new_zeros(len(q), len(q))
    for n, m in itertools.product(range(len(q)), repeat=2):
        if min(n, m) < skip:
            out[n, m] = q[n] @ table[:, 49]
    for i, j, a, b in itertools.product(range(height), range(width), range(height), range(width)):
        bucket = (naive_bucket(i - a) + 3) * 7 + naive_bucket(j - b) + 3
        n, m = skip + i * width + j, skip + a * width + b
        out[n, m] = q[n] @ table[:, bucket]
    return out


def naive_swin_block(block: nn.Module, x: Tensor, reference: bool) -> Tensor:
    """x: (height, width, C)."""
    height, width, _ = x.shape
    (win, _), (shift, _) = block.window_size, block.shift_size
    normed = naive_norm(block.norm1, x)
    attended = torch.empty_like(x)
    for top, left in itertools.product(range(0, height, win), range(0, width, win)):
        # the window's tokens, as rows and columns of the rolled grid and of the grid itself
        rolled = [(top + i, left + j) for i, j in itertools.product(range(win), repeat=2)]
        tokens = [((i + shift) % height, (j + shift) % width) for i, j in rolled]
        # rolling puts tokens from opposite edges into one window; they must not see each other
        wrapped = [(i + shift >= height, j + shift >= width) for i, j in rolled]
        mask = torch.tensor([[0.0 if a == b else -100.0 for b in wrapped] for a in wrapped], dtype=x.dtype)
        rows = [[(a[0] - b[0] + win - 1) * (2 * win - 1) + a[1] - b[1] + win - 1 for b in rolled] for a in rolled]
        position = block.attn.relative_position_bias_table[torch.tensor(rows)]
        inside = torch.stack([normed[i, j] for i, j in tokens])
        out = naive_attention(block.attn, inside, list(position.unbind(-1)), mask if shift else None)
        for (i, j), value in zip(tokens, out, strict=True):
            attended[i, j] = value
    y = naive_mlp_conv(block.mlp_conv, x + attended, reference)
    return y + naive_mlp(block.mlp, naive_norm(block.norm2, y))
