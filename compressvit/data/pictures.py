"""Reading image files: which formats are read, and how each mode is converted to 8 bits per channel. All image files are opened here.

What Pillow does not read is an array in `.npy` (`compressvit.data.bands`) or a TIFF of bands (`compressvit.data.tiff`).

| stored as | becomes |
| --- | --- |
| 8 bits: gray, colour, palette, 1 bit, CMYK, YCbCr, HSV | the result of Pillow's `convert`, as in torchvision and timm |
| 16 bits, gray (PNG, TIFF, JPEG 2000) | value / 257, rounded |
| 16 bits per channel, colour | the high byte of each, as Pillow reads it |
| 32-bit integers (also PGM of more than 8 bits, which Pillow scales to 0..65535) | as 16 bits; values outside 0..65535 are refused |
| floats | 0..1 scaled to 0..255; other values are refused |
| alpha, or a palette's transparent colours | for a model of 4 channels the fourth; otherwise dropped, as in torchvision and timm |
| several frames or pages | the first |
| an array of 1 or 3 channels | a gray picture or one in colour, by the same rules |
| an array or a TIFF of other channels | bands, which only models of as many channels take, and alike; none is alpha |

The EXIF orientation is ignored, as in torchvision and timm, unless `data.exif` is true. (For TIFF, Pillow itself applies it.)
An image whose EXIF block is damaged is read as it is stored.

Other formats that Pillow knows (EPS, PostScript, WMF, containers, …) are not read, whatever a file is called, because Pillow starts
Ghostscript for EPS. Some readers of other packages open files themselves, so importing this module disables Ghostscript in Pillow.
"""

from __future__ import annotations

import errno
import warnings
from contextlib import AbstractContextManager, nullcontext
from functools import cache
from pathlib import Path
from typing import IO

import numpy as np
from PIL import EpsImagePlugin, ExifTags, Image, ImageOps, TiffImagePlugin, UnidentifiedImageError

from compressvit.data.bands import NPY, Bands, Picture, npy_header, picture_of, read_npy
from compressvit.data.levels import MODES, BrokenPicture, Read, eight_bits
from compressvit.data.tiff import PHOTOMETRIC, SAMPLES, is_tiff, read_tiff, tiff_header

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

_GRAY = ("1", "L", "LA", "I", "F")
_EIGHT_BITS = ("1", "L", "LA", "P", "PA", "RGB", "RGBA", "RGBX", "CMYK", "YCbCr", "HSV")
_TIFF = (b"II*\0", b"MM\0*")  # how an EXIF block begins, by byte order

EpsImagePlugin.gs_binary = False


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


@cache
def _formats() -> list[str]:
    """The formats in `FORMATS` that the installed Pillow supports."""
    Image.init()
    return [name for name in FORMATS if name in Image.OPEN]


def read_picture(
    file: str | Path | IO[bytes], *, exif: bool = False, channels: int | None = None
) -> tuple[Picture, Read]:
    """Decode the first frame of a file to 8 bits per channel.

    Args:
        exif: apply the EXIF orientation.
        channels: those of the model that it is for, which the picture must fit.

    Returns:
        The image, and what was converted.

    Raises:
        BrokenPicture: the file cannot be read, does not have these channels, or is so large that it could be a decompression bomb.
        MemoryError, TooManyFiles: memory or file handles ran out, which says nothing of the file.
    """
    try:
        image, done = _read(file, exif, channels)
        if channels is not None:
            require_channels(image, channels, several=Read.FRAMES in done)
        return image, done
    except BrokenPicture:
        raise
    except UnidentifiedImageError as error:
        raise BrokenPicture("it is not an image") from error
    except Exception as error:  # a damaged header leads Pillow's readers into errors of every kind
        refuse_shortage(error, file)
        raise BrokenPicture(str(error) or type(error).__name__) from error


def _read(file: str | Path | IO[bytes], exif: bool, channels: int | None) -> tuple[Picture, Read]:
    try:
        opened = Image.open(file, formats=_formats())
    except Exception as error:  # as above
        refuse_shortage(error, file)
        if read := _read_bands(file):
            return read
        raise
    with opened as image:
        if _is_of_bands(image, channels) and (read := _read_bands(file)):
            return read
        frames = Read.FRAMES if getattr(image, "is_animated", False) else Read(0)
        image.load()
        image, done = standard(image, exif=exif)
        return image, done | frames


def _is_of_bands(image: Image.Image, channels: int | None) -> bool:
    """Whether an opened image is a TIFF of bands, of which Pillow would read the first: one if they are called gray, and three if colours.

    Args:
        channels: those of the model that it is for; three of bands that are called colours are a picture for one that takes pictures.
    """
    if not isinstance(image, TiffImagePlugin.TiffImageFile):
        return False
    bands, gray = image.tag_v2.get(SAMPLES, 1), image.tag_v2.get(PHOTOMETRIC) in (0, 1)
    return (gray and bands > 2) or (bands not in (1, 3) and channels is not None and channels not in MODES)


def _read_bands(file: str | Path | IO[bytes]) -> tuple[Picture, Read] | None:
    """What is in an `.npy` file, or a TIFF of several bands; None of any other file."""
    with _stream(file) as stream:
        head = _head(stream)
        if head == NPY:
            return picture_of(read_npy(stream))
        if is_tiff(head) and (header := tiff_header(stream)).bands > 1:
            return picture_of(read_tiff(stream, header))
    return None


def _stream(file: str | Path | IO[bytes]) -> AbstractContextManager[IO[bytes]]:
    """A file, opened; one that is open stays so."""
    return open(file, "rb") if isinstance(file, (str, Path)) else nullcontext(file)


def _head(stream: IO[bytes]) -> bytes:
    """The first bytes of a file, which is then at its beginning."""
    stream.seek(0)
    head = stream.read(len(NPY))
    stream.seek(0)
    return head


def picture_shape(file: str | Path, channels: int) -> tuple[int, int, int] | None:
    """Height and width in pixels, and the number of channels, as a header says for a model of `channels`; None if it cannot be read."""
    try:
        return _shape(file, channels)
    except Exception as error:  # as above
        refuse_shortage(error, file)
        return None


def _shape(file: str | Path, channels: int) -> tuple[int, int, int]:
    try:
        with Image.open(file, formats=_formats()) as image:
            if not _is_of_bands(image, channels):
                return image.height, image.width, count_channels(image)
    except (UnidentifiedImageError, ValueError):
        pass
    with _stream(file) as stream:
        if _head(stream) == NPY:
            shape = npy_header(stream)[0]
            return shape[0], shape[1], shape[2] if len(shape) == 3 else 1
        header = tiff_header(stream)
        return header.height, header.width, header.bands


def standard(image: Picture | np.ndarray, *, exif: bool = False) -> tuple[Picture, Read]:
    """Convert a decoded image, or an array (H, W) or (H, W, C), to 8 bits per channel by the rules of this module.

    Returns:
        The image, and what was converted.

    Raises:
        BrokenPicture: no rule covers its mode, its shape or its values.
    """
    if isinstance(image, np.ndarray):
        return picture_of(image)
    if isinstance(image, Bands):
        return image, Read(0)
    image, done = _upright(image) if exif else (image, _orientation(image))
    if image.mode in ("F", "I") or image.mode.startswith("I;16"):
        levels, converted = eight_bits(np.asarray(image))
        return Image.fromarray(levels), done | converted
    if image.mode not in _EIGHT_BITS:
        raise BrokenPicture(f"images of mode {image.mode} are not read")
    if image.mode == "CMYK":
        done |= Read.CMYK
    if image.has_transparency_data:
        done |= Read.ALPHA
    return image, done


def count_channels(image: Picture) -> int:
    """The channels of a picture; of Pillow's 1 (gray) or 3 (colour), without alpha."""
    if isinstance(image, Bands):
        return image.channels
    return 1 if image.mode in _GRAY or image.mode.startswith("I;16") else 3


def fits(given: int, channels: int) -> bool:
    """Whether a model of so many channels can be given an image of `given`: pictures, of 1 or 3, are converted, and bands are not."""
    return given == channels or (given in (1, 3) and channels in MODES)


def require_channels(image: Picture, channels: int, *, several: bool = False) -> None:
    """Raise a `BrokenPicture` where a model of so many channels cannot be given an image, which may be the first of several of its file."""
    given = count_channels(image)
    if fits(given, channels):
        return
    text = f"it has {given} channel{'s' * (given > 1)}, and the model takes {channels}"
    if image.height == channels:
        text += (
            f"; its shape is {image.height}×{image.width}×{given}, and that of an array is (height, width, channels)"
        )
    elif several:
        text += "; it has several pages, and bands are those of the first"
    raise BrokenPicture(text)


def to_channels(image: Picture, channels: int) -> Image.Image:
    """Convert an image from `standard` to 1 (gray), 3 (colour) or 4 channels (colour and alpha; 255 if it has no alpha).

    Raises:
        BrokenPicture: the image is of bands, which stay as they are.
    """
    if isinstance(image, Bands):
        raise BrokenPicture(f"it has {image.channels} bands, which are not made into a picture of {channels} channels")
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
