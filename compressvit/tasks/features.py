"""The task `features`: outputs are a backbone's features (B, width), which should match the teacher's."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any, ClassVar, NamedTuple

from compressvit.tasks.base import Answers, Measure, Metrics, Result, task
from compressvit.tasks.classes import ClassTargets
from compressvit.tasks.classification import COSINE, GRADED, Apart, ClassScores, class_count
from compressvit.tasks.neighbours import KNN, Neighbours
from compressvit.tasks.quality import Quality
from compressvit.tasks.retrieval import QUALITIES as RETRIEVAL
from compressvit.tasks.retrieval import Retrieval

if TYPE_CHECKING:
    import torch
    from torch import Tensor, nn


class Features(NamedTuple):
    """Pooled features (B, width) and, of a model of tokens, its patch tokens after the final norm (B, N, C)."""

    pooled: Tensor
    patches: Tensor | None


@task("features")
class FeatureTask(ClassTargets):
    """Features of a backbone without a classifier, evaluated against a teacher's."""

    qualities = (
        COSINE,
        Quality("cosine_patches", "of patches", "cosine of the patch tokens", "of the patch tokens", "", 4),
        *RETRIEVAL,
        KNN,
    )
    ranking = ("cosine", "recall_10", "knn")
    pipeline = "image-feature-extraction"
    graded = (*GRADED, "knn")  # the others of a teacher with a classifier; None for the student
    supervised = False
    searches = True
    measures: ClassVar[Mapping[str, Measure]] = {
        "cosine": Measure(
            "The images on which the outputs of student and teacher point apart the most, with their cosine: 1 is the same direction.",
            lambda value: f"cosine {value:.3f}",
        )
    }

    def fits(self, model: nn.Module) -> bool:
        return not class_count(model)

    def run(self, model: nn.Module, images: Tensor) -> Features:
        from compressvit.model.modules import as_timm

        if class_count(model) or not hasattr(
            model, "forward_head"
        ):  # a teacher with a classifier, or a model not of timm's
            return Features(model(images).float(), None)
        timm_model = as_timm(model)
        hidden = timm_model.forward_features(images)
        pooled = timm_model.forward_head(hidden).float()
        prefix = getattr(model, "num_prefix_tokens", 0)
        return Features(pooled, hidden[:, prefix:].float() if hidden.ndim == 3 else None)

    def metrics(self, model: nn.Module, teacher: nn.Module | None, labelled: bool) -> Metrics:
        return _Metrics(model, teacher, labelled)

    def against_teacher(self) -> list[Quality]:
        return [quality for quality in super().against_teacher() if quality.key in self.ranking]

    def comparable(self, outputs: Features, expected: Features) -> bool:
        return outputs.pooled.shape == expected.pooled.shape

    def answers(self, model: nn.Module, names: Sequence[str] | None, labelled: bool) -> Answers:
        return _Answers()

    def output_distance(self, model: nn.Module, images: Tensor, generator: torch.Generator) -> Tensor:
        """Normalised tokens in a random direction; prefix tokens together count as much as all others."""
        import torch
        import torch.nn.functional as F

        from compressvit.model.modules import as_timm

        of_timm = hasattr(model, "forward_features")
        tokens = as_timm(model).forward_features(images) if of_timm else model(images).flatten(1)[:, None]
        tokens = F.normalize(tokens.float(), dim=-1).flatten(1, -2)  # Swin's are on a grid
        prefix = getattr(model, "num_prefix_tokens", 0)
        weight = torch.ones(tokens.shape[1], 1, device=tokens.device)
        if prefix:
            weight[:prefix] = ((tokens.shape[1] - prefix) / prefix) ** 0.5
        direction = torch.randn(tokens.shape, generator=generator).to(tokens.device)
        return (tokens * direction * weight).sum()

    def verdict(self, student: Mapping[str, Any], teacher: Mapping[str, Any], images: str) -> str | None:
        parts = []
        if student.get("cosine") is not None:
            parts.append(f"has outputs whose mean cosine to the teacher's is {student['cosine']:.4f}")
        if student.get("recall_10") is not None:
            parts.append(
                f"finds {student['recall_10']:.1f} % of the ten images that the teacher finds nearest in its index"
            )
        if student.get("knn") is not None:
            beside = "" if teacher.get("knn") is None else f" (the teacher {teacher['knn']:.2f} %)"
            parts.append(f"gives {student['knn']:.2f} % the right class by their nearest neighbours{beside}")
        if not parts:
            return None
        return f"{', '.join(parts[:-1])} and {parts[-1]} on {images}" if len(parts) > 1 else f"{parts[0]} on {images}"


class _Metrics(Metrics):
    """How close features are to a teacher's, those of the patches too where both models have tokens of one shape; what they find in the
    teacher's index; and, where there is an index with labels, which classes they give."""

    def __init__(self, model: nn.Module, teacher: nn.Module | None, labelled: bool):
        self._retrieval: Retrieval | None = None
        self._neighbours = {who: Neighbours() for who in ("", "teacher_")}
        # a classifier's outputs are no embeddings
        self._embeds = {"": not class_count(model), "teacher_": teacher is not None and not class_count(teacher)}
        self._scores = ClassScores(model, labelled)
        self._theirs = None if teacher is None else ClassScores(teacher, labelled)
        self._comparable = self._tokens = True
        self._cosine = self._patches = 0.0
        self._apart = Apart("knn")

    def _embeddings(self, outputs: Features, expected: Features | None) -> Iterator[tuple[Neighbours, Tensor]]:
        for who, found in (("", outputs), ("teacher_", expected)):
            if found is not None and self._embeds[who] and found.pooled.ndim == 2:
                yield self._neighbours[who], found.pooled

    def search(self) -> None:
        self._retrieval = Retrieval()

    def index(self, outputs: Features, targets: Tensor, expected: Features | None) -> None:
        for neighbours, embeddings in self._embeddings(outputs, expected):
            neighbours.index(embeddings, targets)

    def add(self, outputs: Features, targets: Tensor, expected: Features | None) -> None:
        import torch.nn.functional as F

        self._scores.add(outputs.pooled, targets)
        asked = [n.ask(embeddings, targets) for n, embeddings in self._embeddings(outputs, expected) if n.indexed]
        if len(asked) == len(self._neighbours):
            self._apart.add(*asked)
        if expected is None or self._theirs is None:
            return
        self._theirs.add(expected.pooled, targets)
        ours, theirs = outputs.patches, expected.patches
        if self._tokens and ours is not None and theirs is not None and ours.shape == theirs.shape:
            self._patches += F.cosine_similarity(ours, theirs, dim=-1).mean(dim=1).sum().item()
        else:
            self._tokens = False
        self._comparable = expected.pooled.shape == outputs.pooled.shape
        if self._retrieval is not None and self._comparable and self._embeds["teacher_"] and outputs.pooled.ndim == 2:
            self._retrieval.add(outputs.pooled, expected.pooled)
        if self._comparable:
            self._cosine += F.cosine_similarity(outputs.pooled, expected.pooled, dim=1).sum().item()

    def result(self) -> Result:
        found = self._scores.result()
        for who, neighbours in self._neighbours.items():
            if neighbours.indexed:
                found |= {f"{who}knn": neighbours.accuracy(), "indexed": neighbours.indexed}
        if self._theirs is None:
            return found
        found |= {f"teacher_{name}": value for name, value in self._theirs.result().items()}
        found |= self._apart.result()
        if self._retrieval is not None:
            found |= self._retrieval.result()
        count = self._scores.images
        found |= {"agreement": None, "cosine": self._cosine / count if self._comparable else None}
        return {**found, "cosine_patches": self._patches / count} if self._tokens else found


class _Answers(Answers):
    """The images whose features point apart most."""

    def add(self, outputs: Features, targets: Tensor, expected: Features | None) -> Tensor | None:
        import torch.nn.functional as F

        self.measure = None if expected is None or outputs.pooled.ndim != 2 else "cosine"
        if self.measure is None or expected is None:
            return None
        return 1 - F.cosine_similarity(outputs.pooled, expected.pooled, dim=1).nan_to_num()

    def describe(self, index: int) -> dict[str, Any]:
        return {}

    def value(self, worth: float) -> float:
        return 1 - worth
