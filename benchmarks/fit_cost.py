"""What a fit of `shrink` costs in forward passes of its images: those that grow with the images, and the algebra that does not.

DINOv2 ViT-S/14 is fitted to half of its parameters and multiply-accumulates with few crops and with many. The line through the CPU seconds
of the two gives what a crop costs (passes through both models, and sums), and what is left without crops (factorisations and products).

    python benchmarks/fit_cost.py --data crops --weights FILE
"""

from __future__ import annotations

import argparse
import copy
import time
from collections.abc import Sequence
from functools import partial

import torch
from shrink_dinov2 import MODEL
from shrink_measures import CPU, of_program

from compressvit import Shrink
from compressvit.data.input import input_config
from compressvit.data.loaders import calibration_batches
from compressvit.transforms.applying import transform_

TOKENS = 48  # of each crop that are summed up, as `compressvit shrink` does


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure two fits and print the line through them."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--data", required=True, help="a folder with train/ and val/, as crop_photographs.py makes it")
    parser.add_argument("--weights", required=True, help="a file of the teacher, in timm's or its own names")
    parser.add_argument("--model", default=MODEL, help="timm's name of the teacher")
    parser.add_argument("--size", type=int, default=224, help="height and width of the crops for the models")
    parser.add_argument("--crops", type=int, nargs=2, default=(32, 96), metavar="N", help="few and many")
    parser.add_argument("--threads", type=int, default=1)
    given = parser.parse_args(arguments)
    torch.set_num_threads(given.threads)
    teacher, data, datasets, _ = of_program(given)
    config = input_config(teacher, data)
    spent = []
    for crops in given.crops:
        images = partial(calibration_batches, datasets, data, config, CPU, images=crops, seed=0)
        student = copy.deepcopy(teacher)
        started = time.process_time()
        transform_(student, [Shrink(budget={"parameters": 0.5, "macs": 0.5})], images, tokens=TOKENS)
        spent.append(time.process_time() - started)
    batches = list(calibration_batches(datasets, data, config, CPU, images=given.crops[0], seed=0))
    with torch.no_grad():
        teacher(batches[0])
        started = time.process_time()
        for batch in batches:
            teacher(batch)
    forward = (time.process_time() - started) / given.crops[0]
    few, many = given.crops
    each = (spent[1] - spent[0]) / (many - few)
    alone = spent[0] - each * few
    print(
        f"fits to {few} and {many} crops: {spent[0]:.0f} and {spent[1]:.0f} CPU s; a forward pass of one: {forward:.3f}"
    )
    print(
        f"a crop: {each / forward:.1f} forward passes; besides: {alone:.0f} CPU s, {alone / forward:.0f} forward passes"
    )


if __name__ == "__main__":
    main()
