"""Why a fitted student gains little from few images: how far gradients of different images agree, and what one step along them does.

The gradient of 1 − cosine (of the class token and, on average, of the patch tokens; the outputs are features) is taken over two halves of
some training images. Its parts are divided by their root mean square over batches, as Adam does, and each tensor's step is in proportion
to the tensor. One step of several sizes is then made from the student as it is, and the loss is measured on images of the gradient and on
held-out ones.

    compressvit shrink FILE crops --model vit_small_patch14_dinov2 --img-size 224 --to parameters=0.5 macs=0.5 --output RUN
    python benchmarks/gradient_noise.py RUN --weights FILE --data crops
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import compressvit
from compressvit.data.input import input_config
from compressvit.data.loaders import calibration_batches
from compressvit.data.opening import open_data
from compressvit.data.spec import Data
from compressvit.model.stored import read_manifest
from compressvit.model.weights import build, load_file
from compressvit.tasks.base import task_of

BATCH = 16
SIZES = (0.0, 3e-5, 1e-4, 3e-4, 1e-3)  # of a step, in parts of each tensor's root mean square
CPU = torch.device("cpu")

Images = list[tuple[Tensor, Tensor, Tensor]]  # batches, and the teacher's pooled outputs and patches


def loss(model: nn.Module, batch: tuple[Tensor, Tensor, Tensor]) -> Tensor:
    """The mean of 1 − cosine of the class token, and of the patch tokens, added."""
    images, pooled, patches = batch
    found = task_of(model).run(model, images)
    own = 1 - F.cosine_similarity(found.pooled, pooled, dim=-1).mean()
    return own + 1 - F.cosine_similarity(found.patches, patches, dim=-1).mean()


def with_targets(teacher: nn.Module, batches: Sequence[Tensor]) -> Images:
    """Batches of images, and what the teacher makes of them."""
    with torch.inference_mode():
        found = [(images, task_of(teacher).run(teacher, images)) for images in batches]
    return [(images.clone(), outputs.pooled.clone(), outputs.patches.clone()) for images, outputs in found]


def gradients(student: nn.Module, images: Images) -> tuple[list[list[Tensor]], list[Tensor]]:
    """Of every parameter, the mean over the batches with even numbers and over those with odd ones, and the mean square over all."""
    parameters = [p for p in student.parameters() if p.requires_grad]
    halves = [[torch.zeros_like(p) for p in parameters] for _ in range(2)]
    squares = [torch.zeros_like(p) for p in parameters]
    for i, batch in enumerate(images):
        student.zero_grad(set_to_none=True)
        loss(student, batch).backward()
        for mean, square, parameter in zip(halves[i % 2], squares, parameters, strict=True):
            if parameter.grad is not None:
                mean += parameter.grad / len(images[i % 2 :: 2])
                square += parameter.grad.square() / len(images)
    return halves, squares


def cosine(a: Sequence[Tensor], b: Sequence[Tensor], weights: Sequence[Tensor]) -> float:
    """Of two gradients whose parts are divided by `weights`."""
    products = [
        sum((x * y / w).sum().item() for x, y, w in zip(left, right, weights, strict=True))
        for left, right in ((a, b), (a, a), (b, b))
    ]
    return products[0] / (products[1] * products[2]) ** 0.5


@torch.no_grad()
def mean_loss(model: nn.Module, images: Images) -> float:
    """Over batches, each by its number of images."""
    return sum(loss(model, batch).item() * len(batch[0]) for batch in images) / sum(len(batch[0]) for batch in images)


def main() -> None:
    """Print how far gradients agree, and a table of steps."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("run", type=Path, help="a run of `compressvit shrink` on a model without a classifier")
    parser.add_argument("--weights", required=True, help="the teacher's file")
    parser.add_argument("--data", required=True, help="a folder with train/ and val/")
    parser.add_argument("--images", type=int, default=192, help="of the gradient")
    parser.add_argument("--held-out", type=int, default=64)
    parser.add_argument("--seed", type=int, default=1, help="which training images")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    student = compressvit.load(arguments.run / "student")
    manifest = read_manifest(arguments.run / "student")
    teacher = build(manifest.architecture, manifest.args).eval()
    load_file(teacher, arguments.weights, "--weights")
    data = Data(name="images", root=arguments.data, batch_size=BATCH)
    datasets, config = open_data(data), input_config(teacher, data)
    wanted = [(datasets.train, arguments.images, arguments.seed), (datasets.validation, arguments.held_out, 0)]
    train, held_out = (
        with_targets(
            teacher,
            [b[0] for b in calibration_batches(replace(datasets, train=part), data, config, CPU, images=n, seed=seed)],
        )
        for part, n, seed in wanted
    )
    halves, squares = gradients(student, train)
    roots = [square.sqrt() + 1e-3 * square.mean().sqrt() + 1e-30 for square in squares]
    ones = [torch.ones_like(square) for square in squares]
    print(
        f"cosine of the gradients of two halves of {arguments.images} images: {cosine(*halves, ones):.3f}, "
        f"each part in units of its root mean square: {cosine(*halves, [root.square() for root in roots]):.3f}"
    )
    parameters = [p for p in student.parameters() if p.requires_grad]
    start = [p.detach().clone() for p in parameters]
    print(
        "\n| step, in parts of each tensor | loss on images of the gradient | on held-out images |\n| --- | --- | --- |"
    )
    for step in SIZES:
        with torch.no_grad():
            for parameter, old, a, b, root in zip(parameters, start, *halves, roots, strict=True):
                parameter.copy_(old - step * old.square().mean().sqrt() * (a + b) / 2 / root)
        print(f"| {step:g} | {mean_loss(student, train[:4]):.4f} | {mean_loss(student, held_out):.4f} |", flush=True)


if __name__ == "__main__":
    main()
