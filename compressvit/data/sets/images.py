"""`images`: images without classes, anywhere in a folder."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

from compressvit.data.bands import SUFFIX
from compressvit.data.classes import some_of
from compressvit.data.data_set import data_set
from compressvit.data.files import Found, PictureFiles, Search
from compressvit.data.fractions import TEST, TRAIN, VALIDATION, parts_by_name
from compressvit.data.notes import counted
from compressvit.data.photographs import notes_of_photographs, photographs
from compressvit.data.pictures import EXTENSIONS
from compressvit.data.sets.base import TRAIN_FOLDERS, existing_root, split_names, val_names
from compressvit.data.spec import VAL_FRACTION, Data
from compressvit.errors import UserError
from compressvit.notes import Note

LAYOUT = "expected images anywhere under FOLDER, or under FOLDER/train and FOLDER/val"
NO_LABEL = -1


@data_set("images", note="unlabelled, searched recursively", labelled=False, listed=True, parts=True)
def open_images(data: Data) -> tuple[PictureFiles, ...]:
    """FOLDER/train and FOLDER/val if they exist, under the names that `folder` also accepts. Without a validation folder, every
    1/val_fraction-th photograph (`data.group_by`) is held out; without a training folder, all images not held out are used. With
    `data.test_fraction` both fractions are held out by the hash of names."""
    root = existing_root(data, LAYOUT)
    validation = _folder(root, val_names(data))
    train = _folder(root, split_names(data.train_split, TRAIN_FOLDERS))
    test = _test(root, data)
    tests = [name for name in [data.test_split] if name is not None]
    if validation is None:
        search = _search(root, data, leave_out=tests)
        return *(_held_out(search, data) if data.test_fraction is None else _parts(search, data)), *test
    if data.test_fraction is not None:
        raise UserError(
            f"data.test_fraction={data.test_fraction:g}: {root} has a {validation.name}/ already; a fraction is held out where there is "
            "none; name a folder instead, data.test_split=test"
        )
    held_out = _search(validation, data)
    if train is not None:
        used = (train.name, validation.name, *tests)
        return _to_train_on(_search(train, data), data), _set(held_out, _others(root, used)), *test
    # no folder that is called like a validation split is trained on
    kept = [name for name in (*val_names(data), *tests) if os.path.isdir(root / name)]
    rest = _search(root, data, leave_out=kept)
    text = f"{counted(len(rest.found))} outside {', '.join(f'{name}/' for name in kept)} to train on; validation is {validation.name}/"
    return _to_train_on(rest, data, [Note("split", len(rest.found), text)]), _set(held_out), *test


def _folder(root: Path, names: Sequence[str]) -> Path | None:
    return next((root / name for name in names if os.path.isdir(root / name)), None)


def _test(root: Path, data: Data) -> list[PictureFiles]:
    """The set of `data.test_split`, where that is given."""
    if data.test_split is None:
        return []
    folder = _folder(root, [data.test_split])
    if folder is None:
        raise UserError(
            f"data.test_split={data.test_split}: there is no such folder in {root}; found "
            f"{some_of(sorted(path.name for path in root.iterdir()))}"
        )
    return [_set(_search(folder, data))]


def _search(folder: Path, data: Data, leave_out: Sequence[str] = ()) -> Search:
    """All images in a folder or below it, whatever their folders are called."""
    root = existing_root(data, LAYOUT)
    found = Search(folder, within=root, outside=data.outside is not False, leave_out=leave_out, arrays=data.arrays)
    if not found.found:
        besides = f" outside {', '.join(leave_out)}" if leave_out else ""
        types = ", ".join((*EXTENSIONS, SUFFIX))
        raise UserError(f"data.root={data.root}: no images in {folder} or below{besides} ({types})")
    return found


def _set(search: Search, notes: Sequence[Note] = ()) -> PictureFiles:
    return _files(search.found, [*notes, *search.notes()])


def _to_train_on(search: Search, data: Data, notes: Sequence[Note] = ()) -> PictureFiles:
    groups, of_groups = photographs(_paths(search.found), data.group_by)
    return _set(search, [*notes, *of_groups, *notes_of_photographs(groups, data.group_by)])


def _files(found: Sequence[Found], notes: Sequence[Note] = ()) -> PictureFiles:
    return PictureFiles([(file.path, NO_LABEL) for file in found], None, notes)


def _others(root: Path, used: Sequence[str]) -> list[Note]:
    """A note of what lies beside the folders of the splits."""
    others = sorted(path.name for path in root.iterdir() if path.name not in used)
    if not others:
        return []
    text = f"only {' and '.join(f'{name}/' for name in used)} are used; beside them, first {others[0]}, nothing is"
    return [Note("beside_splits", len(others), text)]


def _held_out(search: Search, data: Data) -> tuple[PictureFiles, PictureFiles]:
    """Every 1/val_fraction-th photograph, or other group, is held out with all its images."""
    found = search.found
    if len(found) < 2:
        raise UserError(
            f"data.root={data.root}: a single image cannot be used for both training and evaluation; add images"
        )
    groups, notes = photographs(_paths(found), data.group_by)
    names = list(dict.fromkeys(groups))
    if len(names) < 2:
        raise UserError(
            f"data.group_by={data.group_by}: all {len(found)} images are of one group, '{names[0]}', which cannot be used for both "
            "training and evaluation"
        )
    every = round(1 / (data.val_fraction or VAL_FRACTION))
    chosen = set(names[every - 1 :: every]) or {names[-1]}
    train = [file for file, group in zip(found, groups, strict=True) if group not in chosen]
    held_out = [file for file, group in zip(found, groups, strict=True) if group in chosen]
    if data.group_by == "auto" and len(names) < len(found):
        how = f"all of every {_ordinal(every)} of {len(names):,} photographs, by name (data.group_by)"
    elif data.group_by in ("auto", "none", None):
        how = (
            f"every {_ordinal(every)} image in natural order of the paths. Crops or frames of one photograph fall on both sides, which "
            "makes figures too good: data.group_by keeps them together"
        )
    else:
        how = f"all of every {_ordinal(every)} of {len(names):,} groups (data.group_by={data.group_by})"
    notes.insert(0, Note("held_out", len(held_out), f"{counted(len(held_out))} of {len(found):,} held out: {how}"))
    notes += notes_of_photographs([group for group in groups if group not in chosen], data.group_by)
    return _files(train, [*notes, *search.notes()]), _files(held_out)


def _parts(search: Search, data: Data) -> list[PictureFiles]:
    """The images to train on, those for validation and those for the test, by the hash of their names."""
    of_image, notes = parts_by_name(
        _paths(search.found), [""] * len(search.found), data, f"{os.path.basename(search.root)}/"
    )
    train, *others = (
        [file for file, part in zip(search.found, of_image, strict=True) if part == wanted]
        for wanted in (TRAIN, VALIDATION, TEST)
    )
    return [_files(train, [*notes, *search.notes()]), *map(_files, others)]


def _paths(found: Sequence[Found]) -> list[str]:
    return ["/".join(file.parts) for file in found]


def _ordinal(number: int) -> str:
    ending = "th" if number % 100 in (11, 12, 13) else {1: "st", 2: "nd", 3: "rd"}.get(number % 10, "th")
    return f"{number}{ending}"
