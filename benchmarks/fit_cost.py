"""What a fit without training costs, in forward passes: of each crop, and of the algebra that does not depend on their number.

Makes the student at 50 % of `shrink_dinov2.py` from two numbers of crops, and measures the CPU time of the teacher's forward passes over
the larger number before and after each fit. What the further crops took, in forward passes of them, is the cost of a crop; the rest of the
time is the algebra (factorisations, solves, the search for widths), and what is done once.

    python benchmarks/fit_cost.py --data crops --weights FILE --threads 1
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from shrink_cells import CELLS
from shrink_dinov2 import MODEL, student_of
from shrink_measures import CPU, of_program
from torch import nn

from compressvit.data.input import input_config
from compressvit.data.loaders import calibration_batches


def forward_seconds(teacher: nn.Module, images: Callable[[], Any]) -> float:
    """CPU seconds of the teacher's forward passes over some crops, without reading them."""
    taken = 0.0
    with torch.inference_mode():
        for batch in images():
            started = time.process_time()
            teacher(batch)
            taken += time.process_time() - started
    return taken


def costs(fits: dict[int, float], forwards: float, rows: int) -> tuple[float, float]:
    """What a further crop costs in forward passes of it, and CPU seconds of what does not depend on their number.

    Args:
        fits: CPU seconds of a fit, by its crops: two.
        forwards: CPU seconds of forward passes over so many crops.
        rows: so many.
    """
    (few, less), (many, more) = sorted(fits.items())
    each = (more - less) / (many - few)
    return each / (forwards / rows), less - few * each


def main(given: Sequence[str] | None = None) -> None:
    """Measure, and print a line for each fit and the two figures."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", required=True, help="a folder with train/ and val/, as crop_photographs.py makes it")
    parser.add_argument("--weights", required=True, help="a file of the teacher, in timm's or its own names")
    parser.add_argument("--model", default=MODEL, help="timm's name of the teacher (%(default)s)")
    parser.add_argument("--size", type=int, default=224, help="height and width of the crops (%(default)s)")
    parser.add_argument("--crops", type=int, nargs=2, default=[128, 512], help="of the two fits (128 512)")
    parser.add_argument("--cell", choices=CELLS, default="all_50", help="of shrink_dinov2.py (%(default)s)")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    arguments = parser.parse_args(given)
    if len(set(arguments.crops)) < 2 or min(arguments.crops) < 1:
        parser.error(
            f"--crops {' '.join(map(str, arguments.crops))}: give two different numbers of crops, e.g. 128 512"
        )
    torch.set_num_threads(arguments.threads)
    teacher, data, datasets, _ = of_program(arguments)
    config, cell = input_config(teacher, data), CELLS[arguments.cell]

    def crops(count: int) -> Callable[[], Any]:
        return partial(calibration_batches, datasets, data, config, CPU, images=count, seed=cell.seed)

    most = max(arguments.crops)
    times, fits = [forward_seconds(teacher, crops(most))], {}
    for count in sorted(arguments.crops):
        _, took, _ = student_of(cell, teacher, crops(count))
        times.append(forward_seconds(teacher, crops(most)))
        fits[count] = took["cpu_seconds"]
        print(f"{count} crops: {fits[count]:.0f} CPU s, {took['minutes']:.1f} minutes", flush=True)
    forwards = statistics.median(times)
    each, once = costs(fits, forwards, most)
    spread = ", ".join(f"{seconds:.0f}" for seconds in times)
    print(f"forward passes of {most} crops: {forwards:.0f} CPU s ({spread})")
    print(
        f"a crop of the fit costs {each:.1f} forward passes of it; once: {once:.0f} CPU s, as {once / forwards * most:.0f} of them"
    )


if __name__ == "__main__":
    main()
