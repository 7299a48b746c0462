"""MiniViT's figures 4 and 5 at a small scale: gradient norms of the layers over training, and CKA of every layer with the teacher's.

Four students from noise on Fashion-MNIST: the original (nothing shared, labels), sharing (labels), sharing that is distilled, and
multiplexing (sharing, transforms, distilled), so that what the transforms do can be told from what the teacher does. A finished run is not
run again. Writes `gradients`, `gradients_by_block` and `cka` as .png, .svg, .csv and .json.

    python benchmarks/minivit_figures.py --teacher runs/ablation/teacher_run/teacher --output runs/minivit_figures
"""

from __future__ import annotations

import argparse
import dataclasses
import statistics
from pathlib import Path

import yaml
from minivit_ablation import run
from rich.console import Console

from compressvit.charts.findings import Finding, read
from compressvit.diagnostics.gradients import GradientRow
from compressvit.model.stored import read_manifest
from compressvit.recipe.shipped import find_recipe
from compressvit.rows import read_rows

NOISE = {"form": "reference", "init": "scratch"}


def students(share: int, start: dict) -> dict[str, tuple[list[dict], str]]:
    """Of each the steps before training, and the word of the phase."""
    sharing = [{"multiplex": {"share": share, "head_mixing": False, **start}}]
    return {
        "original": ([], "finetune"),
        "sharing": (sharing, "finetune"),
        "sharing, distilled": (sharing, "distill"),
        "multiplexing": ([{"multiplex": {"share": share, "head_mixing": True, "mlp_conv": 3, **start}}], "distill"),
    }


def main() -> None:
    """Run what is missing, and draw."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--teacher", required=True, help="folder of the teacher's artifact")
    parser.add_argument("--output", type=Path, default=Path("runs/minivit_figures"))
    parser.add_argument("--share", type=int, default=6)
    parser.add_argument("--images", type=int, default=30000, help="training images of an epoch")
    parser.add_argument("--epochs", type=int, default=1)
    arguments = parser.parse_args()
    console = Console(quiet=True)
    base = yaml.safe_load(find_recipe("fashion_mnist_mini_vit").read_text(encoding="utf-8"))
    base["teacher"] = {"model": read_manifest(arguments.teacher).architecture, "weights": arguments.teacher}
    base["data"] |= {"limit_train": arguments.images}
    base["diagnostics"] = [{"gradients": {"every": 5}}, {"cka": {"epochs": ["last"], "images": 512}}]
    training = {"epochs": arguments.epochs, "lr": 1e-3, "warmup_epochs": 0.2}

    norms, alike = [], []
    for name, (first, word) in students(arguments.share, NOISE).items():
        recipe = {**base, "steps": [*first, {word: training}], "student": {"weights": "random"}}
        folder = arguments.output / name.replace(", ", "_")
        result = run(yaml.safe_dump(recipe, sort_keys=False), folder, console)
        print(f"{name}: {result['student']['top1']:.2f} %, {result['student']['parameters']:,} parameters", flush=True)
        for row in read_rows(folder / "diagnostics" / "gradients.jsonl", GradientRow):
            for layer, groups in row.norms.items():
                if layer.startswith("blocks."):
                    norm = sum(value**2 for value in groups.values()) ** 0.5
                    norms.append({"student": name, "step": row.step, "block": int(layer.split(".")[1]), "norm": norm})
        found = read(folder / "diagnostics" / "cka_layers.json")
        alike.append(dataclasses.replace(found, records=[{**r, "when": name} for r in found.records]))

    by_block: dict[tuple[str, int], list[float]] = {}
    for record in norms:
        by_block.setdefault((record["student"], record["block"]), []).append(record["norm"])
    means = {key: statistics.mean(values) for key, values in by_block.items()}
    whole = {s: statistics.mean(v for (other, _), v in means.items() if other == s) for s, _ in means}
    titles = {"norm": "ℓ2 norm of the gradient, before clipping", "step": "optimiser step", "block": "block"}
    findings = [
        Finding(
            "gradients",
            "Norm of the gradient of every block over training",
            "A line a block, from the first (dark) to the last (light); a panel a student (MiniViT, figure 4).",
            "lines",
            norms,
            {
                "x": "step",
                "y": "norm",
                "colour": "block",
                "facet": "student",
                "ramp": True,
                "points": False,
                "scales": {"norm": "log"},
                "titles": titles,
            },
        ),
        Finding(
            "gradients_by_block",
            "Norm of the gradient of every block, in means of the student's",
            "Means over training. Students have losses of their own, whose scale is taken out: a flat line is a student whose blocks are "
            "pulled at alike. What a block shares counts with the gradient of its own use.",
            "lines",
            [{"student": s, "block": b, "norm": v, "relative": v / whole[s]} for (s, b), v in means.items()],
            {
                "x": "block",
                "y": "relative",
                "colour": "student",
                "scales": {"relative": "log"},
                "titles": {**titles, "relative": "norm / its mean over the blocks"},
            },
        ),
        dataclasses.replace(alike[0], name="cka", records=[record for one in alike for record in one.records]),
    ]
    for finding in findings:
        finding.write(arguments.output)
        print(arguments.output / f"{finding.name}.png")


if __name__ == "__main__":
    main()
