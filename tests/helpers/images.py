"""Small images and data sets on disk, and an epoch of a loader over them."""

from __future__ import annotations

import gzip
import io
import random
import struct
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import nn

from compressvit.data.input import InputConfig, Side
from compressvit.data.opening import open_data
from compressvit.data.spec import Augment, Data

CPU = torch.device("cpu")
COLOUR = InputConfig(3, 32, 32, (0.5, 0.4, 0.3), (0.2, 0.25, 0.3), "bicubic", 0.9)
GRAY = InputConfig(1, 8, 8, (0.5,), (0.25,), "bicubic", 1.0)
UNCHANGED = InputConfig(1, 8, 8, (0.0,), (1.0,), "bicubic", 1.0)
PLAIN = InputConfig(3, 20, 24, (0.0,) * 3, (1.0,) * 3, "bicubic", 1.0)  # pixel values in 0..1, as large as `picture`

CROPPED = Augment(scale=(0.3, 1.0), hflip=0.5, color_jitter=0.4, random_erasing=0.5)
POLICY = Augment(scale=(0.3, 1.0), auto_augment="rand-m9-mstd0.5-inc1", translate=2)


def side(model: nn.Module) -> Side:
    """A model that takes batches as they are, beside others that do."""
    return Side(model, GRAY)


def picture(seed: int) -> Image.Image:
    noise = np.random.default_rng(seed).integers(0, 256, (5, 6, 3), dtype=np.uint8)
    return Image.fromarray(noise).resize((24, 20), Image.Resampling.BILINEAR)


def jpeg(seed: int) -> bytes:
    buffer = io.BytesIO()
    picture(seed).save(buffer, "JPEG")
    return buffer.getvalue()


def class_folders(root: Path, splits=("train", "val"), classes=("cat", "dog"), each: int = 6) -> Path:
    for s, split in enumerate(splits):
        for c, name in enumerate(classes):
            folder = root / split / name
            folder.mkdir(parents=True)
            for i in range(each):
                (folder / f"{i}.jpg").write_bytes(jpeg(100 * s + 10 * c + i))
    return root


def sixteen_bit_digits(root: Path) -> Path:
    """Two of every digit to train on and one held out, as PNG of 16 bits in class folders; the first held out is damaged."""
    digits = open_data(Data(name="digits")).train.source
    for digit in range(10):
        for i, position in enumerate((digits.targets == digit).nonzero().flatten()[:3].tolist()):
            file = root / ("val" if i == 2 else "train") / str(digit) / f"{i}.png"
            file.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(digits.data[position].numpy().astype(np.uint16) * 257).save(file)
    (root / "val" / "0" / "2.png").write_bytes(b"no picture")
    return root


def write_idx(folder: Path, *, train: int = 20, test: int = 10, size: int = 28, labels: int = 10, packed: bool = True):
    folder.mkdir(parents=True, exist_ok=True)
    for split, count in (("train", train), ("t10k", test)):
        rng = np.random.default_rng(count)
        images = struct.pack(">IIII", 0x803, count, size, size) + rng.integers(0, 256, count * size**2, "u1").tobytes()
        targets = struct.pack(">II", 0x801, count) + (np.arange(count) % labels).astype("u1").tobytes()
        for name, content in ((f"{split}-images-idx3-ubyte", images), (f"{split}-labels-idx1-ubyte", targets)):
            (folder / (name + ".gz" * packed)).write_bytes(gzip.compress(content) if packed else content)
    return folder


def seed_all(seed: int) -> None:
    random.seed(seed)
    np.random.seed(seed)
    torch.manual_seed(seed)


def epoch(loader, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    """An epoch's images and targets, with draws in between as a training step would make them."""
    seed_all(seed)
    images, targets = [], []
    for batch_images, batch_targets in loader:
        images.append(batch_images)
        targets.append(batch_targets)
        torch.rand(3), random.random(), np.random.rand()
    return torch.cat(images), torch.cat(targets)


def as_multiset(images: torch.Tensor) -> list[bytes]:
    return sorted(image.tobytes() for image in (images * 255).round().to(torch.uint8).numpy())


def grays(loader) -> list[int]:
    """Of every image of a loader whose input is `UNCHANGED`, in order of size."""
    return sorted(round(float(image.mean()) * 255) for images, _ in loader for image in images)
