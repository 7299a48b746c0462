"""Pictures whose ground truth lies at places in them: boxes and masks, which move with the pixels (`compressvit.data.placed_transform`)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from compressvit.data.bands import Picture
from compressvit.data.files import PictureFiles
from compressvit.data.notes import Note
from compressvit.data.outlines import NO_OUTLINES, Outlines
from compressvit.data.pictures import BrokenPicture


@dataclass(frozen=True)
class Annotation:
    """The ground truth of one picture.

    Attributes:
        size: height and width of the picture, in pixels.
        boxes: (x0, y0, x1, y1) of each object, in pixels.
        labels: its class, from 0.
        crowd: whether it stands for many objects that were not told apart.
        outlines: what of the picture it covers, None where that is not known; empty where it is known of no object.
    """

    size: tuple[int, int]
    boxes: tuple[tuple[float, float, float, float], ...]
    labels: tuple[int, ...]
    crowd: tuple[bool, ...]
    outlines: Outlines = NO_OUTLINES


class AnnotatedFiles(PictureFiles):
    """Picture files with annotations: `samples` holds (path, `Annotation`)."""

    def __init__(self, samples: Sequence[tuple[str, Annotation]], classes: list[str], notes: Sequence[Note] = ()):
        self.samples: list[tuple[str, Any]] = list(samples)
        self.classes, self.notes = classes, list(notes)
        self.targets: Any = None  # they are not numbers

    @property
    def outlined(self) -> bool:
        """Whether the mask of any object is known."""
        return any(annotation.outlines for _, annotation in self.samples)


def require_size(image: Picture, annotation: Any) -> None:
    """Raise a `BrokenPicture` where a picture is not of the size that its annotation says."""
    if isinstance(annotation, Annotation) and (image.height, image.width) != annotation.size:
        height, width = annotation.size
        raise BrokenPicture(f"it has {image.width}×{image.height} pixels, and its annotations are for {width}×{height}")
