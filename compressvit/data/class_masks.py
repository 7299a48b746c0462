"""Masks of classes: a picture of one channel whose values are the classes of the pixels of another."""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
from PIL import Image

from compressvit.data.bands import Picture
from compressvit.data.pictures import BrokenPicture, Read, read_picture
from compressvit.tasks.overlap import IGNORED

MOST_CLASSES = IGNORED  # of one byte


@dataclass(frozen=True, eq=False)
class ClassMask:
    """The ground truth of one picture: `values` uint8 (H, W), classes from 0, and `IGNORED`."""

    values: np.ndarray


class NoClassError(BrokenPicture):
    """A value of a mask is no class."""


@dataclass(frozen=True)
class MaskFile:
    """A mask of classes on disk, read when its picture is.

    Attributes:
        path: of the file.
        name: the same, relative to the folder of the set, for messages.
        classes: how many there are; None: any.
        zero_is_none: 0 is ignored, and 1 is the first class, as in ADE20K.
    """

    path: str = field(repr=False)
    name: str
    classes: int | None = field(repr=False)
    zero_is_none: bool = False

    def read(self, picture: Picture) -> ClassMask:
        """The mask of a picture.

        Raises:
            BrokenPicture: it is damaged, is no picture of one channel of 8 bits, has another size than the picture, or a value that is no
                class (`NoClassError`).
        """
        values = self.values()
        height, width = values.shape
        if (height, width) != (picture.height, picture.width):
            raise BrokenPicture(
                f"it has {picture.width}×{picture.height} pixels, and its mask {self.name} {width}×{height}"
            )
        return ClassMask(values)

    def values(self) -> np.ndarray:
        """Classes from 0 and `IGNORED`, uint8 (H, W). Raises as `read`."""
        try:
            mask, done = read_picture(self.path)
        except BrokenPicture as error:
            raise BrokenPicture(f"its mask {self.name} cannot be read: {error}") from error
        scaled = done & (Read.SIXTEEN_BITS | Read.FLOAT)
        if not isinstance(mask, Image.Image) or mask.mode not in ("L", "P") or scaled:
            kind = "more than 8 bits" if scaled else f"mode {mask.mode}" if isinstance(mask, Image.Image) else "bands"
            raise BrokenPicture(
                f"its mask {self.name} is a picture of {kind}; a mask has one channel of 8 bits (mode L or P), whose values are classes"
            )
        values = np.array(mask)
        if self.zero_is_none:
            values = np.where(values == 0, IGNORED, values - np.uint8(values != IGNORED)).astype(np.uint8)
        self._require_classes(values)
        return values

    def _require_classes(self, values: np.ndarray) -> None:
        strange = (values >= self.classes) & (values != IGNORED) if self.classes is not None else np.zeros(1, bool)
        if not strange.any():
            return
        assert self.classes is not None
        shift = int(self.zero_is_none)
        zero = "0 and " * shift
        raise NoClassError(
            f"its mask {self.name} has the value {int(values[strange].max()) + shift}, which is no class: there are {self.classes}, of "
            f"values {shift} to {self.classes - 1 + shift}, and {zero}{IGNORED} {'are' if shift else 'is'} ignored"
        )
