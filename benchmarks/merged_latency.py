"""What adapters cost at inference, as they are and merged, on several backbones and batch sizes (RepAdapter's table of latencies).

RepAdapter merges to the backbone itself; AdaptFormer, which does not merge, stands beside it. Weights are random and adapters moved off
the identity: times do not depend on values. All variants of a backbone take turns in one process; a ratio is to the backbone of the same
round, and the median of the ratios is printed with its 99 % interval.

    python benchmarks/merged_latency.py --threads 1
    python benchmarks/merged_latency.py --threads 1 --models vit_small_patch16_224 --batches 1 16
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from typing import Any

import timm
import torch
from runtimes import moved
from shrink_dinov2 import with_interval
from shrink_measures import CPU
from torch import nn

import compressvit
from compressvit import AdaptFormer, RepAdapter, compress
from compressvit.model import cost

MODELS = (
    "vit_small_patch16_224",
    "swin_tiny_patch4_window7_224",
    "convnext_tiny",
    "vit_base_patch16_clip_quickgelu_224",
)
BACKBONE, MERGED = "backbone", "RepAdapter, merged"
ADAPTERS: dict[str, Any] = {"AdaptFormer": AdaptFormer(width=64), "RepAdapter": RepAdapter(width=8)}


def variants(name: str) -> dict[str, nn.Module]:
    """The backbone, and what adapters make of it, by name."""
    torch.manual_seed(0)
    found = {BACKBONE: timm.create_model(name, num_classes=0).eval()}
    for adapter, spec in ADAPTERS.items():
        found[adapter] = moved(compress(found[BACKBONE], [spec]))
    found[MERGED] = compressvit.merge(found["RepAdapter"]).eval()
    return found


def largest_difference(found: dict[str, nn.Module], size: tuple[int, int, int]) -> float:
    """Of the merged model's outputs from those of the adapted one, relative to the largest of these."""
    images = torch.randn(2, *size, generator=torch.Generator().manual_seed(0))
    with torch.inference_mode():
        ours, theirs = found[MERGED](images), found["RepAdapter"](images)
    return float((ours - theirs).abs().max() / theirs.abs().max())


def main(given: Sequence[str] | None = None) -> None:
    """Measure, and print a row for each backbone, batch size and adapter."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--models", nargs="+", default=MODELS, metavar="MODEL", help="timm's names (%(default)s)")
    parser.add_argument("--batches", nargs="+", type=int, default=(1, 16, 64), help="images at once (%(default)s)")
    parser.add_argument("--rounds", type=int, default=20, help="(%(default)s)")
    parser.add_argument("--seconds", type=float, default=300.0, help="at most, of a backbone and batch (%(default)s)")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    arguments = parser.parse_args(given)
    torch.set_num_threads(arguments.threads)
    names = [*ADAPTERS, MERGED]
    lines = [f"| backbone | images | {BACKBONE} | {' | '.join(names)} |", f"|{' --- |' * (3 + len(names))}"]
    for name in arguments.models:
        found = variants(name)
        size = found[BACKBONE].pretrained_cfg["input_size"]
        print(f"{name}: merged and adapted differ by {largest_difference(found, size):.1e}", flush=True)
        for batch in arguments.batches:
            times = cost.latencies(
                list(found.values()),
                [size] * len(found),
                device=CPU,
                batch=batch,
                rounds=arguments.rounds,
                seconds=arguments.seconds,
            )
            ratios = [times.ratio(list(found).index(one), 0) for one in names]
            texts = [with_interval((middle, low, high), 2) for low, middle, high in ratios]
            lines.append(f"| {name} | {batch} | {times.medians[0]:.1f} ms | {' | '.join(texts)} |")
            print(lines[-1], flush=True)
    print(f"\n{cost.threads_text()}; ratios to the backbone\n")
    print("\n".join(lines))


if __name__ == "__main__":
    main()
