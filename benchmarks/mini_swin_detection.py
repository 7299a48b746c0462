"""A Mini-Swin under a detector beside its Swin, trained on the same pictures with boxes: MiniViT's transfer (§4.4 of the paper), small.

For every seed: a detector with a pretrained Swin; one with the Mini-Swin of the same weights, trained as long; and Mini-Swins that start
from the trained detector and are trained further, on labels alone, distilled by its predictions, by these and relations, and by these and
the maps of its pyramid. The trained detector is also trained further, as long. Prints the hours that it will take, from measured steps,
before it starts; a finished cell is not run again; `--hours` ends it before the first cell that would exceed them.
Writes `cells.json` and `table.md` after every cell.

    python benchmarks/mini_swin_detection.py --data FOLDER --backbone FILE --output runs/mini_swin_detection --hours 8
    python benchmarks/mini_swin_detection.py --output runs/mini_swin_detection --table-only

`--blocks` makes a shorter Swin of the first blocks of the file's third stage: on a CPU, 18 of them are long to train.
"""

from __future__ import annotations

import argparse
import copy
import json
import statistics
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import yaml
from detector_runs import FOUND, detections, difference_text, differences, matches, mean_and_each
from minivit_ablation import run
from resumable import seconds_of
from rich.console import Console
from safetensors.torch import load_file, save_file

from compressvit.data.opening import open_data
from compressvit.files import write_json, write_text
from compressvit.model.weights import build
from compressvit.recipe.recipe import parse_recipe
from compressvit.transforms import Transform
from compressvit.transforms.applying import apply_plans

SWIN = "swin"
MULTIPLEX = {"share": 2, "mixing_bias": True, "mlp_conv": 7}  # of the recipe mini_swin_b
PREDICTION = {"prediction": {"weight": 1.0}, "labels": {"weight": 1.0}}
RELATIONS = {"attention_relation": {"weight": 1.0}, "hidden_relation": {"weight": 0.1}}
ALONE = {key: {"weight": 0.0} for key in RELATIONS}  # terms that a recipe does not name have their default weight


@dataclass(frozen=True)
class Cell:
    """A row of the table.

    Attributes:
        text: what the row says.
        mini: whether the backbone is multiplexed.
        further: it starts from the trained detector of its seed, and is trained for the shorter time.
        losses: of a distillation from that detector; without any it learns from labels alone.
    """

    text: str
    mini: bool = True
    further: bool = False
    losses: Mapping[str, Any] | None = None


CELLS = {
    SWIN: Cell("Swin", mini=False),
    "mini": Cell("Mini-Swin of the same weights, as long"),
    "swin_further": Cell("Swin, trained further", mini=False, further=True),
    "further": Cell("Mini-Swin of the trained detector, on labels", further=True),
    "prediction": Cell("… and its predictions", further=True, losses={**PREDICTION, **ALONE}),
    "relations": Cell("… and relations", further=True, losses={**PREDICTION, **RELATIONS}),
    "features": Cell("… and maps", further=True, losses={**PREDICTION, **ALONE, "feature": {"weight": 1.0}}),
}


def shorter(file: Path, blocks: int, output: Path) -> Path:
    """Weights of a Swin whose third stage has only the first blocks of the file's."""
    kept, stage = {}, "layers.2.blocks."
    for key, tensor in load_file(file).items():
        beyond = key.startswith(stage) and int(key.removeprefix(stage).split(".")[0]) >= blocks
        if not (beyond or key.startswith("head.")):
            kept[key] = tensor
    save_file(kept, output)
    return output


@dataclass(frozen=True)
class Benchmark:
    """Where cells are run, and with what: the keys of `base.json`."""

    base: dict[str, Any]
    output: Path

    def folder(self, name: str, seed: int) -> Path:
        """The run folder of a cell."""
        return self.output / f"{name}_seed{seed}"

    def recipe(self, name: str, seed: int) -> dict[str, Any]:
        """The recipe of a cell."""
        cell = CELLS[name]
        base = copy.deepcopy(self.base)
        training = {**base["training"], "epochs": base["epochs"]["further" if cell.further else "whole"]}
        training["evaluate_every"] = training["epochs"]
        teacher: dict[str, Any] = {"model": base["detector"]}
        if cell.further:
            training["lr"] /= 4
            teacher["weights"] = str(self.folder(SWIN, seed) / "student")
        else:
            teacher |= {"weights": "random", "backbone": base["backbone"], "args": base["args"]}
        steps: list[dict[str, Any]] = [{"multiplex": MULTIPLEX}] if cell.mini else []
        steps.append({"distill": {**training, "losses": cell.losses}} if cell.losses else {"finetune": training})
        return {"seed": seed, "teacher": teacher, "data": base["data"], "steps": steps}

    def finished(self, name: str, seed: int) -> bool:
        """Whether a cell need not be run again."""
        return (self.folder(name, seed) / FOUND).is_file()

    def cell(self, name: str, seed: int) -> dict[str, Any]:
        """Run a cell unless it is finished; AP and AP50 in percent, at the end and before training, parameters of the backbone, minutes."""
        folder, text = self.folder(name, seed), yaml.safe_dump(self.recipe(name, seed), sort_keys=False)
        results = run(text, folder, Console(quiet=True))
        if not self.finished(name, seed):
            write_json(folder / FOUND, detections(folder / "student", parse_recipe(text)))
        (phase,) = results["phases"].values()
        student = {key: results["student"][key] for key in ("ap", "ap50", "parameters")}
        start = phase["start"] and {key: phase["start"][key] for key in ("ap", "ap50")}
        return {**student, "before_training": start, "minutes": results["seconds"] / 60}


def minutes(benchmark: Benchmark, name: str, train: int, held_out: int) -> float:
    """Minutes that a cell takes, from the faster of two training steps and two forward passes."""
    recipe = parse_recipe(yaml.safe_dump(benchmark.recipe(name, 0)))
    model: Any = build(benchmark.base["detector"], {**benchmark.base["args"], "num_classes": recipe.data.num_classes})
    for spec in (step.spec for step in recipe.steps):
        if isinstance(spec, Transform):
            apply_plans(model, [spec.plan(model)])
    batch = recipe.data.batch_size
    images = torch.randn(batch, 3, *model.img_size, generator=torch.Generator().manual_seed(0))
    box = {"boxes": torch.tensor([[0.1, 0.2, 0.5, 0.6]] * 3), "labels": torch.zeros(3, dtype=torch.long)}
    box["masks"] = torch.ones(3, *model.img_size, dtype=torch.uint8)

    def step() -> None:
        sum(model.train()(images).losses([box] * batch).values()).backward()

    def forward() -> None:
        with torch.no_grad():
            model.eval()(images)

    of_step, of_forward = (min(seconds_of(function) for _ in range(2)) for function in (step, forward))
    taught = of_forward if CELLS[name].losses else 0.0
    evaluations = 3  # before and after training, and of the student at the end
    epochs = recipe.steps[-1].spec.epochs
    return (epochs * (train // batch) * (of_step + taught) + evaluations * held_out / batch * of_forward) / 60


def write(benchmark: Benchmark, seeds: Sequence[int]) -> None:
    """Write `cells.json` and `table.md` of what is finished."""
    done = {
        (name, seed): benchmark.cell(name, seed) for name in CELLS for seed in seeds if benchmark.finished(name, seed)
    }
    found = {(name, seed): matches(benchmark.folder(name, seed)) for name, seed in done}
    content: dict[str, Any] = {}
    for name in CELLS:
        each = {seed: done[name, seed] for other, seed in done if other == name}
        if each:
            content[name] = {"seeds": each}
            if name != SWIN:
                content[name] |= differences(done, found, (name, SWIN), list(each))
    write_json(benchmark.output / "cells.json", {"base": benchmark.base, "cells": content}, indent=1)
    write_text(benchmark.output / "table.md", table(content))


def table(content: Mapping[str, Any]) -> str:
    """The cells in Markdown."""
    lines = [
        "| backbone | parameters | AP before | AP, mean (each seed) | AP50 | AP less Swin's [95 % over images] ± seeds | AP50 less Swin's "
        "| minutes |",
        "| --- | --- | --- | --- | --- | --- | --- | --- |",
    ]
    for name, entry in content.items():
        seeds = list(entry["seeds"].values())
        start = [seed["before_training"]["ap"] for seed in seeds if seed["before_training"]]
        columns = [
            CELLS[name].text,
            f"{seeds[0]['parameters']:,}",
            mean_and_each(start) if start and CELLS[name].further else "",
            *(mean_and_each([seed[key] for seed in seeds]) for key in ("ap", "ap50")),
            *(difference_text(entry.get(f"{key}_difference")) for key in ("ap", "ap50")),
            f"{statistics.mean(seed['minutes'] for seed in seeds):.0f}",
        ]
        lines.append(f"| {' | '.join(columns)} |")
    return "\n".join([*lines, ""])


def base_of(arguments: argparse.Namespace) -> dict[str, Any]:
    """What all cells have in common; the backbone's file is written beside them if it is a shorter one."""
    backbone = arguments.backbone
    swin: dict[str, Any] = {}
    if arguments.blocks:
        backbone = shorter(backbone, arguments.blocks, arguments.output / "backbone.safetensors")
        swin = {"backbone_args": {"depths": [2, 2, arguments.blocks, 2]}}
    data = {"name": "coco", "root": arguments.data, "batch_size": arguments.batch_size, "augment": {"hflip": 0.5}}
    if arguments.limit:
        data["limit_train"] = arguments.limit
    data["num_classes"] = open_data(parse_recipe(_recipe(data)).data).num_classes
    return {
        "detector": arguments.detector,
        "backbone": str(backbone),
        "args": {
            "backbone": arguments.model,
            "img_size": arguments.size,
            "channels": 128,
            "representation": 256,
            **swin,
        },
        "data": data,
        "training": {"lr": arguments.lr, "weight_decay": 0.05, "warmup_epochs": 0.5, "clip_grad": 1.0},
        "epochs": {"whole": arguments.epochs, "further": arguments.further},
    }


def _recipe(data: Mapping[str, Any]) -> str:
    teacher = {"model": "faster_rcnn", "weights": "random"}
    return yaml.safe_dump({"teacher": teacher, "data": dict(data), "steps": [{"finetune": {"epochs": 1, "lr": 1e-4}}]})


def parsed() -> argparse.Namespace:
    """The arguments of the command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", help="a folder in COCO's layout")
    parser.add_argument("--backbone", type=Path, help="a safetensors file of the Swin, in timm's names")
    parser.add_argument("--model", default="swin_base_patch4_window7_224", help="timm's name of it (%(default)s)")
    parser.add_argument("--blocks", type=int, default=0, help="take only so many of its third stage (all)")
    parser.add_argument("--detector", choices=("faster_rcnn", "mask_rcnn"), default="faster_rcnn")
    parser.add_argument("--size", type=int, default=160, help="of images, a multiple of 32 (%(default)s)")
    parser.add_argument("--limit", type=int, help="of the training images")
    parser.add_argument("--batch-size", type=int, default=8, help="(%(default)s)")
    parser.add_argument(
        "--lr", type=float, default=2e-4, help="at this batch; a fourth of it for those trained further"
    )
    parser.add_argument("--epochs", type=int, default=8, help="of a detector from a pretrained backbone (%(default)s)")
    parser.add_argument("--further", type=int, default=3, help="epochs after those (%(default)s)")
    parser.add_argument("--output", type=Path, default=Path("runs/mini_swin_detection"))
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
    """Run what is not finished, as far as the hours allow; what others start from comes first."""
    names = [name for name in CELLS if name == SWIN or name in arguments.cells]
    waiting = [(name, seed) for seed in arguments.seeds for name in names if not benchmark.finished(name, seed)]
    datasets = open_data(parse_recipe(yaml.safe_dump(benchmark.recipe(SWIN, 0))).data)
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
        print(f"{name}, seed {seed}: AP {found['ap']:.2f} AP50 {found['ap50']:.2f}, {found['minutes']:.1f} minutes")
        write(benchmark, arguments.seeds)


if __name__ == "__main__":
    main()
