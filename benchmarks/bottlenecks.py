"""Where the first bottleneck of a distillation lies on 1, 8 and 64 GPUs: loading images, computing, or averaging gradients.

The seconds that an image takes to be read, decoded and augmented as the recipe says are measured here, on one core. What models
compute and how many gradients there are comes from the recipe's plan. What a GPU and a network do is not measured but assumed, and given
by options: the table says what follows. Computing counts 2 operations for a multiply-accumulate, the student three times (forward, and
twice as much backward) and its teacher once; gradients of float32 are averaged in a ring while the backward pass runs.

    python benchmarks/bottlenecks.py mini_swin_b --data FOLDER --tflops 400 --cores 16 --network 25
"""

from __future__ import annotations

import argparse
import time
from itertools import islice

import torch

from compressvit.data.loaders import train_loader
from compressvit.recipe.recipe import load_recipe
from compressvit.runs.job import prepare
from compressvit.runs.plan import plan_job


def seconds_to_load(loader: object, batches: int) -> float:
    """Of one image, in this process; the first batch is not counted."""
    images = 0
    started = time.process_time()
    for number, (pixels, _) in enumerate(islice(iter(loader), batches + 1)):  # type: ignore[call-overload]
        if number == 0:
            started = time.process_time()
        else:
            images += len(pixels)
    return (time.process_time() - started) / images


def main() -> None:
    """Measure, and print the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("recipe")
    parser.add_argument("overrides", nargs="*", default=[], metavar="key=value")
    parser.add_argument("--data", required=True, help="a folder of pictures, as data.name=images takes it")
    parser.add_argument(
        "--tflops", type=float, default=400.0, help="what a GPU computes of these models a second, in 10^12 operations"
    )
    parser.add_argument("--cores", type=float, default=16.0, help="cores for each GPU")
    parser.add_argument("--network", type=float, default=25.0, help="what a GPU sends a second, in 10^9 bytes")
    parser.add_argument("--gpus", type=int, nargs="+", default=[1, 8, 64])
    parser.add_argument("--batches", type=int, default=4, help="batches of 32 that are loaded for the measurement")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    overrides = ["data.name=images", f"data.root={arguments.data}", "data.num_workers=0", *arguments.overrides]
    recipe = load_recipe(arguments.recipe, overrides)
    job = prepare(recipe, "cpu")
    plan, batch = plan_job(job), recipe.data.batch_size
    loader = train_loader(job.datasets, recipe.data, job.student.input, job.device, batch_size=32)
    load = seconds_to_load(loader, arguments.batches) / arguments.cores
    compute = 2 * (3 * plan.student.macs + plan.teacher.macs) / (arguments.tflops * 1e12)
    print(
        f"{arguments.recipe}, batches of {batch} for each GPU; measured: {1e3 * load * arguments.cores:.2f} ms of a core for an image of "
        f"{job.student.input.height}×{job.student.input.width}. Assumed: {arguments.tflops:g} TFLOPS, {arguments.cores:g} cores and "
        f"{arguments.network:g} GB/s for each GPU"
    )
    print("| GPUs | loading, µs an image and GPU | computing | averaging | first bottleneck | images/s |")
    print("| --- | --- | --- | --- | --- | --- |")
    for count in arguments.gpus:
        average = 2 * (count - 1) / count * 4 * plan.student.parameters / (arguments.network * 1e9) / batch
        times = {"loading": load, "computing": compute, "averaging": average}
        slowest = max(times, key=lambda name: times[name])
        each = " | ".join(f"{1e6 * value:.0f}" for value in times.values())
        print(f"| {count} | {each} | {slowest} | {count / times[slowest]:,.0f} |")


if __name__ == "__main__":
    main()
