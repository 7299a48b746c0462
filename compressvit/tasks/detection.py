"""The task `detection`: outputs are boxes with classes and scores, and targets the annotated boxes of each image.

Figures are COCO's: average precision in percent, by pycocotools, over boxes in pixels of the pictures as they are on disk.
"""

from __future__ import annotations

import contextlib
import io
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, ClassVar

from compressvit.errors import UserError
from compressvit.tasks.base import Answers, Labels, Measure, Metrics, Result, Task, task
from compressvit.tasks.quality import Curve, Quality

if TYPE_CHECKING:
    import torch
    from PIL.Image import Image
    from torch import Tensor, nn

    from compressvit.model.detectors.prediction import Detections, SetPrediction

LIMIT = 100  # detections of an image that count, as in COCO
SURE = 0.3  # score from which a detection is drawn, and from which the teacher's count as objects
GRADED = ("ap", "ap50", "ap75")
AP = Quality(
    "ap",
    "AP",
    "average precision",
    "AP",
    "%",
    2,
    phrase="{} AP",
    curve=Curve(
        "average_precision", "Average precision", "COCO's AP, the mean over IoU 0.50 to 0.95, on held-out images."
    ),
)
AP50 = Quality("ap50", "AP50", "average precision at IoU 0.5", "AP50", "%", 2)
AP75 = Quality("ap75", "AP75", "average precision at IoU 0.75", "AP75", "%", 2, detail=True)
AGREEMENT = Quality(
    "ap50_of_teacher", "of teacher", "AP50 against the teacher's boxes", "AP50 against the teacher's boxes", "%", 2
)


@task("detection")
class Detection(Task):
    """Boxes with classes."""

    qualities = (AP, AP50, AP75, AGREEMENT)
    ranking = ("ap", "ap50", "ap50_of_teacher")
    graded = GRADED
    needs_class_count = True
    imitates = True
    places = True
    progress_names: ClassVar[Mapping[str, str]] = {"ap": "AP", "ap50": "AP50"}
    measures: ClassVar[Mapping[str, Measure]] = {
        "missed": Measure(
            "The images on which student and teacher find the most different objects: the share of boxes that only one of them has.",
            lambda value: f"{100 * value:.0f} % only one",
        ),
    }

    def fits(self, model: nn.Module) -> bool:
        return getattr(model, "task", None) == self.name

    def needs_classes(self, classes: int) -> int:
        return classes

    def collate(self, targets: Sequence[Any]) -> Any:
        """The ground truth of each image: `boxes` (n, 4) in widths and heights of the image, `labels` (n,), `crowd` (n,) of bool, and
        `size` (2,), the picture's height and width on disk."""
        return list(targets)

    def known(self, targets: Any) -> Tensor:
        import torch

        return torch.ones(len(targets), dtype=torch.bool)

    def labels(self, targets: Any) -> Labels:
        largest = max((int(t["labels"].max()) for t in targets if len(t["labels"])), default=-1)
        return Labels(len(targets), largest)

    def loss(self, outputs: SetPrediction, targets: Any, smoothing: float = 0.0) -> Tensor:
        """The sum of the model's own losses; annotations of crowds are left out."""
        import torch

        alone = [{**t, "boxes": t["boxes"][~t["crowd"]], "labels": t["labels"][~t["crowd"]]} for t in targets]
        return torch.stack(list(outputs.losses(alone).values())).sum()

    def imitation(self, outputs: Any, expected: Any, temperature: float) -> dict[str, Tensor]:
        """The model's own parts, of queries or of proposals; the same kind of detector is needed."""
        from compressvit.model.detectors.prediction import SetPrediction

        if isinstance(outputs, SetPrediction) != isinstance(expected, SetPrediction):
            raise UserError(
                "losses.prediction compares the outputs of two detectors of one kind, and student and teacher are of two; set "
                "losses.prediction.weight=0, and e.g. losses.labels.weight=1"
            )
        if not hasattr(outputs, "imitation"):  # in a plan, where nothing can be chosen
            raise NotImplementedError
        return outputs.imitation(expected, temperature)

    def run(self, model: nn.Module, images: Tensor) -> list[Detections]:
        return model(images).detections(LIMIT)

    def metrics(self, model: nn.Module, teacher: nn.Module | None, labelled: bool) -> Metrics:
        return _Metrics(model.num_classes, teacher is not None, labelled)  # type: ignore[arg-type]

    def comparable(self, outputs: Any, expected: Any) -> bool:
        return True

    def answers(self, model: nn.Module, names: Sequence[str] | None, labelled: bool) -> Answers:
        return _Boxes([*(names or ()), *map(str, range(len(names or ()), model.num_classes))], labelled)  # type: ignore[arg-type]

    def graph(self, model: nn.Module) -> tuple[nn.Module, tuple[str, ...]]:
        from compressvit.model.detectors.prediction import Answering

        return Answering(model, LIMIT), ("boxes", "scores", "labels")

    def output_distance(self, model: nn.Module, images: Tensor, generator: torch.Generator) -> Tensor:
        """Logits and boxes of every stage in a random direction; a box's four numbers weigh as much as its logits."""
        import torch

        found = model(images)
        parts = []
        for values, weight in ((found.logits, 1.0), (found.boxes, (found.logits.shape[-1] / 4) ** 0.5)):
            direction = torch.randn(values.shape, generator=generator).to(values.device)
            parts.append((values.float() * direction).sum() * weight)
        if not torch.isfinite(parts[0]):
            raise FloatingPointError("the classifier")
        return parts[0] + parts[1]


class _Precision:
    """COCO's average precision of detections against boxes, in pixels of the pictures on disk."""

    def __init__(self, classes: int):
        self.classes = classes
        self.truth: list[dict[str, Any]] = []
        self.found: list[list[float]] = []
        self.images = 0

    def add(self, detections: Sequence[Detections], targets: Sequence[Mapping[str, Any]]) -> None:
        import torch

        for found, target in zip(detections, targets, strict=True):
            self.images += 1
            height, width = (float(side) for side in target["size"])
            scale = torch.tensor([width, height, width, height], dtype=torch.float64)
            boxes = target["boxes"].cpu().double() * scale
            for box, label, crowd in zip(
                boxes.tolist(), target["labels"].tolist(), target["crowd"].tolist(), strict=True
            ):
                x0, y0, x1, y1 = box
                self.truth.append(
                    {
                        "id": len(self.truth) + 1,
                        "image_id": self.images,
                        "category_id": label + 1,
                        "bbox": [x0, y0, x1 - x0, y1 - y0],
                        "area": (x1 - x0) * (y1 - y0),
                        "iscrowd": int(crowd),
                    }
                )
            boxes = found.boxes.cpu().double() * scale
            for (x0, y0, x1, y1), score, label in zip(
                boxes.tolist(), found.scores.tolist(), found.labels.tolist(), strict=True
            ):
                self.found.append([self.images, x0, y0, x1 - x0, y1 - y0, score, label + 1])

    def result(self) -> Result:
        """`GRADED` in percent; None where there is no annotated box."""
        if not any(not box["iscrowd"] for box in self.truth):
            return dict.fromkeys(GRADED)
        if not self.found:
            return dict.fromkeys(GRADED, 0.0)
        import numpy as np

        coco, evaluation = _pycocotools()
        with contextlib.redirect_stdout(io.StringIO()):  # it prints its tables
            truth = coco()
            truth.dataset = {
                "images": [{"id": i + 1} for i in range(self.images)],
                "annotations": self.truth,
                "categories": [{"id": i + 1} for i in range(self.classes)],
                "info": {},
            }
            truth.createIndex()
            judged = evaluation(truth, truth.loadRes(np.asarray(self.found)), "bbox")
            judged.evaluate()
            judged.accumulate()
            judged.summarize()
        return {key: 100 * float(value) for key, value in zip(GRADED, judged.stats, strict=False)}


def _pycocotools() -> tuple[Any, Any]:
    try:
        from pycocotools.coco import COCO
        from pycocotools.cocoeval import COCOeval
    except ImportError as error:
        raise UserError(
            "average precision needs a package: pip install pycocotools, or compressvit[detection]"
        ) from error
    return COCO, COCOeval


class _Metrics(Metrics):
    def __init__(self, classes: int, beside_teacher: bool, labelled: bool):
        self.labelled = labelled
        self.ours = _Precision(classes)
        self.theirs = _Precision(classes) if beside_teacher else None
        self.agreement = _Precision(classes) if beside_teacher else None

    def add(self, outputs: Sequence[Detections], targets: Any, expected: Sequence[Detections] | None) -> None:
        if self.labelled:
            self.ours.add(outputs, targets)
        if expected is None or self.theirs is None or self.agreement is None:
            return
        if self.labelled:
            self.theirs.add(expected, targets)
        self.agreement.add(outputs, [_as_truth(found, target) for found, target in zip(expected, targets, strict=True)])

    def result(self) -> Result:
        found = self.ours.result()
        if self.theirs is None or self.agreement is None:
            return found
        found |= {f"teacher_{name}": value for name, value in self.theirs.result().items()}
        return {**found, AGREEMENT.key: self.agreement.result()["ap50"]}


def _as_truth(found: Detections, target: Mapping[str, Any]) -> dict[str, Any]:
    """The sure detections of a teacher as if they were annotated."""
    import torch

    sure = found.scores >= SURE
    count = int(sure.sum())
    return {
        "boxes": found.boxes[sure],
        "labels": found.labels[sure],
        "crowd": torch.zeros(count, dtype=torch.bool),
        "size": target["size"],
    }


class _Boxes(Answers):
    """The boxes of both models, and the images on which they differ most."""

    COLOURS: ClassVar[Mapping[str, tuple[int, int, int]]] = {
        "true": (255, 255, 255),
        "teacher": (255, 190, 0),
        "student": (0, 200, 255),
    }

    def __init__(self, names: Sequence[str], labelled: bool):
        self.names, self.labelled, self.compared = names, labelled, False
        self._found: dict[str, Sequence[Detections]] = {}
        self._targets: Any = []

    @property
    def measure(self) -> str | None:  # type: ignore[override]
        return "missed" if self.compared else None

    def add(self, outputs: Any, targets: Any, expected: Any | None) -> Tensor | None:
        import torch

        self.compared = expected is not None
        self._targets = targets
        self._found = {"student": outputs} | ({} if expected is None else {"teacher": expected})
        if expected is None:
            return None
        return torch.tensor([_apart(ours, theirs) for ours, theirs in zip(outputs, expected, strict=True)])

    def describe(self, index: int) -> dict[str, Any]:
        answer: dict[str, Any] = {"boxes": {}}
        if self.labelled:
            target = self._targets[index]
            answer["true"] = self._words(target["labels"].tolist())
            answer["boxes"]["true"] = _rounded(target["boxes"])
        for who, found in self._found.items():
            sure = found[index].scores >= SURE
            answer[who] = self._words(found[index].labels[sure].tolist())
            answer["boxes"][who] = _rounded(found[index].boxes[sure])
        return answer

    def draw(self, picture: Image, description: Mapping[str, Any]) -> Image:
        from PIL import ImageDraw

        drawn = picture.convert("RGB")
        pen = ImageDraw.Draw(drawn)
        for who, colour in self.COLOURS.items():
            for x0, y0, x1, y1 in description["boxes"].get(who, ()):
                across, down = (
                    sorted((x0 * drawn.width, x1 * drawn.width)),
                    sorted((y0 * drawn.height, y1 * drawn.height)),
                )
                pen.rectangle((across[0], down[0], across[1], down[1]), outline=colour, width=2 if who != "true" else 1)
        return drawn

    def _words(self, labels: Sequence[int]) -> str:
        """'2 cups, 1 plate' as 'cup ×2, plate'."""
        counts = {label: list(labels).count(label) for label in dict.fromkeys(labels)}
        return ", ".join(self.names[k] + (f" ×{n}" if n > 1 else "") for k, n in counts.items()) or "nothing"


def _rounded(boxes: Tensor) -> list[list[float]]:
    return [[round(value, 4) for value in box] for box in boxes.tolist()]


def _apart(ours: Detections, theirs: Detections) -> float:
    """The share of sure boxes of either model that the other has none of, of the same class and IoU at least 0.5."""
    from torchvision.ops import box_iou

    a, b = ours.scores >= SURE, theirs.scores >= SURE
    total = int(a.sum() + b.sum())
    if not total:
        return 0.0
    same = (box_iou(ours.boxes[a], theirs.boxes[b]) >= 0.5) & (ours.labels[a][:, None] == theirs.labels[b])
    return 1 - float(same.any(1).sum() + same.any(0).sum()) / total
