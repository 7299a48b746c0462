"""k-NN accuracy: how well an embedding tells classes apart, without training anything.

A held-out image gets the class for which its 20 nearest training images vote, each with exp(cosine / 0.07): the evaluation of DINO
(Caron et al., https://arxiv.org/abs/2104.14294; `eval_knn.py` in its code). The index is up to 5,000 labelled training images, evenly
taken, where the paper has all, so a figure compares models with each other, not with papers. Student and teacher have an index each, of
their own embeddings of the same images.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from compressvit.tasks.quality import Quality

if TYPE_CHECKING:
    from torch import Tensor

INDEXED = 5000  # training images, at most
NEIGHBOURS = 20
TEMPERATURE = 0.07
KNN = Quality("knn", "k-NN", f"k-NN accuracy (k {NEIGHBOURS})", "k-NN accuracy", "%", 2, of_images=True)


class Neighbours:
    """An index of embeddings with classes, and how many images it gave the right class."""

    def __init__(self) -> None:
        self._embeddings: list[Tensor] = []
        self._labels: list[Tensor] = []
        self._right = self._asked = 0

    @property
    def indexed(self) -> int:
        """Images in the index."""
        return sum(map(len, self._labels))

    def index(self, embeddings: Tensor, labels: Tensor) -> None:
        """Add embeddings (B, width) of classes (B,)."""
        import torch.nn.functional as F

        self._embeddings.append(F.normalize(embeddings, dim=1))
        self._labels.append(labels)

    def classes(self, embeddings: Tensor) -> Tensor:
        """The class (B,) that the nearest images of the index give each of the embeddings (B, width)."""
        import torch
        import torch.nn.functional as F

        if len(self._labels) > 1:
            self._embeddings, self._labels = [torch.cat(self._embeddings)], [torch.cat(self._labels)]
        known, classes = self._embeddings[0], self._labels[0]
        similarities, nearest = (F.normalize(embeddings, dim=1) @ known.T).topk(min(NEIGHBOURS, len(known)), dim=1)
        votes = torch.zeros(len(embeddings), int(classes.max()) + 1, device=known.device)
        votes.scatter_add_(1, classes[nearest], ((similarities - 1) / TEMPERATURE).exp())
        return votes.argmax(dim=1)

    def ask(self, embeddings: Tensor, labels: Tensor) -> Tensor:
        """Classify images by their embeddings (B, width), and count those whose class is that of `labels` (B,).

        Returns:
            Which are right, bool (B,).
        """
        right = self.classes(embeddings) == labels
        self._right += int(right.sum())
        self._asked += len(labels)
        return right

    def accuracy(self) -> float | None:
        """Percent; None if nothing was asked."""
        return 100 * self._right / self._asked if self._asked else None
