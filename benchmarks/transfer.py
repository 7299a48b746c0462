"""A frozen backbone on few images of each class, on domains it has not seen, and on VTAB-1k: linear probe and adapters in one table.

    python benchmarks/transfer.py leave_one_out --data SETS --weights FILE --domains stamps sketch clipart --output runs/transfer
    python benchmarks/transfer.py one_source --data SETS --weights FILE --domains stamps --output runs/transfer
    python benchmarks/transfer.py few_shot --data SETS --weights FILE --domains stamps --shots 1 2 4 8 16 --output runs/transfer
    python benchmarks/transfer.py vtab --data VTAB --model vit_base_patch16_224.orig_in21k --squash --epochs 100 --output runs/vtab
    python benchmarks/transfer.py --output runs/transfer --table-only

SETS has lists as DomainNet (DOMAIN_train.txt, DOMAIN_test.txt) or PACS (DOMAIN_train_kfold.txt, …), or folders DOMAIN/CLASS; VTAB has
TASK/train800.txt, val200.txt, train800val200.txt and test.txt.
The learning rate, and the scale where a method has one, are chosen once for each method and family of tasks, with seed 0, on training
images of training domains (`transfer_tasks.to_choose`): the most accurate, of equals the smaller rate. While the best rate is at an edge of
those tried, one beyond it is tried, twice at most.
Prints the hours that it will take, from measured steps, before it starts; a finished cell is not run again; `--hours` ends it before the
first cell that would exceed them. Writes `cells.json` and `table.md` after every cell.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import yaml
from few_shot_runs import EXTENSIONS, beyond
from minivit_ablation import run
from resumable import require_same, seconds_of
from rich.console import Console
from transfer_lists import Layout, read_layout, write_list
from transfer_table import CELL, LINEAR, write_tables
from transfer_tasks import PROTOCOLS, Limits, Task, tasks_of, to_choose

from compressvit.artifacts import artifact
from compressvit.data.loaders import eval_loader
from compressvit.data.opening import open_data
from compressvit.errors import UserError
from compressvit.exits import answered
from compressvit.files import write_json
from compressvit.model.weights import build
from compressvit.recipe.recipe import parse_recipe
from compressvit.runs.evaluate import trained_side
from compressvit.tasks.base import task_of
from compressvit.training.evaluate import evaluate

METHODS: dict[str, list[list[dict[str, Any]]]] = {  # the steps before training; more than one: also a choice
    LINEAR: [[{"freeze": {"train": "head"}}]],
    "repadapter": [[{"repadapter": {"width": 8, "scale": scale}}] for scale in (1.0, 10.0)],
    "adaptformer": [[{"adaptformer": {"width": 64, "scale": scale}}] for scale in (0.1, 1.0)],
    "lora": [[{"lora": {"rank": 8}}]],
}
RATES = (2e-3, 1e-2)  # to begin with; while the best is at an edge, up to EXTENSIONS more beyond it
DECAY = 1e-4  # of the weights, as RepAdapter's code
OWN = 48  # test images that a run itself judges, before and after training; the table is of all


@dataclass(frozen=True)
class Benchmark:
    """Where cells are run, and with what."""

    arguments: argparse.Namespace
    layout: Layout
    output: Path

    @property
    def limits(self) -> Limits:
        """Of what is learned and tested."""
        return Limits(self.arguments.per_class, self.arguments.limit)

    def tasks(self, seed: int) -> list[Task]:
        """Those of the protocol; few images are drawn by the seed."""
        arguments = self.arguments
        domains = self.layout.chosen(arguments.domains)
        return tasks_of(self.layout, arguments.protocol, domains, arguments.shots, seed, self.limits)

    def steps(self, method: str) -> list[list[dict[str, Any]]]:
        """Of a method, to choose from: those of `METHODS`, or the step of that name as it is by default."""
        return METHODS.get(method, [[{method: {}}]])[: 1 if self.arguments.fixed else None]

    def recipe(
        self, seed: int, lists: tuple[str, str], steps: list[dict[str, Any]], rate: float, task: Task
    ) -> dict[str, Any]:
        """A run's recipe; `lists` are the names of those to learn from and to judge by."""
        arguments = self.arguments
        training = {"epochs": arguments.epochs, "lr": rate, "weight_decay": DECAY, "evaluate_every": arguments.epochs}
        size = {} if arguments.size is None else {"img_size": arguments.size}
        data = {
            **{
                "name": "lists",
                "root": str((self.output / "lists").resolve()),
                "outside": True,
                "num_classes": task.classes,
            },
            **{"train_split": lists[0], "val_split": lists[1], "batch_size": arguments.batch, "eval_batch_size": 64},
            **({"crop_pct": 1.0, "crop_mode": "squash"} if arguments.squash else {"crop_pct": 1.0}),
        }
        return {
            "seed": seed,
            "teacher": {"model": arguments.model, "weights": arguments.weights, "args": size, "num_classes": 0},
            "student": {"head": "new"},
            "data": data,
            "steps": [*steps, {"finetune": training}],
        }

    def choice(self, task: Task, method: str) -> dict[str, Any]:
        """The options and rate of a method for a family of tasks, and what every one of the grid came to; kept in a file."""
        file = self.output / f"choice_{task.protocol}_{task.family}_{method}.json"
        if file.is_file():
            return json.loads(file.read_text(encoding="utf-8"))
        options, tried = self.steps(method), list[dict[str, Any]]()
        if len(options) > 1 or len(self.arguments.rates) > 1:
            lists = self.lists_to_choose(task)
            for i, steps in enumerate(options):
                scores: dict[float, float] = {}
                waiting = sorted(self.arguments.rates)
                while waiting:
                    for rate in waiting:
                        text = yaml.safe_dump(self.recipe(0, lists, steps, rate, task), sort_keys=False)
                        folder = self.output / "choice" / f"{task.protocol}_{task.family}_{method}_{i}_{rate:g}"
                        scores[rate] = run(text, folder, Console(quiet=True))["student"]["top1"]
                        print(
                            f"choice: {task.family}, {method}, {steps}, rate {rate:g}: {scores[rate]:.2f} %", flush=True
                        )
                    more = len(scores) < len(self.arguments.rates) + EXTENSIONS
                    waiting = beyond(scores) if more and len(scores) > 1 else []
                tried += [{"steps": steps, "rate": rate, "accuracy": score} for rate, score in scores.items()]
        chosen = best(tried) if tried else {"steps": options[0], "rate": self.arguments.rates[0]}
        found = {"chosen": chosen, "tried": tried}
        write_json(file, found, indent=1)
        return found

    def lists_to_choose(self, task: Task) -> tuple[str, str]:
        """Write the lists to learn from and to choose on, of a task's family; their names."""
        domains = self.layout.chosen(self.arguments.domains)
        fit, held = to_choose(self.layout, task.protocol, task, domains, self.arguments.shots, self.limits)
        names = f"choice_{task.protocol}_{task.family}_train", f"choice_{task.protocol}_{task.family}_val"
        for name, samples in zip(names, (fit, held), strict=True):
            write_list(self.output / "lists" / f"{name}.txt", samples)
        return names

    def folder(self, task: Task, method: str, seed: int) -> Path:
        """The run folder of a cell."""
        return self.output / "cells" / f"{task.protocol}_{task.name}_{method}_seed{seed}"

    def cell(self, task: Task, method: str, seed: int) -> dict[str, Any]:
        """Run a cell; whether each test image is given its class, by domain, counts and minutes."""
        started = time.time()
        chosen = self.choice(task, method)["chosen"]
        stem = f"{task.protocol}_{task.name}_seed{seed}"
        tests = {name: f"{stem}_test_{name}" for name in task.tests}
        write_list(self.output / "lists" / f"{stem}_train.txt", task.train)
        for name, samples in task.tests.items():
            write_list(self.output / "lists" / f"{tests[name]}.txt", samples)
        lists = f"{stem}_train", next(iter(tests.values()))
        recipe = self.recipe(seed, lists, chosen["steps"], chosen["rate"], task)
        recipe["data"]["limit_val"] = OWN
        folder = self.folder(task, method, seed)
        student = run(yaml.safe_dump(recipe, sort_keys=False), folder, Console(quiet=True))["student"]
        right = {name: recognised(folder / "student", recipe, name_of_list) for name, name_of_list in tests.items()}
        counts = {
            key: student[key] for key in ("trained_adapter", "trained_head", "adapter_bytes", "macs") if key in student
        }
        about = {"protocol": task.protocol, "task": task.name, "shots": task.shots, "method": method, "seed": seed}
        content = {
            **about,
            "images": len(task.train),
            "right": right,
            **counts,
            "minutes": (time.time() - started) / 60,
        }
        write_json(folder / CELL, {**content, "chosen": chosen})
        return content


def best(tried: list[dict[str, Any]]) -> dict[str, Any]:
    """The most accurate; of equals that with the smaller rate, and then the one tried first."""
    return min(tried, key=lambda one: (-one["accuracy"], one["rate"]))


def recognised(student: Path, recipe: dict[str, Any], name: str) -> list[int]:
    """Whether a trained student gives every image of a list its class, 1 or 0, in the order of the list."""
    content = {**recipe, "data": {**recipe["data"], "val_split": name, "limit_val": None}}
    data, device = parse_recipe(yaml.safe_dump(content)).data, torch.device("cpu")
    model = artifact.load(student)
    side, right = trained_side(model, data, ()), list[int]()

    def note(images: torch.Tensor, targets: Any, outputs: Any, expected: Any) -> None:
        right.extend((outputs.argmax(dim=1) == targets).int().tolist())

    evaluate(side, eval_loader(open_data(data), data, side.input, device), device, task=task_of(model), watch=note)
    return right


def measured(arguments: argparse.Namespace) -> Callable[[str, Task], float]:
    """What tells the minutes of a method's run, from the faster of two training steps and of two forward passes of random images."""
    size = {} if arguments.size is None else {"img_size": arguments.size}
    model: Any = build(arguments.model, **size, num_classes=0)
    images = torch.randn(arguments.batch, *_shape(model), generator=torch.Generator().manual_seed(0))
    model.requires_grad_(False)

    def forward() -> None:
        with torch.inference_mode():
            model.eval()(images)

    def step() -> None:  # of adapters, which pass gradients back through all blocks
        model.train()(images.clone().requires_grad_(True)).float().mean().backward()

    forward()
    of_forward, of_step = (min(seconds_of(one) for _ in range(2)) for one in (forward, step))

    def minutes(method: str, task: Task) -> float:
        passes = sum(map(len, task.tests.values())) + 4 * OWN
        steps = arguments.epochs * -(-len(task.train) // arguments.batch)
        return (steps * (of_forward if method == LINEAR else of_step) + passes / arguments.batch * of_forward) / 60

    return minutes


def _shape(model: Any) -> tuple[int, int, int]:
    channels, height, width = model.pretrained_cfg.get("input_size", (3, 224, 224))
    found = getattr(getattr(model, "patch_embed", None), "img_size", None) or (height, width)
    return channels, *found


def go(benchmark: Benchmark) -> None:
    """Say what it takes; then run what is not finished, a task after the other with all its seeds, as far as the hours allow."""
    arguments, layout = benchmark.arguments, benchmark.layout
    for note in layout.notes:
        print(note)
    by_seed = {seed: benchmark.tasks(seed) for seed in arguments.seeds}
    order = [
        (by_seed[seed][i], method, seed)
        for i in range(len(by_seed[arguments.seeds[0]]))
        for seed in arguments.seeds
        for method in arguments.methods
    ]
    waiting = [cell for cell in order if not (benchmark.folder(*cell) / CELL).is_file()]
    minutes = measured(arguments)
    each = [minutes(method, task) for task, method, _ in waiting]
    choices = {}  # of each family and method, as many runs as the grid has
    for task, method, _ in waiting:
        file = benchmark.output / f"choice_{task.protocol}_{task.family}_{method}.json"
        grid = len(benchmark.steps(method)) * (
            len(arguments.rates) + (len(arguments.rates) > 1)
        )  # about one is beyond an edge
        choices[file] = 0.0 if file.is_file() or grid == 1 else grid * minutes(method, task)
    total = (sum(each) + sum(choices.values())) / 60
    print(
        f"{len(waiting)} of {len(order)} cells are to be run, predicted {total:.1f} hours, {arguments.hours:g} allowed",
        flush=True,
    )
    started = time.time()
    for (task, method, seed), alone in zip(waiting if not arguments.predict else [], each, strict=False):
        taken = alone + choices.pop(benchmark.output / f"choice_{task.protocol}_{task.family}_{method}.json", 0.0)
        if (time.time() - started) / 60 + taken > arguments.hours * 60:
            print(
                f"{task.name}, {method}, seed {seed}, would exceed the {arguments.hours:g} hours; run the same command to go on"
            )
            return
        found = benchmark.cell(task, method, seed)
        print(
            f"{task.protocol} {task.name}, {method}, seed {seed}: {_words(found['right'])}, {found['minutes']:.1f} minutes",
            flush=True,
        )
        write_tables(benchmark.output)


def _words(right: Mapping[str, list[int]]) -> str:
    return ", ".join(f"{name} {100 * sum(each) / len(each):.1f} %" for name, each in right.items())


def parsed(words: list[str] | None = None) -> argparse.Namespace:
    """The arguments of the command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("protocol", nargs="?", choices=PROTOCOLS)
    parser.add_argument("--data", type=Path, help="the folder that paths in the lists are relative to")
    parser.add_argument("--lists", type=Path, help="the folder of the lists, if it is another")
    parser.add_argument("--classes", type=int, help="how many there are (the highest label + 1)")
    parser.add_argument("--model", default="vit_small_patch14_dinov2.lvd142m", help="timm's name of the backbone")
    parser.add_argument("--weights", help="its file")
    parser.add_argument("--size", type=int, help="height and width of images (the model's)")
    parser.add_argument("--squash", action="store_true", help="resize images to a square without keeping their aspect")
    parser.add_argument("--domains", nargs="+", metavar="NAME", help="to hold out, to learn from, or tasks (all)")
    parser.add_argument("--methods", nargs="+", default=list(METHODS), help="also steps of recipes by name, e.g. ssf")
    parser.add_argument("--shots", type=int, nargs="+", default=[1, 2, 4, 8, 16], help="images of each class")
    parser.add_argument(
        "--per-class", type=int, help="images of each class and domain to learn from in leave_one_out (all)"
    )
    parser.add_argument("--limit", type=int, help="images of each domain that are tested (all)")
    parser.add_argument(
        "--rates",
        type=float,
        nargs="+",
        default=list(RATES),
        help="learning rates to choose from; with one there is no choice",
    )
    parser.add_argument("--fixed", action="store_true", help="choose no options but the rate")
    parser.add_argument("--epochs", type=int, default=5)
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--hours", type=float, default=10.0, help="end before the cell that would exceed them")
    parser.add_argument("--output", type=Path, default=Path("runs/transfer"))
    parser.add_argument("--predict", action="store_true", help="print the predicted hours and run nothing")
    parser.add_argument("--table-only", action="store_true", help="write the table of what is finished and run nothing")
    arguments = parser.parse_args(words)
    if not arguments.table_only and not (arguments.protocol and arguments.data and arguments.weights):
        parser.error("give a protocol, --data and --weights")
    arguments.shots = sorted({*arguments.shots})
    return arguments


def program(arguments: argparse.Namespace) -> int:
    """Read, predict, run, and write the tables."""
    torch.set_num_threads(arguments.threads)
    if not arguments.table_only:
        if arguments.shots[0] < 1 or (arguments.per_class or 1) < 1 or (arguments.limit or 1) < 1:
            raise UserError("--shots, --per-class and --limit are numbers of images: give 1 or more")
        layout = read_layout(arguments.data, arguments.lists, arguments.classes)
        benchmark = Benchmark(arguments, layout, arguments.output)
        benchmark.tasks(arguments.seeds[0])  # before anything is written
        if not arguments.predict:
            require_same(arguments.output, settings(arguments))
        go(benchmark)
    if not arguments.predict:
        print(write_tables(arguments.output))
    return 0


def settings(arguments: argparse.Namespace) -> dict[str, Any]:
    """What all cells of a folder have in common."""
    names = ("model", "size", "squash", "per_class", "limit", "rates", "fixed", "epochs", "batch")
    return {"data": str(arguments.data), **{name: getattr(arguments, name) for name in names}}


def main() -> int:
    """Run the program; a fault of what it is given is one sentence, and exit code 2."""
    arguments = parsed()
    return answered("transfer", lambda: program(arguments))


if __name__ == "__main__":
    raise SystemExit(main())
