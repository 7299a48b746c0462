"""`folder`: a folder or tar a split, with a folder or tar a class."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

from torch.utils.data import Dataset

from compressvit.data.classes import class_order, composed, different_classes, missing_classes, numbers_of, some_of
from compressvit.data.data_set import data_set
from compressvit.data.pictures import EXTENSIONS
from compressvit.data.sets.base import LAYOUT, TRAIN_FOLDERS, VAL_FOLDERS, existing_root, split_names
from compressvit.data.spec import Data
from compressvit.errors import UserError


@data_set("folder", note="train/ and val/ with a folder or tar per class", listed=True)
def open_folder(data: Data) -> tuple[Dataset, Dataset]:
    """Classes are the folders directly in a split, and images anywhere below one belong to it. Splits are found under their usual names,
    too: val/, valid/, test/ for the validation split."""
    from compressvit.data.splits import Split  # with timm, which names and classes of sets do not need

    root = existing_root(data, LAYOUT)
    train, validation = (
        Split.read(_path(root, option, split, usual), root, data)
        for option, split, usual in (
            ("train_split", data.train_split, TRAIN_FOLDERS),
            ("val_split", data.val_split, VAL_FOLDERS),
        )
    )
    order, notes = class_order(train.classes, data.classes, f"{train.name}/")
    numbers = numbers_of(order)
    if any(composed(name) not in numbers for name in validation.classes):
        raise different_classes(data.name, train.classes, validation.classes)
    notes += missing_classes(order, train.classes, train.name)
    notes += missing_classes(order, validation.classes, validation.name)
    return train.data_set(order, [*notes, *train.notes]), validation.data_set(order, validation.notes)


def class_folders(data: Data) -> tuple[set[str], set[str]] | None:
    """The class folders (or tars) of the training and the validation split, by their names alone; None unless both splits have some, and
    no image beside them."""
    root = existing_root(data, LAYOUT)
    found = []
    for option, split, usual in (
        ("train_split", data.train_split, TRAIN_FOLDERS),
        ("val_split", data.val_split, VAL_FOLDERS),
    ):
        try:
            path = _path(root, option, split, usual)
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


def _classes_in(path: Path, root: Path, data: Data) -> set[str]:
    from compressvit.data.splits import Split  # as above

    if path.is_file():
        return set(Split.read(path, root, data).classes)
    inside = list(path.iterdir())
    if any(entry.suffix.lower() in EXTENSIONS for entry in inside if not entry.is_dir()):
        return set()
    return {entry.name.removesuffix(".tar") for entry in inside if entry.is_dir() or entry.suffix == ".tar"}


def _path(root: Path, option: str, split: str, usual: Sequence[str]) -> Path:
    names = split_names(split, usual)
    paths = [path for name in names for path in (root / name, root / f"{name}.tar") if os.path.exists(path)]
    if not paths:
        raise UserError(
            f"data.root={root}: nothing for data.{option}={split} (looked for {', '.join(names)}, as a folder "
            f"or .tar); found {some_of(sorted(p.name for p in root.iterdir()))}; {LAYOUT}"
        )
    return paths[0]
