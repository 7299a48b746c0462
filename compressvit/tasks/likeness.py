"""How alike the outputs of one model are as two programs compute them: a graph and the artifact that it was made from."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    from torch import Tensor

LEAST_SHARED = 0.95  # of detections: those around the 100th score of an image may be in one and not in the other


class Likeness(NamedTuple):
    """How alike outputs are.

    Attributes:
        difference: the largest of a number, relative to the largest number; of detections the largest of those that both have.
        agreement: from 0 to 1: share of images of the same class, cosine of the images' outputs, or share of detections that both have.
        text: the agreement in words.
        alike: whether they are as near as the tolerance asks.
    """

    difference: float
    agreement: float
    text: str
    alike: bool


def relative_difference(expected: Sequence[Tensor], found: Sequence[Tensor]) -> float:
    """Largest absolute difference of outputs, relative to the largest output; NaN where one is not finite."""
    import torch

    largest = max(float(values.abs().max()) for values in expected)
    apart = torch.stack([(ours - theirs).abs().max() for ours, theirs in zip(expected, found, strict=True)]).max()
    return float(apart) / max(largest, torch.finfo(torch.float32).tiny)  # a classifier may start at zero


def of_tensors(expected: Sequence[Tensor], found: Sequence[Tensor], tolerance: float) -> Likeness:
    """Of features or any other tensors (B, …): the smallest cosine of an image's."""
    import torch
    import torch.nn.functional as F

    ours, theirs = (torch.cat([values.double().flatten(1) for values in part], dim=1) for part in (expected, found))
    cosine = float(F.cosine_similarity(ours, theirs, dim=1).min())
    difference = relative_difference(expected, found)
    return Likeness(difference, cosine, f"smallest cosine of an image {cosine:.6f}", difference <= tolerance)


def of_classes(expected: Sequence[Tensor], found: Sequence[Tensor], tolerance: float) -> Likeness:
    """Of logits (B, classes): on how many images the likeliest class is the same."""
    (ours,), (theirs,) = expected, found
    same, images = int((ours.argmax(1) == theirs.argmax(1)).sum()), len(ours)
    difference = relative_difference(expected, found)
    return Likeness(difference, same / images, f"the same class for {same} of {images}", difference <= tolerance)


def of_detections(expected: Sequence[Tensor], found: Sequence[Tensor], tolerance: float) -> Likeness:
    """Of `boxes` (B, n, 4) in widths and heights of the image, `scores` (B, n), 0 after an image's last, `labels` (B, n) and perhaps
    `masks` (B, n, M, M): the share of detections that the other has, too, with the same label, and all else within the tolerance. Their
    order does not count, since scores may be equal but for rounding."""
    import torch

    shared, count, largest = 0, 0, 0.0
    for ours, theirs in zip(zip(*expected, strict=True), zip(*found, strict=True), strict=True):
        mine, other = ([values[part[1] > 0] for values in part] for part in (ours, theirs))
        count += len(mine[0]) + len(other[0])
        if not len(mine[0]) or not len(other[0]):
            continue
        apart = torch.stack(
            [
                (a[:, None] - b).abs().flatten(2).amax(-1) if a.ndim > 1 else (a[:, None] - b).abs()
                for a, b in zip((*mine[:2], *mine[3:]), (*other[:2], *other[3:]), strict=True)
            ]
        ).amax(0)
        apart = apart.masked_fill(mine[2][:, None] != other[2], torch.inf).nan_to_num(torch.inf)
        nearest = torch.cat([apart.amin(0), apart.amin(1)])
        near = nearest[nearest <= tolerance]
        shared, largest = shared + len(near), max([largest, *near.tolist()])
    share = shared / count if count else 1.0
    text = f"{100 * share:.1f} % of {count // 2:,} detections in both" if count else "no detections in either"
    return Likeness(largest, share, text, share >= LEAST_SHARED)
