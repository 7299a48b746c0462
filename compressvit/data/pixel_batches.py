"""Small sets in memory, of which a batch at a time is taken."""

from __future__ import annotations

import dataclasses

import torch
import torch.nn.functional as F
from torch.utils.data import Dataset

from compressvit.data.image_transform import image_transform
from compressvit.data.input import InputConfig
from compressvit.data.order import View
from compressvit.data.pictures import MODES
from compressvit.data.pixels import Pixels
from compressvit.data.samples import Samples
from compressvit.data.spec import Augment

_IN_MEMORY_BYTES = 2**28  # larger than this after resizing, and a small set is read image by image like any other
Moves = dict[str, torch.Tensor]  # of images by kind, (B, 1, 1, 1) of flips and (B, 1, 1) of shifts


def pixel_batches(samples: Samples, config: InputConfig, augment: Augment | None) -> PixelBatches | None:
    """The set as tensors to take whole batches from, where it is small and no image is augmented by itself."""
    source = samples.source
    per_image = augment is not None and (augment.scale or augment.color_jitter or augment.auto_augment)
    if not isinstance(source, Pixels) or config.channels not in MODES:
        return None
    if per_image or len(samples) * config.height * config.width > _IN_MEMORY_BYTES:
        return None
    index = torch.tensor(samples.indices)
    if source.data.shape[1:] == (config.height, config.width) and config.crop_pct == 1:
        pixels = source.data[index].unsqueeze(1)
    else:  # by Pillow, as everywhere: torch's resizing of a tensor differs where bicubic overshoots
        transform = image_transform(dataclasses.replace(config, channels=1, mean=(0.0,), std=(1.0,)), None)
        pixels = torch.stack([transform(source[i][0]) for i in samples.indices])
    return PixelBatches(pixels, source.targets[index], config.channels, augment)


class PixelBatches(Dataset):
    """A small set indexed a batch at a time: `pixels` uint8 (N, 1, H, W), already resized, `targets` int64 (N,)."""

    def __init__(self, pixels: torch.Tensor, targets: torch.Tensor, channels: int, augment: Augment | None):
        self.pixels, self.targets, self.channels, self.augment = pixels, targets, channels, augment
        self._of_view: tuple[View, Moves] | None = None

    def __len__(self) -> int:
        return len(self.pixels)

    def __getitems__(self, keys: list[tuple[int, int | View]]) -> tuple[torch.Tensor, torch.Tensor]:
        index = torch.tensor([i for i, _ in keys])
        images, drawn = self.pixels[index], keys[0][1]
        if self.augment is not None:
            if isinstance(drawn, View):
                moves = {name: values[index] for name, values in self._moves_of(drawn).items()}
            else:
                moves = _moves(len(index), self.augment, torch.Generator().manual_seed(drawn))
            images = _flip_and_shift(images, self.augment.translate, moves)
        if self.channels == 4:
            return torch.cat([images.repeat(1, 3, 1, 1), torch.full_like(images, 255)], dim=1), self.targets[index]
        return images.repeat(1, self.channels, 1, 1), self.targets[index]

    def _moves_of(self, view: View) -> Moves:
        """Those of every image of the set in a view."""
        if self._of_view is None or self._of_view[0] != view:
            assert self.augment is not None, "a view is of images to train on"
            generator = torch.Generator().manual_seed(view.seed_of(0))
            self._of_view = view, _moves(len(self), self.augment, generator)
        return self._of_view[1]


def _moves(count: int, augment: Augment, generator: torch.Generator) -> Moves:
    """How so many images are flipped and shifted."""
    found = {}
    for name, probability in (("hflip", augment.hflip), ("vflip", augment.vflip)):
        if probability:
            found[name] = torch.rand(count, 1, 1, 1, generator=generator) < probability
    if shift := augment.translate:
        found["top"], found["left"] = torch.randint(2 * shift + 1, (2, count, 1, 1), generator=generator)
    return found


def _flip_and_shift(images: torch.Tensor, shift: int, moves: Moves) -> torch.Tensor:
    """What `image_transform` does to one image, for a batch: uint8 (B, 1, H, W) to the same shape."""
    batch, _, height, width = images.shape
    for name, axis in (("hflip", 3), ("vflip", 2)):
        if name in moves:
            images = torch.where(moves[name], images.flip(axis), images)
    if shift:
        padded = F.pad(images, (shift,) * 4)[:, 0]
        rows, columns = moves["top"] + torch.arange(height)[:, None], moves["left"] + torch.arange(width)
        images = padded[torch.arange(batch)[:, None, None], rows, columns][:, None]
    return images
