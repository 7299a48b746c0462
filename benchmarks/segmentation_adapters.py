"""Adapters under a segmenter: a linear head alone, RepAdapter, LoRA and full fine-tuning, also on a backbone of half the size.

For every seed, on one set of pictures with masks of classes: a linear head on a frozen pretrained ViT; RepAdapter, LoRA and full
fine-tuning with such a head, trained as long; then `shrink` makes half of the trained head's backbone, without training, and the same
four train it on.
Prints the hours that it will take, from measured steps, before it starts; a finished cell is not run again; `--hours` ends it before the
first cell that would exceed them. Writes `cells.json` and `table.md` after every cell.

    python benchmarks/scenes_as_masks.py SCENES MASKS
    python benchmarks/segmentation_adapters.py --data MASKS --backbone FILE --output runs/segmentation_adapters --hours 6
    python benchmarks/segmentation_adapters.py --output runs/segmentation_adapters --table-only

Rates are fixed and not searched for: 1e-2 for the head alone, 1e-3 with adapters, 1e-3 and a twentieth of it for the backbone in full
fine-tuning; a tenth of these for what goes on from a trained head.
"""

from __future__ import annotations

import argparse
import copy
import json
import shutil
import statistics
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import yaml
from detector_runs import difference_text
from minivit_ablation import run
from resumable import seconds_of
from rich.console import Console

from compressvit.artifacts import artifact
from compressvit.data.loaders import eval_loader
from compressvit.data.opening import open_data
from compressvit.files import write_json, write_text
from compressvit.model.weights import build
from compressvit.recipe.recipe import parse_recipe
from compressvit.recipe.shipped import find_recipe
from compressvit.runs.evaluate import trained_side
from compressvit.runs.files import Figures
from compressvit.tasks.base import task_of
from compressvit.tasks.overlap import Overlap, on_picture, sampled
from compressvit.training.evaluate import evaluate

RECIPE = "segmentation_dinov2_s"
LINEAR, HALF = "linear", "half"
COUNTS = "counts.pt"  # of a cell's pixels, (images, 3, classes)
ADAPTERS: dict[str, list[dict[str, Any]]] = {
    LINEAR: [{"freeze": {"train": "head"}}],
    "repadapter": [{"repadapter": {"width": 8, "scale": 1.0}}],
    "lora": [{"lora": {"rank": 8}}],
    "full": [],
}
NAMES = {LINEAR: "linear head alone", "repadapter": "RepAdapter", "lora": "LoRA", "full": "full fine-tuning"}
RATES = {
    LINEAR: (1e-2, 0.0),
    "repadapter": (1e-3, 1.0),
    "lora": (1e-3, 1.0),
    "full": (1e-3, 0.05),
}  # and the backbone's share of it
ON = 0.1  # of a rate, for what goes on from a trained head


@dataclass(frozen=True)
class Cell:
    """A row of the table.

    Attributes:
        method: of `ADAPTERS`; None: `shrink` and no training.
        half: of the shrunken backbone.
    """

    method: str | None
    half: bool = False

    @property
    def text(self) -> str:
        """What the row says."""
        return NAMES[self.method] if self.method else "as `shrink` makes it"


CELLS = {
    **{name: Cell(name) for name in ADAPTERS},
    HALF: Cell(None, half=True),
    **{f"{HALF}_{name}": Cell(name, half=True) for name in ADAPTERS},
}


def needs(name: str) -> list[str]:
    """The cells that come before one, of the same seed."""
    return [] if not CELLS[name].half else [LINEAR] if name == HALF else [LINEAR, HALF]


@dataclass(frozen=True)
class Benchmark:
    """Where cells are run, and with what: the recipe of the linear head."""

    base: dict[str, Any]
    output: Path

    def folder(self, name: str, seed: int) -> Path:
        """The run folder of a cell."""
        return self.output / f"{name}_seed{seed}"

    def recipe(self, name: str, seed: int) -> dict[str, Any]:
        """The recipe of a cell."""
        cell, content = CELLS[name], copy.deepcopy(self.base)
        training = content["teacher"].pop("finetune")
        content |= {"seed": seed, "steps": []}
        if not cell.half:
            content["teacher"]["weights"] = "random"
        else:
            trained = str(self.folder(LINEAR, seed) / "student")
            content["teacher"] = {"model": "segmenter", "weights": trained}
        if cell.method is None:
            content["steps"] = [{"shrink": {"budget": {"parameters": 0.5, "macs": 0.5}}}]
            content["calibration"] = {"images": 256, "tokens": 48}
            return content
        if cell.half:
            content["student"] = {"weights": str(self.folder(HALF, seed) / "student")}
        rate, backbone = RATES[cell.method]
        own = {"lr": rate * (ON if cell.half else 1.0), "backbone_lr": backbone, "evaluate_every": training["epochs"]}
        content["steps"] = [*ADAPTERS[cell.method], {"finetune": {**training, **own}}]
        return content

    def finished(self, name: str, seed: int) -> bool:
        """Whether a cell need not be run again."""
        return (self.folder(name, seed) / COUNTS).is_file()

    def cell(self, name: str, seed: int) -> dict[str, Any]:
        """Run a cell unless it is finished; mIoU and accuracy in percent, parameters, those that were trained, MACs, minutes."""
        folder, text = self.folder(name, seed), yaml.safe_dump(self.recipe(name, seed), sort_keys=False)
        results = run(text, folder, Console(quiet=True))
        if not self.finished(name, seed):
            torch.save(counts(folder / "student", text), folder / COUNTS)
        shutil.rmtree(folder / "checkpoints", ignore_errors=True)
        student = {key: results["student"][key] for key in ("miou", "pixel_accuracy", "parameters", "macs")}
        figures = Figures.model_validate(results["student"])
        trained = (figures.trained_body or 0) + (figures.trained_head or 0)
        return {**student, "trained": trained, "minutes": results["seconds"] / 60}

    def counts(self, name: str, seed: int) -> torch.Tensor:
        """Pixels of every held-out picture, (images, 3, classes)."""
        return torch.load(self.folder(name, seed) / COUNTS, weights_only=True)


def counts(student: Path, text: str) -> torch.Tensor:
    """Pixels of every class that a trained segmenter finds, that are there and that are both, by held-out picture."""
    model, data = artifact.load(student), parse_recipe(text).data
    side, device = trained_side(model, data, ()), torch.device("cpu")
    overlap = Overlap(model.num_classes)

    def note(images: torch.Tensor, targets: Any, outputs: Any, expected: Any) -> None:
        for truth, logits in zip(targets, outputs, strict=True):
            overlap.add(on_picture(logits, tuple(truth.shape)), truth)

    evaluate(side, eval_loader(open_data(data), data, side.input, device), device, task=task_of(model), watch=note)
    return overlap.counts()


# ----------------------------------------------------------------------------------------------------------- what it takes


def minutes(benchmark: Benchmark, name: str, train: int, held_out: int) -> float:
    """Minutes of a cell, from the faster of two training steps and of two forward passes."""
    cell, data = CELLS[name], benchmark.base["data"]
    batch, epochs = data["batch_size"], benchmark.base["teacher"]["finetune"]["epochs"]
    model: Any = build("segmenter", {**benchmark.base["teacher"]["args"], "num_classes": data["num_classes"]})
    size = model.backbone.patch_embed.img_size
    images = torch.randn(batch, 3, *size, generator=torch.Generator().manual_seed(0))
    model.backbone.requires_grad_(cell.method == "full")

    def forward() -> None:
        with torch.inference_mode():
            model.eval()(images)

    def step() -> None:
        given = images.clone().requires_grad_(
            cell.method not in (LINEAR, None)
        )  # adapters pass gradients back through all blocks
        model.train()(given).float().mean().backward()

    of_forward, of_step = min(seconds_of(forward) for _ in range(2)), min(seconds_of(step) for _ in range(2))
    if cell.method is None:
        return 15 * 256 / batch * of_forward / 60  # about so many forward passes of its images
    share = 0.5 if cell.half else 1.0
    evaluations = 4 if cell.half else 3  # before and after training, at the end, and of the teacher it started from
    return share * (epochs * (train // batch) * of_step + evaluations * held_out / batch * of_forward) / 60


# ------------------------------------------------------------------------------------------------------------------ tables


def interval(samples: Sequence[torch.Tensor]) -> tuple[float, float]:
    """The 95 % interval of the mean over seeds, for samples of pictures by seed, the same pictures in each."""
    rest = torch.stack(list(samples)).mean(0)[1:]
    low, high = rest[~rest.isnan()].quantile(torch.tensor([0.025, 0.975], dtype=rest.dtype)).tolist()
    return low, high


def summary(benchmark: Benchmark, done: Mapping[tuple[str, int], Mapping[str, Any]]) -> dict[str, Any]:
    """Every finished cell: its figures by seed, their interval, and its difference from the linear head on the same backbone."""
    samples = {cell: sampled(benchmark.counts(*cell))["miou"] for cell in done}
    content: dict[str, Any] = {}
    for name, cell in CELLS.items():
        seeds = [seed for other, seed in done if other == name]
        if not seeds:
            continue
        content[name] = {
            "seeds": {str(seed): done[name, seed] for seed in seeds},
            "interval_over_images": interval([samples[name, seed] for seed in seeds]),
        }
        other = f"{HALF}_{LINEAR}" if cell.half else LINEAR
        pairs = [seed for seed in seeds if (other, seed) in done]
        if name != other and pairs:
            each = [samples[name, seed] - samples[other, seed] for seed in pairs]
            content[name]["difference"] = {
                "from": other,
                "seeds": pairs,
                "mean": statistics.mean(float(one[0]) for one in each),
                "deviation_of_seeds": statistics.stdev(float(one[0]) for one in each) if len(pairs) > 1 else None,
                "interval_over_images": interval(each),
            }
    return content


def table(content: Mapping[str, Any]) -> str:
    """The cells in Markdown, a table for each backbone."""
    lines = []
    for half, title in ((False, "the pretrained backbone"), (True, "its half, by `shrink`")):
        rows = [_row(CELLS[name], entry) for name, entry in content.items() if CELLS[name].half == half]
        if rows:
            heads = "trained | mIoU, mean [95 % over images] (each seed) | accuracy of pixels | less the linear head ± seeds | minutes"
            lines += [f"| {title} | {heads} |", "| --- | --- | --- | --- | --- | --- |", *rows, ""]
    return "\n".join(lines)


def _row(cell: Cell, entry: Mapping[str, Any]) -> str:
    seeds = list(entry["seeds"].values())
    each, (low, high) = [seed["miou"] for seed in seeds], entry["interval_over_images"]
    columns = [
        cell.text,
        f"{seeds[0]['trained']:,}" if cell.method else "0",
        f"{statistics.mean(each):.2f} [{low:.1f}, {high:.1f}] ({', '.join(f'{value:.1f}' for value in each)})",
        f"{statistics.mean(seed['pixel_accuracy'] for seed in seeds):.2f}",
        difference_text(entry.get("difference")),
        f"{statistics.mean(seed['minutes'] for seed in seeds):.0f}",
    ]
    return f"| {' | '.join(columns)} |"


def write(benchmark: Benchmark, seeds: Sequence[int]) -> None:
    """Write `cells.json` and `table.md` of what is finished."""
    cells = [(name, seed) for seed in seeds for name in CELLS]
    done = {cell: benchmark.cell(*cell) for cell in cells if benchmark.finished(*cell)}
    content = summary(benchmark, done)
    write_json(benchmark.output / "cells.json", {"base": benchmark.base, "cells": content}, indent=1)
    write_text(benchmark.output / "table.md", table(content))


# ------------------------------------------------------------------------------------------------------------- the program


def base_of(arguments: argparse.Namespace) -> dict[str, Any]:
    """The recipe of the linear head, on this data."""
    base = yaml.safe_load(find_recipe(RECIPE).read_text(encoding="utf-8"))
    steps = base.pop("steps")
    base["data"] |= {"root": arguments.data, "limit_train": arguments.limit, "limit_val": arguments.limit_val}
    classes = Path(arguments.data) / "classes.txt"
    base["data"] |= {"classes": str(classes)} if classes.is_file() else {"num_classes": arguments.classes}
    base["teacher"]["backbone"] = arguments.backbone
    base["teacher"]["args"]["img_size"] = arguments.size
    base["teacher"]["finetune"]["epochs"] = arguments.epochs
    base["data"] = {key: value for key, value in base["data"].items() if value is not None}
    base["data"]["num_classes"] = open_data(parse_recipe(yaml.safe_dump({**base, "steps": steps})).data).num_classes
    return base


def parsed() -> argparse.Namespace:
    """The arguments of the command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", help="pictures and masks laid out as ADE20K")
    parser.add_argument("--backbone", help="a file of DINOv2 ViT-S/14")
    parser.add_argument("--size", type=int, default=168, help="height and width of images (%(default)s)")
    parser.add_argument("--classes", type=int, help="how many there are, if DATA/classes.txt does not name them")
    parser.add_argument("--limit", type=int, help="of the training pictures")
    parser.add_argument("--limit-val", type=int, help="of the held-out pictures")
    parser.add_argument("--epochs", type=int, default=6, help="of every cell (%(default)s)")
    parser.add_argument("--output", type=Path, default=Path("runs/segmentation_adapters"))
    parser.add_argument("--cells", nargs="+", choices=CELLS, default=list(CELLS), metavar="CELL")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--hours", type=float, default=10.0, help="end before the cell that would exceed them")
    parser.add_argument("--predict", action="store_true", help="print the predicted hours and run nothing")
    parser.add_argument("--table-only", action="store_true", help="write the table of what is finished and run nothing")
    arguments = parser.parse_args()
    if arguments.data and not arguments.backbone:
        parser.error("give --backbone with --data")
    if not (arguments.data or (arguments.output / "base.json").is_file()):
        parser.error("give --data and --backbone")
    return arguments


def main() -> None:
    """Predict, run, and write the table."""
    arguments = parsed()
    kept = arguments.output / "base.json"
    if arguments.data:
        arguments.output.mkdir(parents=True, exist_ok=True)
        write_json(kept, base_of(arguments), indent=1)
    benchmark = Benchmark(json.loads(kept.read_text()), arguments.output)
    if not arguments.table_only:
        train(benchmark, arguments)
    if not arguments.predict:
        write(benchmark, arguments.seeds)
        print((arguments.output / "table.md").read_text())


def train(benchmark: Benchmark, arguments: argparse.Namespace) -> None:
    """Run what is not finished, as far as the hours allow, a seed after the other."""
    wanted = {other for name in arguments.cells for other in (name, *needs(name))}
    names = [name for name in CELLS if name in wanted]
    waiting = [(name, seed) for seed in arguments.seeds for name in names if not benchmark.finished(name, seed)]
    datasets = open_data(parse_recipe(yaml.safe_dump(benchmark.recipe(LINEAR, 0))).data)
    sizes = len(datasets.train), len(datasets.validation)
    each = {name: minutes(benchmark, name, *sizes) for name in dict.fromkeys(name for name, _ in waiting)}
    total = sum(each[name] for name, _ in waiting) / 60
    print(f"{len(waiting)} cells are to be run, predicted {total:.1f} hours, {arguments.hours:g} allowed", flush=True)
    for name, taken in each.items():
        print(f"  {name}: {taken:.0f} minutes for each seed", flush=True)
    started = time.time()
    for name, seed in [] if arguments.predict else waiting:
        if (time.time() - started) / 60 + each[name] > arguments.hours * 60:
            print(f"{name}, seed {seed}, would exceed the {arguments.hours:g} hours; run the same command to go on")
            return
        found = benchmark.cell(name, seed)
        print(f"{name}, seed {seed}: mIoU {found['miou']:.2f} %, {found['minutes']:.1f} minutes", flush=True)
        write(benchmark, arguments.seeds)


if __name__ == "__main__":
    main()
