"""Splitting a set by the names of its files: which images a fraction of it is held out for validation and for test.

Every photograph has a place in [0, 1), the hash of its name alone: below `val_fraction` it is held out for validation, from
1 - `test_fraction` on for the test, and otherwise it is trained on. So nothing depends on the machine, on the order of a listing, or on
which other files there are. The price is chance: of a class with n photographs as many are held out as of n draws. (Were it exactly the
nearest number, files that are added would have to push others over.) Only where chance leaves a class without an image on one side is the
photograph taken whose place is the nearest.
"""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Sequence

from compressvit.data.classes import composed
from compressvit.data.notes import counted
from compressvit.data.photographs import notes_of_photographs, photograph_names
from compressvit.data.spec import VAL_FRACTION, Data
from compressvit.errors import UserError
from compressvit.notes import Note

TRAIN, VALIDATION, TEST = "training", "validation", "test"


def parts_by_name(paths: Sequence[str], labels: Sequence[str], data: Data, where: str) -> tuple[list[str], list[Note]]:
    """The part of every image, TRAIN, VALIDATION or TEST, and what is to be told of it.

    Args:
        paths: of the images, relative to the folder of the set, parts separated by `/`.
        labels: the name of the class of each; of images without classes they are all "".
        data: says the fractions, and which images are of one photograph (`group_by`).
        where: what messages call what is split.

    Raises:
        UserError: a class has too few photographs to be in every part.
    """
    names, notes = photograph_names(paths, data.group_by)
    places = {name: _place(name) for name in names}
    ranges = _ranges(data)
    part = {name: next(word for word, (_, end) in ranges.items() if place < end) for name, place in places.items()}
    classes: dict[str, dict[str, None]] = {}  # the photographs of each
    for name, label in zip(names, labels, strict=True):
        classes.setdefault(label, {})[name] = None
    filled = _fill(part, places, ranges, classes)
    for label, members in classes.items():
        if missing := [word for word in ranges if all(part[name] != word for name in members)]:
            raise _too_few(label, len(members), missing[0], data, where)
    found = [part[name] for name in names]
    told = [*_counts(found, labels, names, data, where), *_filled(filled)]
    of_training = [name for name, word in zip(names, found, strict=True) if word == TRAIN]
    return found, [*told, *notes, *notes_of_photographs(of_training, data.group_by)]


def _place(name: str) -> float:
    """Where a photograph lies in [0, 1), whichever Unicode form its name is stored in."""
    digest = hashlib.sha256(composed(name).encode(errors="surrogateescape")).digest()
    return int.from_bytes(digest[:6], "big") / 2**48  # exact in a float, and below 1


def _ranges(data: Data) -> dict[str, tuple[float, float]]:
    """The places of every part, in their order."""
    low, high = data.val_fraction or VAL_FRACTION, 1 - (data.test_fraction or 0)
    found = {VALIDATION: (0.0, low), TRAIN: (low, high)}
    return found if data.test_fraction is None else {**found, TEST: (high, 1.0)}


def _fill(
    part: dict[str, str],
    places: dict[str, float],
    ranges: dict[str, tuple[float, float]],
    classes: dict[str, dict[str, None]],
) -> int:
    """Give every class a photograph in every part, where it has enough; how many of them were moved for it."""
    moved = 0
    for label in sorted(classes):
        members = classes[label]
        have = Counter(part[name] for name in members)
        for word, (start, end) in ranges.items():
            spare = [name for name in members if have[part[name]] > 1]
            if have[word] or not spare:
                continue
            nearest = min(spare, key=lambda name: (max(start - places[name], places[name] - end), name))
            have[part[nearest]] -= 1
            have[word] += 1
            part[nearest] = word
            moved += 1
    return moved


def _too_few(label: str, photographs: int, part: str, data: Data, where: str) -> UserError:
    what = f"the class '{label}' has" if label else "there are"
    parts = 2 if data.test_fraction is None else 3
    hint = (
        f"; data.group_by={data.group_by} says which images are of one" if data.group_by not in (None, "none") else ""
    )
    return UserError(
        f"{where}: {what} images of {counted(photographs, 'photograph')}, so that none is left for {part}; it takes {parts}, one "
        f"for each part: add images{' or take the class out' if label else ''}{hint}"
    )


def _counts(found: Sequence[str], labels: Sequence[str], names: Sequence[str], data: Data, where: str) -> list[Note]:
    options = {VALIDATION: f"data.val_fraction={data.val_fraction or VAL_FRACTION:g}"}
    if data.test_fraction is not None:
        options[TEST] = f"data.test_fraction={data.test_fraction:g}"
    notes = []
    for word, option in options.items():
        of_class = Counter(label for label, part in zip(labels, found, strict=True) if part == word)
        least, most = min(of_class.values()), max(of_class.values())
        each = f", {least:,} to {most:,} of a class" if least < most else f", {least:,} of every class"
        each = each if len(of_class) > 1 else ""
        text = f"{counted(of_class.total())} of {len(found):,} of {where} held out for {word} by the hash of their names ({option}){each}"
        if word == VALIDATION:
            text += _together(len(set(names)), len(found), data)
        notes.append(Note("held_out" if word == VALIDATION else "held_out_for_test", of_class.total(), text))
    return notes


def _together(photographs: int, images: int, data: Data) -> str:
    """What stays on one side."""
    if photographs < images:
        how = "by name (data.group_by)" if data.group_by in ("auto", "stem") else f"data.group_by={data.group_by}"
        return f"; all images of one of {photographs:,} photographs ({how}) are on one side"
    if data.group_by in ("auto", "none", None):
        return (
            "; every image by itself. Crops or frames of one photograph fall on both sides, which makes figures too good: data.group_by "
            "keeps them together"
        )
    return ""


def _filled(count: int) -> list[Note]:
    text = (
        f"{counted(count, 'photograph')} of classes that would have none on one side by the hash: that with the nearest is taken, until "
        "files are added that lie nearer"
    )
    return [Note("held_out_nearest", count, text)] if count else []
