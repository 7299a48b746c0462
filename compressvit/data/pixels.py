"""Small sets held in memory."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from PIL import Image
from torch.utils.data import Dataset


class Pixels(Dataset):
    """A small grayscale set held in memory: `data` uint8 (N, H, W), `targets` int64 (N,), `classes` in target order."""

    def __init__(self, data: torch.Tensor, targets: torch.Tensor, classes: Sequence[str]):
        self.data, self.targets, self.classes = data, targets, list(classes)

    def __len__(self) -> int:
        return len(self.data)

    def __getitem__(self, index: int) -> tuple[Image.Image, int]:
        return Image.fromarray(self.data[index].numpy()), int(self.targets[index])
