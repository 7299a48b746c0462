"""Low rank in its forms: latency and bytes of the dense model, of shared and private low rank kept factored and materialised, and of
low rank alone, as two factors and pivoted, all measured alternately in one run.

    python benchmarks/low_rank_forms.py --model deit_small_patch16_224 --rank 32
"""

from __future__ import annotations

import argparse

import timm
import torch
from rich.console import Console
from rich.table import Table

from compressvit import LORS, LowRank
from compressvit.model import cost
from compressvit.model.backbone import input_size
from compressvit.runs.tables import ratio_text
from compressvit.transforms.applying import compress, materialise


def main() -> None:
    """Build, measure, print."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="deit_small_patch16_224")
    parser.add_argument("--rank", type=int, default=32)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--rounds", type=int, default=30)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    torch.manual_seed(0)
    dense = timm.create_model(arguments.model)
    shared = compress(dense, [LORS(rank=arguments.rank, init="scratch")])
    models = {
        "dense": dense,
        f"shared + private rank {arguments.rank}, factored": shared,
        f"shared + private rank {arguments.rank}, materialised": materialise(shared),
        f"rank {arguments.rank} alone, two factors": compress(dense, [LowRank(rank=arguments.rank, init="scratch")]),
        f"rank {arguments.rank} alone, pivoted": compress(
            dense, [LowRank(rank=arguments.rank, pivoted=True, metric="weights")]
        ),
    }
    size = input_size(dense)
    times = cost.latencies(
        list(models.values()), [size] * len(models), device=torch.device("cpu"), rounds=arguments.rounds, seconds=300
    )
    table = Table(
        title=f"{arguments.model}, one image, {arguments.threads} threads, medians of {arguments.rounds}, measured alternately"
    )
    for column in ("", "bytes on disk", "MACs", "latency", "/ dense"):
        table.add_column(column, justify="left" if not column else "right")
    for i, ((name, model), milliseconds) in enumerate(zip(models.items(), times.medians, strict=True)):
        row = cost.cost(model, size)
        table.add_row(name, f"{row.bytes:,}", f"{row.macs:,}", f"{milliseconds:.2f} ms", ratio_text(times.ratio(i)))
    Console().print(table)


if __name__ == "__main__":
    main()
