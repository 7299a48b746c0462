"""What the comparisons of trained detectors share: what each finds in the held-out images, and how they differ, in pairs."""

from __future__ import annotations

import json
import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from paired_precision import Matches, intervals

from compressvit.artifacts import artifact
from compressvit.data.loaders import eval_loader
from compressvit.data.opening import open_data
from compressvit.recipe.recipe import Recipe
from compressvit.runs.evaluate import trained_side
from compressvit.tasks.base import task_of
from compressvit.training.evaluate import evaluate

FOUND = "found.json"  # what a detector finds in the held-out images, in the folder of its run


def detections(student: Path, recipe: Recipe) -> dict[str, Any]:
    """What a trained detector finds in the held-out images, and what is there, in pixels of the pictures on disk."""
    model = artifact.load(student)
    datasets = open_data(recipe.data)
    side = trained_side(model, recipe.data, ())
    content: dict[str, Any] = {"classes": model.num_classes, "truth": [], "crowd": [], "found": []}

    def note(images: torch.Tensor, targets: Any, outputs: Any, expected: Any) -> None:
        for target, found in zip(targets, outputs, strict=True):
            content["truth"].append(_rows(target["boxes"], target["size"], target["labels"]))
            content["crowd"].append(target["crowd"].tolist())
            content["found"].append(_rows(found.boxes, target["size"], found.scores, found.labels))

    device = torch.device("cpu")
    evaluate(side, eval_loader(datasets, recipe.data, side.input, device), device, task=task_of(model), watch=note)
    return content


def _rows(boxes: torch.Tensor, size: torch.Tensor, *more: torch.Tensor) -> list[list[float]]:
    """(x, y, width, height, …) in pixels of boxes in widths and heights of an image."""
    scaled = boxes.double() * size.flip(0).repeat(2)
    placed = torch.cat([scaled[:, :2], scaled[:, 2:] - scaled[:, :2]], dim=1).tolist()
    return [[*box, *rest] for box, *rest in zip(placed, *(values.tolist() for values in more), strict=True)]


def matches(run: Path) -> Matches:
    """What a detector found, matched to the annotated boxes."""
    content = json.loads((run / FOUND).read_text())
    truth, found = (
        [np.asarray(boxes).reshape(-1, width) for boxes in content[key]] for key, width in (("truth", 5), ("found", 6))
    )
    return Matches(truth, found, content["classes"], content["crowd"])


def differences(
    figures: Mapping[tuple[str, int], Mapping[str, Any]],
    found: Mapping[tuple[str, int], Matches],
    names: tuple[str, str],
    seeds: Sequence[int],
) -> dict[str, Any]:
    """AP and AP50 of one cell less those of another, with both intervals.

    Args:
        figures: `ap` and `ap50` in percent, by cell and seed.
        found: what they found, by cell and seed.
        names: the cell, and the one that is subtracted.
        seeds: those of which both are there.
    """
    name, other = names
    over_images = intervals([found[name, seed] for seed in seeds], [found[other, seed] for seed in seeds])
    content = {}
    for key in ("ap", "ap50"):
        each = [figures[name, seed][key] - figures[other, seed][key] for seed in seeds]
        content[f"{key}_difference"] = {
            "from": other,
            "seeds": list(seeds),
            "mean": statistics.mean(each),
            "deviation_of_seeds": statistics.stdev(each) if len(each) > 1 else None,
            "interval_over_images": over_images[key],
        }
    return content


def mean_and_each(values: Sequence[float]) -> str:
    """The mean, and the value of each seed in brackets."""
    return f"{statistics.mean(values):.2f} ({', '.join(f'{value:.1f}' for value in values)})"


def difference_text(found: Mapping[str, Any] | None) -> str:
    """A difference with its interval over images and its deviation over seeds; empty for None."""
    if found is None:
        return ""
    low, high = found["interval_over_images"]
    deviation = found["deviation_of_seeds"]
    over_seeds = "" if deviation is None else f" ± {deviation:.2f}"
    return f"{found['mean']:+.2f} [{low:+.2f}, {high:+.2f}]{over_seeds}"
