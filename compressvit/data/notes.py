"""Sentences about what was done to pictures, by how many."""

from __future__ import annotations

from compressvit.data.pictures import Read
from compressvit.notes import Note

# In the order of `Read`: what it is called, and the sentence for `count` pictures.
_READ = {
    Read.SIXTEEN_BITS: ("sixteen_bits", "{} of 16 bits scaled to 8 (value / 257)"),
    Read.DARK: (
        "dark",
        "{} of 16 bits with no value above 4095, so nearly black: 8 or 12 bits stored in 16 have to be scaled to 16 first",
    ),
    Read.FLOAT: ("float", "{} of floats, 0 to 1 scaled to 8 bits"),
    Read.ALPHA: ("alpha", "{} with transparency, which models of 1 or 3 channels do not see"),
    Read.FRAMES: ("frames", "{} with several frames or pages, of which the first was read"),
    Read.CMYK: ("cmyk", "{} in CMYK, converted without a colour profile"),
}
_EXIF = {
    False: {
        Read.TURNED: ("turned", "{} whose EXIF block says to turn them, which was ignored (data.exif=true turns them)"),
        Read.BAD_EXIF: ("bad_exif", "{} with a damaged EXIF block, which was ignored"),
    },
    True: {
        Read.TURNED: ("turned", "{} turned as their EXIF blocks say"),
        Read.BAD_EXIF: ("bad_exif", "{} with a damaged EXIF block, so not turned"),
    },
}


def notes_of_reading(counts: dict[Read, int], *, exif: bool) -> list[Note]:
    """What was done to the pictures that were read so far, by how many."""
    sentences = _READ | _EXIF[exif]
    return [
        Note(what, counts[kind], text.format(pictures(counts[kind])))
        for kind, (what, text) in sentences.items()
        if counts.get(kind)
    ]


def pictures(count: int, noun: str = "picture") -> str:
    """'1 picture', '1,437 pictures', '2 classes'."""
    ending = "" if count == 1 else "es" if noun.endswith("s") else "s"
    return f"{count:,} {noun}{ending}"
