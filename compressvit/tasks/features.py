"""The task `features`: outputs are a backbone's features (B, width), which should match the teacher's."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, ClassVar, NamedTuple

from compressvit.tasks.base import Answers, Measure, Metrics, Result, task
from compressvit.tasks.classes import ClassTargets
from compressvit.tasks.classification import COSINE, GRADED, ClassScores, class_count
from compressvit.tasks.quality import Quality

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
    )
    ranking = ("cosine",)
    graded = GRADED  # of a teacher with a classifier; None for the student
    supervised = False
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

    def comparable(self, outputs: Features, expected: Features) -> bool:
        return outputs.pooled.shape == expected.pooled.shape

    def answers(self, model: nn.Module, names: Sequence[str] | None, labelled: bool) -> Answers:
        return _Answers()

    def output_distance(self, model: nn.Module, images: Tensor, generator: torch.Generator) -> Tensor:
        """Normalised tokens in a random direction; prefix tokens together count as much as all others."""
        import torch
        import torch.nn.functional as F

        from compressvit.model.modules import as_timm

        tokens = F.normalize(as_timm(model).forward_features(images).float(), dim=-1)
        tokens = tokens.flatten(1, -2)  # Swin's are on a grid
        prefix = getattr(model, "num_prefix_tokens", 0)
        weight = torch.ones(tokens.shape[1], 1, device=tokens.device)
        if prefix:
            weight[:prefix] = ((tokens.shape[1] - prefix) / prefix) ** 0.5
        direction = torch.randn(tokens.shape, generator=generator).to(tokens.device)
        return (tokens * direction * weight).sum()

    def verdict(self, student: Mapping[str, Any], teacher: Mapping[str, Any], images: str) -> str | None:
        if student.get("cosine") is None:
            return None
        return f"has outputs whose mean cosine to the teacher's is {student['cosine']:.4f} on {images}"


class _Metrics(Metrics):
    """How close features are to a teacher's, those of the patches too where both models have tokens of one shape."""

    def __init__(self, model: nn.Module, teacher: nn.Module | None, labelled: bool):
        self._scores = ClassScores(model, labelled)
        self._theirs = None if teacher is None else ClassScores(teacher, labelled)
        self._comparable = self._tokens = True
        self._cosine = self._patches = 0.0

    def add(self, outputs: Features, targets: Tensor, expected: Features | None) -> None:
        import torch.nn.functional as F

        self._scores.add(outputs.pooled, targets)
        if expected is None or self._theirs is None:
            return
        self._theirs.add(expected.pooled, targets)
        ours, theirs = outputs.patches, expected.patches
        if self._tokens and ours is not None and theirs is not None and ours.shape == theirs.shape:
            self._patches += F.cosine_similarity(ours, theirs, dim=-1).mean(dim=1).sum().item()
        else:
            self._tokens = False
        self._comparable = expected.pooled.shape == outputs.pooled.shape
        if self._comparable:
            self._cosine += F.cosine_similarity(outputs.pooled, expected.pooled, dim=1).sum().item()

    def result(self) -> Result:
        found = self._scores.result()
        if self._theirs is None:
            return found
        found |= {f"teacher_{name}": value for name, value in self._theirs.result().items()}
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
