"""Masks of classes as the report shows them: a picture, what is annotated, and what teacher and student say, each class in its colour."""

from __future__ import annotations

import base64
import colorsys
import zlib
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, ClassVar

from compressvit.tasks.answers import Answers, Measure
from compressvit.tasks.overlap import IGNORED, Overlap, on_picture

if TYPE_CHECKING:
    from PIL.Image import Image
    from torch import Tensor

TOLD = 3  # classes of an image that its text names, those of most pixels
_TURN = 0.61803  # of the circle of hues from one class to the next: the golden section, so that neighbours differ
_COVER = 0.6  # of the colour of a class, the rest is the picture
_GAP = 2  # pixels between the parts of a picture
ORDER = ("true", "teacher", "student")
LAYOUT = "Beside and below each picture is what is annotated, what the teacher says, and what the student says, as far as they are there."
MEASURES: Mapping[str, Measure] = {
    "pixels_apart": Measure(
        f"The images in which student and teacher give the most pixels different classes. {LAYOUT}",
        lambda value: f"{100 * value:.0f} % of pixels apart",
    ),
    "pixels_wrong": Measure(
        f"The images in which the student gives the most pixels a wrong class. {LAYOUT}",
        lambda value: f"{100 * value:.0f} % of pixels wrong",
    ),
}


class Paintings(Answers):
    """Masks of the truth and of both models, and the images with the most pixels apart or, without a teacher, wrong.

    Args:
        names: of the classes.
        labelled: whether the targets are masks.
    """

    pixels: ClassVar[int] = 160  # type: ignore[misc]

    def __init__(self, names: Sequence[str], labelled: bool):
        self.names, self.labelled, self.compared = names, labelled, False
        self._masks: list[dict[str, Tensor]] = []
        self._found = {who: Overlap(len(names)) for who in ("teacher", "student")}

    @property
    def measure(self) -> str | None:  # type: ignore[override]
        return "pixels_apart" if self.compared else "pixels_wrong" if self.labelled else None

    def add(self, outputs: Tensor, targets: Any, expected: Tensor | None) -> Tensor | None:
        import torch

        self.compared, self._masks = expected is not None, []
        for i, logits in enumerate(outputs):
            masks = {"true": targets[i]} if self.labelled else {}
            height, width = masks["true"].shape if self.labelled else logits.shape[-2:]
            if expected is not None:
                masks["teacher"] = on_picture(expected[i], (height, width))
            masks["student"] = on_picture(logits, (height, width))
            self._masks.append(masks)
            for who in masks.keys() & self._found.keys() if self.labelled else ():
                self._found[who].add(masks[who], masks["true"])
        worth = [_apart(masks["student"], masks.get("teacher"), masks.get("true")) for masks in self._masks]
        return None if self.measure is None else torch.tensor(worth)

    def describe(self, index: int) -> dict[str, Any]:
        masks = self._masks[index]
        answer: dict[str, Any] = {who: self._words(mask) for who, mask in masks.items()}
        return {**answer, "masks": {who: _packed(mask, self.pixels) for who, mask in masks.items()}}

    def tables(self) -> dict[str, Any]:
        """IoU by class, of the classes that the held-out images have."""
        if not self.labelled:
            return super().tables()
        found = {
            who: self._found[who].by_class() for who in (("teacher", "student") if self.compared else ("student",))
        }
        classes = [
            {"class": self.names[k], "images": images, **{who: _rounded(every[k][1]) for who, every in found.items()}}
            for k, (images, _) in enumerate(found["student"])
            if images
        ]
        return {**super().tables(), "classes": classes, "class_figure": "IoU"}

    def draw(self, picture: Image, description: Mapping[str, Any]) -> Image:
        """The picture and the masks in two columns."""
        from PIL import Image

        picture = picture.convert("RGB")
        larger = max(1, self.pixels // max(picture.size))  # of a small picture little is seen
        picture = picture.resize((picture.width * larger, picture.height * larger), Image.Resampling.NEAREST)
        masks = description["masks"]
        parts = [picture, *(_painted(picture, masks[who]) for who in ORDER if who in masks)]
        width, height = picture.width + _GAP, picture.height + _GAP
        whole = Image.new("RGB", (2 * width - _GAP, (len(parts) + 1) // 2 * height - _GAP), (255, 255, 255))
        for i, part in enumerate(parts):
            whole.paste(part, (i % 2 * width, i // 2 * height))
        return whole

    def _words(self, mask: Tensor) -> str:
        """'sky 60 %, sea 38 %': the classes of most of the pixels that are not ignored."""
        import torch

        values = mask[mask != IGNORED].long().cpu()
        counts = torch.bincount(values, minlength=1)
        most = [k for k in counts.argsort(descending=True, stable=True).tolist() if counts[k]][:TOLD]
        return ", ".join(f"{self.names[k]} {100 * int(counts[k]) / len(values):.0f} %" for k in most) or "nothing"


def _rounded(percent: float | None) -> float:
    assert percent is not None, "the class is there"
    return round(percent, 2)


def _apart(student: Tensor, teacher: Tensor | None, true: Tensor | None) -> float:
    """The share of pixels whose class is not the teacher's or, without one, not the true one; 0 where there is nothing to compare with."""
    if teacher is not None:
        return float((student != teacher).float().mean())
    if true is None:
        return 0.0
    counted = true != IGNORED
    return float((student != true)[counted].float().mean()) if counted.any() else 0.0


def _packed(mask: Tensor, pixels: int) -> dict[str, Any]:
    """A mask (H, W) with at most so many pixels a side, as JSON has it: height and width, and its bytes row by row, compressed."""
    import torch.nn.functional as F

    height, width = mask.shape
    smaller = min(1.0, pixels / max(height, width))
    size = (max(1, round(height * smaller)), max(1, round(width * smaller)))
    values = F.interpolate(mask[None, None].cpu().float(), size, mode="nearest-exact")[0, 0].byte()
    return {"size": list(size), "classes": base64.b64encode(zlib.compress(values.numpy().tobytes())).decode()}


def colour_of(number: int) -> tuple[int, int, int]:
    """The colour of a class."""
    red, green, blue = colorsys.hsv_to_rgb(number * _TURN % 1, 0.9 - 0.3 * (number % 2), 1.0 - 0.35 * (number // 2 % 2))
    return round(255 * red), round(255 * green), round(255 * blue)


def _painted(picture: Image, mask: Mapping[str, Any]) -> Image:
    """A picture under the colours of a mask's classes; what is ignored is black."""
    from PIL import Image

    height, width = mask["size"]
    values = Image.frombytes("P", (width, height), zlib.decompress(base64.b64decode(mask["classes"])))
    colours = [colour_of(number) for number in range(IGNORED)]
    values.putpalette([value for colour in (*colours, (0, 0, 0)) for value in colour])
    return Image.blend(picture, values.convert("RGB").resize(picture.size, Image.Resampling.NEAREST), _COVER)
