"""Building loss terms from the section `losses` of a recipe."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

from compressvit.errors import UserError
from compressvit.training.terms.base import FEATURES, Term, TermSetting
from compressvit.training.terms.section import LossSection

if TYPE_CHECKING:
    from torch import nn

    from compressvit.tasks.base import Task
    from compressvit.training.pairs import LayerPair


def build_terms(
    spec: LossSection,
    pairs: Sequence[LayerPair],
    *,
    classes: int,
    prefix_tokens: int = 0,
    smoothing: float = 0.0,
    task: Task | None = None,
    features: str = FEATURES,
    teacher: nn.Module | None = None,
    student: nn.Module | None = None,
) -> list[Term]:
    """Build the terms of a distillation that have a positive weight; relation terms only if there are layer pairs.

    Args:
        spec: the recipe's `losses`.
        pairs: the pairs of layers to distil.
        classes: size of the student's classifier; 0 for a headless backbone.
        prefix_tokens: number of tokens before the patches in the student's sequence.
        smoothing: label smoothing, for `labels`.
        task: what the student's outputs mean; None: classes if it has a classifier.
        features: the path of the module whose outputs are the student's features.
        student, teacher: for terms that compare what is arranged otherwise in the two.

    Raises:
        UserError: a term needs logits and there is no classifier, a torchdistill loss is unknown or misconfigured,
            or no term is left.
    """
    for asked in spec.terms():
        fits = task.supervised if task is not None and asked.needs_labels else classes
        if asked.needs_classes and not fits:
            raise UserError(
                f"losses.{asked.name} compares classes, but the model has no classifier (num_classes=0); "
                f"set losses.{asked.name}.weight=0 and, to distil features, losses.feature.weight=1"
            )
        if asked.compares_logits and task is not None and not (task.outputs_are_logits or task.imitates):
            raise UserError(
                f"losses.{asked.name} compares classes, and the outputs of the task {task.name!r} are none; set "
                f"losses.{asked.name}.weight=0, and e.g. losses.labels.weight=1"
            )
    setting = TermSetting(tuple(pairs), prefix_tokens, smoothing, task, features, features)
    if student is not None and teacher is not None:
        setting = _between(setting, student, teacher)
    built = [term for asked in spec.terms() if (term := asked.build(setting)) is not None]
    if not built:
        raise UserError(
            "nothing is left to distil: only losses of layer pairs have a weight, and there are none that these compare; "
            "give distill.layers, or losses.prediction.weight"
        )
    return built


def _between(setting: TermSetting, student: nn.Module, teacher: nn.Module) -> TermSetting:
    """The same with what the terms need to know of both models."""
    from compressvit.model.backbone import family_of, model_name
    from compressvit.training.tokens import Layout

    family = family_of(teacher)
    path = FEATURES if family is None else family.features
    absent = [
        f"{model_name(model)}, the {whose}, has no {name!r} whose outputs would be its features, tokens or maps with channels last"
        for whose, model, name in (("student", student, setting.features), ("teacher", teacher, path))
        if name not in dict(model.named_modules())
    ]
    return replace(
        setting,
        teacher_features=path,
        absent="; ".join(absent),
        layout=Layout.of(student),
        teacher_layout=Layout.of(teacher),
        device=next((p.device for p in student.parameters()), setting.device),
    )
