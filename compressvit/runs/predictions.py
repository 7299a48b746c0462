"""Predictions of student and teacher on the held-out images: the task's tables, and the images on which they differ most.

Gathered batch by batch from the evaluation at the end of a run, in memory that does not grow with the set, and left in the run folder as
`predictions.json` and small pictures in `predictions/`, so that a report needs neither model nor data.
"""

from __future__ import annotations

import heapq
import itertools
from functools import partial
from pathlib import Path
from typing import Any

import torch
from PIL import Image

from compressvit.data.input import InputConfig
from compressvit.files import disk_faults, write_atomically, write_json
from compressvit.runs.files import PICTURES, PREDICTIONS, PredictionsFile
from compressvit.tasks.base import Answers

FORMAT = 1
EXAMPLES = 24
_PIXELS = 96  # the longer side of a picture at most
_SMALL = 40  # up to here a PNG is small and keeps every pixel


class Predictions:
    """The images worth looking at, and what the task gathers of all.

    Args:
        config: how the images that `add` is given were normalised.
        answers: of the task; None where it shows nothing.
    """

    def __init__(self, config: InputConfig, answers: Answers | None):
        self.config, self.answers = config, answers
        self.images = 0
        self.compared = False
        self._examples: list[tuple[float, int, dict[str, Any], torch.Tensor]] = []  # a heap: the least of them first
        self._order = itertools.count(0, -1)  # of two equal ones, the earlier image is kept

    def add(self, images: torch.Tensor, targets: Any, outputs: Any, expected: Any | None) -> None:
        """Add a batch.

        Args:
            images: (B, C, H, W), normalised.
            targets: of the images.
            outputs, expected: of student and teacher, as the task's `run` returns them; no `expected` where they cannot be compared.
        """
        self.images += len(images)
        self.compared = expected is not None
        values = None if self.answers is None else self.answers.add(outputs, targets, expected)
        if self.answers is None or values is None:
            return
        for value, index in zip(*(part.tolist() for part in values.topk(min(EXAMPLES, len(values)))), strict=True):
            if len(self._examples) == EXAMPLES and value <= self._examples[0][0]:
                break
            picture = images[index].cpu().clone()  # not a view, which would keep the batch
            entry = (value, next(self._order), self.answers.describe(index), picture)
            (heapq.heappushpop if len(self._examples) == EXAMPLES else heapq.heappush)(self._examples, entry)

    def as_dict(self) -> dict[str, Any]:
        """The content of `predictions.json`; empty where there is nothing to show."""
        answers = self.answers
        if answers is None or answers.measure is None:
            return {}
        return {
            "format": FORMAT,
            "images": self.images,
            "compared": self.compared,
            "measure": answers.measure,
            **answers.tables(),
            "examples": [
                {"file": f"{PICTURES}/{self._name(number)}", "value": round(answers.value(v), 4), **answer}
                for number, (v, _, answer, _) in enumerate(self._ordered())
            ],
        }

    def write(self, folder: Path) -> None:
        """Write `predictions.json` and the pictures into a run folder; nothing if there are no predictions."""
        content = self.as_dict()
        if not content:
            return
        with disk_faults(folder):
            for old in (folder / PICTURES).glob("[0-9][0-9].*"):
                old.unlink()
        for number, (_, _, answer, pixels) in enumerate(self._ordered()):
            picture = self._picture(pixels, answer)
            kind = "PNG" if self._suffix == "png" else "JPEG"
            write_atomically(folder / PICTURES / self._name(number), partial(picture.save, format=kind, quality=88))
        content = PredictionsFile.model_validate(content).model_dump(by_alias=True, exclude_unset=True)
        write_json(folder / PREDICTIONS, content, indent=1)

    def _ordered(self) -> list[tuple[float, int, dict[str, Any], torch.Tensor]]:
        return sorted(self._examples, key=lambda entry: entry[:2], reverse=True)

    @property
    def _suffix(self) -> str:
        return "png" if max(self.config.height, self.config.width) <= _SMALL else "jpg"

    def _name(self, number: int) -> str:
        return f"{number:02d}.{self._suffix}"

    def _picture(self, pixels: torch.Tensor, answer: dict[str, Any]) -> Image.Image:
        """(C, H, W), normalised, as a small picture with what the task draws in it."""
        mean, std = (pixels.new_tensor(v).view(-1, 1, 1) for v in (self.config.mean, self.config.std))
        levels = ((pixels * std + mean)[:3].clamp(0, 1) * 255).round().byte().permute(1, 2, 0).numpy()
        picture = Image.fromarray(levels[:, :, 0] if levels.shape[2] == 1 else levels)
        if self.answers is not None:
            picture = self.answers.draw(picture, answer)
        picture.thumbnail((_PIXELS, _PIXELS))
        return picture
