"""Every adapter on a frozen DINOv2 ViT-S/14 and a few-shot task of 1,000 images, by the protocol of VTAB-1k, in one table.

Learning rate and scale are chosen on 800/200 images with one seed; the final runs learn from all 1,000 with every seed. MiMi also at
several sizes, beside adapters that are trained directly at these sizes. A finished run is not run again.

    python benchmarks/few_shot_lists.py digits --output few_shot/digits
    python benchmarks/few_shot_adapters.py --data few_shot/digits --weights FILE --output runs/few_shot/digits
    compressvit compare runs/few_shot/digits/final --output runs/few_shot/digits/table
    python benchmarks/few_shot_adapters.py --latencies runs/few_shot/digits
"""

from __future__ import annotations

import argparse
import math
from pathlib import Path

import torch
from few_shot_runs import FINAL, Task, add_task, task_of

import compressvit
from compressvit.artifacts import artifact
from compressvit.model import cost
from compressvit.model.backbone import input_size
from compressvit.runs.tables import ratio_text

SMALLER = {"full": 100, "attention": 10, "mlp": 10}  # these start at rates so much smaller
METHODS: dict[str, list[dict]] = {  # the steps before training; more than one: also a choice
    "full": [],
    "linear": [{"freeze": {"train": "head"}}],
    "attention": [{"freeze": {"train": "attention"}}],
    "mlp": [{"freeze": {"train": "mlp"}}],
    "bitfit": [{"bitfit": {}}],
    "vpt_shallow": [{"vpt": {"prompts": 10, "deep": False}}],
    "vpt_deep": [{"vpt": {"prompts": 10}}],
    "adapters": [{"adapters": {}}],
    "phm": [{"phm": {}}],
    "compacter": [{"compacter": {}}],
    "adaptformer": [{"adaptformer": {"width": 64, "scale": scale}} for scale in (0.1, 1.0)],
    "repadapter": [{"repadapter": {"scale": scale}} for scale in (1.0, 10.0)],
    "lora": [{"lora": {}}],
    "ssf": [{"ssf": {}}],
    "fact_tt": [{"fact": {"form": "tt", "rank": 16, "scale": scale}} for scale in (1.0, 10.0)],
    "fact_tk": [{"fact": {"form": "tk", "rank": 16, "scale": scale}} for scale in (1.0, 10.0)],
}
MERGED = ("repadapter", "lora", "ssf", "fact_tt", "fact_tk", "phm", "compacter")  # the last two into dense adapters
SIZES = (1 / 2, 1 / 4, 1 / 8, 1 / 16)  # of the neurons of adapters of M/8, for the curve


def latencies(output: Path, rounds: int = 30) -> None:
    """Milliseconds for one image: the first seed's student of every method, as it is and merged, measured alternately with the backbone."""
    models, names = [], []
    for folder in sorted(output.glob("final/*_seed0")):
        if not (folder / "results.json").is_file():
            print(f"left out, not finished: {folder}")
            continue
        student = artifact.load(folder / "student")
        models.append(student)
        names.append(folder.name.removesuffix("_seed0"))
        if names[-1] in MERGED:
            models.append(compressvit.merge(student))
            names.append(f"{names[-1]}, merged")
    linear = output / "final" / "linear_seed0" / "student"
    if not linear.is_dir():
        raise SystemExit(
            f"{linear} is not there: the backbone to compare with is the one with a new classifier alone (--methods linear)"
        )
    names.append("backbone")
    models.append(artifact.load(linear))
    times = cost.latencies(
        models, [input_size(model) for model in models], device=torch.device("cpu"), rounds=rounds, seconds=600
    )
    print("| one image | milliseconds | of the backbone |\n| --- | --- | --- |")
    for i, (name, taken) in enumerate(zip(names, times.medians, strict=True)):
        print(f"| {name} | {taken:.2f} | {ratio_text(times.ratio(i, len(names) - 1))} |")


def main() -> None:
    """Choose, then run."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "--latencies", type=Path, metavar="OUTPUT", help="run nothing; time the finished students there, alternately"
    )
    add_task(parser)
    parser.add_argument("--methods", nargs="+", default=[*METHODS, "mimi"], choices=[*METHODS, "mimi"])
    parser.add_argument("--cycle-epochs", type=int, default=5, help="of each of MiMi's cycles")
    arguments = parser.parse_args()
    if arguments.latencies:
        latencies(arguments.latencies)
        return
    task = task_of(parser, arguments)
    for method in arguments.methods:
        source = "adapters" if method == "mimi" else method
        chosen = task.choose(source, METHODS[source] or [None], SMALLER.get(method, 1))
        for seed in arguments.seeds:
            if method == "mimi":
                mimi(task, chosen.rate, seed, arguments.cycle_epochs)
            else:
                task.cell(
                    f"final/{method}_seed{seed}", [*chosen.steps, {"finetune": task.training(chosen.rate)}], seed, FINAL
                )


def mimi(task: Task, rate: float, seed: int, epochs: int) -> None:
    """Adapters pruned to every size, and adapters of that size that are trained as long as all cycles of the former."""
    for size in SIZES:
        cycle = task.training(rate, epochs)
        pruned = [*METHODS["adapters"], {"prune": {**cycle, "target": {"neurons": size}}}]
        task.cell(f"final/mimi_{size:g}_seed{seed}", pruned, seed, FINAL)
        longer = task.training(rate, epochs * (1 + round(-math.log2(size))))
        direct = [{"adapters": {"width": round(48 * size)}}, {"finetune": longer}]
        task.cell(f"final/direct_{size:g}_seed{seed}", direct, seed, FINAL)


if __name__ == "__main__":
    main()
