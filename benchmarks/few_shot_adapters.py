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
import json
import math
from pathlib import Path

import torch
import yaml
from minivit_ablation import run
from rich.console import Console

import compressvit
from compressvit.artifacts import artifact
from compressvit.model import cost
from compressvit.model.backbone import input_size
from compressvit.recipe.shipped import find_recipe
from compressvit.runs.tables import ratio_text

RATES = (1e-3, 5e-3)  # to begin with; while the best is at an edge, up to EXTENSIONS more beyond it
EXTENSIONS, FACTOR = 2, 4.0
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


def beyond(scores: dict[float, float]) -> list[float]:
    """One rate beyond the best, where that is the smallest or largest tried; it goes on from the smallest of equals."""
    best = min(scores, key=lambda rate: (-scores[rate], rate))
    if best == max(scores):
        return [best * FACTOR]
    return [best / FACTOR] if best == min(scores) else []


def main() -> None:
    """Choose, then run."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "--latencies", type=Path, metavar="OUTPUT", help="run nothing; time the finished students there, alternately"
    )
    parser.add_argument("--data", type=Path, help="a folder of few_shot_lists.py")
    parser.add_argument("--weights", help="of DINOv2 ViT-S/14, in timm's names")
    parser.add_argument("--output", type=Path)
    parser.add_argument("--methods", nargs="+", default=[*METHODS, "mimi"], choices=[*METHODS, "mimi"])
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--epochs", type=int, default=10)
    parser.add_argument("--cycle-epochs", type=int, default=5, help="of each of MiMi's cycles")
    parser.add_argument("--size", type=int, default=56, help="side of the images in pixels, a multiple of 14")
    parser.add_argument("--precision", choices=("fp32", "bf16"), default="fp32", help="of training; evaluated in fp32")
    arguments = parser.parse_args()
    if arguments.latencies:
        latencies(arguments.latencies)
        return
    if not (arguments.data and arguments.weights and arguments.output):
        parser.error("give --data, --weights and --output")
    base = yaml.safe_load(find_recipe("mimi_dinov2_s").read_text(encoding="utf-8"))
    base["teacher"] |= {"weights": arguments.weights, "args": {"img_size": arguments.size}}
    base["data"] |= {"root": str(arguments.data)}
    console = Console(quiet=True)

    def cell(name: str, steps: list, seed: int, splits: tuple[str, str]) -> float:
        content = {**base, "seed": seed, "steps": steps}
        content["data"] = {**base["data"], "train_split": splits[0], "val_split": splits[1]}
        result = run(yaml.safe_dump(content, sort_keys=False), arguments.output / name, console)
        student = result["student"]
        trained = student.get("trained_adapter", student["parameters"] - student["trained_head"])
        print(f"{name}: {student['top1']:.2f} %, {trained:,} parameters, {result['seconds']:.0f} s", flush=True)
        return student["top1"]

    def training(rate: float, epochs: int = arguments.epochs) -> dict:
        options = {"epochs": epochs, "lr": rate, "weight_decay": 0.05, "warmup_epochs": 1}
        return {**options, "precision": arguments.precision, "evaluate_every": epochs}

    for method in arguments.methods:
        source = "adapters" if method == "mimi" else method
        tried: list[dict] = []
        for i, step in enumerate(METHODS[source] or [None]):
            steps = [step] if step else []
            scores: dict[float, float] = {}
            waiting = [rate / SMALLER.get(method, 1) for rate in RATES]
            while waiting:
                for rate in waiting:
                    name = f"choice/{source}_{i}_{rate:g}"
                    scores[rate] = cell(name, [*steps, {"finetune": training(rate)}], 0, ("train800", "val200"))
                waiting = beyond(scores) if len(scores) < len(RATES) + EXTENSIONS else []
            if beyond(scores):
                print(f"{method}: the best rate of setting {i} is still at an edge of those tried", flush=True)
            tried += [{"steps": steps, "rate": rate, "score": score} for rate, score in scores.items()]
        best = max(tried, key=lambda one: one["score"])  # of equals the one that was tried first
        steps, rate = best["steps"], best["rate"]
        (arguments.output / f"choice_{method}.json").write_text(json.dumps({"chosen": best, "tried": tried}, indent=1))
        for seed in arguments.seeds:
            splits = ("train800val200", "test")
            if method != "mimi":
                cell(f"final/{method}_seed{seed}", [*steps, {"finetune": training(rate)}], seed, splits)
                continue
            for size in SIZES:
                cycle = training(rate, arguments.cycle_epochs)
                cell(
                    f"final/mimi_{size:g}_seed{seed}",
                    [*steps, {"prune": {**cycle, "target": {"neurons": size}}}],
                    seed,
                    splits,
                )
                longer = training(
                    rate, arguments.cycle_epochs * (1 + round(-math.log2(size)))
                )  # as all of MiMi's cycles
                direct = [{"adapters": {"width": round(48 * size)}}, {"finetune": longer}]
                cell(f"final/direct_{size:g}_seed{seed}", direct, seed, splits)


if __name__ == "__main__":
    main()
