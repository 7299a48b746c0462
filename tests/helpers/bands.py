"""Images of bands, in memory and in class folders."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import numpy as np

CLASSES = ("field", "forest", "water")


def bands(channels: int, size: tuple[int, int] = (20, 24), seed: int = 0) -> np.ndarray:
    """Smooth noise, uint8 (H, W, C)."""
    coarse = np.random.default_rng(seed).integers(0, 256, (3, 3, channels))
    rows, columns = (np.linspace(0, 2, side) for side in size)
    return np.stack(
        [
            [np.interp(columns, range(3), row) for row in np.array([np.interp(rows, range(3), c) for c in band.T]).T]
            for band in coarse.transpose(2, 0, 1)
        ],
        axis=-1,
    ).astype(np.uint8)


def npy(values: np.ndarray) -> bytes:
    file = io.BytesIO()
    np.save(file, values)
    return file.getvalue()


def npy_header(shape: tuple[int, ...], kind: str = "<u2") -> bytes:
    """The beginning of a file that claims an array of this shape, whatever follows."""
    file = io.BytesIO()
    np.lib.format.write_array_header_1_0(file, {"descr": kind, "fortran_order": False, "shape": shape})
    return file.getvalue()


def tiff(values: np.ndarray, *, planar: bool = False, **options: Any) -> bytes:
    """An array (H, W, C) as `tifffile` writes it, bands by pixel or one after the other."""
    import tifffile

    file = io.BytesIO()
    stored = np.ascontiguousarray(values.transpose(2, 0, 1)) if planar else values
    how = {"photometric": "minisblack", "planarconfig": "separate" if planar else "contig", "metadata": None}
    tifffile.imwrite(file, stored, **{**how, **options})
    return file.getvalue()


def of_class(label: int, seed: int) -> np.ndarray:
    """An image of 5 bands, (18, 20, 5), of which the first two tell nothing of its class."""
    values = np.random.default_rng(seed).integers(0, 60, (18, 20, 5)).astype(np.uint8)
    values[:, :, 2 + label] += 150
    return values


def band_folders(root: Path, *, tiffs: bool, train: int = 16, val: int = 8) -> Path:
    """So many images of each class: arrays of 8 and of 16 bits, and TIFFs by pixel and of floats by band."""
    for split, count in (("train", train), ("val", val)):
        for label, name in enumerate(CLASSES):
            folder = root / split / name
            folder.mkdir(parents=True)
            for i in range(count):
                values = of_class(label, 1000 * label + i + 100 * (split == "val"))
                if not tiffs or i % 4 < 2:
                    content = npy(values if i % 2 else values.astype(np.uint16) * 257)
                else:
                    content = tiff((values / 255).astype(np.float32), planar=True) if i % 2 else tiff(values)
                (folder / f"{i}.{'npy' if content.startswith(b'NUMPY', 1) else 'tif'}").write_bytes(content)
    return root
