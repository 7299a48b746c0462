"""The features of held-out images, which evaluations during a phase read.

An evaluation does not say which images its batches have: rows are looked for at the places of an order that stays the same, in which
batches are dealt out to the processes of a run in turn, and one counts only where the hash of the image is beside the features. So another
order costs time, and never gives an image the features of another.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from compressvit import processes
from compressvit.model.cut import Cut
from compressvit.training.cache.store import Store

HASH = 16  # bytes of a row


class HeldOut:
    """Features in files of one view, whose rows end with the hash of their image.

    Args:
        form: of the features, without the hash; in float32, so that figures are those of features that are computed.
        store: of rows of that form and the hash.
        batch: how many images the backbone is given at once, but for the last ones.

    Attributes:
        read, asked: how many images' this process has read, and how many it has computed.
    """

    def __init__(self, cut: Cut, form: Any, store: Store, batch: int):
        self._cut, self._form, self._store, self._batch = cut, form, store, batch
        self.read = self.asked = self._batches = 0

    def evaluating(self, evaluate: Callable[[nn.Module], dict[str, Any]]) -> Callable[[nn.Module], dict[str, Any]]:
        """An evaluation that reads what is there, and keeps what it computes."""

        def evaluated(model: nn.Module) -> dict[str, Any]:
            self._batches = 0
            try:
                with self._cut.through(model, self._take):
                    return evaluate(model)
            finally:
                self._store.sync()
                self._store.close()

        return evaluated

    @torch.no_grad()
    def _take(self, images: Tensor, compute: Callable[[Tensor], Any]) -> Any:
        hashes, places = _hashes(images), self._places(len(images))
        rows, there = self._store.read(0, places)
        there &= (rows[:, -HASH:] == hashes).all(1)
        missing = np.flatnonzero(~there)
        if len(missing):
            wanted = images if len(missing) == len(images) else images[torch.from_numpy(missing).to(images.device)]
            found = compute(wanted)
            values = found if isinstance(found, (list, tuple)) else (found,)
            fresh = np.concatenate([self._form.encode(*values).cpu().numpy(), hashes[missing]], axis=1)
            rows[missing] = fresh
            self._store.write(0, [places[i] for i in missing], fresh)
        self.read, self.asked = self.read + len(images) - len(missing), self.asked + len(missing)
        decoded = self._form.decode(torch.from_numpy(rows[:, :-HASH].copy()).to(images.device))
        return list(decoded) if self._form.listed else decoded[0]

    def _places(self, count: int) -> list[int]:
        """Of the next images; -1 of those for which there is no row."""
        first = (self._batches * processes.count() + processes.rank()) * self._batch
        self._batches += 1
        places = range(first, first + count)
        return [place if place < self._store.index.images else -1 for place in places]


def _hashes(images: Tensor) -> np.ndarray:
    """Of every image, uint8 (B, `HASH`)."""
    values = images.detach().float().cpu().contiguous().numpy()
    found = [hashlib.blake2b(image.tobytes(), digest_size=HASH).digest() for image in values]
    return np.frombuffer(b"".join(found), dtype=np.uint8).reshape(len(found), HASH)
