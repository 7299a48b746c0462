"""What relations and CKA add where a teacher teaches a smaller ViT of another width, patch size and depth.

The photographs have no labels. Each student starts from the same random weights and is trained for the same CPU time: as many steps as fit
into it, from steps that are measured first, with one schedule over all of them. It is judged by the k-NN accuracy (k 20, T 0.07) of its
class token on Fashion-MNIST and digits.

    python benchmarks/across_architectures.py --data crops --weights FILE --output runs/across_dinov2
    python benchmarks/across_architectures.py --data crops --weights FILE --output runs/across_clip \\
        --model vit_base_patch16_clip_quickgelu_224 --size 64

A finished cell is not trained again; `--table-only` prints what there is.
"""

from __future__ import annotations

import argparse
import itertools
import json
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.console import Console
from shrink_measures import CPU, DRAWS, drawn
from torch import nn

import compressvit
from compressvit.data.input import input_config
from compressvit.data.loaders import eval_loader, train_loader
from compressvit.data.opening import open_data
from compressvit.data.spec import Augment, Data
from compressvit.files import write_json
from compressvit.model.weights import build, load_file
from compressvit.tasks.base import task_of
from compressvit.tasks.neighbours import Neighbours

STUDENT = {"embed_dim": 192, "depth": 6, "num_heads": 3, "num_classes": 0}
NOTHING = {"prediction": {"weight": 0}, "attention_relation": {"weight": 0}, "hidden_relation": {"weight": 0}}
FEATURES = {**NOTHING, "feature": {"weight": 1.0}}
CELLS: dict[str, dict[str, Any] | None] = {
    "untrained": None,
    "features": FEATURES,
    "features_relations": {**FEATURES, "hidden_relation": {"weight": 0.5, "scale": 10.0}},
    "features_cka": {**FEATURES, "cka": {"weight": 0.5}},
    "features_attention": {**FEATURES, "attention_relation": {"weight": 0.5}},
    "relations_cka": {**NOTHING, "hidden_relation": {"weight": 0.5, "scale": 10.0}, "cka": {"weight": 1.0}},
}
PROBE = 6  # steps, of which the first are not counted
SETS = ("fashion_mnist", "digits")


class Batches:
    """A number of training batches, over as many passes of the images as that takes."""

    def __init__(self, loader: Any, count: int):
        self.loader, self.count = loader, count

    def __len__(self) -> int:
        return self.count

    def __iter__(self) -> Iterator[Any]:
        endless = itertools.chain.from_iterable(iter(self.loader) for _ in itertools.count())
        return itertools.islice(endless, self.count)


def trained(cell: str, teacher: nn.Module, data: Data, arguments: argparse.Namespace) -> tuple[nn.Module, dict]:
    """The student of a cell, and how long it was trained."""
    torch.manual_seed(arguments.seed)
    student = build(arguments.student, img_size=arguments.size, patch_size=arguments.patch, **STUDENT)
    losses = CELLS[cell]
    if losses is None:
        return student.eval(), {"steps": 0, "cpu_seconds": 0.0}
    loader = train_loader(open_data(data), data, input_config(student, data), CPU)

    def run(model: nn.Module, steps: int) -> float:
        started = time.process_time()
        compressvit.distill(
            model,
            teacher,
            Batches(loader, steps),
            device="cpu",
            seed=arguments.seed,
            console=Console(quiet=True),
            epochs=1,
            lr=arguments.lr,
            warmup_epochs=0.1,
            weight_decay=0.05,
            layers="auto",
            losses=losses,
        )
        return time.process_time() - started

    probe = build(arguments.student, img_size=arguments.size, patch_size=arguments.patch, **STUDENT)
    fixed = run(probe, 2)
    each = (run(probe, 2 + PROBE) - fixed) / PROBE
    steps = max(8, int((arguments.cpu_seconds - fixed) / each))
    taken = run(student, steps)
    return student.eval(), {"steps": steps, "cpu_seconds": taken, "seconds_a_step": each}


@torch.inference_mode()
def recognised(model: nn.Module, name: str, images: int) -> list[bool]:
    """Whether every test image of a labelled set is given its class by the nearest neighbours of its features."""
    data = Data(name=name, limit_train=2 * images, limit_val=images)
    datasets, config, task = open_data(data), input_config(model, data), task_of(model)
    neighbours, right = Neighbours(), []
    for batch, labels in eval_loader(replace(datasets, validation=datasets.train), data, config, CPU):
        neighbours.index(task.run(model, batch).pooled, labels)
    for batch, labels in eval_loader(datasets, data, config, CPU):
        right += (neighbours.classes(task.run(model, batch).pooled) == labels).tolist()
    return right


def interval(values: list[float]) -> tuple[float, float, float]:
    """The mean, and the ends of its 95 % interval over resampled images."""
    each = np.asarray(values, dtype=float)
    low, high = np.quantile(drawn(len(each), DRAWS) @ each / len(each), (0.025, 0.975))
    return float(each.mean()), float(low), float(high)


def table(output: Path) -> str:
    """Cells in rows: steps, and accuracies with their differences from `features`, image by image."""
    cells = {
        cell: json.loads(path.read_text())
        for cell in ["teacher", *CELLS]
        if (path := output / f"{cell}.json").is_file()
    }
    lines = ["| | steps | CPU s | " + " | ".join(f"k-NN {name} | less `features`" for name in SETS) + " |"]
    lines.append("| --- " * (3 + 2 * len(SETS)) + "|")
    for cell, found in cells.items():
        columns = [cell.replace("_", " + "), f"{found.get('steps', 0):,}", f"{found.get('cpu_seconds', 0):.0f}"]
        for name in SETS:
            own = [100.0 * right for right in found["knn"][name]]
            columns.append("{:.2f} ({:.2f}–{:.2f})".format(*interval(own)))
            base = cells.get("features")
            less = base and [a - 100.0 * b for a, b in zip(own, base["knn"][name], strict=True)]
            columns.append(
                "" if not less or cell == "features" else "{:+.2f} ({:+.2f} to {:+.2f})".format(*interval(less))
            )
        lines.append(f"| {' | '.join(columns)} |")
    return "\n".join(lines) + "\n"


def main() -> None:
    """Train what is not there yet, and print the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", help="a folder of photographs with train/")
    parser.add_argument("--model", default="vit_small_patch14_dinov2", help="the teacher's name in timm")
    parser.add_argument("--weights", help="its file")
    parser.add_argument("--student", default="vit_tiny_patch16_224")
    parser.add_argument("--size", type=int, default=56, help="height and width of the images of both, in pixels")
    parser.add_argument("--patch", type=int, default=8, help="height and width of the student's patches, in pixels")
    parser.add_argument("--batch-size", type=int, default=32)
    parser.add_argument("--lr", type=float, default=1e-3)
    parser.add_argument("--cpu-seconds", type=float, default=900.0, help="of the training of each student")
    parser.add_argument(
        "--images", type=int, default=1000, help="test images of each labelled set; twice as many are in the index"
    )
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--cells", nargs="+", choices=CELLS, default=list(CELLS), metavar="CELL")
    parser.add_argument("--output", type=Path, default=Path("runs/across_architectures"))
    parser.add_argument("--table-only", action="store_true")
    arguments = parser.parse_args()
    if not arguments.table_only:
        if not (arguments.data and arguments.weights):
            parser.error("give --data and --weights")
        torch.set_num_threads(arguments.threads)
        arguments.output.mkdir(parents=True, exist_ok=True)
        data = Data(
            name="images",
            root=arguments.data,
            batch_size=arguments.batch_size,
            augment=Augment(scale=(0.3, 1.0), hflip=0.5),
        )
        teacher = build(arguments.model, img_size=arguments.size, num_classes=0).eval()
        load_file(teacher, arguments.weights, "--weights")
        for cell in ["teacher", *arguments.cells]:
            kept = arguments.output / f"{cell}.json"
            if kept.is_file():
                continue
            model, found = (teacher, {}) if cell == "teacher" else trained(cell, teacher, data, arguments)
            found["knn"] = {name: recognised(model, name, arguments.images) for name in SETS}
            write_json(kept, found)
            print(cell, found.get("steps"), {name: np.mean(right) for name, right in found["knn"].items()}, flush=True)
    print(table(arguments.output))


if __name__ == "__main__":
    main()
