"""`images`: pictures without classes, anywhere in a folder."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from torch.utils.data import Dataset, Subset

from compressvit.data.data_set import data_set
from compressvit.data.sets.base import IMAGE_TYPES, existing_root
from compressvit.data.spec import Data
from compressvit.errors import UserError

if TYPE_CHECKING:
    from timm.data import ImageDataset

LAYOUT = "expected images anywhere under FOLDER, or under FOLDER/train and FOLDER/val"


@data_set("images", note="unlabelled, searched recursively", labelled=False)
def open_images(data: Data) -> tuple[Dataset, Dataset]:
    """FOLDER/train and FOLDER/val where both are there; else every 1/val_fraction-th image is held out."""
    root = existing_root(data, LAYOUT)
    if (root / "train").is_dir() and (root / "val").is_dir():
        return _readable(root / "train", data), _readable(root / "val", data)
    source = _readable(root, data)
    count = len(source)
    if count < 2:
        raise UserError(
            f"data.root={data.root}: a single image cannot be used for both training and evaluation; add images"
        )
    every = round(1 / data.val_fraction)
    held_out = set(range(every - 1, count, every)) or {count - 1}
    return Subset(source, [i for i in range(count) if i not in held_out]), Subset(source, sorted(held_out))


def _readable(folder: Path, data: Data) -> ImageDataset:
    """All images in a folder or below it, whatever their folders are called."""
    from timm.data import create_dataset

    try:
        return create_dataset("", root=str(folder), search_split=False, input_key=";".join(IMAGE_TYPES))
    except RuntimeError as error:
        raise UserError(f"data.root={data.root}: no images in {folder} or below ({', '.join(IMAGE_TYPES)})") from error
