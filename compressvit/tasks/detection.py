"""The task `detection`: outputs are boxes with classes and scores, of some models with masks, and targets the annotated objects.

Figures are COCO's: average precision in percent, by pycocotools, over boxes and masks in pixels of the pictures as they are on disk.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, ClassVar, cast

from compressvit.errors import UserError
from compressvit.model.detectors import DETECTORS
from compressvit.tasks.base import Answers, Labels, Measure, Metrics, Result, task
from compressvit.tasks.likeness import Likeness, of_detections
from compressvit.tasks.own_models import OwnModels
from compressvit.tasks.precision import BOXES, MASKS, Precision, Runs, coco_masks, on_picture, true_masks
from compressvit.tasks.quality import Curve, Quality

if TYPE_CHECKING:
    import torch
    from PIL.Image import Image
    from torch import Tensor, nn

    from compressvit.model.detectors.prediction import Detections, SetPrediction

LIMIT = 100  # detections of an image that count, as in COCO
UNKNOWN = (1000, 1000)  # pixels of a picture of which nothing is said
SURE = 0.3  # score from which a detection is drawn, and from which the teacher's count as objects
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
MASK_AP = Quality("mask_ap", "mask AP", "average precision of masks", "mask AP", "%", 2)
MASK_AP50 = Quality("mask_ap50", "mask AP50", "average precision of masks at IoU 0.5", "mask AP50", "%", 2, detail=True)
MASK_AP75 = Quality(
    "mask_ap75", "mask AP75", "average precision of masks at IoU 0.75", "mask AP75", "%", 2, detail=True
)
MASK_AGREEMENT = Quality(
    "mask_ap50_of_teacher",
    "masks of teacher",
    "AP50 of masks against the teacher's masks",
    "mask AP50 against the teacher's masks",
    "%",
    2,
    detail=True,
)


@task("detection")
class Detection(OwnModels):
    """Boxes with classes, and masks of models that give some."""

    qualities = (AP, AP50, AP75, MASK_AP, MASK_AP50, MASK_AP75, AGREEMENT, MASK_AGREEMENT)
    ranking = ("ap", "ap50", "mask_ap", "ap50_of_teacher")
    graded = (*BOXES, *MASKS)
    imitates = True
    models = DETECTORS
    pipeline = "object-detection"
    progress_names: ClassVar[Mapping[str, str]] = {"ap": "AP", "ap50": "AP50", "mask_ap": "mask AP"}
    measures: ClassVar[Mapping[str, Measure]] = {
        "missed": Measure(
            "The images on which student and teacher find the most different objects: the share of boxes that only one of them has. "
            "Drawn are the sure ones: the student's in blue, the teacher's in yellow, and in white what is annotated.",
            lambda value: f"{100 * value:.0f} % unmatched",
        ),
    }

    def collate(self, targets: Sequence[Any]) -> Any:
        """The ground truth of each image: `boxes` (n, 4) in widths and heights of the image, `labels` (n,), `crowd` (n,) of bool, and
        `size` (2,), the picture's height and width on disk; for models of masks also `masks` (n, H, W) of the image, or in evaluation
        `runs`, the masks on the picture on disk as run lengths, None of an object without."""
        return list(targets)

    def known(self, targets: Any) -> Tensor:
        """All images that have a mapping; a tensor in place of mappings marks images without ground truth."""
        import torch

        return torch.full((len(targets),), not isinstance(targets, torch.Tensor), dtype=torch.bool)

    def check_batch(self, targets: Any, images: int, outputs: int, name: str) -> None:
        import torch

        if isinstance(targets, torch.Tensor) and (targets < 0).all():
            return
        wanted = ("boxes", "labels", "crowd", "size")
        mappings = isinstance(targets, (list, tuple)) and all(isinstance(target, Mapping) for target in targets)
        missing = [key for key in wanted if mappings and any(key not in target for target in targets)]
        if mappings and not missing and len(targets) == images:
            return
        given = (
            f"mappings without {', '.join(missing)}"
            if missing
            else f"{len(targets)} for {images} images"
            if mappings
            else f"a {type(targets).__name__}"
        )
        raise UserError(
            f"{name} gives {given} as targets of a detector, which takes a list with a mapping for each image: boxes (n, 4), corners in "
            "widths and heights of the image, labels (n,) from 0, crowd (n,) of bool, and size (2,), height and width of the picture; or "
            "give images alone"
        )

    def labels(self, targets: Any) -> Labels:
        import torch

        if isinstance(targets, torch.Tensor):
            return Labels(0, -1)
        largest = max((int(t["labels"].max()) for t in targets if len(t["labels"])), default=-1)
        return Labels(len(targets), largest)

    def loss(self, outputs: SetPrediction, targets: Any, smoothing: float = 0.0) -> Tensor:
        """The sum of the model's own losses; annotations of crowds are left out."""
        import torch

        alone = [{key: t[key][~t["crowd"]] for key in ("boxes", "labels", "masks") if key in t} for t in targets]
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
        return _Metrics(model, teacher, labelled)

    def comparable(self, outputs: Any, expected: Any) -> bool:
        return True

    def uncompared(self, model: nn.Module, teacher: nn.Module) -> str | None:
        if not _gives_masks(model) or _gives_masks(teacher):
            return None
        return f"the teacher gives no masks, so there is no {MASK_AGREEMENT.in_text}"

    def answers(self, model: nn.Module, names: Sequence[str] | None, labelled: bool) -> Answers:
        return _Boxes([*(names or ()), *map(str, range(len(names or ()), model.num_classes))], labelled)  # type: ignore[arg-type]

    def graph(self, model: nn.Module) -> tuple[nn.Module, tuple[str, ...]]:
        from compressvit.model.detectors.prediction import Answering

        names = ("boxes", "scores", "labels")
        return Answering(model, LIMIT), (*names, "masks") if getattr(model, "masks", False) else names

    def likeness(self, expected: Sequence[Tensor], found: Sequence[Tensor], tolerance: float) -> Likeness:
        return of_detections(expected, found, tolerance)

    def output_distance(self, model: nn.Module, images: Tensor, generator: torch.Generator) -> Tensor:
        """Logits and boxes of every stage in a random direction; a box's four numbers weigh as much as its logits. Of a detector that
        chooses regions, the maps that it chooses from."""
        import torch

        from compressvit.model.detectors.prediction import SetPrediction

        found = model(images)
        if not isinstance(found, SetPrediction):
            return _maps_distance(list(found.maps.values()), generator)
        parts = []
        for values, weight in ((found.logits, 1.0), (found.boxes, (found.logits.shape[-1] / 4) ** 0.5)):
            direction = torch.randn(values.shape, generator=generator).to(values.device)
            parts.append((values.float() * direction).sum() * weight)
        if not torch.isfinite(parts[0]):
            raise FloatingPointError("the classifier")
        return parts[0] + parts[1]


def _maps_distance(maps: Sequence[Tensor], generator: torch.Generator) -> Tensor:
    """Maps (B, C, H, W) in a random direction: each counts as much as another, whatever its size and the scale of its values."""
    import torch

    total = torch.zeros((), device=maps[0].device)
    for values in maps:
        if not torch.isfinite(values).all():
            raise FloatingPointError("the pyramid")
        direction = torch.randn(values.shape, generator=generator).to(values.device)
        scale = values.detach().square().mean().sqrt().clamp(min=torch.finfo(values.dtype).tiny)
        total = total + (values.float() * direction).sum() / (scale * values[0, 0].numel() ** 0.5)
    return total


class _Metrics(Metrics):
    """Figures of masks only of a model that gives some."""

    def __init__(self, model: nn.Module, teacher: nn.Module | None, labelled: bool):
        classes = cast(int, model.num_classes)
        ours, theirs = _gives_masks(model), teacher is not None and _gives_masks(teacher)
        self.labelled, self.both = labelled, ours and theirs
        self.ours = Precision(classes, ours)
        self.theirs = None if teacher is None else Precision(classes, theirs)
        self.agreement = None if teacher is None else Precision(classes, ours and theirs)

    def add(self, outputs: Sequence[Detections], targets: Any, expected: Sequence[Detections] | None) -> None:
        import torch

        bare = isinstance(targets, torch.Tensor)  # images without ground truth
        sizes = [UNKNOWN] * len(targets) if bare else [target["size"].tolist() for target in targets]
        masks = _drawn(outputs, sizes) if self.ours.masks and (self.labelled or self.both) else None
        if self.labelled:
            self.ours.add(outputs, targets, masks)
        if expected is None or self.theirs is None or self.agreement is None:
            return
        others = _drawn(expected, sizes) if self.theirs.masks else None
        if self.labelled:
            self.theirs.add(expected, targets, others)
        truth = [
            _as_truth(found, size, others[i] if others else None)
            for i, (found, size) in enumerate(zip(expected, sizes, strict=True))
        ]
        self.agreement.add(outputs, truth, masks if self.both else None)

    def result(self) -> Result:
        found = self.ours.result() if self.labelled else {}
        if self.theirs is None or self.agreement is None:
            return found
        if self.labelled:
            found |= {f"teacher_{name}": value for name, value in self.theirs.result().items()}
        agreed = self.agreement.result()
        found[AGREEMENT.key] = agreed["ap50"]
        return {**found, MASK_AGREEMENT.key: agreed["mask_ap50"]} if self.both else found


def _gives_masks(model: nn.Module) -> bool:
    return getattr(model, "masks", False) is True


def _drawn(detections: Sequence[Detections], sizes: Sequence[Sequence[int]]) -> list[list[Runs]]:
    return [on_picture(found, size) for found, size in zip(detections, sizes, strict=True)]


def _as_truth(found: Detections, size: Sequence[int], masks: Sequence[Runs] | None) -> dict[str, Any]:
    """The sure detections of a teacher as if they were annotated."""
    import torch

    sure = found.sure(SURE)
    return {
        "boxes": sure.boxes,
        "labels": sure.labels,
        "crowd": torch.zeros(len(sure.labels), dtype=torch.bool),
        "size": size,
        **({} if masks is None else {"runs": masks[: len(sure.labels)]}),  # scores fall
    }


class _Boxes(Answers):
    """Boxes and masks of both models, and the images on which they differ most.

    Of masks, those of a model are filled, so that what only one of them covers has that one's colour; of the true ones the edge is drawn.
    """

    pixels = 320

    COLOURS: ClassVar[Mapping[str, tuple[int, int, int]]] = {
        "true": (255, 255, 255),
        "teacher": (255, 190, 0),
        "student": (0, 200, 255),
    }
    # Of lines, from the one that is drawn first: of three boxes in one place all are seen.
    WIDTHS: ClassVar[Mapping[str, int]] = {"teacher": 4, "student": 2, "true": 1}

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
        masks: dict[str, Sequence[Runs | None]] = {}
        target = self._targets[index]
        if self.labelled:
            answer["true"] = self._words(target["labels"].tolist())
            answer["boxes"]["true"] = _rounded(target["boxes"])
            masks["true"] = true_masks(target) or ()
        for who, every in self._found.items():
            found = every[index].sure(SURE)
            answer[who] = self._words(found.labels.tolist())
            answer["boxes"][who] = _rounded(found.boxes)
            masks[who] = () if found.masks is None else on_picture(found, target["size"].tolist())
        if any(masks.values()):
            answer["masks"] = {who: [_as_json(mask) for mask in own if mask] for who, own in masks.items()}
        return answer

    def draw(self, picture: Image, description: Mapping[str, Any]) -> Image:
        from PIL import ImageDraw, ImageFilter

        drawn = picture.convert("RGB")
        larger = self.pixels // max(drawn.size)  # lines on a small picture would hide what they are around
        if larger > 1:
            drawn = drawn.resize((drawn.width * larger, drawn.height * larger))
        for who, masks in description.get("masks", {}).items():
            if masks and who != "true":
                drawn.paste(self.COLOURS[who], mask=_covered(masks, drawn.size).point(lambda value: value * 2 // 5))
        pen = ImageDraw.Draw(drawn)
        for who, width in self.WIDTHS.items():
            for x0, y0, x1, y1 in description["boxes"].get(who, ()):
                across, down = (
                    sorted((x0 * drawn.width, x1 * drawn.width)),
                    sorted((y0 * drawn.height, y1 * drawn.height)),
                )
                pen.rectangle((across[0], down[0], across[1], down[1]), outline=self.COLOURS[who], width=width)
        for mask in description.get("masks", {}).get("true", ()):
            edge = _covered([mask], drawn.size).filter(ImageFilter.FIND_EDGES)
            drawn.paste(self.COLOURS["true"], mask=edge)
        return drawn

    def _words(self, labels: Sequence[int]) -> str:
        """'2 cups, 1 plate' as 'cup ×2, plate'."""
        counts = {label: list(labels).count(label) for label in dict.fromkeys(labels)}
        return ", ".join(self.names[k] + (f" ×{n}" if n > 1 else "") for k, n in counts.items()) or "nothing"


def _rounded(boxes: Tensor) -> list[list[float]]:
    return [[round(value, 4) for value in box] for box in boxes.tolist()]


def _as_json(mask: Runs) -> dict[str, Any]:
    return {"size": list(map(int, mask["size"])), "counts": bytes(mask["counts"]).decode()}


def _covered(masks: Sequence[Mapping[str, Any]], size: tuple[int, int]) -> Image:
    """What any of the masks covers, as a picture of width and height `size` in mode L, 255 where it is covered."""
    from PIL import Image

    union = coco_masks().decode([dict(mask) for mask in masks]).max(axis=2)
    return Image.fromarray(255 * union).resize(size, Image.Resampling.NEAREST)


def _apart(ours: Detections, theirs: Detections) -> float:
    """The share of sure boxes of either model that the other has none of, of the same class and IoU at least 0.5."""
    from torchvision.ops import box_iou

    a, b = ours.sure(SURE), theirs.sure(SURE)
    total = len(a.scores) + len(b.scores)
    if not total:
        return 0.0
    same = (box_iou(a.boxes, b.boxes) >= 0.5) & (a.labels[:, None] == b.labels)
    return 1 - float(same.any(1).sum() + same.any(0).sum()) / total
