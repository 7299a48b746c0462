"""`images`: pictures without classes, anywhere in a folder."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from timm.data import create_dataset

from compressvit.data.samples import Samples
from compressvit.data.sets.base import IMAGE_TYPES, evenly, existing_root
from compressvit.data.spec import Data
from compressvit.errors import UserError


def open_images(data: Data) -> tuple[Samples, Samples]:
    root = existing_root(data)
    if (root / "train").is_dir() and (root / "val").is_dir():
        parts: Any = [(s, range(len(s))) for s in (_readable(root / split, data) for split in ("train", "val"))]
    else:
        source = _readable(root, data)
        count = len(source)
        if count < 2:
            raise UserError(f"data.root={data.root}: one image cannot be both trained on and held out; add images")
        every = round(1 / data.val_fraction)
        held_out = set(range(every - 1, count, every)) or {count - 1}
        parts = (source, [i for i in range(count) if i not in held_out]), (source, sorted(held_out))
    train, validation = (
        Samples(source, [part[i] for i in evenly(len(part), limit)], labeled=False)
        for (source, part), limit in zip(parts, (data.limit_train, data.limit_val), strict=True)
    )
    return train, validation


def _readable(folder: Path, data: Data) -> Any:
    """All images in a folder or below it, whatever their folders are called."""
    try:
        return create_dataset("", root=str(folder), search_split=False, input_key=";".join(IMAGE_TYPES))
    except RuntimeError as error:
        raise UserError(f"data.root={data.root}: no images in {folder} or below ({', '.join(IMAGE_TYPES)})") from error
