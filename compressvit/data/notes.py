"""Sentences about what was done to pictures, by how many."""

from __future__ import annotations

from collections.abc import Sequence

from compressvit.data.pictures import Read, fits
from compressvit.notes import Note

# By conversion: the note's kind, and its sentence, in which {} is e.g. '12 images'.
_READ = {
    Read.SIXTEEN_BITS: ("sixteen_bits", "{} of 16 bits scaled to 8 (value / 257)"),
    Read.DARK: (
        "dark",
        "{} of 16 bits with no value above 4095, so nearly black after scaling: scale 8 or 12 bits stored in 16 to the full range",
    ),
    Read.FLOAT: ("float", "{} of floats, 0 to 1 scaled to 8 bits"),
    Read.ALPHA: ("alpha", "{} with transparency, which models of 1 or 3 channels do not get"),
    Read.FRAMES: ("frames", "{} with several frames or pages, of which the first was read"),
    Read.CMYK: ("cmyk", "{} in CMYK, converted without a colour profile"),
    Read.SHORT: ("short", "{} shorter than a clip, whose frames were repeated"),
    Read.VARYING: ("varying", "{} of a varying frame rate, of which frames are counted, whenever they are shown"),
}
_OF_CLIPS = Read.SHORT | Read.VARYING
_EXIF = {
    False: {
        Read.TURNED: ("turned", "{} with an EXIF orientation, which was ignored (data.exif=true applies it)"),
        Read.BAD_EXIF: ("bad_exif", "{} with a damaged EXIF block, which was ignored"),
    },
    True: {
        Read.TURNED: ("turned", "{} turned according to their EXIF orientation"),
        Read.BAD_EXIF: ("bad_exif", "{} with a damaged EXIF block, so not turned"),
    },
}


def notes_of_reading(counts: dict[Read, int], *, exif: bool) -> list[Note]:
    """Notes on the conversions of the images read so far; `counts` has the number of images for each."""
    sentences = _READ | _EXIF[exif]
    return [
        Note(what, counts[kind], text.format(counted(counts[kind], "video" if kind in _OF_CLIPS else "image")))
        for kind, (what, text) in sentences.items()
        if counts.get(kind)
    ]


def notes_of_sizes(sizes: Sequence[tuple[int, int]], height: int, width: int) -> list[Note]:
    """A note where every image that was looked at has less than half of the model's width and height. One size alone is nothing to tell.

    Args:
        sizes: (width, height) in pixels, of some of the images.
        height, width: of the model's.
    """
    small = [size for size in sizes if 2 * size[0] < width and 2 * size[1] < height]
    if not small or len(small) < len(sizes):
        return []
    largest = max(small, key=lambda size: size[0] * size[1])
    text = (
        f"all {counted(len(small))} that were looked at are less than half as large as the model's {width}×{height} pixels, the largest "
        f"{largest[0]}×{largest[1]}: they are enlarged, which shows the model less than it was made for"
    )
    return [Note("small", len(small), text)]


def notes_of_channels(shapes: Sequence[tuple[int, int, int]], channels: int) -> list[Note]:
    """A note where some images do not have the channels that the model takes.

    Args:
        shapes: height, width and channels of some of the images.
    """
    others = [shape[2] for shape in shapes if not fits(shape[2], channels)]
    if not others:
        return []
    text = (
        f"{len(others)} of {counted(len(shapes))} that were looked at have {_or(sorted({*others}))} "
        f"channel{'s' * ({*others} != {1})}, and the model takes "
        f"{channels}: such images are passed over"
    )
    return [Note("channels", len(others), text)]


def _or(numbers: Sequence[int]) -> str:
    return " or ".join(", ".join(map(str, numbers)).rsplit(", ", 1))


def counted(count: int, noun: str = "image") -> str:
    """A number with its noun: '1 image', '1,437 images', '2 classes'."""
    ending = "" if count == 1 else "es" if noun.endswith("s") else "s"
    return f"{count:,} {noun}{ending}"
