"""Whether memory and open files stay as they are over many epochs, evaluations, checkpoints and diagnostics, and over many runs.

    python benchmarks/soak.py --minutes 60 --output soak

Runs follow each other in this process, as those of a sweep do; two workers read the images of every second one from files.
Every second the memory of the process (RSS), its open files and its threads are noted. After the first two fifths of the
time, in which caches fill, the medians of the third and of the last fifth are compared: `BOUNDS` says how much more there
may be. Exit code 1 where there is more.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import sys
import tempfile
import threading
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import yaml
from PIL import Image
from rich.console import Console

import compressvit
from compressvit.files import write_json

MEASURES = ("rss_mib", "files", "threads")
BOUNDS = {"rss_mib": 24.0, "files": 2.0, "threads": 2.0}
EPOCHS = 12
RECIPE = f"""\
teacher:
  model: vit_tiny_patch16_224
  weights: train
  args: {{img_size: 8, patch_size: 4, in_chans: 1, embed_dim: 16, depth: 2, num_heads: 2}}
  finetune: {{epochs: {EPOCHS}, log_every: 1}}
data: {{name: digits, batch_size: 16, limit_train: 64, limit_val: 32}}
diagnostics: [cka: {{epochs: [0, 4, 8]}}, gradients: {{}}]
steps: [multiplex: {{share: 2}}, distill: {{epochs: {EPOCHS}, log_every: 1, ema: 0.9, keep: best}}]
"""


def now() -> dict[str, float]:
    """The measures of this process; those that the system does not tell are 0."""
    found = dict.fromkeys(MEASURES, 0.0)
    status = Path("/proc/self/status")
    if status.is_file():
        lines = dict(line.split(":", 1) for line in status.read_text().splitlines() if ":" in line)
        found = {
            "rss_mib": int(lines["VmRSS"].split()[0]) / 1024,
            "files": float(len(os.listdir("/proc/self/fd"))),
            "threads": float(lines["Threads"]),
        }
    return found


class Samples(threading.Thread):
    """Notes the measures every so many seconds."""

    def __init__(self, every: float = 1.0):
        super().__init__(daemon=True)
        self.every, self.rows, self.ended = every, list[dict[str, float]](), threading.Event()
        self.began = time.monotonic()

    def run(self) -> None:
        while not self.ended.wait(self.every):
            self.rows.append({"seconds": round(time.monotonic() - self.began, 1), **now()})


def fifths(rows: Sequence[dict[str, float]], measure: str) -> list[float]:
    """The median of a measure in every fifth of the rows."""
    values = [row[measure] for row in rows]
    parts = [values[len(values) * i // 5 : len(values) * (i + 1) // 5] for i in range(5)]
    return [statistics.median(part) for part in parts if part]


def grown(rows: Sequence[dict[str, float]]) -> dict[str, float]:
    """Of the measures that have grown by more than their bound from the third fifth to the last one: by how much."""
    medians = {measure: fifths(rows, measure) for measure in MEASURES}
    found = {measure: parts[4] - parts[2] for measure, parts in medians.items() if len(parts) == 5}
    return {measure: more for measure, more in found.items() if more > BOUNDS[measure]}


def pictures(folder: Path) -> Path:
    """A folder of classes with pictures of noise."""
    draw = np.random.default_rng(0)
    for split, count in (("train", 16), ("val", 8)):
        for kind in range(4):
            (folder / split / str(kind)).mkdir(parents=True)
            for number in range(count):
                pixels = draw.integers(0, 256, (12, 12), dtype=np.uint8)
                Image.fromarray(pixels).save(folder / split / str(kind) / f"{number}.png")
    return folder


def recipe(number: int, root: Path) -> dict[str, Any]:
    """Of the run of that number."""
    content: dict[str, Any] = {**yaml.safe_load(RECIPE), "seed": number}
    if number % 2:
        content["data"] = {"name": "folder", "root": str(root), "batch_size": 16, "num_workers": 2}
    return content


def soak(minutes: float, work: Path) -> tuple[int, list[dict[str, float]]]:
    """Run after run for so many minutes; how many there were, and what was noted."""
    root, samples, runs = pictures(work / "pictures"), Samples(min(1.0, minutes)), 0
    samples.start()
    while runs < 2 or time.monotonic() - samples.began < 60 * minutes:
        # one folder, so that the disk does not fill either
        compressvit.apply(
            recipe(runs, root), work / "run", overwrite=runs > 0, console=Console(quiet=True), device="cpu"
        )
        runs += 1
    samples.ended.set()
    samples.join()
    return runs, samples.rows


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=60.0)
    parser.add_argument("--output", type=Path, help="a folder for soak.json: every row")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as work:
        runs, rows = soak(args.minutes, Path(work))
    more = grown(rows)
    print(f"{runs} runs, {runs * 2 * EPOCHS} epochs in {rows[-1]['seconds']:.0f} s; medians of fifths of the time")
    for measure in MEASURES:
        print(f"{measure:8} {'  '.join(f'{value:8.1f}' for value in fifths(rows, measure))}")
    if args.output is not None:
        args.output.mkdir(parents=True, exist_ok=True)
        write_json(args.output / "soak.json", {"runs": runs, "rows": rows, "grown": more})
    if more:
        print(f"grown by more than allowed ({json.dumps(BOUNDS)}): {json.dumps(more)}")
    return 1 if more else 0


if __name__ == "__main__":
    sys.exit(main())
