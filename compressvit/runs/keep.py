"""Judges students of `shrink: {keep: …}` on the images that decide how small one becomes."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import PurePath
from typing import Any

import torch
from torch import nn

from compressvit.data.classes import composed
from compressvit.data.input import Side
from compressvit.data.notes import counted
from compressvit.data.opening import Datasets
from compressvit.data.samples import Samples
from compressvit.data.sets.base import VAL_FOLDERS, split_names
from compressvit.data.spec import Data
from compressvit.errors import UserError
from compressvit.files import expanded
from compressvit.recipe.recipe import Recipe
from compressvit.runs.evaluate import Scorer
from compressvit.runs.job import Job
from compressvit.tasks.base import task_of


@dataclass
class OnHeldOut:
    """Judges students on the images that were set aside (`compressvit.fitting.judge.Judge`).

    Args:
        teacher: with its input.
        like: the student before its first step, with its input.
    """

    datasets: Datasets
    data: Data
    device: torch.device
    teacher: Side
    like: Side
    comparable: bool = True
    images: str = field(init=False)

    def __post_init__(self) -> None:
        assert self.datasets.deciding is not None, "set_aside comes first"
        self.datasets = replace(self.datasets, validation=self.datasets.deciding)
        count = len(self.datasets.deciding) if isinstance(self.datasets.deciding, Samples) else 0
        self.images = f"{counted(count)} held out" if count else "images held out"

    @classmethod
    def of(cls, job: Job, teacher: Side) -> OnHeldOut:
        """That of a job; `teacher` may have values by now."""
        comparable = is_comparable(job.recipe)
        return cls(job.datasets, job.recipe.data, job.device, teacher, job.student, comparable)

    @property
    def _scorer(self) -> Scorer:
        return Scorer(self.datasets, self.data, self.device)

    def refuse(self, figures: list[str]) -> None:
        refuse_figures(figures, self.like, self.data, comparable=self.comparable)
        if "worst_domain_drop" in figures and len(self._domains()) < 2:
            raise UserError(
                "shrink.keep.worst_domain_drop needs images of several domains, in folders of these within those of their classes "
                "(val/CLASS/DOMAIN/…); give worst_class_drop or top1_drop"
            )

    def figures(self, student: nn.Module, wanted: list[str]) -> dict[str, float]:
        found: dict[str, float] = {}
        if set(wanted) - {"worst_domain_drop"}:
            classes = _Classes()
            side = Side(student, self.like.input)
            scores = self._scorer.score(side, self.teacher, classes.add if "worst_class_drop" in wanted else None)
            if "cosine" in wanted:
                if scores.get("cosine") is None:
                    raise UserError(
                        "shrink.keep.cosine: the outputs of student and teacher have different widths; give a budget"
                    )
                found["cosine"] = float(scores["cosine"])
            if "top1_drop" in wanted:
                found["top1_drop"] = scores["teacher_top1"] - scores["top1"]
            if "worst_class_drop" in wanted:
                found["worst_class_drop"] = classes.worst()
        if "worst_domain_drop" in wanted:
            found["worst_domain_drop"] = max(self._drop(student, part) for part in self._domains().values())
        return {name: found[name] for name in wanted}

    def _drop(self, student: nn.Module, part: Sequence[int]) -> float:
        assert isinstance(self.datasets.validation, Samples)
        images = replace(self.datasets, validation=self.datasets.validation.part(part))
        scores = Scorer(images, self.data, self.device).score(Side(student, self.like.input), self.teacher)
        return float(scores["teacher_top1"] - scores["top1"])

    def _domains(self) -> dict[str, list[int]]:
        """The places of the images of every domain: of the folder directly in that of a class, however deep in it they lie."""
        held_out, names = self.datasets.validation, {composed(name) for name in self.datasets.class_names or ()}
        root = f"{expanded(self.data.root, 'data.root')}/" if self.data.root else ""
        splits = tuple(f"{name}/" for name in split_names(self.data.val_split, VAL_FOLDERS))
        found: dict[str, list[int]] = {}
        if isinstance(held_out, Samples):
            for position in range(len(held_out)):
                path = held_out.name(position).removeprefix(root)
                path = path.removeprefix(next((split for split in splits if path.startswith(split)), ""))  # no class
                folders = iter(PurePath(path).parts[:-1])
                if any(composed(folder) in names for folder in folders) and (domain := next(folders, None)) is not None:
                    found.setdefault(domain, []).append(position)
        return found


def is_comparable(recipe: Recipe) -> bool:
    """Whether a student has the task of its teacher."""
    return recipe.student.head != "new"


def refuse_judged(job: Job) -> None:
    """Raise a `UserError` if a figure that a step asks for cannot be measured on the images held out, which are opened."""
    for step in job.recipe.steps:
        if figures := getattr(step.spec, "judged", ()):
            OnHeldOut.of(job, job.teacher).refuse(list(figures))


def refuse_figures(figures: Sequence[str], like: Side, data: Data, *, comparable: bool) -> None:
    """Raise a `UserError` if a figure cannot be measured of models of this structure, or on such data, whatever its images are."""
    task = task_of(like.model, data.usual_task)
    if not figures:
        return
    if not comparable:
        raise UserError(
            "shrink.keep compares the student with its teacher, and student.head=new has another task; give a budget"
        )
    if "cosine" in figures and "cosine" not in {quality.key for quality in task.qualities}:
        raise UserError(
            f"shrink.keep.cosine compares outputs, which are none of a model for '{task.name}'; give a budget"
        )
    drop = next((name for name in figures if name != "cosine"), None)
    if drop is None:
        return
    if not task.outputs_are_logits:
        raise UserError(
            f"shrink.keep.{drop} compares accuracies, and the model has no classifier; give keep: {{cosine: 0.98}}"
        )
    if not data.labelled:
        raise UserError(
            f"shrink.keep.{drop} compares accuracies, and the images of data '{data.name}' have no labels; give "
            "keep: {cosine: 0.98}, or train/ and val/ with a folder per class in each"
        )


class _Classes:
    """How many images of every class student and teacher have right."""

    def __init__(self) -> None:
        self.images, self.theirs, self.ours = Counter[int](), Counter[int](), Counter[int]()

    def add(self, images: torch.Tensor, targets: Any, outputs: Any, expected: Any | None) -> None:
        assert expected is not None
        self.images.update(targets.tolist())
        self.theirs.update(targets[expected.argmax(dim=1) == targets].tolist())
        self.ours.update(targets[outputs.argmax(dim=1) == targets].tolist())

    def worst(self) -> float:
        """Points of accuracy that the class loses which loses most."""
        return max(100 * (self.theirs[name] - self.ours[name]) / count for name, count in self.images.items())
