"""COCO's average precision of boxes and of masks, by pycocotools, in pixels of the pictures on disk."""

from __future__ import annotations

import contextlib
import io
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from compressvit.errors import UserError

if TYPE_CHECKING:
    from torch import Tensor

    from compressvit.model.detectors.prediction import Detections
    from compressvit.tasks.base import Result

Runs = dict[str, Any]  # run lengths of a mask as pycocotools has them: {"size": [height, width], "counts": bytes}
BOXES = ("ap", "ap50", "ap75")
MASKS = tuple(f"mask_{key}" for key in BOXES)


def coco_masks() -> Any:
    """pycocotools' functions on run lengths.

    Raises:
        UserError: it is not installed.
    """
    try:
        from pycocotools import mask
    except ImportError as error:
        raise UserError("masks need a package: pip install pycocotools, or compressvit[detection]") from error
    return mask


def _pycocotools() -> tuple[Any, Any]:
    try:
        from pycocotools.coco import COCO
        from pycocotools.cocoeval import COCOeval
    except ImportError as error:
        raise UserError(
            "average precision needs a package: pip install pycocotools, or compressvit[detection]"
        ) from error
    return COCO, COCOeval


def packed(masks: Tensor) -> list[Runs]:
    """Masks (n, H, W) of 0 and 1 as run lengths."""
    import numpy as np

    found: list[Runs] = coco_masks().encode(np.asfortranarray(masks.cpu().byte().permute(1, 2, 0).numpy()))
    return found


def on_picture(found: Detections, size: Sequence[int]) -> list[Runs]:
    """The masks of detections, each where its probability is above ½, in a picture of height and width `size`.

    Each is drawn as torchvision's `paste_masks_in_image` draws it, in the part of the picture that it can reach: in a large picture that is
    many times faster.
    """
    import numpy as np
    from torchvision.models.detection.roi_heads import expand_boxes, paste_masks_in_image

    assert found.masks is not None
    height, width = (int(side) for side in size)
    masks, boxes = found.masks.double().cpu()[:, None], in_pixels(found.boxes, size)
    reached = expand_boxes(boxes, 1 + 2 / masks.shape[-1]).long()  # by a point of the mask on every side
    reached = reached + reached.new_tensor([0, 0, 1, 1])
    limits = reached.new_tensor([width, height, width, height])
    runs: list[Runs] = []
    for i, box in enumerate(reached.clamp(min=reached.new_zeros(4), max=limits).tolist()):
        x0, y0, x1, y1 = box
        frame = np.zeros((height, width, 1), dtype=np.uint8, order="F")
        if x1 > x0 and y1 > y0:
            shifted = boxes[i : i + 1] - boxes.new_tensor([x0, y0, x0, y0])
            drawn = paste_masks_in_image(masks[i : i + 1], shifted, (y1 - y0, x1 - x0))[0, 0] > 0.5
            frame[y0:y1, x0:x1, 0] = drawn.numpy()
        runs += coco_masks().encode(frame)
    return runs


def true_masks(target: Mapping[str, Any]) -> Sequence[Runs | None] | None:
    """The annotated masks of an image on the picture on disk: `runs`, or `masks` (n, H, W) of a caller's own loader; None without any."""
    if "runs" in target or "masks" not in target:
        return target.get("runs")
    from torch.nn.functional import interpolate

    size = [int(side) for side in target["size"]]
    masks = interpolate(target["masks"][None].cpu().byte(), size, mode="nearest")[0] if len(target["masks"]) else None
    return [] if masks is None else packed(masks)


def in_pixels(boxes: Tensor, size: Sequence[int]) -> Tensor:
    """Boxes (n, 4) of a picture of height and width `size`, on the CPU in float64."""
    import torch

    height, width = (float(side) for side in size)
    return boxes.cpu().double() * torch.tensor([width, height, width, height], dtype=torch.float64)


class Precision:
    """Average precision of the detections in a set of pictures.

    Args:
        classes: their number.
        masks: also of masks.
    """

    def __init__(self, classes: int, masks: bool = False):
        self.classes, self.masks = classes, masks
        self.truth: list[dict[str, Any]] = []
        self.found: list[Any] = []
        self.sizes: list[tuple[int, int]] = []

    def add(
        self,
        detections: Sequence[Detections],
        targets: Sequence[Mapping[str, Any]],
        runs: Sequence[Sequence[Runs]] | None = None,
    ) -> None:
        """Add a batch.

        Args:
            targets: `boxes`, `labels`, `crowd` and `size` as the task has them, and of masks `runs`, None of an object without one.
            runs: of the masks of the detections, as `on_picture` gives them.
        """
        for i, (found, target) in enumerate(zip(detections, targets, strict=True)):
            height, width = (int(side) for side in target["size"])
            self.sizes.append((height, width))
            boxes, labels = in_pixels(target["boxes"], (height, width)).tolist(), target["labels"].tolist()
            known = (true_masks(target) if self.masks else None) or [None] * len(boxes)
            for box, label, crowd, mask in zip(boxes, labels, target["crowd"].tolist(), known, strict=True):
                self._add_true(box, label, bool(crowd), mask)
            boxes, labels = in_pixels(found.boxes, (height, width)).tolist(), found.labels.tolist()
            for j, ((x0, y0, x1, y1), score, label) in enumerate(
                zip(boxes, found.scores.tolist(), labels, strict=True)
            ):
                image, box, kind = len(self.sizes), [x0, y0, x1 - x0, y1 - y0], label + 1
                if runs is None:
                    self.found.append([image, *box, score, kind])
                else:
                    mask = {"bbox": box, "score": score, "category_id": kind, "segmentation": runs[i][j]}
                    self.found.append({"image_id": image, **mask})

    def _add_true(self, box: Sequence[float], label: int, crowd: bool, mask: Runs | None) -> None:
        x0, y0, x1, y1 = box
        self.truth.append(
            {
                "id": len(self.truth) + 1,
                "image_id": len(self.sizes),
                "category_id": label + 1,
                "bbox": [x0, y0, x1 - x0, y1 - y0],
                "area": (x1 - x0) * (y1 - y0),
                "iscrowd": int(crowd),
                **({"segmentation": mask} if self.masks else {}),
            }
        )

    def result(self) -> Result:
        """`BOXES` and, where asked for, `MASKS`, in percent; None where there is nothing annotated to find."""
        found = dict(zip(BOXES, self._judged("bbox", self.truth), strict=True))
        if self.masks:
            found |= dict(zip(MASKS, self._judged("segm", self._true_masks()), strict=True))
        return found

    def _true_masks(self) -> list[dict[str, Any]]:
        """The truth of masks. What lies in the box of an object without a mask counts neither as right nor as wrong, as that of crowds."""
        tools, truth = coco_masks(), []
        for entry in self.truth:
            if (mask := entry["segmentation"]) is None or not tools.area(mask):
                x, y, across, down = entry["bbox"]
                corners = [x, y, x + across, y, x + across, y + down, x, y + down]
                (mask,) = tools.frPyObjects([corners], *self.sizes[entry["image_id"] - 1])
                entry = {**entry, "iscrowd": 1}
            truth.append({**entry, "segmentation": mask})
        return truth

    def _judged(self, kind: str, annotations: list[dict[str, Any]]) -> Sequence[float | None]:
        if all(entry["iscrowd"] for entry in annotations):
            return [None] * len(BOXES)
        if not self.found:
            return [0.0] * len(BOXES)
        import numpy as np

        coco, evaluation = _pycocotools()
        with contextlib.redirect_stdout(io.StringIO()):  # it prints its tables
            truth = coco()
            truth.dataset = {
                "images": [{"id": i, "height": h, "width": w} for i, (h, w) in enumerate(self.sizes, 1)],
                "annotations": annotations,
                "categories": [{"id": i + 1} for i in range(self.classes)],
                "info": {},
            }
            truth.createIndex()
            entries = self.found if self.masks else np.asarray(self.found)
            judged = evaluation(truth, truth.loadRes(entries), kind)
            judged.evaluate()
            judged.accumulate()
            judged.summarize()
        return [100 * float(value) for value in judged.stats[: len(BOXES)]]
