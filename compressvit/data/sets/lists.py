"""Image sets whose splits are text files: a line `PATH LABEL` per image, as VTAB-1k is commonly prepared.

FOLDER/train800.txt  FOLDER/val200.txt  FOLDER/train800val200.txt  FOLDER/test.txt
FOLDER/images/…      PATH is relative to FOLDER, LABEL counts from 0
"""

from __future__ import annotations

from pathlib import Path

import torch
from PIL import Image
from torch.utils.data import Dataset

from compressvit.data.data_set import data_set
from compressvit.data.sets.base import existing_root
from compressvit.data.spec import Data
from compressvit.errors import UserError, nearest

LAYOUT = """expected FOLDER/SPLIT.txt with a line `PATH LABEL` per image (PATH relative to FOLDER, LABEL from 0), as in a prepared VTAB-1k:
  data.train_split=train800val200 data.val_split=test      (or train800 and val200, to choose hyper-parameters)"""


class Listed(Dataset):
    """Images of a list: `samples` holds (path, target), and an item is (PIL image, target)."""

    def __init__(self, samples: list[tuple[Path, int]], classes: int):
        self.samples = samples
        self.targets = torch.tensor([target for _, target in samples])
        self.classes = [str(i) for i in range(classes)]

    def __len__(self) -> int:
        return len(self.samples)

    def __getitem__(self, index: int) -> tuple[Image.Image, int]:
        path, target = self.samples[index]
        with Image.open(path) as image:
            image.load()
            return image, target


@data_set("lists", note="SPLIT.txt with `PATH LABEL` lines, as a prepared VTAB-1k")
def open_lists(data: Data) -> tuple[Listed, Listed]:
    """The two splits that `data` names; both have as many classes as the highest label of either says.

    Raises:
        UserError: no such folder or list, a line that cannot be read, or images that are not there.
    """
    root = existing_root(data, LAYOUT)
    parts = [
        _read(root, option, split)
        for option, split in (("train_split", data.train_split), ("val_split", data.val_split))
    ]
    classes = data.num_classes or 1 + max(target for part in parts for _, target in part)
    return Listed(parts[0], classes), Listed(parts[1], classes)


def _read(root: Path, option: str, split: str) -> list[tuple[Path, int]]:
    file = root / f"{split.removesuffix('.txt')}.txt"
    if not file.is_file():
        there = sorted(path.stem for path in root.glob("*.txt"))
        close = nearest(split, there)
        hint = f"did you mean {close}? " if close else ""
        raise UserError(
            f"data.{option}={split}: there is no {file}; {hint}lists there: {', '.join(there) or 'none'}; {LAYOUT}"
        )
    samples = []
    try:
        lines = file.read_text(encoding="utf-8").splitlines()
    except UnicodeDecodeError as error:
        raise UserError(f"{file} is not UTF-8 text: {error}") from error
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        path, _, label = line.strip().rpartition(" ")
        if not path or not label.isdecimal():
            raise UserError(f"{file}, line {number}: {line!r} is not `PATH LABEL` with a label from 0; {LAYOUT}")
        samples.append((root / path, int(label)))
    if not samples:
        raise UserError(f"{file} lists no image; {LAYOUT}")
    missing = [path for path, _ in samples if not path.is_file()]
    if missing:
        raise UserError(f"{file}: {len(missing)} of its {len(samples)} images are not there, first {missing[0]}")
    return samples
