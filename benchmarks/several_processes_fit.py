"""What several processes make of a fit to calibration images, against one: seconds of it, and whether the students are the same.

Each round shrinks a ViT-S/14 with random weights at 98² to half its parameters on random images, once for every number of processes, with
one thread each. Images take as long as others do; the student is of no use.

    python benchmarks/several_processes_fit.py --processes 1 2 --rounds 3
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator

import timm
import torch

from compressvit import processes
from compressvit.fitting.reference import Reference
from compressvit.fitting.shares import own
from compressvit.model import surgery
from compressvit.transforms import Shrink
from compressvit.transforms.applying import transform_
from compressvit.transforms.shares import Shares

BATCH = 16
CPU = torch.device("cpu")


def fit(images: int, tokens: int | None) -> None:
    """Fit in the processes that run this; the leader prints the seconds, and a checksum of the student."""
    torch.manual_seed(0)
    student = timm.create_model("vit_small_patch14_dinov2", img_size=98, num_classes=0).eval()
    drawn = [torch.randn(BATCH, 3, 98, 98, generator=torch.Generator().manual_seed(i)) for i in range(images // BATCH)]

    def share() -> Iterator[torch.Tensor]:
        yield from own(drawn)

    with processes.joined("cpu"):
        shares = Shares(surgery.deep_copy(student), share, tokens, CPU)
        reference = Reference(surgery.deep_copy(student), share, tokens, CPU, asks=shares.asked)
        started = time.monotonic()
        processes.led_for(lambda: transform_(student, [Shrink(budget={"parameters": 0.5})], reference), [], shares.help)
        if processes.leads():
            values = b"".join(value.numpy().tobytes() for value in student.state_dict().values())
            print(json.dumps({"seconds": time.monotonic() - started, "student": hashlib.sha256(values).hexdigest()}))


def launched(count: int, words: list[str]) -> dict:
    """What the leader of so many processes prints."""
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(count)] if count > 1 else []
    command = [sys.executable, *launcher, __file__, "--inside", *words]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True, env=environment)
    found: dict = json.loads(done.stdout.splitlines()[-1])
    return found


def main() -> None:
    """Run every round, and print the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--processes", type=int, nargs="+", default=[1, 2], help="of which the first is compared with")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--images", type=int, default=320)
    parser.add_argument("--tokens", type=int, default=None, help="of every image that are summed up; all by default")
    parser.add_argument("--inside", action="store_true", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.inside:
        fit(arguments.images, arguments.tokens)
        return
    words = ["--images", str(arguments.images)]
    words += [] if arguments.tokens is None else ["--tokens", str(arguments.tokens)]
    found: dict[int, list[dict]] = {count: [] for count in arguments.processes}
    for _ in range(arguments.rounds):
        for count in arguments.processes:
            found[count].append(launched(count, words))
    first = found[arguments.processes[0]]
    print(f"{torch.__version__}, {os.cpu_count()} cores, {arguments.rounds} rounds, {arguments.images} images")
    print("| processes | seconds | times as fast | student |\n| --- | --- | --- | --- |")
    for count, rounds in found.items():
        ratios = [one["seconds"] / own["seconds"] for one, own in zip(first, rounds, strict=True)]
        spread = f"{statistics.median(ratios):.2f} ({min(ratios):.2f}–{max(ratios):.2f})"
        same = all(own["student"] == first[0]["student"] for own in rounds)
        seconds = statistics.median(own["seconds"] for own in rounds)
        print(f"| {count} | {seconds:.1f} | {spread} | {'the same bits' if same else 'another'} |")


if __name__ == "__main__":
    main()
