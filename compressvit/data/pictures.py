"""Reading image files: which formats are read, and how each mode is converted to 8 bits per channel. All image files are opened here.

| stored as | becomes |
| --- | --- |
| 8 bits: gray, colour, palette, 1 bit, CMYK, YCbCr, HSV | the result of Pillow's `convert`, as in torchvision and timm |
| 16 bits, gray (PNG, TIFF, JPEG 2000) | value / 257, rounded |
| 16 bits per channel, colour | the high byte of each, as Pillow reads it |
| 32-bit integers (also PGM of more than 8 bits, which Pillow scales to 0..65535) | as 16 bits; values outside 0..65535 are refused |
| floats | 0..1 scaled to 0..255; other values are refused |
| alpha, or a palette's transparent colours | for a model of 4 channels the fourth; otherwise dropped, as in torchvision and timm |
| several frames or pages | the first |

The EXIF orientation is ignored, as in torchvision and timm, unless `data.exif` is true. (For TIFF, Pillow itself applies it.)
An image whose EXIF block is damaged is read as it is stored.

Other formats that Pillow knows (EPS, PostScript, WMF, containers, …) are not read, whatever a file is called, because Pillow starts
Ghostscript for EPS. Some readers of other packages open files themselves, so importing this module disables Ghostscript in Pillow.
"""

from __future__ import annotations

import errno
import warnings
from enum import IntFlag
from functools import cache
from pathlib import Path
from typing import IO

import numpy as np
from PIL import EpsImagePlugin, ExifTags, Image, ImageOps, UnidentifiedImageError

# Pillow's names, with the extensions for which folders are searched. TGA is last, because it has no signature to recognise it by.
FORMATS: dict[str, tuple[str, ...]] = {
    "JPEG": (".jpg", ".jpeg", ".jpe", ".jfif", ".mpo"),
    "PNG": (".png", ".apng"),
    "WEBP": (".webp",),
    "BMP": (".bmp",),
    "DIB": (".dib",),
    "GIF": (".gif",),
    "TIFF": (".tif", ".tiff"),
    "PPM": (".ppm", ".pgm", ".pbm", ".pnm", ".pfm"),
    "JPEG2000": (".jp2", ".j2k", ".jpc", ".jpf", ".jpx", ".j2c"),
    "AVIF": (".avif",),
    "QOI": (".qoi",),
    "PCX": (".pcx",),
    "SGI": (".sgi",),
    "ICO": (".ico",),
    "TGA": (".tga",),
}
EXTENSIONS = tuple(extension for extensions in FORMATS.values() for extension in extensions)

MODES = {1: "L", 3: "RGB", 4: "RGBA"}  # by channels of a model
_EIGHT_BITS = ("1", "L", "LA", "P", "PA", "RGB", "RGBA", "RGBX", "CMYK", "YCbCr", "HSV")
_TWELVE_BITS = 4095
_TIFF = (b"II*\0", b"MM\0*")  # how an EXIF block begins, by byte order

EpsImagePlugin.gs_binary = False


class BrokenPicture(ValueError):
    """A file that is not an image in one of `FORMATS`, is damaged, or has values that cannot be converted; the message says which."""


class TooManyFiles(Exception):
    """The system opens no more files for this process; it is no fault of the file that was to be opened."""


def refuse_shortage(error: BaseException, file: object = "") -> None:
    """Raise a `MemoryError` or `TooManyFiles` where that is what an error comes from, and not the picture.

    Args:
        file: that was read, for the message, if it has a path.
    """
    number, path = getattr(error, "errno", None), str(file) if isinstance(file, (str, Path)) else ""
    if isinstance(error, MemoryError) or number == errno.ENOMEM:
        raise MemoryError(": ".join(filter(None, (path, str(error))))) from error
    if isinstance(error, TooManyFiles) or number in (errno.EMFILE, errno.ENFILE):
        raise TooManyFiles(str(error)) from error


class Read(IntFlag):
    """Conversions and properties of an image that a user may want to know, as flags, so that a data set stores one byte per image."""

    SIXTEEN_BITS = 1
    DARK = 2
    FLOAT = 4
    ALPHA = 8
    FRAMES = 16
    CMYK = 32
    TURNED = 64
    BAD_EXIF = 128


@cache
def _formats() -> list[str]:
    """The formats in `FORMATS` that the installed Pillow supports."""
    Image.init()
    return [name for name in FORMATS if name in Image.OPEN]


def read_picture(file: str | Path | IO[bytes], *, exif: bool = False) -> tuple[Image.Image, Read]:
    """Decode the first frame of a file to 8 bits per channel.

    Args:
        exif: apply the EXIF orientation.

    Returns:
        The image, and what was converted.

    Raises:
        BrokenPicture: the file cannot be read, or the image is so large that Pillow considers it a decompression bomb.
        MemoryError, TooManyFiles: memory or file handles ran out, which says nothing of the file.
    """
    try:
        with Image.open(file, formats=_formats()) as image:
            frames = Read.FRAMES if getattr(image, "is_animated", False) else Read(0)
            image.load()
            image, done = standard(image, exif=exif)
            return image, done | frames
    except BrokenPicture:
        raise
    except UnidentifiedImageError as error:
        raise BrokenPicture("it is not an image") from error
    except Exception as error:  # a damaged header leads Pillow's readers into errors of every kind
        refuse_shortage(error, file)
        raise BrokenPicture(str(error) or type(error).__name__) from error


def picture_size(file: str | Path) -> tuple[int, int] | None:
    """Width and height in pixels, as the header says; None if it cannot be read."""
    try:
        with Image.open(file, formats=_formats()) as image:
            return image.size
    except Exception as error:  # as above
        refuse_shortage(error, file)
        return None


def standard(image: Image.Image, *, exif: bool = False) -> tuple[Image.Image, Read]:
    """Convert a decoded image to 8 bits per channel by the rules of this module.

    Returns:
        The image, and what was converted.

    Raises:
        BrokenPicture: no rule covers its mode or its values.
    """
    image, done = _upright(image) if exif else (image, _orientation(image))
    if image.mode == "F":
        return _from_floats(image), done | Read.FLOAT
    if image.mode == "I" or image.mode.startswith("I;16"):
        image, dark = _from_integers(image)
        return image, done | Read.SIXTEEN_BITS | (Read.DARK if dark else Read(0))
    if image.mode not in _EIGHT_BITS:
        raise BrokenPicture(f"images of mode {image.mode} are not read")
    if image.mode == "CMYK":
        done |= Read.CMYK
    if image.has_transparency_data:
        done |= Read.ALPHA
    return image, done


def to_channels(image: Image.Image, channels: int) -> Image.Image:
    """Convert an image from `standard` to 1 (gray), 3 (colour) or 4 channels (colour and alpha; 255 if it has no alpha)."""
    mode = MODES[channels]
    return image if image.mode == mode else image.convert(mode)


def _orientation(image: Image.Image) -> Read:
    """Whether the EXIF block says to turn a picture, or is so damaged that it does not say."""
    try:
        orientation = image.getexif().get(ExifTags.Base.Orientation)
    except Exception as error:  # a damaged block leads Pillow into errors of every kind
        refuse_shortage(error)
        return Read.BAD_EXIF
    block = image.info.get("exif")
    if block and orientation is None and _is_damaged(block):
        return Read.BAD_EXIF
    return Read.TURNED if orientation in range(2, 9) else Read(0)


def _is_damaged(block: bytes) -> bool:
    """Whether an EXIF block cannot be read to its end; Pillow reads what it can, and warns."""
    with warnings.catch_warnings(record=True) as warned:
        warnings.simplefilter("always")
        try:
            Image.Exif().load(block)
        except Exception as error:  # of every kind, as above
            refuse_shortage(error)
            return True
    return bool(warned) or not block.removeprefix(b"Exif\0\0").startswith(_TIFF)


def _upright(image: Image.Image) -> tuple[Image.Image, Read]:
    """A picture turned as its EXIF block says."""
    done = _orientation(image)
    try:
        return (ImageOps.exif_transpose(image) if done is Read.TURNED else image), done
    except Exception as error:  # Pillow writes the block again, without the orientation
        refuse_shortage(error)
        return image, Read.BAD_EXIF


def _from_integers(image: Image.Image) -> tuple[Image.Image, bool]:
    """Scale integers of 0..65535 to 8 bits; also returns whether all fit in 12 bits, i.e. the result is nearly black."""
    values = np.asarray(image).astype(np.int64)
    low, high = int(values.min()), int(values.max())
    if low < 0 or high > 65535:
        raise BrokenPicture(f"its integers reach from {low} to {high}; 0 to 65535 are read, as 16 bits")
    return Image.fromarray(((values + 128) // 257).astype(np.uint8)), 0 < high <= _TWELVE_BITS


def _from_floats(image: Image.Image) -> Image.Image:
    values = np.asarray(image)
    low, high = float(values.min()), float(values.max())
    if not (low >= 0 and high <= 1):
        raise BrokenPicture(f"its floats reach from {low:g} to {high:g}; 0 to 1 are read")
    return Image.fromarray((values * 255).round().astype(np.uint8))
