"""Intervals of COCO's average precision, and of differences of it, over resampled images.

pycocotools matches the detections of every image to its boxes once. An image that is drawn n times counts n times in the curves of
precision and recall, which gives what COCOeval gives for a set that has the image n times, where no two detections have one score.
"""

from __future__ import annotations

import contextlib
import io
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval

Array = np.ndarray[Any, Any]
EPS = np.spacing(1)  # as in COCOeval


@dataclass(frozen=True)
class _Class:
    """The matches of one class: detections by falling score, and boxes by image.

    Attributes:
        images: of each detection, (n,).
        right, wrong: (thresholds, n); a detection can be neither.
        boxes: of each image that count, (images,).
    """

    images: Array
    right: Array
    wrong: Array
    boxes: Array


class Matches:
    """Detections matched to the annotated boxes of images.

    Args:
        truth, found: of each image, rows of (x, y, width, height, class), and of (x, y, width, height, score, class); classes from 0.
        crowd: of each image, for each of its boxes, whether it is a crowd.
        classes: how many there are.
    """

    def __init__(
        self,
        truth: Sequence[Array],
        found: Sequence[Array],
        classes: int,
        crowd: Sequence[Sequence[bool]] | None = None,
    ):
        self.images = len(truth)
        judged = _judged(truth, found, classes, crowd)
        self.recalls: Array = judged.params.recThrs
        by_place: dict[tuple[int, int], Any] = {
            (entry["category_id"], entry["image_id"]): entry
            for entry in judged.evalImgs[: classes * self.images * len(judged.params.areaRng)]
            if entry is not None and entry["aRng"] == judged.params.areaRng[0]
        }
        self.classes = [
            found_of for label in range(classes) if (found_of := self._of_class(by_place, label + 1)).boxes.any()
        ]

    def _of_class(self, by_place: Mapping[tuple[int, int], Any], category: int) -> _Class:
        boxes = np.zeros(self.images)
        scores, images, right, wrong = [], [], [], []
        for image in range(self.images):
            entry = by_place.get((category, image + 1))
            if entry is None:
                continue
            boxes[image] = np.count_nonzero(~np.asarray(entry["gtIgnore"], dtype=bool))
            ignored = np.asarray(entry["dtIgnore"], dtype=bool)
            matched = np.asarray(entry["dtMatches"]) > 0
            scores.append(entry["dtScores"])
            images.append(np.full(len(entry["dtScores"]), image))
            right.append(matched & ~ignored)
            wrong.append(~matched & ~ignored)
        if not scores:
            nothing = np.zeros((1, 0), dtype=bool)
            return _Class(np.zeros(0, dtype=int), nothing, nothing, boxes)
        order = np.argsort(-np.concatenate(scores), kind="mergesort")
        joined = (np.concatenate(part, axis=1)[:, order] for part in (right, wrong))
        return _Class(np.concatenate(images)[order], *joined, boxes)

    def precision(self, times: Array | None = None) -> Array:
        """Average precision in percent at each threshold of IoU (10,), the mean over classes, if image i is there `times[i]` times.

        NaN where no image that is there has a box.
        """
        times = np.ones(self.images) if times is None else times
        found = [_average(entry, times, self.recalls) for entry in self.classes if entry.boxes @ times]
        return 100 * np.mean(found, axis=0) if found else np.full(10, np.nan)


def _average(entry: _Class, times: Array, recalls: Array) -> Array:
    if not len(entry.images):
        return np.zeros(10)
    weights = times[entry.images]
    right, wrong = (np.cumsum(part * weights, axis=1) for part in (entry.right, entry.wrong))
    recall = right / (entry.boxes @ times)
    precision = right / (right + wrong + EPS)
    precision = np.maximum.accumulate(precision[:, ::-1], axis=1)[:, ::-1]
    areas = []
    for curve, reached in zip(precision, recall, strict=True):
        places = np.searchsorted(reached, recalls, side="left")
        areas.append(np.where(places < len(curve), curve[np.minimum(places, len(curve) - 1)], 0.0).mean())
    return np.asarray(areas)


def _judged(
    truth: Sequence[Array], found: Sequence[Array], classes: int, crowd: Sequence[Sequence[bool]] | None
) -> COCOeval:
    annotations = [
        {
            "image_id": image + 1,
            "category_id": int(box[4]) + 1,
            "bbox": box[:4].tolist(),
            "area": float(box[2] * box[3]),
            "iscrowd": int(crowd[image][i]) if crowd is not None else 0,
        }
        for image, boxes in enumerate(truth)
        for i, box in enumerate(boxes)
    ]
    results = np.asarray(
        [[image + 1, *box[:5], box[5] + 1] for image, boxes in enumerate(found) for box in boxes]
    ).reshape(-1, 7)
    with contextlib.redirect_stdout(io.StringIO()):  # it prints
        coco = COCO()
        coco.dataset = {
            "images": [{"id": image + 1} for image in range(len(truth))],
            "annotations": [{"id": number + 1, **entry} for number, entry in enumerate(annotations)],
            "categories": [{"id": label + 1} for label in range(classes)],
            "info": {},
        }
        coco.createIndex()
        judged = COCOeval(coco, coco.loadRes(results) if len(results) else COCO(), "bbox")
        judged.evaluate()
    return judged


def drawn(images: int, draws: int, seed: int = 0) -> Array:
    """How many times each image is in each resampled set of as many images, (draws, images)."""
    generator = np.random.default_rng(seed)
    return generator.multinomial(images, np.full(images, 1 / images), size=draws).astype(float)


def intervals(ours: Sequence[Matches], theirs: Sequence[Matches], draws: int = 500) -> dict[str, list[float]]:
    """95 % intervals over images of AP and AP50 of `ours` less `theirs`, in percentage points.

    Both have one entry per seed, on the same images. A draw resamples the images, the same ones for every model, and takes the mean
    over seeds of the differences; so an interval is that of the held-out images for these trained models, and does not contain what other
    seeds would give.

    Args:
        ours, theirs: of the same length.
        draws: of images.
    """
    differences = []
    for times in drawn(ours[0].images, draws):
        pairs = [a.precision(times) - b.precision(times) for a, b in zip(ours, theirs, strict=True)]
        mean = np.mean(pairs, axis=0)
        differences.append((mean.mean(), mean[0]))
    # a draw without a box says nothing
    low, high = np.nanquantile(np.asarray(differences), (0.025, 0.975), axis=0)
    return {"ap": [float(low[0]), float(high[0])], "ap50": [float(low[1]), float(high[1])]}
