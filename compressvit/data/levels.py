"""From the numbers that a file holds to 8 bits a channel, whatever they are stored as: the rules of `compressvit.data.pictures`."""

from __future__ import annotations

from enum import IntFlag

import numpy as np

MODES = {1: "L", 3: "RGB", 4: "RGBA"}  # Pillow's, by channels of a model
_TWELVE_BITS = 4095
_WIDE = ("int16", "uint16", "int32", "uint32")  # of which values of 16 bits are read


class BrokenPicture(ValueError):
    """A file that is no image that is read, is damaged, or has values that cannot be converted; the message says which."""


class Read(IntFlag):
    """Conversions and properties of an image that a user may want to know, as flags, so that a data set stores two bytes per image."""

    SIXTEEN_BITS = 1
    DARK = 2
    FLOAT = 4
    ALPHA = 8
    FRAMES = 16
    CMYK = 32
    TURNED = 64
    BAD_EXIF = 128
    SHORT = 256  # of a clip
    VARYING = 512


def require_readable(dtype: np.dtype) -> None:
    """Raise a `BrokenPicture` where no rule covers numbers of this kind."""
    if dtype.name not in ("bool", "uint8", *_WIDE) and not (dtype.kind == "f" and dtype.itemsize <= 8):
        name = "Python objects" if dtype.hasobject else f"fields {dtype!s:.60}" if dtype.names else dtype.name
        raise BrokenPicture(
            f"its values are {name}; uint8, 16 bits (also in 32) of 0 to 65535, and floats of 0 to 1 are read"
        )


def eight_bits(values: np.ndarray) -> tuple[np.ndarray, Read]:
    """Values of any shape as uint8, and what was done to them.

    Raises:
        BrokenPicture: no rule covers their kind or their range.
    """
    require_readable(values.dtype)
    if values.dtype == np.uint8:
        return values, Read(0)
    if values.dtype == bool:
        return values.astype(np.uint8) * 255, Read(0)
    low, high = values.min(), values.max()
    if values.dtype.kind == "f":
        if not (low >= 0 and high <= 1):  # NaN is not
            raise BrokenPicture(f"its floats reach from {low:g} to {high:g}; 0 to 1 are read")
        values = values.astype(np.float32) if values.dtype.itemsize < 4 else values
        return (values * 255).round().astype(np.uint8), Read.FLOAT
    if low < 0 or high > 65535:
        raise BrokenPicture(f"its integers reach from {low} to {high}; 0 to 65535 are read, as 16 bits")
    dark = Read.DARK if 0 < high <= _TWELVE_BITS else Read(0)
    return ((values.astype(np.int32) + 128) // 257).astype(np.uint8), Read.SIXTEEN_BITS | dark
