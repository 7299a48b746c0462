"""MiniViT's component ablation on Fashion-MNIST: sharing, transforms and weight distillation, from noise and from the teacher.

Trains the teacher of `fashion_mnist_mini_vit` once, then every cell at equal epochs through the same engine as `compressvit apply`.
A finished cell is not run again, so the program can be stopped and started. Prints a Markdown table of mean top-1 over the seeds.

    python benchmarks/minivit_ablation.py --output runs/ablation --share 2 6 --seeds 0 1 --epochs 1
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from pathlib import Path

import yaml
from rich.console import Console

from compressvit.recipe.shipped import find_recipe
from compressvit.runs.apply import apply

COMPONENTS = {
    "sharing alone": (False, False),
    "+ transforms": (True, False),
    "+ weight distillation": (False, True),
    "both": (True, True),
}
STARTS = {
    "noise": {"form": "reference", "init": "scratch"},
    "teacher": {"form": "identity", "init": "first"},
}


def recipe_text(overrides: dict, teacher: dict | None, steps: list) -> str:
    """The shipped recipe with another teacher section, seed and steps."""
    content = yaml.safe_load(find_recipe("fashion_mnist_mini_vit").read_text(encoding="utf-8"))
    content |= {**overrides, "steps": steps}
    if teacher is not None:
        content["teacher"] = teacher
    return yaml.safe_dump(content, sort_keys=False)


def run(text: str, output: Path, console: Console) -> dict:
    """Apply a recipe unless its results are there already; returns its results with the wall time.

    Raises:
        SystemExit: what is there is of another recipe, and a table must not mix the two.
    """
    results, clock = output / "results.json", output / "seconds.json"
    finished = results.is_file() and clock.is_file()
    if finished and yaml.safe_load((output / "recipe.yaml").read_text(encoding="utf-8")) != yaml.safe_load(text):
        raise SystemExit(f"{output} holds a finished run of another recipe; remove it, or give another --output")
    if not finished:
        started = time.time()
        apply(yaml.safe_load(text), output, overwrite=True, console=console)
        clock.write_text(json.dumps(time.time() - started))
    return {**json.loads(results.read_text()), "seconds": json.loads(clock.read_text())}


def main() -> None:
    """Run the cells and print the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--output", type=Path, default=Path("runs/ablation"))
    parser.add_argument("--share", type=int, nargs="+", default=[2, 6])
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1])
    parser.add_argument("--epochs", type=int, default=1)
    parser.add_argument(
        "--images", type=int, default=60000, help="training images of an epoch of the cells (the teacher sees all)"
    )
    parser.add_argument("--teacher-epochs", type=int, default=4)
    parser.add_argument("--table-only", action="store_true", help="print what is finished and run nothing")
    arguments = parser.parse_args()
    console = Console(quiet=True)

    base = yaml.safe_load(find_recipe("fashion_mnist_mini_vit").read_text(encoding="utf-8"))
    training = {**base["steps"][-1]["distill"], "epochs": arguments.epochs}
    taught = {**base["teacher"], "finetune": {**base["teacher"]["finetune"], "epochs": arguments.teacher_epochs}}
    nothing = [{"multiplex": {"share": 1, "head_mixing": False}}]
    teacher_run = run(recipe_text({}, taught, nothing), arguments.output / "teacher_run", console)
    fixed = {**base["teacher"], "weights": str(arguments.output / "teacher_run" / "teacher"), "num_classes": 10}
    fixed.pop("finetune")
    print(f"teacher: top-1 {teacher_run['teacher']['top1']:.2f} %, {teacher_run['teacher']['parameters']:,} parameters")

    cells: dict[tuple, list[dict]] = {}
    for share in arguments.share:
        for seed in arguments.seeds:
            for start, how in STARTS.items():
                for component, (transforms, distilled) in COMPONENTS.items():
                    sharing = {"share": share, "head_mixing": transforms, "mlp_conv": 3 if transforms else 0, **how}
                    steps = [{"multiplex": sharing}, {"distill" if distilled else "finetune": training}]
                    name = f"share{share}_{start}_{component.strip('+ ').replace(' ', '_')}_seed{seed}"
                    output = arguments.output / name
                    if arguments.table_only and not (output / "results.json").is_file():
                        continue
                    result = run(
                        recipe_text(
                            {"seed": seed, "data": {**base["data"], "limit_train": arguments.images}}, fixed, steps
                        ),
                        output,
                        console,
                    )
                    cells.setdefault((share, start, component), []).append(result)
                    print(f"{name}: {result['student']['top1']:.2f} %  {result['seconds']:.0f} s", flush=True)

    print("\n| share | start | components | parameters | top-1, mean (each seed) | seconds |")
    print("| --- | --- | --- | --- | --- | --- |")
    for (share, start, component), results in cells.items():
        scores = [r["student"]["top1"] for r in results]
        each = ", ".join(f"{s:.2f}" for s in scores)
        seconds = statistics.mean(r["seconds"] for r in results)
        parameters = results[0]["student"]["parameters"]
        print(
            f"| {share} | {start} | {component} | {parameters:,} | {statistics.mean(scores):.2f} ({each}) | {seconds:.0f} |"
        )


if __name__ == "__main__":
    main()
