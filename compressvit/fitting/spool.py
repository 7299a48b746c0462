"""Tensors that wait in temporary files between two passes over the calibration images."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import torch

from compressvit.errors import UserError
from compressvit.fitting.lowrank import Tensor


class Spool:
    """One tensor a batch, kept on the disk between two passes."""

    def __init__(self, folder: Path, name: str):
        self._stem, self._count = folder / name, 0

    def append(self, tensor: Tensor) -> None:
        self._count += 1
        self.replace(self._count - 1, tensor)

    def replace(self, index: int, tensor: Tensor) -> None:
        try:
            np.save(self._file(index), tensor.cpu().numpy())
        except OSError as error:
            raise _no_room(str(self._stem.parent), error) from error

    def read(self, index: int, device: torch.device) -> Tensor:
        return torch.from_numpy(np.load(self._file(index))).to(device)

    def __len__(self) -> int:
        return self._count

    def _file(self, index: int) -> Path:
        return self._stem.with_name(f"{self._stem.name}_{index}.npy")


def _no_room(folder: str, error: OSError) -> UserError:
    return UserError(
        f"the hidden states of the calibration images cannot be stored in {folder}: {error.strerror or error}; point TMPDIR at a folder "
        "with room, give fewer calibration images, or fit layers one by one (sequential: false)"
    )


@contextmanager
def scratch_folder() -> Iterator[Path]:
    try:
        folder = tempfile.TemporaryDirectory(prefix="compressvit-", ignore_cleanup_errors=True)
    except OSError as error:
        raise _no_room(os.environ.get("TMPDIR", "the temporary folder"), error) from error
    with folder as path:
        yield Path(path)
