"""Top-1 on Fashion-MNIST before any training, over budgets, share groups and metrics: what the defaults of `low_rank` are chosen by.

Needs the teacher of a finished run of `fashion_mnist_low_rank` (or `fashion_mnist_mini_vit`).

    python benchmarks/one_shot.py --teacher runs/fashion_mnist_low_rank/teacher
"""

from __future__ import annotations

import argparse
import copy
import time
from functools import partial

import torch

from compressvit import LORS, LowRank
from compressvit.artifacts import artifact
from compressvit.data.input import Side, input_config
from compressvit.data.loaders import calibration_batches, eval_loader
from compressvit.data.opening import open_data
from compressvit.errors import UserError
from compressvit.fitting.reference import Reference
from compressvit.model.ties import count_parameters
from compressvit.recipe.recipe import load_recipe
from compressvit.training.evaluate import evaluate
from compressvit.transforms.applying import transform_

CPU = torch.device("cpu")


def main() -> None:
    """Compress, evaluate, print a Markdown table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--teacher", required=True, help="folder of the teacher's artifact")
    parser.add_argument("--budgets", type=float, nargs="+", default=[0.55, 0.35, 0.2])
    parser.add_argument("--share", type=int, nargs="+", default=[1, 2, 3, 6, 12], help="1 for low rank alone")
    parser.add_argument("--calibration", type=int, default=512, help="training images")
    parser.add_argument("--images", type=int, default=5000, help="test images")
    parser.add_argument("--one-by-one", action="store_true", help="sequential: false, each layer for itself")
    arguments = parser.parse_args()

    recipe = load_recipe("fashion_mnist_low_rank", [f"data.limit_val={arguments.images}"])
    datasets = open_data(recipe.data)
    teacher = artifact.load(arguments.teacher)
    config = input_config(teacher, recipe.data)
    batches = partial(
        calibration_batches, datasets, recipe.data, config, CPU, images=arguments.calibration, seed=recipe.seed
    )
    reference = Reference(copy.deepcopy(teacher), batches)

    def top1(model: torch.nn.Module) -> float:
        return evaluate(Side(model.eval(), config), eval_loader(datasets, recipe.data, config, CPU), CPU)["top1"]

    print(f"teacher: {count_parameters(teacher):,} parameters, top-1 {top1(teacher):.2f} %\n")
    print(f"| share | metric | {' | '.join(f'{b:.0%} of the parameters' for b in arguments.budgets)} |")
    print(f"| --- | --- |{' --- |' * len(arguments.budgets)}")
    for share in arguments.share:
        for metric in ("outputs", "inputs", "weights"):
            cells = []
            for budget in arguments.budgets:
                options = {"budget": {"parameters": budget}, "metric": metric, "sequential": not arguments.one_by_one}
                spec = LowRank(**options) if share == 1 else LORS(share=share, **options)
                student, started = copy.deepcopy(teacher), time.time()
                try:
                    transform_(student, [spec], reference)
                except UserError:  # sharing so little leaves more than the budget
                    cells.append("out of reach")
                    continue
                seconds = time.time() - started
                cells.append(f"{top1(student):.2f} ({seconds:.0f} s)")
            print(f"| {share} | {metric} | {' | '.join(cells)} |", flush=True)


if __name__ == "__main__":
    main()
