"""Retrieval: what the student's embeddings find in an index of the teacher's.

Whoever searches by embeddings has stored the teacher's, and wants to ask them with a smaller model. The index is the teacher's embeddings
of the held-out images, and each of them is a query once; near is a high cosine.

- recall@1 and recall@10: which part of the 1 or 10 images nearest to the teacher's own query, without the query itself, are among the
  1 or 10 nearest to the student's. This is the recall by which approximate indices are judged.
- found itself: whether the student's embedding of an image is nearer to the teacher's embedding of the same image than to any other.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from compressvit.tasks.base import Result
from compressvit.tasks.quality import Quality

if TYPE_CHECKING:
    from torch import Tensor

DEPTHS = (1, 10)
QUALITIES = (
    Quality(
        "recall_10",
        "recall@10",
        "recall@10 in the teacher's index",
        "recall@10 in the teacher's index",
        "%",
        1,
        of_images=True,
    ),
    Quality("recall_1", "recall@1", "recall@1", "recall@1", "%", 1, detail=True, of_images=True),
    Quality("recall_self", "found", "found itself first", "found itself first", "%", 1, detail=True, of_images=True),
)
_ROWS = 1024  # queries at once
_EQUAL = 1e-6  # cosines that differ by less are those of copies of an image


class Retrieval:
    """Collects the embeddings of all images, on the CPU: 4 bytes a number, for 50,000 images of 1,024 numbers 0.4 GB for both models.
    Every image is compared with every other, so it is done once, for the final figures."""

    def __init__(self) -> None:
        self._ours: list[Tensor] = []
        self._theirs: list[Tensor] = []

    def add(self, ours: Tensor, theirs: Tensor) -> None:
        """A batch of the embeddings (B, width) of both models."""
        import torch.nn.functional as F

        self._ours.append(F.normalize(ours, dim=1).cpu())
        self._theirs.append(F.normalize(theirs, dim=1).cpu())

    def result(self) -> Result:
        """Percent; None where there are not more images than are to be found."""
        import torch

        if not self._ours:
            return {}
        ours, theirs = torch.cat(self._ours), torch.cat(self._theirs)
        count = len(ours)
        depths = [depth for depth in DEPTHS if depth < count - 1]
        found = dict.fromkeys(["self", *depths], 0.0)
        for start in range(0, count, _ROWS):
            rows = torch.arange(start, min(start + _ROWS, count))
            asked, wanted = (queries[rows] @ theirs.T for queries in (ours, theirs))
            own = asked[rows - start, rows]
            found["self"] += (own >= asked.max(dim=1).values - _EQUAL).sum().item()
            for similarities in (asked, wanted):
                similarities[rows - start, rows] = -torch.inf
            for depth in depths:
                least = wanted.topk(depth, dim=1).values[:, -1:]
                near = wanted.gather(1, asked.topk(depth, dim=1).indices) >= least - _EQUAL
                found[depth] += near.double().mean(dim=1).sum().item()
        values = {f"recall_{name}": 100 * total / count for name, total in found.items()}
        return {quality.key: values.get(quality.key) for quality in QUALITIES}
