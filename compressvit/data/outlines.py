"""Where objects are in a picture: COCO's `segmentation`, checked when a file is read, kept compactly, and drawn when a picture is loaded.

COCO (https://cocodataset.org/#format-data) writes polygons, or run lengths down the columns, from the left: of points outside, of points
inside, and so on. Run lengths are a list of numbers, or a text that packs each number, as a difference, in five bits a character. What is
not checked here would be read by C code that checks nothing.
"""

from __future__ import annotations

import math
import zlib
from array import array
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from compressvit.tasks.precision import Runs, coco_masks

Outline = bytes | tuple[bytes, ...]  # packed run lengths, or polygons, each x0, y0, x1, y1, … in float64
_LEAST_CORNERS = 3
_LONGEST = 1_000_000  # pixels of a polygon: each takes 80 bytes when it is drawn
_CHARACTER, _BITS, _MORE, _SIGN = 48, 5, 32, 16  # of packed run lengths: that of 0, and what a character holds
_MOST_CHARACTERS = 7  # of a number below 2^32


class BadOutline(ValueError):
    """A segmentation that gives no mask; its text is one of `FAULTS`."""


FAULTS = {
    "form": "a segmentation that is neither polygons nor run lengths",
    "polygon": "a polygon that is not three or more pairs of numbers near its image",
    "long": "a polygon longer than a million pixels",
    "size": "run lengths for an image of another size",
    "runs": "run lengths that are damaged or do not fill the image",
    "empty": "a mask without a pixel",
}


class Outlines(tuple[Outline | None, ...]):
    """Those of the objects of one picture, None of an object without; its `repr` is short and tells contents apart."""

    def __repr__(self) -> str:
        checksum = 0
        for outline in self:
            for part in outline if isinstance(outline, tuple) else (outline or b"",):
                checksum = zlib.crc32(part, zlib.crc32(b"-", checksum))
        return f"Outlines({len(self)}, {checksum:08x})"


NO_OUTLINES = Outlines()


def read_outline(given: Any, size: tuple[int, int]) -> tuple[Outline, tuple[float, float, float, float]]:
    """The `segmentation` of an annotation, and the least box (x0, y0, x1, y1) around it.

    Args:
        size: height and width of the image.

    Raises:
        BadOutline: nothing can be drawn from it.
    """
    if isinstance(given, list):
        return _read_polygons(given, size)
    if not isinstance(given, Mapping):
        raise BadOutline("form")
    if given.get("size") != [*size]:
        raise BadOutline("size" if isinstance(given.get("size"), list) else "form")
    text = given.get("counts")
    counts = _unpacked(text) if isinstance(text, str) else _numbers(text)
    if counts is None or (counts < 0).any() or (counts > size[0] * size[1]).any() or counts.sum() != size[0] * size[1]:
        raise BadOutline("runs")
    if not counts[1::2].any():
        raise BadOutline("empty")
    packed = (
        text
        if isinstance(text, str)
        else coco_masks().frPyObjects({**given, "counts": counts.tolist()}, *size)["counts"]
    )
    return packed.encode() if isinstance(packed, str) else packed, _around(counts, size[0])


def _read_polygons(given: list[Any], size: tuple[int, int]) -> tuple[Outline, tuple[float, float, float, float]]:
    """In plain Python, where a small array costs more than its numbers: COCO has a million of them."""
    if not given:
        raise BadOutline("polygon")
    height, width = size
    outline, xs, ys, area = [], [], [], 0.0
    for polygon in given:
        try:
            numbers = array("d", polygon)
        except (TypeError, OverflowError) as error:
            raise BadOutline("polygon") from error
        if not isinstance(polygon, list) or len(numbers) % 2 or len(numbers) < 2 * _LEAST_CORNERS:
            raise BadOutline("polygon")
        x, y = numbers[0::2], numbers[1::2]
        # further out than the image is large, its lines would fill the memory before they are cut off; NaN is nowhere
        near = (-width <= min(x), max(x) <= 2 * width, -height <= min(y), max(y) <= 2 * height)
        if not all(near) or not math.isfinite(sum(numbers)):
            raise BadOutline("polygon")
        if len(x) * 3 * max(size) > _LONGEST and _length(x, y) > _LONGEST:
            raise BadOutline("long")
        area += abs(sum(a * d - b * c for a, b, c, d in zip(x, y, x[1:] + x[:1], y[1:] + y[:1], strict=True))) / 2
        outline.append(numbers.tobytes())
        xs += [min(x), max(x)]
        ys += [min(y), max(y)]
    x0, y0, x1, y1 = around = min(xs), min(ys), max(xs), max(ys)
    thin, outside = area < x1 - x0 + y1 - y0, x1 <= 0 or y1 <= 0 or x0 >= width or y0 >= height
    if (thin or outside) and not coco_masks().area(runs(tuple(outline), size)):
        raise BadOutline("empty")
    return tuple(outline), around


def _length(x: Sequence[float], y: Sequence[float]) -> float:
    """The pixels that the lines of a polygon pass, of each line in its longer direction."""
    steps = (np.abs(np.diff(side, append=side[0])) for side in (x, y))
    return float(np.maximum(*steps).sum())


def _numbers(given: Any) -> np.ndarray | None:
    """A list of whole numbers as an array; None if it is something else."""
    if not isinstance(given, list) or not given:
        return None
    try:
        found = np.asarray(given)
    except (ValueError, OverflowError):  # lists of several lengths
        return None
    return found if found.ndim == 1 and found.dtype.kind in "iu" else None


def _unpacked(text: str) -> np.ndarray | None:
    """The numbers of packed run lengths, int64; None where a text is none."""
    if not text or not text.isascii():
        return None
    codes = np.frombuffer(text.encode(), dtype=np.uint8).astype(np.int64) - _CHARACTER
    last = codes & _MORE == 0
    if codes.min() < 0 or codes.max() >= 2 * _MORE or not last[-1]:
        return None
    ends = np.flatnonzero(last)
    starts = np.concatenate([[0], ends[:-1] + 1])
    lengths = ends - starts + 1
    if lengths.max() > _MOST_CHARACTERS:
        return None
    place = np.arange(len(codes)) - np.repeat(starts, lengths)
    counts = np.add.reduceat((codes % _MORE) << (_BITS * place), starts)
    counts -= (codes[ends] & _SIGN > 0) << (_BITS * lengths)
    # from the fourth on, each is the difference to the one before the last
    counts[1::2] = counts[1::2].cumsum()
    counts[2::2] = counts[2::2].cumsum()
    return counts


def _around(counts: np.ndarray, height: int) -> tuple[float, float, float, float]:
    """The box of run lengths."""
    ends = counts.cumsum()[1::2]
    inside = counts[1::2] > 0
    first, last = (ends - counts[1::2])[inside], ends[inside] - 1
    x0, x1 = first.min() // height, last.max() // height + 1
    whole = (first // height != last // height).any()  # a run that goes on in the next column
    y0, y1 = (0, height) if whole else ((first % height).min(), (last % height).max() + 1)
    return float(x0), float(y0), float(x1), float(y1)


def runs(outline: Outline, size: tuple[int, int]) -> Runs:
    """An outline in a picture of height and width `size`, as pycocotools takes it."""
    if isinstance(outline, bytes):
        return {"size": [*size], "counts": outline}
    tools = coco_masks()
    found: Runs = tools.merge(tools.frPyObjects([np.frombuffer(part).tolist() for part in outline], *size))
    return found


def drawn(
    outlines: Sequence[Outline | None], size: tuple[int, int], places: tuple[Tensor, Tensor] | None = None
) -> Tensor:
    """Masks, uint8 (n, H, W); that of an object without an outline is empty.

    Args:
        size: height and width of the picture.
        places: rows and columns of the picture, each int64 (h, w): the masks are (n, h, w), there alone. One at a time is drawn at `size`.
    """
    shape = size if places is None else places[0].shape
    masks = torch.zeros(len(outlines), *shape, dtype=torch.uint8)
    for mask, outline in zip(masks, outlines, strict=True):
        if outline is not None:
            whole = torch.from_numpy(coco_masks().decode(runs(outline, size)))
            mask.copy_(whole if places is None else whole[places])
    return masks
