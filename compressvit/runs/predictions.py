"""What student and teacher say of the held-out images: by class, by confusion, and on the images on which they differ most.

Gathered batch by batch from the evaluation at the end of a run, in memory that does not grow with the set, and left in the run folder as
`predictions.json` and small pictures in `predictions/`, so that a report needs neither model nor data.
"""

from __future__ import annotations

import heapq
import itertools
import json
from collections import Counter
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from PIL import Image

from compressvit.data.input import InputConfig
from compressvit.files import disk_faults, write_atomically, write_text
from compressvit.runs.files import PredictionsFile

FILE = "predictions.json"
PICTURES = "predictions"
FORMAT = 1
EXAMPLES, CONFUSIONS = 24, 20
_PIXELS = 96  # the longer side of a picture at most
_SMALL = 40  # up to here a PNG is small and keeps every pixel


class Predictions:
    """Counts of right and wrong answers, and the images worth looking at.

    Args:
        config: how the images that `add` is given were normalised.
        classes: how many the student tells apart; 0 for a headless one.
        names: of the classes, as far as they are known.
        labelled: whether targets are classes.
    """

    def __init__(self, config: InputConfig, classes: int, names: Sequence[str] | None, labelled: bool):
        self.config = config
        self.names = (
            [*(names or ()), *map(str, range(len(names or ()), classes))] if classes else []
        )  # features are no scores
        self.labelled = labelled and classes > 0
        self.images = 0
        self.compared = False
        self._count = torch.zeros(classes, dtype=torch.long)
        self._right = {
            "student": torch.zeros(classes, dtype=torch.long),
            "teacher": torch.zeros(classes, dtype=torch.long),
        }
        self._confused: dict[str, Counter[tuple[int, int]]] = {"student": Counter(), "teacher": Counter()}
        self._examples: list[tuple[float, int, dict[str, Any], torch.Tensor]] = []  # a heap: the least of them first
        self._order = itertools.count(0, -1)  # of two equal ones, the earlier image is kept

    @property
    def measure(self) -> str | None:
        """By what the examples were chosen: 'shift' of probability between the models, 'cosine' of their outputs, or the 'loss' of
        the student alone; None where there is nothing to go by."""
        if self.compared:
            return "shift" if self.names else "cosine"
        return "loss" if self.labelled else None

    def add(
        self, images: torch.Tensor, targets: torch.Tensor, outputs: torch.Tensor, expected: torch.Tensor | None
    ) -> None:
        """Note a batch.

        Args:
            images: (B, C, H, W), normalised.
            targets: (B,), classes in a labelled set.
            outputs, expected: (B, classes or width) of student and teacher; no `expected` where they cannot be compared.
        """
        self.images += len(images)
        if outputs.ndim != 2:  # tokens or maps of a backbone without pooling
            return
        self.compared = expected is not None
        answers = {"student": outputs} | ({} if expected is None else {"teacher": expected})
        shares = {who: logits.softmax(1).nan_to_num() for who, logits in answers.items()} if self.names else {}
        if self.labelled:
            self._count_answers(targets.cpu(), {who: share.argmax(1).cpu() for who, share in shares.items()})
        if self.measure is None:
            return
        if self.measure == "shift":
            values = (shares["student"] - shares["teacher"]).abs().sum(1) / 2
        elif self.measure == "loss":
            values = 1 - shares["student"].gather(1, targets[:, None])[:, 0]
        else:
            values = 1 - F.cosine_similarity(outputs, expected, dim=1).nan_to_num()  # type: ignore[arg-type]
        for value, index in zip(*(part.tolist() for part in values.topk(min(EXAMPLES, len(values)))), strict=True):
            if len(self._examples) == EXAMPLES and value <= self._examples[0][0]:
                break
            said: dict[str, Any] = {"true": self.names[int(targets[index])]} if self.labelled else {}
            for who, share in shares.items():
                probability, chosen = share[index].max(0)
                said[who] = {"class": self.names[int(chosen)], "probability": round(float(probability), 4)}
            picture = images[index].cpu().clone()  # not a view, which would keep the batch
            entry = (value, next(self._order), said, picture)
            (heapq.heappushpop if len(self._examples) == EXAMPLES else heapq.heappush)(self._examples, entry)

    def _count_answers(self, targets: torch.Tensor, chosen: dict[str, torch.Tensor]) -> None:
        classes = len(self._count)
        self._count += torch.bincount(targets, minlength=classes)
        for who, answers in chosen.items():
            right = answers == targets
            self._right[who] += torch.bincount(targets[right], minlength=classes)
            self._confused[who].update(zip(targets[~right].tolist(), answers[~right].tolist(), strict=True))

    def as_dict(self) -> dict[str, Any]:
        """The content of `predictions.json`."""
        confusions = self._confusions()
        return {
            "format": FORMAT,
            "images": self.images,
            "compared": self.compared,
            "measure": self.measure,
            "classes": self._classes() if self.labelled else None,
            "confusions": confusions[:CONFUSIONS] if self.labelled else None,
            "confusions_in_all": len(confusions) if self.labelled else None,
            "examples": [
                {
                    "file": f"{PICTURES}/{self._name(number)}",
                    "value": round(1 - v if self.measure == "cosine" else v, 4),
                    **said,
                }
                for number, (v, _, said, _) in enumerate(self._ordered())
            ],
        }

    def write(self, folder: Path) -> None:
        """Write `predictions.json` and the pictures into a run folder; nothing if there are no predictions."""
        if self.measure is None:
            return
        with disk_faults(folder):
            for old in (folder / PICTURES).glob("*"):
                old.unlink()
        for number, (*_, pixels) in enumerate(self._ordered()):
            picture = self._picture(pixels)
            kind = "PNG" if self._suffix == "png" else "JPEG"
            write_atomically(folder / PICTURES / self._name(number), partial(picture.save, format=kind, quality=88))
        content = PredictionsFile.model_validate(self.as_dict()).model_dump(by_alias=True, exclude_unset=True)
        write_text(folder / FILE, json.dumps(content, indent=1, allow_nan=False) + "\n")

    def _ordered(self) -> list[tuple[float, int, dict[str, Any], torch.Tensor]]:
        return sorted(self._examples, key=lambda entry: entry[:2], reverse=True)

    def _classes(self) -> list[dict[str, Any]]:
        """Percent right by class, of the classes that the held-out images have."""
        who = ("teacher", "student") if self.compared else ("student",)
        return [
            {"class": self.names[c], "images": n, **{w: round(100 * int(self._right[w][c]) / n, 2) for w in who}}
            for c, n in enumerate(self._count.tolist())
            if n
        ]

    def _confusions(self) -> list[dict[str, Any]]:
        """The confusions (true class, answer) that student and teacher make most differently often; the student's most frequent alone."""
        theirs, ours = self._confused["teacher"], self._confused["student"]
        ranked = sorted(
            theirs.keys() | ours.keys(), key=lambda pair: (-abs(ours[pair] - theirs[pair]), -ours[pair], pair)
        )
        return [
            {
                "true": self.names[true],
                "answer": self.names[answer],
                **({"teacher": theirs[true, answer]} if self.compared else {}),
                "student": ours[true, answer],
            }
            for true, answer in ranked
            if ours[true, answer] != theirs[true, answer]
        ]

    @property
    def _suffix(self) -> str:
        return "png" if max(self.config.height, self.config.width) <= _SMALL else "jpg"

    def _name(self, number: int) -> str:
        return f"{number:02d}.{self._suffix}"

    def _picture(self, pixels: torch.Tensor) -> Image.Image:
        """(C, H, W), normalised, as a small picture."""
        mean, std = (pixels.new_tensor(v).view(-1, 1, 1) for v in (self.config.mean, self.config.std))
        levels = ((pixels * std + mean).clamp(0, 1) * 255).round().byte().permute(1, 2, 0).numpy()
        picture = Image.fromarray(levels[:, :, 0] if levels.shape[2] == 1 else levels)
        picture.thumbnail((_PIXELS, _PIXELS))
        return picture
