"""What Faster R-CNN computes before it chooses, of a student and of its teacher.

On the proposals of a teacher, a student is also compared in Learning Efficient Object Detection Models with Knowledge Distillation, NeurIPS
2017. Here every proposal counts by how sure the teacher is that it has an object, and so does the box of every anchor. Of anchors those
alone count that student or teacher is surest of, as many as torchvision samples: there are so many more without an object that small
probabilities add up to hundreds of objects in an image with none (268,569 of 0.25 % at 800 × 1344: 671).

Shapes: A anchors and P proposals of all images of a batch, C classes.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from compressvit.errors import UserError
from compressvit.model.detectors.prediction import divergence

DIFFERENT = (
    "losses.prediction compares anchors and proposals one by one, and those of student and teacher differ (the size of images, the maps "
    "of the backbone, or the classes); set losses.prediction.weight=0, or give both the same"
)


class Numbers(NamedTuple):
    """Of anchors the logit of an object (A,) and the change of the box (A, 4); of proposals the logits of classes, background first,
    (P, 1 + C), and the change of the box for each of these (P, 4 (1 + C))."""

    objectness: Tensor
    changes: Tensor
    logits: Tensor
    offsets: Tensor


def imitation(ours: Numbers, theirs: Numbers, temperature: float = 1.0, sampled: int = 256) -> dict[str, Tensor]:
    """The four parts of the loss, under the names that torchvision gives those against the ground truth; 0 for equal numbers.

    Classes and objectness: the Kullback-Leibler divergence from the teacher's probabilities. Boxes: smooth L1 of the changes, of the
    heads each class with its probability. Objectness is the mean over anchors, as torchvision's is, the others are per object of the
    teacher, the sum of its probabilities but at least 1.

    Args:
        theirs: gets no gradient.
        temperature: logits of both are divided by it.
        sampled: anchors that count, of all images together, those of the highest probability, the student's or the teacher's.

    Raises:
        UserError: shapes differ.
    """
    if [values.shape for values in ours] != [values.shape for values in theirs]:
        raise UserError(DIFFERENT)
    theirs = Numbers(*(values.detach() for values in theirs))
    surest = torch.maximum(ours.objectness.detach(), theirs.objectness)
    index = surest.topk(min(sampled, len(surest))).indices
    ours, theirs = (n._replace(objectness=n.objectness[index], changes=n.changes[index]) for n in (ours, theirs))
    anchors, classes = theirs.objectness.sigmoid(), theirs.logits.softmax(-1)[:, 1:]
    in_anchors, in_classes = (weights.sum().clamp(min=1) for weights in (anchors, classes))  # objects
    of_anchors = F.smooth_l1_loss(ours.changes, theirs.changes, reduction="none").sum(-1)
    of_classes = F.smooth_l1_loss(ours.offsets, theirs.offsets, reduction="none").unflatten(-1, (-1, 4)).sum(-1)[:, 1:]
    expected, found = ((numbers.logits / temperature).log_softmax(-1) for numbers in (theirs, ours))
    return {
        "loss_objectness": divergence(ours.objectness, theirs.objectness, temperature).mean(),
        "loss_rpn_box_reg": (anchors * of_anchors).sum() / in_anchors,
        "loss_classifier": F.kl_div(found, expected, reduction="sum", log_target=True) / in_classes,
        "loss_box_reg": (classes * of_classes).sum() / in_classes,
    }
