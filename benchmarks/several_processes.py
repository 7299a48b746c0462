"""What several processes make of a run, against one with the same batches of all together: seconds of a step, and how far weights differ.

Each round trains the same student (a teacher with random weights and labels of digits, float32) once for every number of processes,
with one thread each. A step is timed by the rows of `metrics.jsonl`, from the first that is written to the last.

    python benchmarks/several_processes.py --processes 1 2 4 --rounds 3
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

import torch
import yaml
from safetensors.torch import load_file

BATCH = 64  # images of all processes together


def recipe(size: int, width: int, depth: int, steps: int, optimizer: str) -> dict:
    """A fine-tuning of a model made for the purpose."""
    args = {"img_size": size, "patch_size": 8, "embed_dim": width, "depth": depth, "num_heads": width // 32}
    training = {
        "epochs": 100,
        "max_steps": steps,
        "log_every": 1,
        "evaluate_every": 100,
        "optimizer": optimizer,
        "lr": 1e-3,
    }
    return {
        "teacher": {"model": "vit_tiny_patch16_224", "weights": "random", "args": args},
        "data": {"name": "digits"},
        "steps": [{"finetune": training}],
    }


def trained(content: dict, count: int, folder: Path) -> float:
    """Seconds of a step in a run of so many processes."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    file = folder.parent / "recipe.yaml"
    file.write_text(yaml.safe_dump(content))
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(count)] if count > 1 else []
    words = ["-m", "compressvit", "apply", str(file), f"data.batch_size={BATCH // count}", "--output", str(folder)]
    command = [sys.executable, *launcher, *words, "--device", "cpu", "--no-report"]
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL, env={**os.environ, "OMP_NUM_THREADS": "1"})
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    times = [row["time"] for row in rows if row["kind"] == "train"]
    return (times[-1] - times[0]) / (len(times) - 1)


def difference(one: Path, other: Path) -> float:
    """The largest difference of a weight, relative to the largest of its tensor."""
    ours, theirs = (load_file(folder / "student" / "model.safetensors") for folder in (one, other))
    worst = 0.0
    for name, value in ours.items():
        if value.is_floating_point() and (most := float(value.abs().max())):
            worst = max(worst, float((value - theirs[name]).abs().max()) / most)
    return worst


def main() -> None:
    """Run every round, and print the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "--processes", type=int, nargs="+", default=[1, 2, 4], help="of which the first is compared with"
    )
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=21)
    parser.add_argument("--size", type=int, default=64, help="height and width of the images, in pixels")
    parser.add_argument("--width", type=int, default=192)
    parser.add_argument("--depth", type=int, default=6)
    parser.add_argument(
        "--optimizer", default="sgd", help="of timm; adamw takes other ways where a gradient is nearly 0"
    )
    arguments = parser.parse_args()
    content = recipe(arguments.size, arguments.width, arguments.depth, arguments.steps, arguments.optimizer)
    first, *others = arguments.processes
    seconds: dict[int, list[float]] = {count: [] for count in arguments.processes}
    apart: dict[int, float] = {}
    with tempfile.TemporaryDirectory() as scratch:
        for number in range(arguments.rounds):
            folder = Path(scratch) / str(number)
            for count in arguments.processes:
                seconds[count].append(trained(content, count, folder / str(count) / "run"))
            for count in others:
                apart[count] = difference(folder / str(first) / "run", folder / str(count) / "run")
    print(
        f"{torch.__version__}, {os.cpu_count()} cores, {arguments.rounds} rounds of {arguments.steps - 1} steps of {BATCH} images"
    )
    print("| processes | seconds a step | steps in the time of one | weights differ |\n| --- | --- | --- | --- |")
    for count in arguments.processes:
        ratios = [one / own for one, own in zip(seconds[first], seconds[count], strict=True)]
        median = f"{statistics.median(ratios):.2f} ({min(ratios):.2f}–{max(ratios):.2f})"
        differ = f"{apart[count]:.1e}" if count in apart else "–"
        print(f"| {count} | {statistics.median(seconds[count]):.3f} | {median} | {differ} |")


if __name__ == "__main__":
    main()
