"""Which images belong to one photograph, as its crops and frames do, so that no photograph is on both sides of a split."""

from __future__ import annotations

import os
import re
from collections import Counter
from collections.abc import Hashable, Sequence
from typing import NamedTuple

import torch

from compressvit.data.notes import counted
from compressvit.notes import Note

MOST = 64  # images of one photograph; as many of one name and more are those of a class, a film or a camera
LEAST = 4  # photographs; fewer names are those of classes or cameras
FEW = 32  # photographs, below which it is said that others would help more than further crops

_NUMBERED = re.compile(r"(.*[^ _.-])[ _.-]+(\d{1,9})")


class Photographed(NamedTuple):
    """A batch of images, and to which photograph each belongs.

    Attributes:
        images: (B, C, H, W), normalised.
        photographs: int64 (B,), the same number for all images of one photograph; None if it is not known, as of a stream.
    """

    images: torch.Tensor
    photographs: torch.Tensor | None


def photographs(paths: Sequence[str], by: str | None) -> tuple[list[str], list[Note]]:
    """The photograph of every image, by its path; an image that is said to share none is a photograph of its own, called as its path.

    Args:
        paths: of the images, relative to their folder, parts separated by `/`.
        by: `data.group_by`: none (or None), folder, stem (file names up to a number at their end), auto (stem, where names tell: see
            `_told_by_names`), or a regular expression.
    """
    if by is None or by == "none":
        return list(paths), []
    if by == "folder":
        return [path.rpartition("/")[0] for path in paths], []
    if by in ("auto", "stem"):
        stems = [_stem(path) for path in paths]
        told = _told_by_names(paths, stems) if by == "auto" else {stem for stem, _ in stems}
        return [stem if stem in told else path for path, (stem, _) in zip(paths, stems, strict=True)], []
    pattern = re.compile(by)
    found, alone = [], 0
    for path in paths:
        match = pattern.search(path)
        alone += match is None
        found.append(path if match is None else "\0".join(part or "" for part in match.groups()) or match.group())
    text = f"{counted(alone)} in which data.group_by={by} finds nothing, each a group of its own"
    return found, [Note("ungrouped", alone, text)] if alone else []


def photograph_names(paths: Sequence[str], by: str | None) -> tuple[list[str], list[Note]]:
    """As `photographs`, under names that last: a first crop has its name already, before there is a second of the same photograph."""
    found, notes = photographs(paths, by)
    if by == "auto":
        stems = [_stem(path)[0] for path in paths]
        alone = {stem for stem, count in Counter(stems).items() if count == 1}
        found = [stem if stem in alone else name for stem, name in zip(stems, found, strict=True)]
    return found, notes


def _stem(path: str) -> tuple[str, int | None]:
    """A path without a number at the end of the file's name, and the number: `a/0001_Bridge_3.jpg` is image 3 of `a/0001_Bridge`. A path
    without one is returned as it is."""
    folder, slash, name = path.rpartition("/")
    match = _NUMBERED.fullmatch(os.path.splitext(name)[0])
    return (path, None) if match is None else (f"{folder}{slash}{match[1]}", int(match[2]))


def _told_by_names(paths: Sequence[str], stems: Sequence[tuple[str, int | None]]) -> set[str]:
    """The stems that are those of photographs.

    The names of `0001_Bridge_0.jpg` … `0001_Bridge_7.jpg` are also those of a class (`cat_0.jpg` …) or of a camera (`IMG_0001.jpg` …).
    So a stem is not believed if it has more than `MOST` images, if it is that of all images in a folder, or if more than three quarters
    of its numbers are missing; and none is if there would be fewer than `LEAST` photographs.
    """
    in_folder = Counter(path.rpartition("/")[0] for path in paths)
    numbers: dict[str, list[int]] = {}
    for stem, number in stems:
        if number is not None:
            numbers.setdefault(stem, []).append(number)
    told = {
        stem
        for stem, found in numbers.items()
        if 1 < len(found) <= MOST
        and len(found) < in_folder[stem.rpartition("/")[0]]
        and max(found) - min(found) < 4 * len(found)
    }
    return told if len(paths) - sum(len(numbers[stem]) - 1 for stem in told) >= LEAST else set()


def notes_of_photographs(found: Sequence[Hashable], by: str | None) -> list[Note]:
    """How many photographs the images to train on are of, where several are of one, and whether these are few."""
    count = len(set(found))
    if count == len(found):
        return []
    how = "by name" if by in ("auto", "stem") else f"data.group_by={by}"
    text = f"{counted(len(found))} of {counted(count, 'photograph')} ({how}) to train on"
    notes = [Note("photographs", count, text)]
    if count < FEW:
        text = f"only {counted(count, 'photograph')}: others would help more than further crops or frames of the same"
        notes.append(Note("few_photographs", count, text))
    return notes


def spread(order: torch.Tensor, numbers: torch.Tensor) -> torch.Tensor:
    """Images so that as few as possible give as many photographs as possible: one of each, then a second of each, and so on.

    Args:
        order: of the images, int64 (N,), which is kept where each is a photograph of its own.
        numbers: the photograph of every image, int64 (N,).
    """
    grouped, places = numbers[order].sort(stable=True)
    turns = torch.empty_like(places)
    turns[places] = torch.arange(len(order)) - torch.searchsorted(
        grouped, grouped
    )  # as which of its photograph each comes
    return order[turns.argsort(stable=True)]


def numbered(found: Sequence[Hashable]) -> torch.Tensor:
    """Photographs as numbers in the order of their first images, int64 (N,)."""
    numbers: dict[Hashable, int] = {}
    return torch.tensor([numbers.setdefault(photograph, len(numbers)) for photograph in found], dtype=torch.int64)
