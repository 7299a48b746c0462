"""What the data sets share: layouts, class names, and the folder they are in."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from compressvit.data.spec import Data
from compressvit.errors import UserError
from compressvit.files import expanded

TRAIN_FOLDERS = ("train", "training")
VAL_FOLDERS = ("val", "valid", "validation", "eval", "evaluation", "test")
LAYOUT = """expected
  FOLDER/train/CLASS/*.jpg   (or FOLDER/train.tar, or a FOLDER/train/CLASS.tar for each class)
  FOLDER/val/CLASS/*.jpg     (or FOLDER/val.tar, …)
or FOLDER/CLASS/*.jpg with data.val_fraction=0.1, which holds out a tenth of every class
for images without classes use data.name=images"""


def split_names(split: str, usual: Sequence[str]) -> list[str]:
    """The names under which a split is looked for: `split`, and where it is a usual one the other usual ones."""
    return list(dict.fromkeys([split, *usual] if split in usual else [split]))


def val_names(data: Data) -> list[str]:
    """The names under which the validation split is looked for, of which `data.test_split` is none.

    Raises:
        UserError: both options name the same split.
    """
    if data.val_split == data.test_split:
        raise UserError(
            f"data.val_split and data.test_split are both {data.test_split}; figures at the end are honest of other images than those "
            "that choices are made on: name two splits, or leave test_split out"
        )
    return [name for name in split_names(data.val_split, VAL_FOLDERS) if name != data.test_split]


def class_names_of(source: Any) -> list[str] | None:
    """The class names of a source in target order, or None where it does not say."""
    holder = getattr(source, "reader", source)
    mapping = getattr(holder, "class_to_idx", None) or getattr(holder, "class_name_to_idx", None)
    if not mapping:
        return [str(name) for name in getattr(source, "classes", None) or ()] or None
    by_index: dict[int, str] = {}
    for name, index in mapping.items():  # ImageNet gives a class several names: the first is kept
        by_index.setdefault(int(index), str(name))
    return [by_index.get(i, str(i)) for i in range(max(by_index) + 1)]


def evenly(count: int, limit: int | None) -> Sequence[int]:
    """Positions of at most `limit` of `count` items, evenly spaced."""
    return range(count) if limit is None or limit >= count else [i * count // limit for i in range(limit)]


def existing_root(data: Data, layout: str) -> Path:
    """data.root as a folder that is there, or a UserError that says how to supply it.

    Args:
        layout: what messages say is expected in it.
    """
    if data.root is None:
        raise UserError(f"data.name={data.name} needs data.root=FOLDER; {layout}")
    root = expanded(data.root, "data.root")
    if not root.is_dir():
        fault = "this is a file" if root.exists() else "there is no such folder"
        raise UserError(f"data.root={data.root}: {fault}; {layout}")
    return root


def download_root(data: Data) -> str:
    """data.root for a reader that may download the set, or a UserError that asks for it."""
    if data.root is None:
        raise UserError(f"data.name={data.name} needs data.root=FOLDER, where the set is or will be downloaded to")
    return str(expanded(data.root, "data.root"))
