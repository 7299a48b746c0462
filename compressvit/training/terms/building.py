"""From the section `losses` of a recipe to terms."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from compressvit.errors import UserError
from compressvit.training.terms.base import Term, TermSetting
from compressvit.training.terms.section import LossSection

if TYPE_CHECKING:
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
) -> list[Term]:
    """The terms of a distillation with weight above 0, relation terms only where there are layer pairs.

    Args:
        spec: the recipe's `losses`.
        pairs: the distilled layers.
        classes: size of the student's classifier; 0 for a headless backbone.
        prefix_tokens: how many tokens at the front of the student's sequence are no patches.
        smoothing: of the ground truth, for `labels`.
        task: what the student's outputs mean; None: classes where it has a classifier.

    Raises:
        UserError: a term needs logits and there is no classifier, a torchdistill loss is unknown or ill-configured,
            or nothing is left to learn.
    """
    for asked in spec.terms():
        fits = task.supervised if task is not None and asked.needs_labels else classes
        if asked.needs_classes and not fits:
            raise UserError(
                f"losses.{asked.name} compares classes, but the model has no classifier (num_classes=0); "
                f"set losses.{asked.name}.weight=0 and, to distil features, losses.feature.weight=1"
            )
        if asked.compares_logits and task is not None and not task.outputs_are_logits:
            raise UserError(
                f"losses.{asked.name} compares classes, and the outputs of the task {task.name!r} are none; set "
                f"losses.{asked.name}.weight=0, and e.g. losses.labels.weight=1"
            )
    setting = TermSetting(tuple(pairs), prefix_tokens, smoothing, task)
    built = [term for asked in spec.terms() if (term := asked.build(setting)) is not None]
    if not built:
        raise UserError(
            "nothing is left to distil: only relation losses have a weight, and there are no layer pairs; "
            "give distill.layers, or losses.prediction.weight"
        )
    return built
