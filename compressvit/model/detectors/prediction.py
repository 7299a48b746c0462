"""What a query-based detector says of a batch: its loss against annotated boxes, and its detections.

Each object is matched to one query, all of them as cheaply as possible (Hungarian algorithm), and queries without an object learn that
there is nothing: End-to-End Object Detection with Transformers, ECCV 2020, https://arxiv.org/abs/2005.12872. Classes are learned by the
focal loss (https://arxiv.org/abs/1708.02002), boxes by L1 and GIoU (https://arxiv.org/abs/1902.09630), weighted 2, 5 and 2 in the loss
and in the matching, as in AdaMixer.

Boxes are (x0, y0, x1, y1) in widths and heights of the image, 0 to 1 inside it. Ground truth of an image: `boxes` (n, 4), `labels` (n,).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torchvision.ops import generalized_box_iou, generalized_box_iou_loss, sigmoid_focal_loss

from compressvit.errors import UserError

CLASSES, L1, GIOU = 2.0, 5.0, 2.0  # weights of the three parts
ALPHA, GAMMA = 0.25, 2.0  # of the focal loss

Target = Mapping[str, Tensor]


class Detections(NamedTuple):
    """The boxes found in one image: (n, 4), their scores (n,) from 0 to 1, falling, and their classes (n,).

    A model of masks also gives (n, M, M), the probability that a point of the box belongs to the object; `masks` is None of others.
    """

    boxes: Tensor
    scores: Tensor
    labels: Tensor
    masks: Tensor | None = None

    def first(self, count: int) -> Detections:
        """Those of highest score."""
        return Detections(*(None if part is None else part[:count] for part in self))  # type: ignore[arg-type]

    def sure(self, score: float) -> Detections:
        """Those of a score of at least `score`."""
        return self.first(int((self.scores >= score).sum()))


class Answering(nn.Module):
    """A detector whose outputs are its detections: those of B images in tensors (B, limit, …), with zeros after an image's last.

    Args:
        detector: has a method `answer`, from images (B, C, H, W) and `limit` to such `Detections`, or to fewer in all images alike.
    """

    def __init__(self, detector: nn.Module, limit: int):
        super().__init__()
        self.detector, self.limit = detector, limit

    def forward(self, images: Tensor) -> tuple[Tensor, ...]:
        found: Detections = self.detector.answer(images, self.limit)  # type: ignore[operator]
        return tuple(self._padded(part) for part in found if part is not None)

    def _padded(self, part: Tensor) -> Tensor:
        """(B, n, …) -> (B, limit, …): where there cannot be so many, as with few queries and classes."""
        missing = self.limit - part.shape[1]
        return F.pad(part, (*(0, 0) * (part.ndim - 2), 0, missing)) if missing else part


class SetPrediction(NamedTuple):
    """Logits (stages, B, N, classes) and boxes (stages, B, N, 4) of every stage; the last one's are the answer."""

    logits: Tensor
    boxes: Tensor

    def losses(self, targets: Sequence[Target]) -> dict[str, Tensor]:
        """The three parts of the loss, weighted, summed over stages, per annotated object of the batch.

        Args:
            targets: the ground truth of each of the B images, on the device of the boxes.
        """
        objects = max(1, sum(len(target["labels"]) for target in targets))
        found = {"classes": self.logits.sum() * 0.0, "l1": self.boxes.sum() * 0.0, "giou": self.boxes.sum() * 0.0}
        for logits, boxes in zip(self.logits.float(), self.boxes.float(), strict=True):
            rows, wanted = _matched(logits, boxes, targets)
            image, query = rows
            truth, labels = wanted
            hot = torch.zeros_like(logits)
            hot[image, query, labels] = 1.0
            found["classes"] += CLASSES * sigmoid_focal_loss(logits, hot, ALPHA, GAMMA, reduction="sum") / objects
            found["l1"] += L1 * F.l1_loss(boxes[image, query], truth, reduction="sum") / objects
            found["giou"] += GIOU * generalized_box_iou_loss(boxes[image, query], truth, reduction="sum") / objects
        return found

    def imitation(self, expected: SetPrediction, temperature: float = 1.0) -> dict[str, Tensor]:
        """The three parts of the loss of a student whose queries are to say what its teacher's say, query by query and stage by stage.

        A query counts by how sure its teacher is that it has an object, the probability of its likeliest class. Classes are compared by
        the Kullback-Leibler divergence of their probabilities, which is 0 for equal ones, boxes by L1 and GIoU. All are weighted as
        against the ground truth, summed over stages, and per object of the teacher.

        Args:
            expected: of the teacher for the same images; gets no gradient.
            temperature: logits of both are divided by it.

        Raises:
            UserError: stages, queries or classes differ in number.
        """
        if self.logits.shape != expected.logits.shape:
            raise UserError(
                f"losses.prediction compares queries one by one, and the student has {_counted(self.logits)}, the teacher "
                f"{_counted(expected.logits)}; set "
                "losses.prediction.weight=0, or give both the same"
            )
        theirs = expected.logits.detach().float()
        sure = theirs.sigmoid().amax(-1)
        objects = sure.flatten(1).sum(1).clamp(min=1)[:, None, None]  # of every stage
        boxes, truth = self.boxes.float(), expected.boxes.detach().float()
        l1 = (boxes - truth).abs().sum(-1)
        giou = generalized_box_iou_loss(boxes.flatten(0, 2), truth.flatten(0, 2)).view_as(sure)
        classes = divergence(self.logits.float(), theirs, temperature).sum(-1)
        parts = {"classes": CLASSES * classes, "l1": L1 * sure * l1, "giou": GIOU * sure * giou}
        return {name: (values / objects).sum() for name, values in parts.items()}

    def answer(self, limit: int = 100) -> Detections:
        """The `limit` likeliest pairs of a query and a class of each image, or all if there are fewer, of all images in one."""
        scores = self.logits[-1].float().sigmoid()
        _, queries, classes = scores.shape
        best, index = scores.flatten(1).topk(min(limit, queries * classes), dim=1)
        query = (index // classes)[..., None].expand(-1, -1, 4)
        return Detections(self.boxes[-1].float().gather(1, query), best, index % classes)

    def detections(self, limit: int = 100) -> list[Detections]:
        """The `limit` likeliest pairs of a query and a class of each image."""
        found = self.answer(limit)
        return [Detections(*parts) for parts in zip(found.boxes, found.scores, found.labels, strict=True)]


def divergence(logits: Tensor, expected: Tensor, temperature: float = 1.0) -> Tensor:
    """The Kullback-Leibler divergence of independent probabilities from those expected, each from a logit; of any one shape."""
    ours, theirs = logits / temperature, expected / temperature
    share = theirs.sigmoid()
    present = share * (F.logsigmoid(theirs) - F.logsigmoid(ours))
    return present + (1 - share) * (F.logsigmoid(-theirs) - F.logsigmoid(-ours))


def _counted(logits: Tensor) -> str:
    stages, _, queries, classes = logits.shape
    return f"{stages} stages, {queries} queries and {classes} classes"


@torch.no_grad()
def costs(logits: Tensor, boxes: Tensor, target: Target) -> Tensor:
    """What it costs to match each query of an image to each of its objects.

    Args:
        logits: (N, classes).
        boxes: (N, 4).

    Returns:
        (N, n).
    """
    share = logits.sigmoid()
    positive = -ALPHA * (1 - share) ** GAMMA * F.logsigmoid(logits)
    negative = -(1 - ALPHA) * share**GAMMA * F.logsigmoid(-logits)
    by_class = (positive - negative)[:, target["labels"]]
    truth = target["boxes"].float()
    return CLASSES * by_class + L1 * torch.cdist(boxes, truth, p=1) - GIOU * generalized_box_iou(boxes, truth)


def _matched(
    logits: Tensor, boxes: Tensor, targets: Sequence[Target]
) -> tuple[tuple[Tensor, Tensor], tuple[Tensor, Tensor]]:
    """Image and query of every matched pair of a batch, and its box and class."""
    from scipy.optimize import linear_sum_assignment

    images, queries, chosen = [], [], []
    for i, target in enumerate(targets):
        if not len(target["labels"]):
            continue
        query, which = linear_sum_assignment(costs(logits[i], boxes[i], target).nan_to_num(1e6).cpu().numpy())
        images += [i] * len(query)
        queries += query.tolist()
        chosen.append((target["boxes"].float()[which], target["labels"][which]))
    where = boxes.device
    if not chosen:
        nothing = torch.zeros(0, dtype=torch.long, device=where)
        return (nothing, nothing), (boxes.new_zeros(0, 4), nothing)
    pairs = torch.tensor(images, device=where), torch.tensor(queries, device=where)
    return pairs, (torch.cat([box for box, _ in chosen]), torch.cat([label for _, label in chosen]))
