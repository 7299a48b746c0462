"""`images`: images without classes, anywhere in a folder."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

from compressvit.data.data_set import data_set
from compressvit.data.files import Found, PictureFiles, Search
from compressvit.data.notes import counted
from compressvit.data.photographs import notes_of_photographs, photographs
from compressvit.data.pictures import EXTENSIONS
from compressvit.data.sets.base import TRAIN_FOLDERS, VAL_FOLDERS, existing_root, split_names
from compressvit.data.spec import Data
from compressvit.errors import UserError
from compressvit.notes import Note

LAYOUT = "expected images anywhere under FOLDER, or under FOLDER/train and FOLDER/val"
NO_LABEL = -1


@data_set("images", note="unlabelled, searched recursively", labelled=False, listed=True)
def open_images(data: Data) -> tuple[PictureFiles, PictureFiles]:
    """FOLDER/train and FOLDER/val if they exist, under the names that `folder` also accepts. Without a validation folder, every
    1/val_fraction-th photograph (`data.group_by`) is held out; without a training folder, all images not held out are used."""
    root = existing_root(data, LAYOUT)
    validation = _folder(root, data.val_split, VAL_FOLDERS)
    train = _folder(root, data.train_split, TRAIN_FOLDERS)
    if validation is None:
        return _held_out(_search(root, data), data)
    held_out = _search(validation, data)
    if train is not None:
        used = (train.name, validation.name)
        return _to_train_on(_search(train, data), data), _set(held_out, _others(root, used))
    # no folder that is called like a validation split is trained on
    kept = [name for name in split_names(data.val_split, VAL_FOLDERS) if os.path.isdir(root / name)]
    rest = _search(root, data, leave_out=kept)
    text = f"{counted(len(rest.found))} outside {', '.join(f'{name}/' for name in kept)} to train on; validation is {validation.name}/"
    return _to_train_on(rest, data, [Note("split", len(rest.found), text)]), _set(held_out)


def _folder(root: Path, split: str, usual: Sequence[str]) -> Path | None:
    return next((root / name for name in split_names(split, usual) if os.path.isdir(root / name)), None)


def _search(folder: Path, data: Data, leave_out: Sequence[str] = ()) -> Search:
    """All images in a folder or below it, whatever their folders are called."""
    root = existing_root(data, LAYOUT)
    found = Search(folder, within=root, outside=data.outside is not False, leave_out=leave_out)
    if not found.found:
        besides = f" outside {', '.join(leave_out)}" if leave_out else ""
        raise UserError(f"data.root={data.root}: no images in {folder} or below{besides} ({', '.join(EXTENSIONS)})")
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
    every = round(1 / data.val_fraction)
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


def _paths(found: Sequence[Found]) -> list[str]:
    return ["/".join(file.parts) for file in found]


def _ordinal(number: int) -> str:
    ending = "th" if number % 100 in (11, 12, 13) else {1: "st", 2: "nd", 3: "rd"}.get(number % 10, "th")
    return f"{number}{ending}"
