"""LORS on AdaMixer's decoder: the comparisons of the paper's tables 2 to 8, at the size of the recipe `adamixer_lors_dinov2_s`.

Trains the dense detector first and goes on only if it finds objects (AP50 of at least 30 %); then every cell for every seed, as
`compressvit apply` would. Prints the hours that it will take, from measured steps, before it starts. A finished cell is not run again, so
the program can be stopped and started; `--hours` ends it before the first cell that would exceed them. Writes `cells.json` and `table.md`
after every cell.

Every cell starts from the same random detector as the dense one of its seed, or from that one trained. A difference from the dense detector
has two intervals: over resampled held-out images, in pairs, for the models as they were trained; and ± one standard deviation of the seeds.

    python benchmarks/lors_detection.py --data FOLDER --backbone FILE --output runs/lors_detection --hours 8
    python benchmarks/lors_detection.py --output runs/lors_detection --table-only
    python benchmarks/lors_detection.py --list
"""

from __future__ import annotations

import argparse
import copy
import hashlib
import json
import shutil
import statistics
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import yaml
from detector_runs import FOUND, detections, difference_text, differences, matches, mean_and_each
from lors_cells import CELLS, compared_with, order
from minivit_ablation import run
from resumable import seconds_of
from rich.console import Console
from torch import nn

from compressvit.artifacts import artifact
from compressvit.data.opening import Datasets, open_data
from compressvit.files import write_json, write_text
from compressvit.model import ties
from compressvit.model.detectors import adamixer
from compressvit.model.weights import build
from compressvit.recipe.recipe import Recipe, parse_recipe
from compressvit.recipe.shipped import find_recipe
from compressvit.transforms import Transform
from compressvit.transforms.applying import apply_plans

RECIPE = "adamixer_lors_dinov2_s"
LEAST = 30.0  # AP50 of the dense detector in percent, below which a comparison with it says nothing
HEAD = (
    "| decoder | AP, mean (each seed) | AP50 | AP less dense [95 % over images] ± seeds | AP50 less dense | minutes |"
)


# ------------------------------------------------------------------------------------------------------------- what is run


@dataclass(frozen=True)
class Benchmark:
    """Where cells are run, and with what."""

    base: dict[str, Any]
    output: Path

    def folder(self, name: str, seed: int) -> Path:
        """The run folder of a cell."""
        return self.output / f"{name}_seed{seed}"

    def recipe(self, name: str, seed: int) -> dict[str, Any]:
        """The recipe of a cell."""
        cell, content = CELLS[name], copy.deepcopy(self.base)
        whole, further = content["teacher"].pop("finetune"), content["steps"][-1]["finetune"]
        training = further if cell.trained else {**whole, "epochs": further["epochs"]} if cell.short else whole
        content["teacher"] |= {"weights": "random", "args": {**content["teacher"]["args"], **cell.args}}
        if cell.trained:
            content["teacher"] = {
                "model": "adamixer",
                "weights": str(self.folder(compared_with(name), seed) / "student"),
            }
        steps = [*cell.steps, {"finetune": {**training, "evaluate_every": training["epochs"]}}]
        return {**content, "seed": seed, "steps": steps}

    def finished(self, name: str, seed: int) -> bool:
        """Whether a cell need not be run again."""
        return (self.folder(name, seed) / FOUND).is_file()

    def cell(self, name: str, seed: int) -> dict[str, Any]:
        """Run a cell unless it is finished; its figures."""
        folder, content = self.folder(name, seed), self.recipe(name, seed)
        text = yaml.safe_dump(content, sort_keys=False)
        results = run(text, folder, Console(quiet=True))
        if not self.finished(name, seed):
            decoder = ties.count_parameters(artifact.load(folder / "student").get_submodule("decoder"))
            write_json(folder / FOUND, {"decoder": decoder, **detections(folder / "student", parse_recipe(text))})
        for part in (
            ("checkpoints",) if CELLS[name].dense else ("checkpoints", "student")
        ):  # others start from a dense student
            shutil.rmtree(folder / part, ignore_errors=True)
        return self.figures(name, seed, results)

    def figures(self, name: str, seed: int, results: Mapping[str, Any]) -> dict[str, Any]:
        """AP, AP50 and AP75 in percent, those before training if transforms came before it, parameters, and minutes."""
        (phase,) = results["phases"].values()
        student = {key: results["student"][key] for key in ("ap", "ap50", "ap75", "parameters")}
        found = json.loads((self.folder(name, seed) / FOUND).read_text())
        return {
            **student,
            "decoder": found["decoder"],
            "before_training": phase["start"] and {key: phase["start"][key] for key in ("ap", "ap50")},
            "minutes": results["seconds"] / 60,
        }


@contextmanager
def remembered_features() -> Iterator[None]:
    """Let the maps of a frozen backbone be computed once for each image of a process, and for its mirror image, instead of in every epoch.

    Exact up to the rounding of other batches. All cells have the same backbone, and no phase trains it.
    (`cache` of a phase keeps features by view, in which an image has one look; here it has two in all, and any epoch may show either.)
    """
    computed, known = adamixer.feature_maps, {}

    def maps_of(backbone: nn.Module, images: torch.Tensor, indices: list[int]) -> list[torch.Tensor]:
        looked_into = any(module._forward_hooks or module._forward_pre_hooks for module in backbone.modules())
        if images.device.type != "cpu" or type(images) is not torch.Tensor or looked_into:  # values are not all
            return computed(backbone, images, indices)
        keys = [hashlib.blake2b(image.contiguous().numpy().tobytes()).digest() for image in images.detach()]
        absent = [i for i, key in enumerate(keys) if key not in known]
        if absent:
            with torch.inference_mode(False), torch.no_grad():
                for i, *maps in zip(absent, *computed(backbone, images[absent].clone(), indices), strict=True):
                    known[keys[i]] = [level.clone() for level in maps]
        return [torch.stack(level) for level in zip(*(known[key] for key in keys), strict=True)]

    adamixer.feature_maps = maps_of
    try:
        yield
    finally:
        adamixer.feature_maps = computed


# ----------------------------------------------------------------------------------------------------------- what it takes


def minutes(benchmark: Benchmark, names: Sequence[str], train: int, held_out: int) -> tuple[float, dict[str, float]]:
    """Minutes for the backbone's maps of all images, once for each process, and of each cell without a fit, from steps measured here."""
    of_cells: dict[str, float] = {}
    of_backbone, batch = 0.0, benchmark.base["data"]["batch_size"]
    with remembered_features():
        for name in names:
            recipe = parse_recipe(yaml.safe_dump(benchmark.recipe(name, 0)))
            first, forward, step = _seconds(recipe, {**benchmark.base["teacher"]["args"], **CELLS[name].args})
            of_backbone = of_backbone or first - forward
            epochs = recipe.steps[-1].spec.epochs
            # evaluated before and after training, and at the end, with the teacher
            of_cells[name] = (epochs * (train // batch) * step + 5 * held_out / batch * forward) / 60
    return of_backbone * (2 * train + held_out) / batch / 60, of_cells


def _seconds(recipe: Recipe, args: Mapping[str, Any]) -> tuple[float, float, float]:
    """Seconds for a batch: of the first forward pass, in which the backbone runs, of another one, and of a training step; the faster of
    two."""
    model: Any = build(recipe.teacher.model, {**args, "num_classes": recipe.data.num_classes or 6})
    for spec in (step.spec for step in recipe.steps):
        if isinstance(spec, Transform):
            apply_plans(model, [spec.plan(model)])
    model.backbone.requires_grad_(False)
    generator = torch.Generator().manual_seed(0)
    images = torch.randn(recipe.data.batch_size, 3, *model.img_size, generator=generator)
    box = {"boxes": torch.tensor([[0.1, 0.2, 0.5, 0.6]] * 3), "labels": torch.zeros(3, dtype=torch.long)}
    times = [seconds_of(lambda: model(images)) for _ in range(3)]
    steps = [seconds_of(lambda: sum(model(images).losses([box] * len(images)).values()).backward()) for _ in range(2)]
    return times[0], min(times[1:]), min(steps)


# ------------------------------------------------------------------------------------------------------------------ tables


def summary(benchmark: Benchmark, figures: Mapping[tuple[str, int], Mapping[str, Any]]) -> dict[str, Any]:
    """Every finished cell: figures by seed, and its differences from the dense detector."""
    found = {(name, seed): matches(benchmark.folder(name, seed)) for name, seed in figures}
    content: dict[str, Any] = {}
    for name in CELLS:
        seeds = [seed for other, seed in figures if other == name]
        if not seeds:
            continue
        content[name] = {"seeds": {str(seed): figures[name, seed] for seed in seeds}}
        dense = compared_with(name)
        pairs = [seed for seed in seeds if (dense, seed) in figures]
        if name == dense or not pairs:
            continue
        content[name] |= differences(figures, found, (name, dense), pairs)
    return content


def table(content: Mapping[str, Any]) -> str:
    """The cells in Markdown, a table for each thing that is varied."""
    lines = []
    for title in dict.fromkeys(cell.table for cell in CELLS.values()):
        rows = [_row(name, content[name]) for name, cell in CELLS.items() if cell.table == title and name in content]
        if rows:
            lines += [f"| {title} {HEAD}", "| --- | --- | --- | --- | --- | --- | --- |", *rows, ""]
    return "\n".join(lines)


def _row(name: str, entry: Mapping[str, Any]) -> str:
    seeds = list(entry["seeds"].values())
    text = CELLS[name].text
    if CELLS[name].trained and CELLS[name].steps:
        text += f"; before training {mean_and_each([seed['before_training']['ap'] for seed in seeds])} AP"
    columns = [
        text,
        f"{seeds[0]['decoder']:,}",
        *(mean_and_each([seed[key] for seed in seeds]) for key in ("ap", "ap50")),
    ]
    columns += [difference_text(entry.get(key)) for key in ("ap_difference", "ap50_difference")]
    return f"| {' | '.join(columns)} | {statistics.mean(seed['minutes'] for seed in seeds):.0f} |"


def write(benchmark: Benchmark, cells: Sequence[tuple[str, int]]) -> None:
    """Write `cells.json` and `table.md` of what is finished."""
    done = {cell: benchmark.cell(*cell) for cell in cells if benchmark.finished(*cell)}
    content = summary(benchmark, done)
    write_json(benchmark.output / "cells.json", {"recipe": benchmark.base, "cells": content}, indent=1)
    write_text(benchmark.output / "table.md", table(content))


def require_objects_found(benchmark: Benchmark, name: str, seeds: Sequence[int]) -> None:
    """Stop if the dense detector finds too little: any comparison with it would be void."""
    found = [benchmark.cell(name, seed)["ap50"] for seed in seeds if benchmark.finished(name, seed)]
    if found and statistics.mean(found) < LEAST:
        raise SystemExit(
            f"the comparison is void: {CELLS[name].text} reaches AP50 {mean_and_each(found)} %, and below {LEAST:.0f} % it finds too "
            "little to compare; give more epochs, another learning rate, or more images"
        )


def opened(base: Mapping[str, Any]) -> Datasets:
    """The data of the cells."""
    return open_data(parse_recipe(yaml.safe_dump(base)).data)


def main() -> None:
    """Predict, run, and write tables."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", help="a folder in COCO's layout")
    parser.add_argument("--backbone", help="a file of DINOv2 ViT-S/14, in timm's names; by default timm's")
    parser.add_argument("--output", type=Path, default=Path("runs/lors_detection"))
    parser.add_argument("--cells", nargs="+", choices=CELLS, default=list(CELLS), metavar="CELL")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--hours", type=float, default=10.0, help="end before the cell that would exceed them")
    parser.add_argument("--predict", action="store_true", help="print the predicted hours and run nothing")
    parser.add_argument(
        "--table-only", action="store_true", help="write the tables of what is finished and run nothing"
    )
    parser.add_argument("--list", action="store_true", help="print the cells and run nothing")
    arguments = parser.parse_args()
    if arguments.list:
        print("\n".join(f"{name:14} {cell.table}: {cell.text}" for name, cell in CELLS.items()))
        return
    kept = arguments.output / "base.json"
    if not (arguments.data or kept.is_file()):
        parser.error("give --data")
    base = (
        yaml.safe_load(find_recipe(RECIPE).read_text(encoding="utf-8"))
        if arguments.data
        else json.loads(kept.read_text())
    )
    if arguments.data:
        base["data"]["root"] = arguments.data
        base["data"]["num_classes"] = opened(base).num_classes
        base["teacher"] |= {"backbone": arguments.backbone} if arguments.backbone else {}
        arguments.output.mkdir(parents=True, exist_ok=True)
        write_json(kept, base, indent=1)
    benchmark = Benchmark(base, arguments.output)
    names = [name for name in CELLS if name in {*arguments.cells, *map(compared_with, arguments.cells)}]
    cells = order(names, arguments.seeds)
    if arguments.table_only:
        write(benchmark, cells)
        print((arguments.output / "table.md").read_text())
        return
    waiting = [cell for cell in cells if not benchmark.finished(*cell)]
    datasets = opened(base)
    backbone, each = minutes(
        benchmark, list(dict.fromkeys(name for name, _ in waiting)), len(datasets.train), len(datasets.validation)
    )
    total = backbone * bool(waiting) + sum(each[name] for name, _ in waiting)
    print(
        f"{len(waiting)} of {len(cells)} cells are to be run, predicted {total / 60:.1f} hours without fits, {arguments.hours:g} allowed",
        flush=True,
    )
    for name, taken in each.items():
        print(
            f"  {name}: {taken:.1f} minutes for each of {sum(other == name for other, _ in waiting)} seeds", flush=True
        )
    if arguments.predict:
        return
    started, end = time.time(), arguments.hours * 60 - backbone
    with remembered_features():
        for name, seed in waiting:
            if (time.time() - started) / 60 + each[name] > end:
                print(
                    f"{name}, seed {seed}, would exceed the {arguments.hours:g} hours; run the same command again to go on"
                )
                break
            require_objects_found(benchmark, compared_with(name), arguments.seeds)
            figures = benchmark.cell(name, seed)
            print(
                f"{name}, seed {seed}: AP {figures['ap']:.2f} AP50 {figures['ap50']:.2f}, {figures['minutes']:.1f} minutes",
                flush=True,
            )
            write(benchmark, cells)
    print((arguments.output / "table.md").read_text())


if __name__ == "__main__":
    main()
