"""A table of latencies in place of a measurement."""

from __future__ import annotations

import torch

from compressvit.transforms.shrink.latency import LatencyTable, Timed, device_name
from compressvit.transforms.shrink.prices import Prices

CPU = torch.device("cpu")
REST = 0.25  # of the whole, besides blocks


def table_of(model, found, *, order: float = 0.0, batch: int = 1) -> LatencyTable:
    """A table by multiply-accumulates, in which putting a channel in order takes `order` ms."""
    like = {place.path: found[0].path for place in found}
    place, path = found[0], found[0].path
    widths = [4, 8, 16, 32, 64, 128]
    rows = [Timed(kind="linear", of=path, sizes=(a, b), milliseconds=a * b / 1e4) for a in widths for b in widths]
    for kind in ("split", "join"):
        rows += [Timed(kind=kind, of=path, sizes=(width,), milliseconds=order * width) for width in (8, 128)]
    whole = (place.heads, place.head_dim)
    rows += [
        Timed(kind="attention", of=path, sizes=(h, whole[1]), milliseconds=0.1 * h) for h in range(1, whole[0] + 1)
    ]
    rows += [Timed(kind="attention", of=path, sizes=(whole[0], 4), milliseconds=0.1 * whole[0] * 4 / whole[1])]
    rows += [Timed(kind="mlp", of=path, sizes=(width,), milliseconds=1e-4 * width) for width in (8, 128)]
    named = {"device": device_name(CPU), "threads": torch.get_num_threads(), "batch": batch, "dtype": "float32"}
    table = LatencyTable(**named, whole=1.0, like=like, rows=tuple(rows))
    prices = Prices.of(model, found, ("latency",), table)
    parts = sum(prices.part(*part)[0] for part in prices.parts())
    return table.model_copy(update={"whole": float(parts) / (1 - REST)})
