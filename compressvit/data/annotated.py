"""Pictures whose ground truth lies at places in them: boxes and masks, which move with the pixels (`compressvit.data.placed_transform`).

The ground truth of a picture is an `Annotation`, which is there from the beginning, or a mask of classes, which is read with the picture.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from compressvit.data.bands import Picture
from compressvit.data.class_masks import MaskFile
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
    """Picture files with annotations: `samples` holds (path, `Annotation`), or (path, `MaskFile`)."""

    def __init__(
        self,
        samples: Sequence[tuple[str, Annotation | MaskFile]],
        classes: list[str] | None,
        notes: Sequence[Note] = (),
    ):
        self.samples: list[tuple[str, Any]] = list(samples)
        self.classes, self.notes = classes, list(notes)
        self.targets: Any = None  # they are not numbers

    @property
    def outlined(self) -> bool:
        """Whether the mask of any object is known."""
        return any(getattr(annotation, "outlines", None) for _, annotation in self.samples)


def truth_of(image: Picture, target: Any) -> Any:
    """The ground truth of a picture that was read, from what its set says of it; what is no annotation stays as it is.

    Raises:
        BrokenPicture: the two do not belong together, or a mask cannot be used.
    """
    if isinstance(target, MaskFile):
        return target.read(image)
    if isinstance(target, Annotation) and (image.height, image.width) != target.size:
        height, width = target.size
        raise BrokenPicture(f"it has {image.width}×{image.height} pixels, and its annotations are for {width}×{height}")
    return target
