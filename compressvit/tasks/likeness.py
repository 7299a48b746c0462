"""How alike the outputs of one model are as two programs compute them: a graph and the artifact that it was made from."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    from torch import Tensor

LEAST_SHARED = 0.95  # of detections: those around the 100th score of an image may be in one and not in the other
SUREST = 10  # one in so many detections of an image: of these, too, so many are shared


class Likeness(NamedTuple):
    """How alike outputs are.

    Attributes:
        difference: the largest of a number, relative to the largest number; of detections the largest of those that both have.
        agreement: from 0 to 1: share of images of the same class, cosine of the images' outputs, or share of detections that both have.
        text: the agreement in words.
        alike: whether they are as near as the tolerance asks.
        asked: what of the agreement it asks, in words.
    """

    difference: float
    agreement: float
    text: str
    alike: bool
    asked: str


def relative_difference(expected: Sequence[Tensor], found: Sequence[Tensor]) -> float:
    """Largest absolute difference of outputs, relative to the largest output; NaN where one is not finite."""
    import torch

    largest = max(float(values.abs().max()) for values in expected)
    apart = torch.stack([(ours - theirs).abs().max() for ours, theirs in zip(expected, found, strict=True)]).max()
    return float(apart) / max(largest, torch.finfo(torch.float32).tiny)  # a classifier may start at zero


def least_cosine(tolerance: float) -> float:
    """What the cosine of outputs is at least where numbers differ by rounding. The largest difference says nothing of what is wrong in all
    numbers but a few large ones. Of features of a ViT-S the defect was measured to be 1e-6 in fp16 and 9e-5 in bf16, where 1e-3 and
    5e-3 are let pass."""
    return 1 - tolerance / 20 - 1e-9


def _cosines(ours: Tensor, theirs: Tensor) -> Tensor:
    """Cosine of each row (B, n); of two rows of zeros 1."""
    import torch.nn.functional as F

    both_zero = (ours == 0).all(1) & (theirs == 0).all(1)
    return F.cosine_similarity(ours, theirs, dim=1).masked_fill(both_zero, 1.0)


def of_tensors(expected: Sequence[Tensor], found: Sequence[Tensor], tolerance: float) -> Likeness:
    """Of features or any other tensors (B, …): the smallest cosine of an image's, which has its own tolerance (`least_cosine`)."""
    import torch

    ours, theirs = (torch.cat([values.double().flatten(1) for values in part], dim=1) for part in (expected, found))
    each, least = _cosines(ours, theirs), least_cosine(tolerance)
    cosine = float(each.min())
    difference = relative_difference(expected, found)
    text = f"smallest cosine of an image {cosine:.6f}, mean {float(each.mean()):.6f}"
    return Likeness(
        difference, cosine, text, difference <= tolerance and cosine >= least, f"{least:.6g} of the smallest"
    )


def of_classes(expected: Sequence[Tensor], found: Sequence[Tensor], tolerance: float) -> Likeness:
    """Of logits (B, classes): on how many images the likeliest class is the same. Another one is rounding only where the expected logits of
    both are nearer than half the tolerance; all logits together have a cosine, too (`least_cosine`)."""
    (ours,), (theirs,) = expected, found
    classes, others = ours.argmax(1, keepdim=True), theirs.argmax(1, keepdim=True)
    same, images = int((classes == others).sum()), len(ours)
    ahead = float((ours.gather(1, classes) - ours.gather(1, others)).max())
    difference = relative_difference(expected, found)
    cosine = float(_cosines(*(values.double().reshape(1, -1) for values in (ours, theirs))))
    alike = (
        difference <= tolerance
        and ahead <= tolerance / 2 * float(ours.abs().max())
        and cosine >= least_cosine(tolerance)
    )
    asked = f"another class only where both are about as likely, and a cosine of {least_cosine(tolerance):.6g} of all logits"
    return Likeness(difference, same / images, f"the same class for {same} of {images}", alike, asked)


def of_detections(expected: Sequence[Tensor], found: Sequence[Tensor], tolerance: float) -> Likeness:
    """Of `boxes` (B, n, 4) in widths and heights of the image, `scores` (B, n), 0 after an image's last, `labels` (B, n) and perhaps
    `masks` (B, n, M, M): the share of detections that the other has, too, one for one, with the same label, and all else within the
    tolerance. Their order does not count, since scores may be equal but for rounding. The share is the least of three: of all, of all by
    score, and of the surest tenth of every image, but for those whose scores are within the tolerance of its last."""
    import torch

    counts, scores, surest, largest, alone = torch.zeros(2), torch.zeros(2), torch.zeros(2), 0.0, 0.0
    for ours, theirs in zip(zip(*expected, strict=True), zip(*found, strict=True), strict=True):
        mine, other = ([values[~(part[1] <= 0)] for values in part] for part in (ours, theirs))  # NaN is one
        pairs, near = _matched(mine, other, tolerance)
        largest = max([largest, *near])
        for part, rows in zip((mine, other), pairs, strict=True):
            sure = part[1].nan_to_num(1.0)
            shared = torch.zeros(len(sure), dtype=torch.bool)
            shared[rows] = True
            counts += torch.tensor([shared.sum(), len(sure)])
            scores += torch.stack([sure[shared].sum(), sure.sum()])
            if len(sure):
                first = sure.argsort(descending=True)[: math.ceil(len(sure) / SUREST)]
                counted = shared[first] | (sure[first] > sure.min() + tolerance) | (len(sure) == 1)
                surest += torch.tensor([shared[first].sum(), counted.sum()])
                alone = max([alone, *sure[~shared].tolist()])
    total = int(counts[1])
    share = min(float(part / whole) if whole else 1.0 for part, whole in (counts, scores, surest))
    text = (
        f"{100 * float(counts[0]) / total:.1f} % of {total // 2:,} detections in both"
        if total
        else "no detections in either"
    )
    text += f", the surest in one alone has score {alone:.2f}" if alone else ""
    return Likeness(largest, share, text, share >= LEAST_SHARED, f"{100 * LEAST_SHARED:g} % in both")


def _matched(
    ours: Sequence[Tensor], theirs: Sequence[Tensor], tolerance: float
) -> tuple[tuple[list[int], list[int]], list[float]]:
    """Pairs of detections of one image that are the same, as many as can be, each in one: rows of either, and how far apart."""
    import torch
    from scipy.optimize import linear_sum_assignment

    apart = torch.stack(
        [
            (a[:, None] - b).abs().flatten(2).amax(-1) if a.ndim > 1 else (a[:, None] - b).abs()
            for a, b in zip((*ours[:2], *ours[3:]), (*theirs[:2], *theirs[3:]), strict=True)
        ]
    ).amax(0)
    near = (apart <= tolerance) & (ours[2][:, None] == theirs[2])  # NaN is not
    far = 1 + tolerance * (
        sum(near.shape) + 1
    )  # more than all pairs together, so that none is left out for nearer ones
    rows, columns = linear_sum_assignment(torch.where(near, apart, far).double().numpy())
    pairs = [(int(i), int(j)) for i, j in zip(rows, columns, strict=True) if near[i, j]]
    return ([i for i, _ in pairs], [j for _, j in pairs]), [float(apart[pair]) for pair in pairs]
