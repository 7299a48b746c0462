"""The task `classification`: each image has one class, and outputs are logits (B, classes)."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, ClassVar

from compressvit.errors import UserError
from compressvit.tasks.base import Answers, Labels, Measure, Metrics, Result, task
from compressvit.tasks.classes import ClassTargets
from compressvit.tasks.likeness import Likeness, of_classes
from compressvit.tasks.quality import Curve, Quality

if TYPE_CHECKING:
    import torch
    from torch import Tensor, nn

CONFUSIONS = 20
GRADED = ("top1", "top5", "loss")

TOP1 = Quality(
    "top1",
    "top-1",
    "top-1",
    "top-1",
    "%",
    2,
    phrase="{} top-1",
    curve=Curve(
        "accuracy",
        "Top-1",
        "Top-1 accuracy on augmented training images, averaged over each epoch, and on held-out "
        "images at each evaluation. A growing gap between the two is overfitting.",
    ),
    of_images=True,
)
TOP5 = Quality("top5", "top-5", "top-5", "top-5", "%", 2, detail=True, of_images=True)
AGREEMENT = Quality(
    "agreement",
    "same class",
    "same first class as the teacher",
    "agreement with the teacher",
    "%",
    2,
    of_images=True,
)
COSINE = Quality(
    "cosine",
    "cosine",
    "cosine of the outputs",
    "cosine",
    "",
    4,
    curve=Curve(
        "cosine",
        "Cosine to the teacher",
        "Mean cosine between the outputs of student and teacher on held-out images: 1 is the same direction.",
    ),
)


@task("classification")
class Classification(ClassTargets):
    """One class per image."""

    qualities = (TOP1, TOP5, AGREEMENT, COSINE)
    ranking = ("top1", "agreement", "cosine")
    pipeline = "image-classification"
    graded = GRADED
    needs_class_count = True
    least_classes = 2
    outputs_are_logits = True
    progress_names: ClassVar[Mapping[str, str]] = {"top1": "validation", "agreement": "agreement"}
    measures: ClassVar[Mapping[str, Measure]] = {
        "shift": Measure(
            "The images on which student and teacher differ most. Captions give the distance between the predicted distributions, "
            "from 0 % (the same) to 100 % apart (certain of different classes), and each model's top class with its probability.",
            lambda value: f"{100 * value:.0f} % apart",
        ),
        "loss": Measure(
            "The images to whose true class the student gives the lowest probability: the true class, then the student's top class.",
            lambda value: None,
        ),
    }

    def fits(self, model: nn.Module) -> bool:
        return class_count(model) > 0 and getattr(model, "task", self.name) == self.name

    def needs_classes(self, classes: int) -> int:
        return classes

    def uncompared(self, model: nn.Module, teacher: nn.Module) -> str | None:
        ours, theirs = class_count(model), class_count(teacher)
        if ours == theirs:
            return None
        figures = " and no ".join(quality.in_text for quality in self.against_teacher())
        return f"the student has {ours} outputs and the teacher {theirs}, so there is no {figures}"

    def loss(self, outputs: Tensor, targets: Tensor, smoothing: float = 0.0) -> Tensor:
        """Cross-entropy; images without a label (target −1) do not count."""
        import torch.nn.functional as F

        logits = outputs.float()
        if targets.ndim == 2:  # mixup has smoothed already
            return F.cross_entropy(logits, targets)
        total = F.cross_entropy(logits, targets, label_smoothing=smoothing, ignore_index=-1, reduction="sum")
        return total / (targets >= 0).sum().clamp(min=1)  # 0 where no image has a label

    def batch_figures(
        self, outputs: Tensor, expected: Tensor | None, targets: Tensor, labels: Labels
    ) -> dict[str, Tensor]:
        """Top-1 and top-5 in percent, the teacher's too, over the images that have a label; nothing where none has. A mixed image has
        the label it has more of."""
        import torch

        if not labels.count:
            return {}
        classes = targets.argmax(dim=1) if targets.ndim == 2 else targets
        found = {}
        for name, logits in (("", outputs), ("teacher_", expected)):
            if logits is None or logits.shape[-1] == 1 or labels.largest >= logits.shape[-1]:
                continue
            right = logits.topk(min(5, logits.shape[-1]), dim=1).indices == classes[:, None]  # never so for −1
            for top, hits in (("top1", right[:, 0]), ("top5", right.any(dim=1))):
                widest = torch.float32 if hits.device.type == "mps" else torch.float64  # it has no float64
                found[f"{name}{top}"] = 100 * (hits.float().sum() / labels.count).to(widest)
        return found

    def metrics(self, model: nn.Module, teacher: nn.Module | None, labelled: bool) -> Metrics:
        return _Metrics(model, teacher, labelled)

    def answers(self, model: nn.Module, names: Sequence[str] | None, labelled: bool) -> Answers:
        return ClassAnswers(class_count(model), names, labelled)

    def graph(self, model: nn.Module) -> tuple[nn.Module, tuple[str, ...]]:
        return model, ("logits",)

    def likeness(self, expected: Sequence[Tensor], found: Sequence[Tensor], tolerance: float) -> Likeness:
        return of_classes(expected, found, tolerance)

    def output_distance(self, model: nn.Module, images: Tensor, generator: torch.Generator) -> Tensor:
        """The loss of classes drawn from the model's own probabilities: its squared gradients are the Fisher information."""
        import torch
        import torch.nn.functional as F

        logits = self.run(model, images)
        if not torch.isfinite(logits).all():
            raise FloatingPointError("the classifier")
        drawn = torch.multinomial(logits.detach().softmax(dim=-1).cpu(), 1, generator=generator)[:, 0]
        return F.cross_entropy(logits, drawn.to(logits.device), reduction="sum")

    def verdict(self, student: Mapping[str, Any], teacher: Mapping[str, Any], images: str) -> str | None:
        if student.get("top1") is None:
            if student.get("agreement") is None:
                return None
            return f"agrees with the teacher on {student['agreement']:.2f} % of {images}"
        parts = [f"gets {student['top1']:.2f} % of {images} right"]
        if teacher.get("top1") is not None:
            parts.append(f"(the teacher {teacher['top1']:.2f} %)")
        if student.get("agreement") is not None:
            parts.append(f"and agrees with the teacher on {student['agreement']:.2f} %")
        return " ".join(parts)


def class_count(model: nn.Module) -> int:
    """The number of classes of a model; 0 without a classifier."""
    return getattr(model, "num_classes", 0) or 0


class ClassScores:
    """Top-1, top-5 and cross-entropy of one model; all None for a model without classes or a set without labels."""

    def __init__(self, model: nn.Module, labelled: bool):
        self.classes = class_count(model) if labelled else 0
        self.sums = dict.fromkeys(GRADED, 0.0)
        self.images = 0

    def add(self, logits: Any, targets: Tensor) -> Tensor | None:
        """Add a batch of logits (B, classes) and classes (B,); returns which are right, bool (B,), or None without classes or labels."""
        import torch.nn.functional as F

        self.images += len(targets)
        if not self.classes:
            return None
        if int(targets.max()) >= self.classes:
            raise UserError(
                f"the data has label {int(targets.max())}, but the model has only {self.classes} classes "
                f"(0 to {self.classes - 1}); use data of its classes, or a teacher with a head for them (teacher.num_classes and "
                "teacher.finetune in a recipe)"
            )
        ranked = logits.topk(min(5, self.classes), dim=1).indices == targets[:, None]
        self.sums["top1"] += 100 * ranked[:, 0].sum().item()
        self.sums["top5"] += 100 * ranked.any(dim=1).sum().item()
        self.sums["loss"] += F.cross_entropy(logits, targets, reduction="sum").item()
        return ranked[:, 0]

    def result(self) -> Result:
        """Means over all images."""
        return {name: total / self.images if self.classes else None for name, total in self.sums.items()}


class Apart:
    """How many images one of two models alone has right, by which the interval of their difference is known.

    Args:
        key: of the figure.
    """

    def __init__(self, key: str):
        self._key, self._known = key, False
        self._lost = self._gained = 0

    def add(self, ours: Tensor | None, theirs: Tensor | None) -> None:
        """Add what student and teacher have right of a batch, bool (B,); None where one of them has no answers."""
        if ours is None or theirs is None:
            return
        self._known = True
        self._lost += int((theirs & ~ours).sum())
        self._gained += int((ours & ~theirs).sum())

    def result(self) -> Result:
        """Images that the teacher has right and the student not, and the reverse; nothing where nothing was added."""
        return {f"{self._key}_lost": self._lost, f"{self._key}_gained": self._gained} if self._known else {}


class _Metrics(Metrics):
    """The scores of a classifier and of its teacher, and how close the two are."""

    def __init__(self, model: nn.Module, teacher: nn.Module | None, labelled: bool):
        self._scores = ClassScores(model, labelled)
        self._theirs = None if teacher is None else ClassScores(teacher, labelled)
        self._comparable = True
        self._agreement = self._cosine = 0.0
        self._apart = Apart("top1")

    def add(self, outputs: Tensor, targets: Tensor, expected: Tensor | None) -> None:
        import torch.nn.functional as F

        ours = self._scores.add(outputs, targets)
        if expected is None or self._theirs is None:
            return
        self._apart.add(ours, self._theirs.add(expected, targets))
        self._comparable = expected.shape == outputs.shape
        if self._comparable:
            self._agreement += (expected.argmax(1) == outputs.argmax(1)).sum().item()
            self._cosine += F.cosine_similarity(outputs, expected, dim=1).sum().item()

    def result(self) -> Result:
        found = self._scores.result()
        if self._theirs is None:
            return found
        found |= {f"teacher_{name}": value for name, value in self._theirs.result().items()}
        found |= self._apart.result()
        count = self._scores.images
        agreement = 100 * self._agreement / count if self._comparable else None
        return {**found, "agreement": agreement, "cosine": self._cosine / count if self._comparable else None}


class ClassAnswers(Answers):
    """Right and wrong by class, confusions, and the images whose answers differ most.

    Images are ranked by the 'shift' of probability between the models or, without a teacher, by the student's 'loss'.

    Args:
        classes: how many the student tells apart.
        names: names of the classes, if they are known.
        labelled: whether targets are classes.
    """

    def __init__(self, classes: int, names: Sequence[str] | None, labelled: bool):
        import torch

        self.names = [*(names or ()), *map(str, range(len(names or ()), classes))]
        self.labelled, self.compared = labelled, False
        self._count = torch.zeros(classes, dtype=torch.long)
        self._right = {who: torch.zeros(classes, dtype=torch.long) for who in ("student", "teacher")}
        self._confused: dict[str, Counter[tuple[int, int]]] = {"student": Counter(), "teacher": Counter()}
        self._targets = torch.zeros(0)
        self._shares: dict[str, Tensor] = {}

    @property
    def measure(self) -> str | None:  # type: ignore[override]
        if self.compared:
            return "shift"
        return "loss" if self.labelled else None

    def add(self, outputs: Tensor, targets: Tensor, expected: Tensor | None) -> Tensor | None:
        self.compared = expected is not None
        answers = {"student": outputs} | ({} if expected is None else {"teacher": expected})
        shares = {who: logits.softmax(1).nan_to_num() for who, logits in answers.items()}
        self._targets, self._shares = targets, shares
        if self.labelled:
            self._count_answers(targets.cpu(), {who: share.argmax(1).cpu() for who, share in shares.items()})
        if self.measure == "shift":
            return (shares["student"] - shares["teacher"]).abs().sum(1) / 2
        if self.measure == "loss":
            return 1 - shares["student"].gather(1, targets[:, None])[:, 0]
        return None

    def describe(self, index: int) -> dict[str, Any]:
        answer: dict[str, Any] = {"true": self.names[int(self._targets[index])]} if self.labelled else {}
        for who, share in self._shares.items():
            probability, chosen = share[index].max(0)
            answer[who] = {"class": self.names[int(chosen)], "probability": round(float(probability), 4)}
        return answer

    def tables(self) -> dict[str, Any]:
        if not self.labelled:
            return super().tables()
        confusions = self._confusions()
        return {
            "classes": self._classes(),
            "confusions": confusions[:CONFUSIONS],
            "confusions_in_all": len(confusions),
        }

    def _count_answers(self, targets: Tensor, chosen: dict[str, Tensor]) -> None:
        import torch

        classes = len(self._count)
        self._count += torch.bincount(targets, minlength=classes)
        for who, answers in chosen.items():
            right = answers == targets
            self._right[who] += torch.bincount(targets[right], minlength=classes)
            self._confused[who].update(zip(targets[~right].tolist(), answers[~right].tolist(), strict=True))

    def _classes(self) -> list[dict[str, Any]]:
        """Percent right by class, of the classes that the held-out images have."""
        who = ("teacher", "student") if self.compared else ("student",)
        return [
            {"class": self.names[c], "images": n, **{w: round(100 * int(self._right[w][c]) / n, 2) for w in who}}
            for c, n in enumerate(self._count.tolist())
            if n
        ]

    def _confusions(self) -> list[dict[str, Any]]:
        """The confusions (true class, answer) that student and teacher make most differently often; the student's most frequent alone."""
        theirs, ours = self._confused["teacher"], self._confused["student"]
        ranked = sorted(
            theirs.keys() | ours.keys(), key=lambda pair: (-abs(ours[pair] - theirs[pair]), -ours[pair], pair)
        )
        return [
            {
                "true": self.names[true],
                "answer": self.names[answer],
                **({"teacher": theirs[true, answer]} if self.compared else {}),
                "student": ours[true, answer],
            }
            for true, answer in ranked
            if ours[true, answer] != theirs[true, answer]
        ]
