"""Fashion-MNIST, epoch by epoch at equal parameters: low rank from the teacher, and MiniViT's sharing from noise.

The reference shares weights among blocks (`--share`), starts from noise and is distilled; ours (`low_rank`) gets a budget of
exactly the reference's parameters and starts from the teacher. Same teacher, data, epochs, losses and seeds. A finished cell is not run
again.

    python benchmarks/start_from_teacher.py --teacher runs/fashion_mnist_low_rank/teacher --output runs/start_from_teacher
"""

from __future__ import annotations

import argparse
import json
import statistics
from pathlib import Path

import yaml
from minivit_ablation import run
from rich.console import Console

from compressvit.model.stored import read_manifest
from compressvit.recipe.shipped import find_recipe

METHODS = {"reference, from noise": 1e-3, "low rank, from the teacher": 1e-4}  # and the peak learning rate


def scores_by_epoch(output: Path) -> dict[int, float]:
    """Top-1 of the student by epoch of its only phase; 0 is before training."""
    lines = [json.loads(line) for line in (output / "metrics.jsonl").read_text().splitlines()]
    return {line.get("epoch", 0): line["top1"] for line in lines if line["kind"] == "evaluate"}


def main() -> None:
    """Run the cells and print the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--teacher", required=True, help="folder of the teacher's artifact")
    parser.add_argument("--output", type=Path, default=Path("runs/start_from_teacher"))
    parser.add_argument("--share", nargs="+", default=["2", "3", "6"], help="of the reference; 2,4 gives one a stage")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1])
    parser.add_argument("--epochs", type=int, default=10)
    parser.add_argument("--images", type=int, default=60000, help="training images of an epoch")
    parser.add_argument("--test-images", type=int, default=10000, help="evaluated after every epoch")
    parser.add_argument("--show", type=int, nargs="+", default=[0, 1, 3, 10], help="epochs in the table")
    parser.add_argument("--table-only", action="store_true", help="print what is finished and run nothing")
    arguments = parser.parse_args()
    console = Console(quiet=True)

    base = yaml.safe_load(find_recipe("fashion_mnist_low_rank").read_text(encoding="utf-8"))
    base["teacher"] = {"model": read_manifest(arguments.teacher).architecture, "weights": arguments.teacher}
    base["data"] |= {"limit_train": arguments.images, "limit_val": arguments.test_images}

    rows: dict[tuple, list[tuple[dict, dict]]] = {}
    for text in arguments.share:
        per_stage = [int(number) for number in text.split(",")]
        share = per_stage if len(per_stage) > 1 else per_stage[0]
        for seed in arguments.seeds:
            parameters = 0
            for method, rate in METHODS.items():
                first: dict = {
                    "multiplex": {"share": share, "head_mixing": False, "form": "reference", "init": "scratch"}
                }
                if "low rank" in method:
                    first = {"low_rank": {"budget": {"parameters": parameters}}}
                training = {"distill": {"epochs": arguments.epochs, "lr": rate, "warmup_epochs": 0.5}}
                recipe = yaml.safe_dump({**base, "seed": seed, "steps": [first, training]}, sort_keys=False)
                name = f"share{text}_{method.split(',')[0].replace(' ', '_')}_seed{seed}"
                output = arguments.output / name
                if arguments.table_only and not (
                    (output / "results.json").is_file() and (parameters or "low" not in method)
                ):
                    continue  # without the reference there is no budget for ours
                result = run(recipe, output, console)
                parameters = result["student"]["parameters"]
                rows.setdefault((text, method), []).append((result, scores_by_epoch(output)))
                print(f"{name}: {parameters:,} {scores_by_epoch(output)} {result['seconds']:.0f} s", flush=True)

    print(
        f"\n| parameters | student | {' | '.join(f'epoch {e}' if e else 'before' for e in arguments.show)} | seconds |"
    )
    print(f"| --- | --- |{' --- |' * len(arguments.show)} --- |")
    for (_, method), found in rows.items():
        student, teacher = (
            statistics.mean(r[whose]["parameters"] for r, _ in found) for whose in ("student", "teacher")
        )
        cells = [
            f"{statistics.mean(s[e] for _, s in found):.2f} ({', '.join(f'{s[e]:.2f}' for _, s in found)})"
            for e in arguments.show
        ]
        seconds = statistics.mean(r["seconds"] for r, _ in found)
        print(f"| {student / teacher:.1%} | {method} | {' | '.join(cells)} | {seconds:.0f} |")


if __name__ == "__main__":
    main()
