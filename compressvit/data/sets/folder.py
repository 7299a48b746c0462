"""`folder`: a folder or tar a split, with a folder or tar a class; or folders of classes, of which a fraction is held out."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from torch.utils.data import Dataset

from compressvit.data.classes import class_order, composed, different_classes, missing_classes, numbers_of, some_of
from compressvit.data.data_set import data_set
from compressvit.data.pictures import EXTENSIONS
from compressvit.data.sets.base import LAYOUT, TRAIN_FOLDERS, VAL_FOLDERS, existing_root, split_names, val_names
from compressvit.data.spec import Data
from compressvit.errors import UserError
from compressvit.notes import Note

if TYPE_CHECKING:
    from compressvit.data.splits import Split


@data_set("folder", note="train/ and val/ with a folder or tar per class", listed=True, parts=True)
def open_folder(data: Data) -> tuple[Dataset, ...]:
    """Classes are the folders directly in a split, and images anywhere below one belong to it. Splits are found under their usual names,
    too: val/, valid/, test/ for the validation split. With `data.val_fraction` classes are the folders directly in train/, or in the root
    where there is none."""
    from compressvit.data.splits import Split  # with timm, which names and classes of sets do not need

    root = existing_root(data, LAYOUT)
    test = None if data.test_split is None else _path(root, "test_split", [data.test_split], data)
    if data.val_fraction is not None:
        train, *others = _held_out(root, data)
    elif data.test_fraction is not None:
        raise UserError(
            f"data.test_fraction={data.test_fraction:g} is held out of the images that data.val_fraction splits; give that too, or name "
            "a folder: data.test_split=test"
        )
    else:
        train, *others = (
            Split.read(_path(root, option, names, data), root, data)
            for option, names in (
                ("train_split", split_names(data.train_split, TRAIN_FOLDERS)),
                ("val_split", val_names(data)),
            )
        )
    if test is not None:
        others.append(Split.read(test, root, data))
    order, notes = class_order(train.classes, data.classes, f"{train.name}/")
    numbers = numbers_of(order)
    notes += missing_classes(order, train.classes, train.name)
    for part, held_out in zip(("validation", "test"), others, strict=False):
        if any(composed(name) not in numbers for name in held_out.classes):
            raise different_classes(data.name, train.classes, held_out.classes, part)
        notes += missing_classes(order, held_out.classes, held_out.name)
    return train.data_set(order, [*notes, *train.notes]), *(part.data_set(order, part.notes) for part in others)


def class_folders(data: Data) -> tuple[set[str], set[str]] | None:
    """The class folders (or tars) of the training and the validation split, by their names alone; None unless both splits have some, and
    no image beside them. With `data.val_fraction` both have the same.

    Raises:
        UserError: `data.val_fraction` is given and cannot be used.
    """
    root = existing_root(data, LAYOUT)
    if data.val_fraction is not None:
        path, besides = _to_split(root, data)
        classes = _classes_in(path, root, data) - {*besides}
        return (classes, classes) if classes else None
    found = []
    for option, names in (
        ("train_split", split_names(data.train_split, TRAIN_FOLDERS)),
        ("val_split", val_names(data)),
    ):
        try:
            path = _path(root, option, names, data)
        except UserError:
            return None
        found.append(_classes_in(path, root, data))
    train, validation = found
    return (train, validation) if train and validation else None


def folders_beside(data: Data) -> int:
    """How many folders, directly in the root, might be classes by their places alone: two or more with no image beside them, but for those
    named as splits; otherwise 0."""
    root = existing_root(data, LAYOUT)
    names = _classes_in(root, root, data) - {*TRAIN_FOLDERS, *VAL_FOLDERS}
    return len(names) if len(names) > 1 else 0


def _held_out(root: Path, data: Data) -> list[Split]:
    """The training split, and what `data.val_fraction` and `data.test_fraction` hold out of the same folders."""
    from compressvit.data.fractions import TEST, TRAIN, VALIDATION, parts_by_name
    from compressvit.data.splits import Split

    path, besides = _to_split(root, data)
    whole = Split.read(path, root, data, leave_out=besides)
    of_image, notes = parts_by_name(whole.paths, whole.labels, data, f"{whole.name}/")
    parts = [whole.part([word == part for word in of_image]) for part in (TRAIN, VALIDATION, TEST)]
    odd = sorted({*whole.classes} & {*TRAIN_FOLDERS, *VAL_FOLDERS})
    if odd:
        text = f"{', '.join(odd)}: taken for classes although named as splits are, because images and no folders are in them"
        notes.append(Note("named_as_splits", len(odd), text))
    parts[0] = replace(parts[0], notes=[*notes, *whole.notes])
    return parts[: 2 if data.test_fraction is None else 3]


def _to_split(root: Path, data: Data) -> tuple[Path, list[str]]:
    """The folder of the class folders that `data.val_fraction` splits, and the names in it that are none of them.

    Raises:
        UserError: there is a validation split already, or there are tar files.
    """
    besides = [] if data.test_split is None else [data.test_split]
    there = [name for name in val_names(data) if _is_split(root, name, data)]
    if there:
        hint = f", or data.test_split={there[0]} if it is the test" if data.test_split is None else ""
        raise UserError(
            f"data.val_fraction={data.val_fraction:g}: {root} has a {there[0]}/ already, which is the validation split; leave "
            f"val_fraction out{hint}"
        )
    names = split_names(data.train_split, TRAIN_FOLDERS)
    path = next((root / name for name in names if _is_split(root, name, data)), root)
    if not path.is_dir() or any(path.glob("*.tar")):
        raise UserError(
            f"data.val_fraction={data.val_fraction:g} splits folders of images, and there are tar files in {root}; unpack them, or make "
            "train.tar and val.tar"
        )
    return path, besides if path == root else []


def _is_split(root: Path, name: str, data: Data) -> bool:
    """Whether a split of that name is there, rather than a class: as a tar file, or as a folder with folders or tar files alone."""
    if (root / f"{name}.tar").is_file():
        return True
    return (root / name).is_dir() and bool(_classes_in(root / name, root, data))


def _classes_in(path: Path, root: Path, data: Data) -> set[str]:
    from compressvit.data.splits import Split  # as above

    if path.is_file():
        return set(Split.read(path, root, data).classes)
    inside = list(path.iterdir())
    if any(entry.suffix.lower() in EXTENSIONS for entry in inside if not entry.is_dir()):
        return set()
    return {entry.name.removesuffix(".tar") for entry in inside if _holds_something(entry) or entry.suffix == ".tar"}


def _holds_something(path: Path) -> bool:
    """Whether it is a folder that is not empty; an empty one is no class."""
    try:
        return path.is_dir() and any(os.scandir(path))
    except OSError:
        return False


def _path(root: Path, option: str, names: Sequence[str], data: Data) -> Path:
    """Where a split is, which may have any of these names, as a folder or a tar file."""
    paths = [path for name in names for path in (root / name, root / f"{name}.tar") if os.path.exists(path)]
    if not paths:
        raise UserError(
            f"data.root={root}: nothing for data.{option}={getattr(data, option)} (looked for {', '.join(names)}, as a folder "
            f"or .tar); found {some_of(sorted(p.name for p in root.iterdir()))}; {_hint(root, option, data)}{LAYOUT}"
        )
    return paths[0]


def _hint(root: Path, option: str, data: Data) -> str:
    """What to do where folders that may be classes are there, and no validation split."""
    splits = any(os.path.exists(root / name) for name in val_names(data))
    if option == "test_split" or splits or data.val_fraction is not None:
        return ""
    if option == "val_split":
        return "data.val_fraction=0.1 holds out a tenth of the training split; "
    beside = folders_beside(data)
    return (
        f"data.val_fraction=0.1 takes the {beside} folders for classes and holds out a tenth of each; "
        if beside
        else ""
    )
