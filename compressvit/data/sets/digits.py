"""`digits`: the handwritten digits of scikit-learn, which need no files."""

from __future__ import annotations

import functools

import torch

from compressvit.data.data_set import data_set
from compressvit.data.pixels import Pixels
from compressvit.data.spec import Data


@data_set("digits", note="comes with scikit-learn", classes=10, full_frame=True)
def open_digits(data: Data) -> tuple[Pixels, Pixels]:
    """A fifth is held out, the same one each time, with as many of each class as there are in the whole."""
    from sklearn.model_selection import train_test_split

    pixels, targets = _digits()
    parts = train_test_split(range(len(targets)), test_size=0.2, random_state=0, stratify=targets)
    train, validation = (Pixels(pixels[part], targets[part], list("0123456789")) for part in parts)
    return train, validation


@functools.cache
def _digits() -> tuple[torch.Tensor, torch.Tensor]:
    """All pixels, uint8 (1797, 8, 8), and classes, int64 (1797,): not to be changed."""
    from sklearn.datasets import load_digits

    digits = load_digits()
    pixels = torch.from_numpy((digits.images * (255 / 16)).round().astype("uint8"))  # ink is stored as 0 to 16
    return pixels, torch.from_numpy(digits.target.astype("int64"))
