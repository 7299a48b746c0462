"""MiniViT's losses on Fashion-MNIST, one after the other (§4.1.4 of the paper): prediction, with labels, with attention, with hidden.

The student is the paper's: pairs of blocks share, with transforms in its form, from random values. Trains the teacher of
`fashion_mnist_mini_vit` once, then every cell at equal epochs, as `compressvit apply` would. A finished cell is not run again, so the
program can be stopped and started. Prints a Markdown table: a difference is that to the prediction alone of the same seed.

    python benchmarks/minivit_losses.py --output runs/minivit_losses --images 30000
    python benchmarks/minivit_losses.py --output runs/minivit_losses --table-only

With a teacher that `minivit_ablation.py` has trained, `--teacher runs/ablation/teacher_run` saves training another.
"""

from __future__ import annotations

import argparse
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml
from minivit_ablation import STARTS, recipe_text, run
from rich.console import Console

from compressvit.recipe.shipped import find_recipe

RELATIONS = ("attention_relation", "hidden_relation")
LOSSES = {
    "prediction": {},
    "prediction, labels": {"labels": 1.0},
    "prediction, attention": {"attention_relation": 1.0},
    "prediction, hidden": {"hidden_relation": 1.0},
    "prediction, attention, hidden": {"attention_relation": 1.0, "hidden_relation": 1.0},
    "all four": {"labels": 1.0, "attention_relation": 1.0, "hidden_relation": 1.0},
}
SHARING = {"share": 2, "head_mixing": True, "mlp_conv": 3, **STARTS["noise"]}
ALONE = "prediction"


def steps_of(name: str, training: dict[str, Any]) -> list[dict[str, Any]]:
    """The steps of a cell: terms that it does not name have a weight of 0."""
    weights = {**dict.fromkeys(RELATIONS, 0.0), **LOSSES[name]}
    losses = {term: {"weight": weight} for term, weight in weights.items()}
    return [{"multiplex": SHARING}, {"distill": {**training, "losses": losses}}]


def row(name: str, scores: Sequence[float], alone: Sequence[float], seconds: Sequence[float]) -> str:
    """A row of the table, for scores of a cell and of the prediction alone by seed."""
    each, gains = ", ".join(f"{score:.2f}" for score in scores), [a - b for a, b in zip(scores, alone, strict=True)]
    spread = f" ± {statistics.stdev(gains):.2f}" if len(gains) > 1 else ""
    gain = "" if name == ALONE else f"{statistics.mean(gains):+.2f}{spread}"
    return f"| {name} | {statistics.mean(scores):.2f} ({each}) | {gain} | {statistics.mean(seconds):.0f} |"


def main() -> None:
    """Run the cells and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=Path("runs/minivit_losses"))
    parser.add_argument("--teacher", type=Path, help="the run of a teacher; without it one is trained in 4 epochs")
    parser.add_argument("--cells", nargs="+", choices=LOSSES, default=list(LOSSES), help="default: all")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2], help="default: 0 1 2")
    parser.add_argument("--epochs", type=int, default=1, help="of the cells (default: %(default)s)")
    parser.add_argument("--images", type=int, default=30000, help="of an epoch of the cells (default: %(default)s)")
    parser.add_argument("--table-only", action="store_true", help="print what is finished and run nothing")
    arguments = parser.parse_args()
    console = Console(quiet=True)

    base = yaml.safe_load(find_recipe("fashion_mnist_mini_vit").read_text(encoding="utf-8"))
    teacher = arguments.teacher or arguments.output / "teacher_run"
    if arguments.teacher is None and not arguments.table_only:
        taught = {**base["teacher"], "finetune": {**base["teacher"]["finetune"], "epochs": 4}}
        run(recipe_text({}, taught, [{"multiplex": {"share": 1, "head_mixing": False}}]), teacher, console)
    fixed = {**base["teacher"], "weights": str(teacher / "teacher"), "num_classes": 10}
    fixed.pop("finetune")
    training = {**base["steps"][-1]["distill"], "epochs": arguments.epochs}
    data = {**base["data"], "limit_train": arguments.images}

    found: dict[tuple[str, int], dict[str, Any]] = {}
    for seed in arguments.seeds:
        for name in arguments.cells:
            output = arguments.output / f"{name.replace(', ', '_')}_seed{seed}"
            if arguments.table_only and not (output / "results.json").is_file():
                continue
            text = recipe_text({"seed": seed, "data": data}, fixed, steps_of(name, training))
            found[name, seed] = run(text, output, console)
            score, seconds = found[name, seed]["student"]["top1"], found[name, seed]["seconds"]
            print(f"{name}, seed {seed}: {score:.2f} %, {seconds:.0f} s", flush=True)

    print("\n| losses | top-1, mean (each seed) | less the prediction alone, mean ± deviation of the seeds | seconds |")
    print("| --- | --- | --- | --- |")
    for name in arguments.cells:
        seeds = [s for s in arguments.seeds if (name, s) in found and (ALONE, s) in found]
        if seeds:
            of_cell, alone = ([found[cell, s]["student"]["top1"] for s in seeds] for cell in (name, ALONE))
            print(row(name, of_cell, alone, [found[name, s]["seconds"] for s in seeds]))


if __name__ == "__main__":
    main()
