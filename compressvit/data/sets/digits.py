"""`digits`: the handwritten digits of scikit-learn, which need no files."""

from __future__ import annotations

import torch

from compressvit.data.samples import Pixels
from compressvit.data.spec import Data


def open_digits(data: Data) -> tuple[Pixels, Pixels]:
    from sklearn.datasets import load_digits
    from sklearn.model_selection import train_test_split

    digits = load_digits()
    pixels = torch.from_numpy((digits.images * (255 / 16)).round().astype("uint8"))  # ink is stored as 0 to 16
    targets = torch.from_numpy(digits.target.astype("int64"))
    parts = train_test_split(range(len(targets)), test_size=0.2, random_state=0, stratify=targets)
    train, validation = (Pixels(pixels[part], targets[part], list("0123456789")) for part in parts)
    return train, validation
