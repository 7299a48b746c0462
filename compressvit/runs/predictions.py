"""Predictions of student and teacher on the held-out images: the task's tables, and the images on which they differ most.

Collected batch by batch during the evaluation at the end of a run, with memory independent of the size of the set, and written to the run
folder as `predictions.json` and thumbnails in `predictions/`, so that a report needs neither model nor data.
"""

from __future__ import annotations

import heapq
import itertools
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from PIL import Image

from compressvit.data.input import InputConfig
from compressvit.data.pictures import MODES
from compressvit.data.sets.base import evenly
from compressvit.files import disk_faults, write_atomically, write_json
from compressvit.runs.files import PICTURES, PREDICTIONS, PredictionsFile
from compressvit.tasks.base import Answers

FORMAT = 1
EXAMPLES = 24
FRAMES, ACROSS = 8, 4  # of a clip that are shown, and those of them in a row
_SMALL = 40  # up to this size, a lossless PNG is small


class Predictions:
    """The most informative images, and the statistics of the task over all images.

    Args:
        config: how the images that `add` is given were normalised.
        answers: from the task; None if it has nothing to show.
    """

    def __init__(self, config: InputConfig, answers: Answers | None):
        self.config, self.answers = config, answers
        self.images = 0
        self.compared = False
        self._examples: list[tuple[float, int, dict[str, Any], torch.Tensor]] = []  # a heap with the smallest first
        self._order = itertools.count(0, -1)  # of two equal images, the earlier one is kept

    def add(self, images: torch.Tensor, targets: Any, outputs: Any, expected: Any | None) -> None:
        """Add a batch.

        Args:
            images: (B, C, H, W), normalised.
            targets: targets of the images.
            outputs, expected: outputs of student and teacher, from the task's `run`; `expected` is None if they are not comparable.
        """
        self.images += len(images)
        self.compared = expected is not None
        values = None if self.answers is None else self.answers.add(outputs, targets, expected)
        if self.answers is None or values is None:
            return
        for value, index in zip(*(part.tolist() for part in values.topk(min(EXAMPLES, len(values)))), strict=True):
            if len(self._examples) == EXAMPLES and value <= self._examples[0][0]:
                break
            picture = images[index].cpu().clone()  # a copy, since a view would keep the whole batch alive
            entry = (value, next(self._order), self.answers.describe(index), picture)
            (heapq.heappushpop if len(self._examples) == EXAMPLES else heapq.heappush)(self._examples, entry)

    def as_dict(self) -> dict[str, Any]:
        """The content of `predictions.json`; empty if there is nothing to show."""
        answers = self.answers
        if answers is None or answers.measure is None:
            return {}
        return {
            "format": FORMAT,
            "images": self.images,
            "compared": self.compared,
            "measure": answers.measure,
            **answers.tables(),
            **({} if self.drawn is None else {"drawn": self.drawn}),
            "examples": [
                {"file": f"{PICTURES}/{self._name(number)}", "value": round(answers.value(v), 4), **answer}
                for number, (v, _, answer, _) in enumerate(self._ordered())
            ],
        }

    @property
    def drawn(self) -> str | None:
        """What of an image of bands, or of a clip, a picture shows; None of a picture, which is shown as it is."""
        count, frames = self.config.channels, self.config.frames
        if count in MODES:
            return None
        if frames is not None:
            return f"those of {min(frames, FRAMES)} of the {frames} frames of a clip, row by row"
        return f"the first of {count}, in gray" if count < 3 else f"the first 3 of {count}, as red, green and blue"

    def write(self, folder: Path) -> None:
        """Write `predictions.json` and the pictures to a run folder, unless there are no predictions."""
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
        """A normalised image (C, H, W) as a small picture, with the task's drawings: of two channels the first, of more three; of a clip
        some frames, row by row."""
        assert self.answers is not None, "without answers there are no pictures"
        config = self.config
        shown = pixels[: config.channels]  # of several clips of a video the first
        mean, std = (pixels.new_tensor(v).view(-1, 1, 1) for v in (config.mean, config.std))
        levels = ((shown * std + mean).clamp(0, 1) * 255).round().byte()
        size = self.answers.pixels
        if config.frames is not None and config.frames > 1:
            frames = levels.unflatten(0, (config.frames, -1))
            picture = _mosaic([_small(frames[i], size) for i in evenly(len(frames), FRAMES)])
        else:
            picture = _small(levels[:3], size)
        return self.answers.draw(picture, answer)


def _small(levels: torch.Tensor, size: int) -> Image.Image:
    """A picture of one or three channels (C, H, W), of at most `size` pixels a side."""
    values = levels.permute(1, 2, 0).numpy()
    picture = Image.fromarray(values[:, :, 0] if values.shape[2] < 3 else values)
    picture.thumbnail((size, size))
    return picture


def _mosaic(frames: Sequence[Image.Image]) -> Image.Image:
    """Frames in rows, in the order of reading."""
    width, height = frames[0].size
    across = min(len(frames), ACROSS)
    mosaic = Image.new(frames[0].mode, (across * width, -(-len(frames) // across) * height), "white")
    for i, frame in enumerate(frames):
        mosaic.paste(frame, (i % across * width, i // across * height))
    return mosaic
