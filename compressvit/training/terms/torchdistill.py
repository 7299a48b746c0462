"""The `torchdistill` terms: any mid-level loss of torchdistill, by its class name."""

from __future__ import annotations

import copy
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from pydantic import Field
from torch import nn

from compressvit.errors import UserError, did_you_mean
from compressvit.training.terms.base import Batch, LossTerm, Term, TermSetting, loss_term

if TYPE_CHECKING:
    from compressvit.model.taps import Tap


@loss_term("torchdistill")
class TorchdistillTerm(LossTerm):
    """Any mid-level loss of torchdistill, given by its class name and arguments, which also name the taps."""

    listed: ClassVar[bool] = True

    loss: str = Field(description="Name of the loss class, e.g. SPKDLoss.")
    weight: float = Field(1.0, ge=0)
    kwargs: dict[str, Any] = Field(
        default_factory=dict, description="Its arguments, as documented by torchdistill; module paths name the taps."
    )

    def build(self, setting: TermSetting) -> Term:
        module = _module(self.loss, self.kwargs)
        student_taps, teacher_taps = _named_taps(self.kwargs)

        def function(batch: Batch) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
            try:
                return module(batch.student_taps, batch.teacher_taps, batch.targets), {}
            except NotImplementedError:  # an operation that the device does not support, e.g. the meta device of a plan
                raise
            except (AttributeError, IndexError, KeyError, RuntimeError, TypeError, ValueError) as error:
                shapes = [
                    f"{whose} {path} {_shape(value)}"
                    for whose, side, taps in (
                        ("student", batch.student_taps, student_taps),
                        ("teacher", batch.teacher_taps, teacher_taps),
                    )
                    for path, _ in dict.fromkeys(taps)
                    for value in side.get(path, {}).values()
                ]
                raise UserError(
                    f"torchdistill's {self.loss} failed on its taps ({', '.join(shapes) or 'it names none'}): "
                    f"{type(error).__name__}: {error}"
                ) from error

        return Term(f"torchdistill/{self.loss}", self.weight, function, tuple(student_taps), tuple(teacher_taps))


def _module(name: str, kwargs: dict[str, Any]) -> nn.Module:
    # imported only here because it takes seconds
    from torchdistill.losses import mid_level  # noqa: F401  (fills the registry below)
    from torchdistill.losses.registry import MIDDLE_LEVEL_LOSS_DICT

    if name not in MIDDLE_LEVEL_LOSS_DICT:
        raise UserError(
            f"torchdistill has no mid-level loss {name!r}; {did_you_mean(name, MIDDLE_LEVEL_LOSS_DICT, list_at_most=60)}"
        )
    try:
        module: nn.Module = MIDDLE_LEVEL_LOSS_DICT[name](**copy.deepcopy(kwargs))
    except (TypeError, KeyError, ValueError) as error:
        raise UserError(f"torchdistill's {name} does not take {kwargs}: {error}") from error
    if any(True for _ in module.parameters()):
        raise UserError(
            f"torchdistill's {name} has trainable weights, which a loss term here cannot have; use a loss without any"
        )
    return module


def _shape(value: Any) -> str:
    return str(tuple(value.shape)) if isinstance(value, torch.Tensor) else type(value).__name__


def _named_taps(kwargs: Any, whose: str | None = None) -> tuple[list[Tap], list[Tap]]:
    """The module paths in the arguments of a torchdistill loss, by its conventions: `student_module_path` with `student_module_io`,
    `student_output_path`, or {path: …, io: …} under a key that names the model."""
    found: dict[str, list[Tap]] = {"student": [], "teacher": []}
    if isinstance(kwargs, dict):
        if whose and isinstance(kwargs.get("path"), str):
            found[whose].append((kwargs["path"], kwargs.get("io", "output")))
        for key, value in kwargs.items():
            owner = next((w for w in found if key.startswith(w)), whose)
            if key == "module_path" and isinstance(value, str) and owner is None:  # RegularizationLoss
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
