"""TIFFs of bands, which Pillow does not read: by the package `tifffile`, where it is installed. It needs numpy alone.

What a file claims of itself is checked before it is given to that package, which would take the memory first.
"""

from __future__ import annotations

import logging
import math
import os
import struct
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from typing import IO, Any, NamedTuple

import numpy as np

from compressvit.data.bands import limit_of_bytes, require_shape
from compressvit.data.levels import BrokenPicture, require_readable

INSTALL = "pip install 'compressvit[bands]'"
_BEGINS = {
    b"II*\0": ("<", False),
    b"MM\0*": (">", False),
    b"II+\0": ("<", True),
    b"MM\0+": (">", True),
}  # order of bytes; BigTIFF
_NUMBERS = {3: "H", 4: "I", 16: "Q"}  # types of tags that are one whole number
_MOST_TAGS = 4096
WIDTH, HEIGHT, PHOTOMETRIC, ORIENTATION, SAMPLES = 256, 257, 262, 274, 277  # tags
_STORED, _DEFLATE = 1, (8, 32946)
_COMPRESSIONS = (
    _STORED,
    *_DEFLATE,
    5,
    32773,
)  # LZW, for which tifffile needs another package and says so, and PackBits
_DENSEST = 1032  # bytes from one of deflate, at most


class TiffHeader(NamedTuple):
    """Of the first page: its size in pixels, the number of its bands, and how it is to be turned."""

    width: int
    height: int
    bands: int
    orientation: int = 1


def is_tiff(head: bytes) -> bool:
    return head[:4] in _BEGINS


def tiff_header(file: IO[bytes]) -> TiffHeader:
    """What the first page of a TIFF says of itself; a `BrokenPicture` where it is not whole."""
    try:
        found = _first_page(file)
    except struct.error as error:
        raise BrokenPicture("it is truncated: the header of its first page is not whole") from error
    if WIDTH not in found or HEIGHT not in found:
        raise BrokenPicture("its first page says no width and height")
    return TiffHeader(found[WIDTH], found[HEIGHT], found.get(SAMPLES, 1), found.get(ORIENTATION, 1))


def _first_page(file: IO[bytes]) -> dict[int, int]:
    """The tags of the first page that are one whole number, by their numbers."""
    head = file.read(16)
    order, big = _BEGINS[head[:4]]
    (place,) = struct.unpack(f"{order}Q", head[8:16]) if big else struct.unpack(f"{order}I", head[4:8])
    file.seek(place)
    (count,) = struct.unpack(f"{order}Q", file.read(8)) if big else struct.unpack(f"{order}H", file.read(2))
    entry = struct.Struct(f"{order}HHQ8s" if big else f"{order}HHI4s")
    found: dict[int, int] = {}
    for _ in range(min(count, _MOST_TAGS)):
        tag, kind, length, value = entry.unpack(file.read(entry.size))
        if length == 1 and kind in _NUMBERS:
            number = struct.Struct(order + _NUMBERS[kind])
            found[tag] = number.unpack(value[: number.size])[0]
    return found


def read_tiff(file: IO[bytes], header: TiffHeader) -> np.ndarray:
    """The first page of a TIFF as an array (H, W, C), whether its bands lie by pixel or one after the other, turned as it says.

    Raises:
        BrokenPicture: the package is not installed, or the file is damaged, or has what is not read.
    """
    try:
        import tifffile
    except ImportError as error:
        raise BrokenPicture(
            f"it is a TIFF of {header.bands} bands, which Pillow does not read and tifffile does: {INSTALL}"
        ) from error
    size = file.seek(0, os.SEEK_END)
    file.seek(0)
    try:
        with _quiet(), tifffile.TiffFile(file) as opened:
            return _upright(_first_pixels(opened.pages[0], file, size), header.orientation)
    except (BrokenPicture, MemoryError, OSError):
        raise
    except Exception as error:  # a damaged file leads it into errors of every kind
        raise BrokenPicture(f"the TIFF cannot be read: {str(error)[:200]}") from error


@contextmanager
def _quiet() -> Iterator[None]:
    """Inside, the package does not log what is amiss with a file."""
    logger = logging.getLogger("tifffile")
    level = logger.level
    logger.setLevel(logging.CRITICAL + 1)
    try:
        yield
    finally:
        logger.setLevel(level)


def _first_pixels(page: Any, file: IO[bytes], size: int) -> np.ndarray:
    """The pixels (H, W, C) of a page of `tifffile`, in a file of so many bytes."""
    planes, depth, height, width, samples = page.shaped
    if depth != 1:
        raise BrokenPicture(f"it has {depth} layers of pixels; one is read")
    if page.dtype is None:
        raise BrokenPicture("its numbers are of no kind that is read")
    require_readable(page.dtype)
    require_shape((height, width, planes * samples), page.dtype.itemsize)
    _require_segments(page, file, size)
    values = page.asarray(maxworkers=1).reshape(planes, height, width, samples)
    return values.transpose(1, 2, 0, 3).reshape(height, width, planes * samples)


def _require_segments(page: Any, file: IO[bytes], size: int) -> None:
    """Raise a `BrokenPicture` where the strips or tiles of a page of `tifffile` are compressed in a way that is not read, would be more in
    memory than they say, or are not all there."""
    if page.compression not in _COMPRESSIONS:
        name = getattr(page.compression, "name", page.compression)
        raise BrokenPicture(f"its compression is {name}; save it without, or with deflate")
    whole = math.prod(page.shaped) * page.dtype.itemsize
    if page.compression == _STORED and whole > size:
        raise BrokenPicture(f"it is truncated: its pixels are {whole:,} bytes, and the file has {size:,}")
    most, segment = limit_of_bytes(), math.prod(page.chunks) * page.dtype.itemsize
    if most is None:
        return
    if segment > most:
        raise BrokenPicture(f"its strips or tiles are of {segment:,} bytes; {most:,} are read")
    for place, length in zip(page.dataoffsets, page.databytecounts, strict=True):
        if page.compression in _DEFLATE and length * _DENSEST > most:  # else it is less, whatever is in it
            file.seek(place)
            if len(zlib.decompressobj().decompress(file.read(min(length, size)), segment + 1)) > segment:
                raise BrokenPicture("a strip or tile of it has more than its pixels, and could be a decompression bomb")


def _upright(values: np.ndarray, orientation: int) -> np.ndarray:
    """Pixels (H, W, C) turned as the tag says that they are to be shown; so does Pillow for every TIFF."""
    if orientation in (5, 6, 7, 8):
        values = values.swapaxes(0, 1)
    if orientation in (2, 3, 6, 7):
        values = values[:, ::-1]
    return values[::-1] if orientation in (3, 4, 7, 8) else values
