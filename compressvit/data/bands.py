"""Pictures of any number of channels, as of satellites and microscopes: what they are in memory, and `.npy` files of them.

An array is (H, W) or (H, W, C). One of 1 or 3 channels is a picture of Pillow's like any other; one of another number is `Bands`.
"""

from __future__ import annotations

import io
import math
import os
from dataclasses import dataclass
from typing import IO

import numpy as np
from numpy.lib import format as npy
from PIL import Image

from compressvit.data.levels import BrokenPicture, Read, eight_bits, require_readable

NPY = b"\x93NUMPY"  # how a file begins
SUFFIX = ".npy"
_HEADERS = {(1, 0): npy.read_array_header_1_0, (2, 0): npy.read_array_header_2_0}
_LONGEST_HEADER = 10_000  # bytes; as numpy's own limit, and without fields a header has 128


@dataclass(frozen=True, eq=False)
class Bands:
    """A picture of another number of channels than 1 and 3: `values` uint8 (H, W, C)."""

    values: np.ndarray

    @property
    def height(self) -> int:
        return self.values.shape[0]

    @property
    def width(self) -> int:
        return self.values.shape[1]

    @property
    def channels(self) -> int:
        return self.values.shape[2]

    def part(self, first: int, end: int) -> Image.Image:
        """Channels from `first` to before `end`: one as a gray picture, three as one in colour, two as one whose third is black."""
        values = self.values[:, :, first:end]
        if end - first == 2:
            values = np.concatenate([values, np.zeros_like(values[:, :, :1])], axis=2)
        return Image.fromarray(np.ascontiguousarray(values.squeeze(2) if end - first == 1 else values))


Picture = Image.Image | Bands


def picture_of(values: np.ndarray) -> tuple[Picture, Read]:
    """The picture in an array (H, W) or (H, W, C) of any kind that is read, and what was done to it.

    Raises:
        BrokenPicture: it has another shape, or values without a rule.
    """
    require_shape(values.shape, values.dtype.itemsize)
    values, done = eight_bits(values)
    values = values[:, :, None] if values.ndim == 2 else values
    bands = Bands(values)
    return (bands.part(0, bands.channels) if bands.channels in (1, 3) else bands), done


def limit_of_bytes() -> int | None:
    """How many bytes a picture may have: 4 for every pixel of the largest that Pillow reads; None where its limit was lifted."""
    limit = (
        Image.MAX_IMAGE_PIXELS
    )  # of twice as many Pillow says that it could be a decompression bomb, and refuses the picture
    return None if limit is None else 8 * limit


def require_shape(shape: tuple[int, ...], itemsize: int) -> None:
    """Raise a `BrokenPicture` where an array of this shape is no picture, or is too large."""
    text = "×".join(map(str, shape))[:60]
    if len(shape) not in (2, 3) or min(shape) < 1:
        raise BrokenPicture(
            f"its shape is {text or 'that of a single number'}; (height, width) and (height, width, channels) are read"
        )
    most = limit_of_bytes()
    if most is not None and max(4 * shape[0] * shape[1], math.prod(shape) * itemsize) > most:
        raise BrokenPicture(
            f"its shape is {text}, which could be a decompression bomb; up to {most // 4:,} pixels and {most:,} bytes are read"
        )


def npy_header(file: IO[bytes]) -> tuple[tuple[int, ...], bool, np.dtype]:
    """The shape, whether columns come first, and the kind of the numbers of an `.npy` file, of which nothing else is read.

    Raises:
        BrokenPicture: it is damaged, is no picture, or would have to be unpickled.
    """
    begin = file.tell()
    head = io.BytesIO(file.read(_LONGEST_HEADER))  # whatever length the file claims for it
    try:
        shape, columns_first, dtype = _HEADERS[npy.read_magic(head)](head)
    except Exception as error:  # it is evaluated as a literal, which leads to errors of every kind
        raise BrokenPicture("the header of the array is damaged") from error
    file.seek(begin + head.tell())
    require_readable(dtype)
    require_shape(shape, dtype.itemsize)
    return shape, columns_first, dtype


def read_npy(file: IO[bytes]) -> np.ndarray:
    """The array in an `.npy` file; no memory is taken for more than is in it, and nothing is unpickled. Raises as `npy_header`."""
    shape, columns_first, dtype = npy_header(file)
    begin, size = file.tell(), math.prod(shape) * dtype.itemsize
    there = file.seek(0, os.SEEK_END) - begin
    if there < size:
        raise BrokenPicture(
            f"it is truncated: an array of {'×'.join(map(str, shape))} {dtype} has {size:,} bytes, and {there:,} are there"
        )
    file.seek(begin)
    return np.frombuffer(file.read(size), dtype).reshape(shape, order="F" if columns_first else "C")
