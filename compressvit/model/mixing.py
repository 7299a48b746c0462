"""Attention in the open: from queries, keys and values to what the heads give, with the slots of `slots.py` on the way.

Maps have their heads first, (H, B, N, M), so that a mix of heads is one product of (H, H) and (H, B·N·M), forward and backward, and no
product of small matrices for every image or window. Slots and hooks see them as (B, H, N, M). Where nothing is learned, a CPU takes some
images at a time, so that maps stay in its cache.

Shapes: B batch (windows·B in windows), H heads, N queries, M keys, D head width.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from einops import rearrange
from torch import nn
from torch.fx import wrap

from compressvit.model.slots import ATTENTION_SLOTS

wrap("rearrange")  # torch.fx records the call: einops does not take its proxies

AT_ONCE = 2**19  # elements of the maps of a piece: 2 MiB of float32, of which a few are alive at once

Maps = Callable[[torch.Tensor], torch.Tensor]  # of (B, H, N, M), the same shape


def open_attention(
    attention: Any,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    *,
    positions: Callable[[torch.Tensor, torch.Tensor], torch.Tensor] | None = None,
    mask: Maps | None = None,
    together: int | None = 1,
) -> torch.Tensor:
    """What the heads of an attention give, (B, N, H·D): logits → + position → `logit_mix` → mask → softmax → `prob_mix` → dropout → values.

    Args:
        attention: has `logit_mix`, `prob_mix` and `attn_drop`.
        q: scaled queries (B, H, N, D).
        k, v: (B, H, M, D).
        positions: of logits (B, H, N, M) and the queries they are of, logits with positions.
        mask: of mixed logits, masked ones.
        together: how many rows of B a piece has a multiple of, as the windows of an image; None where `positions` or `mask` are not the
            same for every image, so that all are taken at once.
    """

    def attended(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        logits = q.transpose(0, 1) @ k.transpose(0, 1).transpose(-2, -1)
        if positions is not None:
            logits = positions(logits.transpose(0, 1), q).transpose(0, 1)
        if attention.logit_mix is not None:
            logits = attention.logit_mix(logits.transpose(0, 1)).transpose(0, 1)
        if mask is not None:
            logits = mask(logits.transpose(0, 1)).transpose(0, 1)
        maps = _softmax(attention, logits).transpose(0, 1)
        if attention.prob_mix is not None:
            maps = attention.prob_mix(maps)
        maps = attention.attn_drop(maps).transpose(0, 1)
        return rearrange(maps @ v.transpose(0, 1), "h b n d -> b n (h d)")

    if together is None or torch.is_grad_enabled() or not eager_on_cpu(q):
        return attended(q, k, v)
    elements = together * q.shape[1] * q.shape[2] * k.shape[2]
    rows = together * max(1, AT_ONCE // elements)
    if rows >= len(q) or _is_watched(attention):
        return attended(q, k, v)
    out = v.new_empty(len(q), q.shape[2], v.shape[1] * v.shape[3])
    for start in range(0, len(q), rows):
        piece = slice(start, start + rows)
        out[piece] = attended(q[piece], k[piece], v[piece])
    return out


def with_contextual(rpe_k: nn.Module | None, logits: torch.Tensor, queries: torch.Tensor) -> torch.Tensor:
    """Logits (B, H, N, M) plus what contextual relative positions give of queries (B, H, N, D), if there are any."""
    return logits if rpe_k is None else logits + rpe_k(queries)


def _softmax(attention: nn.Module, logits: torch.Tensor) -> torch.Tensor:
    """Of logits (H, B, N, M), by the module that timm's Swins have for it where somebody looks into that."""
    module = getattr(attention, "softmax", None)
    if module is None or not _is_hooked(module):
        return logits.softmax(dim=-1)
    maps: torch.Tensor = module(logits.transpose(0, 1))
    return maps.transpose(0, 1)


def eager_on_cpu(tensor: Any) -> bool:
    """Whether operations on this are computed at once, on a CPU: not while it is traced, compiled or exported, where a choice by values or
    by the size of the batch would become part of the program."""
    if not isinstance(tensor, torch.Tensor) or tensor.device.type != "cpu":  # a proxy of torch.fx is none
        return False
    return not (torch.compiler.is_compiling() or torch.jit.is_tracing() or isinstance(tensor.shape[0], torch.SymInt))


def _is_watched(attention: nn.Module) -> bool:
    """Whether maps are recorded by hooks, which must see those of the whole batch, or drawn from."""
    drop = attention.attn_drop
    used = [getattr(attention, name, None) for name in (*ATTENTION_SLOTS, "softmax")] + [drop]
    hooked = any(_is_hooked(part) for part in used if part is not None)
    return hooked or (isinstance(drop, nn.Dropout) and drop.training and drop.p > 0)


def _is_hooked(module: nn.Module) -> bool:
    return any(m._forward_hooks or m._forward_pre_hooks for m in module.modules())
