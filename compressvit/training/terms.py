"""Loss terms: a weight, a function, and the student and teacher taps it reads."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import nn
from torchdistill.losses import mid_level  # noqa: F401  (importing it fills the registry below)
from torchdistill.losses.registry import MIDDLE_LEVEL_LOSS_DICT

from compressvit.errors import UserError, did_you_mean
from compressvit.model.taps import Tap
from compressvit.training import losses
from compressvit.training.pairs import LayerPair
from compressvit.training.term_specs import Losses


@dataclass(frozen=True)
class Batch:
    """What one step offers to the loss terms. Logits are (B, classes); taps are {path: {'input' | 'output': tensor}}."""

    student_logits: torch.Tensor
    teacher_logits: torch.Tensor | None
    student_taps: dict[str, dict[str, Any]]
    teacher_taps: dict[str, dict[str, Any]]
    targets: torch.Tensor  # (B,) class indices, or (B, classes) after mixup


@dataclass(frozen=True)
class Term:
    """One weighted term. `function` returns the unweighted loss and what else is worth logging."""

    name: str
    weight: float
    function: Callable[[Batch], tuple[torch.Tensor, dict[str, torch.Tensor]]]
    student_taps: tuple[Tap, ...] = ()
    teacher_taps: tuple[Tap, ...] = ()


def build_terms(
    spec: Losses, pairs: Sequence[LayerPair], *, classes: int, prefix_tokens: int = 0, smoothing: float = 0.0
) -> list[Term]:
    """The terms of a distillation with weight above 0, relation terms only where there are layer pairs.

    Args:
        spec: the recipe's `losses`.
        pairs: the distilled layers.
        classes: size of the student's classifier; 0 for a headless backbone.
        prefix_tokens: how many tokens at the front of the student's sequence are no patches.
        smoothing: of the ground truth, for `labels`.

    Raises:
        UserError: a term needs logits and there is no classifier, a torchdistill loss is unknown or ill-configured,
            or nothing is left to learn.
    """
    terms = []
    for name in ("prediction", "labels"):
        if getattr(spec, name).weight and not classes:
            raise UserError(
                f"losses.{name} compares classes, but the model has no classifier (num_classes=0); "
                f"set losses.{name}.weight=0 and, to distil features, losses.feature.weight=1"
            )
    if spec.prediction.weight:
        terms.append(_prediction(spec.prediction))
    if spec.attention_relation.weight and pairs:
        terms.append(_attention(spec.attention_relation, pairs))
    if spec.hidden_relation.weight and pairs:
        terms.append(_hidden(spec.hidden_relation, pairs))
    if spec.feature.weight:
        terms.append(_feature(spec.feature, "norm", prefix_tokens))
    if spec.labels.weight:
        terms.append(labels_term(spec.labels.weight, smoothing))
    terms += [_torchdistill(term) for term in spec.torchdistill if term.weight]
    if not terms:
        raise UserError(
            "nothing is left to distil: only relation losses have a weight, and there are no layer pairs; "
            "give distill.layers, or losses.prediction.weight"
        )
    return terms


def labels_term(weight: float, smoothing: float) -> Term:
    """Cross-entropy against the ground truth; images without a label (target −1) do not count."""

    def function(batch: Batch):
        logits, targets = batch.student_logits.float(), batch.targets
        if targets.ndim == 2:  # mixup has smoothed already
            return F.cross_entropy(logits, targets), {}
        total = F.cross_entropy(logits, targets, label_smoothing=smoothing, ignore_index=-1, reduction="sum")
        return total / (targets >= 0).sum().clamp(min=1), {}  # 0 where no image has a label

    return Term("labels", weight, function)


def _prediction(spec) -> Term:
    def function(batch: Batch):
        return losses.prediction(batch.student_logits, batch.teacher_logits, spec.temperature), {}

    return Term("prediction", spec.weight, function)


def _attention(spec, pairs: Sequence[LayerPair]) -> Term:
    def qkv(taps: dict, path: str, skip: int) -> tuple[torch.Tensor, ...]:
        return tuple(taps[f"{path}.attn.qkv"]["output"][:, skip:].chunk(3, dim=-1))

    def function(batch: Batch):
        values = [
            losses.attention_relation(
                qkv(batch.student_taps, p.student.path, p.student_skip),
                qkv(batch.teacher_taps, p.teacher.path, p.teacher_skip),
                spec.heads,
                with_kl=True,
            )
            for p in pairs
        ]
        loss, kl = (torch.stack(v).mean() for v in zip(*values, strict=True))
        # The cross-entropy cannot fall below the teacher's entropy; its distance from there is what training closes.
        return loss, {"attention_relation_kl": kl}

    return Term(
        "attention_relation",
        spec.weight,
        function,
        tuple((f"{p.student.path}.attn.qkv", "output") for p in pairs),
        tuple((f"{p.teacher.path}.attn.qkv", "output") for p in pairs),
    )


def _hidden(spec, pairs: Sequence[LayerPair]) -> Term:
    def tokens(taps: dict, path: str, skip: int) -> torch.Tensor:
        x = taps[path]["output"]
        return (rearrange(x, "b h w c -> b (h w) c") if x.ndim == 4 else x)[:, skip:]

    def function(batch: Batch):
        values = [
            losses.hidden_relation(
                tokens(batch.student_taps, p.student.path, p.student_skip),
                tokens(batch.teacher_taps, p.teacher.path, p.teacher_skip),
                spec.form,
                spec.scale,
            )
            for p in pairs
        ]
        return torch.stack(values).mean(), {}

    return Term(
        "hidden_relation",
        spec.weight,
        function,
        tuple((p.student.path, "output") for p in pairs),
        tuple((p.teacher.path, "output") for p in pairs),
    )


def _feature(spec, path: str, prefix_tokens: int) -> Term:
    def function(batch: Batch):
        student, teacher = batch.student_taps[path]["output"], batch.teacher_taps[path]["output"]
        if not prefix_tokens or student.shape != teacher.shape:  # of unlike shapes the loss itself complains
            return losses.feature(student, teacher, spec.form), {}
        prefix, patches = (
            losses.feature(student[:, part], teacher[:, part], spec.form)
            for part in (slice(prefix_tokens), slice(prefix_tokens, None))
        )
        return spec.prefix * prefix + (1 - spec.prefix) * patches, {
            "feature_prefix": prefix,
            "feature_patches": patches,
        }

    return Term("feature", spec.weight, function, ((path, "output"),), ((path, "output"),))


def _torchdistill(spec) -> Term:
    if spec.loss not in MIDDLE_LEVEL_LOSS_DICT:
        raise UserError(
            f"torchdistill has no mid-level loss {spec.loss!r}; {did_you_mean(spec.loss, MIDDLE_LEVEL_LOSS_DICT, list_at_most=60)}"
        )
    try:
        module: nn.Module = MIDDLE_LEVEL_LOSS_DICT[spec.loss](**copy.deepcopy(spec.kwargs))
    except (TypeError, KeyError, ValueError) as error:
        raise UserError(f"torchdistill's {spec.loss} does not take {spec.kwargs}: {error}") from error
    if any(True for _ in module.parameters()):
        raise UserError(
            f"torchdistill's {spec.loss} has weights of its own to train, which a loss term here has not; use a loss without"
        )
    student_taps, teacher_taps = _named_taps(spec.kwargs)

    def function(batch: Batch):
        try:
            return module(batch.student_taps, batch.teacher_taps, batch.targets), {}
        except NotImplementedError:  # an operation that the device lacks, as the meta device of a plan does
            raise
        except (AttributeError, IndexError, KeyError, RuntimeError, TypeError, ValueError) as error:
            shapes = [
                f"{whose} {path} {_shape(value)}"
                for whose, side in (("student", batch.student_taps), ("teacher", batch.teacher_taps))
                for path, _ in dict.fromkeys(student_taps if whose == "student" else teacher_taps)
                for value in side.get(path, {}).values()
            ]
            raise UserError(
                f"torchdistill's {spec.loss} failed on its taps ({', '.join(shapes) or 'it names none'}): {type(error).__name__}: {error}"
            ) from error

    return Term(f"torchdistill/{spec.loss}", spec.weight, function, tuple(student_taps), tuple(teacher_taps))


def _shape(value: Any) -> str:
    return str(tuple(value.shape)) if isinstance(value, torch.Tensor) else type(value).__name__


def _named_taps(kwargs: Any, whose: str | None = None) -> tuple[list[Tap], list[Tap]]:
    """The module paths in a torchdistill loss's arguments, by its conventions: `student_module_path` beside `student_module_io`,
    `student_output_path`, or {path: …, io: …} under a key that says whose it is."""
    found: dict[str, list[Tap]] = {"student": [], "teacher": []}
    if isinstance(kwargs, dict):
        if whose and isinstance(kwargs.get("path"), str):
            found[whose].append((kwargs["path"], kwargs.get("io", "output")))
        for key, value in kwargs.items():
            owner = next((w for w in found if key.startswith(w)), whose)
            if key == "module_path" and isinstance(value, str) and owner is None:  # RegularizationLoss names one side's
                side = "teacher" if kwargs.get("is_from_teacher") else "student"
                found[side].append((value, kwargs.get("io_type", "output")))
            elif isinstance(value, str) and key.endswith("_path") and owner:
                found[owner].append((value, kwargs.get(f"{key[: -len('_path')]}_io", "output")))
            elif isinstance(value, (dict, list)):
                student, teacher = _named_taps(value, owner)
                found["student"] += student
                found["teacher"] += teacher
    elif isinstance(kwargs, list):
        for item in kwargs:
            student, teacher = _named_taps(item, whose)
            found["student"] += student
            found["teacher"] += teacher
    return found["student"], found["teacher"]
