"""Runs of a few-shot task: a rate and a setting are chosen on a part of the training images, then all of them are learned from.

The protocol is that of VTAB-1k: choices are made with one seed on 800 images to learn from and 200 to judge by, and final runs learn from
all 1,000 and are judged on test images that no choice was based on. A finished run is not run again.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml
from minivit_ablation import run
from rich.console import Console

from compressvit.recipe.shipped import find_recipe

RATES = (1e-3, 5e-3)  # to begin with; while the best is at an edge, up to EXTENSIONS more beyond it
EXTENSIONS, FACTOR = 2, 4.0
CHOOSING, FINAL = ("train800", "val200"), ("train800val200", "test")


@dataclass(frozen=True)
class Choice:
    """The setting and the rate that were best on the images to judge by."""

    steps: list[dict[str, Any]]
    rate: float


@dataclass(frozen=True)
class Task:
    """The runs of one task.

    Attributes:
        base: the recipe without its steps.
        output: the folder of its runs.
        epochs: of every run.
        precision: of training.
    """

    base: dict[str, Any]
    output: Path
    epochs: int
    precision: str

    def cell(self, name: str, steps: Sequence[dict[str, Any]], seed: int, splits: tuple[str, str]) -> float:
        """The top-1 of a run, in percent."""
        content = {**self.base, "seed": seed, "steps": list(steps)}
        content["data"] = {**self.base["data"], "train_split": splits[0], "val_split": splits[1]}
        result = run(yaml.safe_dump(content, sort_keys=False), self.output / name, Console(quiet=True))
        student = result["student"]
        trained = student.get("trained_adapter", student["parameters"] - student["trained_head"])
        print(f"{name}: {student['top1']:.2f} %, {trained:,} parameters, {result['seconds']:.0f} s", flush=True)
        return float(student["top1"])

    def training(self, rate: float, epochs: int | None = None) -> dict[str, Any]:
        """The options of a phase."""
        options = {"epochs": epochs or self.epochs, "lr": rate, "weight_decay": 0.05, "warmup_epochs": 1}
        return {**options, "precision": self.precision, "evaluate_every": options["epochs"]}

    def choose(self, name: str, settings: Sequence[dict[str, Any] | None], smaller: float = 1.0) -> Choice:
        """The best of some settings of a method, each with its best rate; written to `choice_NAME.json`.

        Args:
            settings: steps before training, one of them each; None for none.
            smaller: how many times smaller rates are than usual.
        """
        tried: list[dict[str, Any]] = []
        for i, step in enumerate(settings):
            steps = [step] if step else []
            scores: dict[float, float] = {}
            waiting = [rate / smaller for rate in RATES]
            while waiting:
                for rate in waiting:
                    phase = {"finetune": self.training(rate)}
                    scores[rate] = self.cell(f"choice/{name}_{i}_{rate:g}", [*steps, phase], 0, CHOOSING)
                waiting = beyond(scores) if len(scores) < len(RATES) + EXTENSIONS else []
            if beyond(scores):
                print(f"{name}: the best rate of setting {i} is still at an edge of those tried", flush=True)
            tried += [{"steps": steps, "rate": rate, "score": score} for rate, score in scores.items()]
        best = max(tried, key=lambda one: one["score"])  # of equals the one that was tried first
        (self.output / f"choice_{name}.json").write_text(json.dumps({"chosen": best, "tried": tried}, indent=1))
        return Choice(best["steps"], best["rate"])


def beyond(scores: dict[float, float]) -> list[float]:
    """One rate beyond the best, where that is the smallest or largest tried; it goes on from the smallest of equals."""
    best = min(scores, key=lambda rate: (-scores[rate], rate))
    if best == max(scores):
        return [best * FACTOR]
    return [best / FACTOR] if best == min(scores) else []


def add_task(parser: argparse.ArgumentParser) -> None:
    """The arguments that make a `Task`."""
    parser.add_argument("--data", type=Path, help="a folder of few_shot_lists.py")
    parser.add_argument("--weights", help="of DINOv2 ViT-S/14, in timm's names")
    parser.add_argument("--output", type=Path)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--epochs", type=int, default=10)
    parser.add_argument("--size", type=int, default=56, help="side of the images in pixels, a multiple of 14")
    parser.add_argument("--precision", choices=("fp32", "bf16"), default="fp32", help="of training; evaluated in fp32")


def task_of(parser: argparse.ArgumentParser, arguments: argparse.Namespace) -> Task:
    """The task of these arguments."""
    if not (arguments.data and arguments.weights and arguments.output):
        parser.error("give --data, --weights and --output")
    base = yaml.safe_load(find_recipe("mimi_dinov2_s").read_text(encoding="utf-8"))
    base["teacher"] |= {"weights": arguments.weights, "args": {"img_size": arguments.size}}
    base["data"] |= {"root": str(arguments.data)}
    return Task(base, arguments.output, arguments.epochs, arguments.precision)
