"""Why a student is slower than its teacher where that was measured, as far as what it computes says so."""

from __future__ import annotations

from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode

from compressvit.data.input import Side
from compressvit.model import cost
from compressvit.transforms.low_rank.layer import Factored
from compressvit.transforms.quantise.packed import Rounded

UNPACKED = "weights in few bits are unpacked in every pass (once with compressvit.load(FOLDER, materialise=True))"


def slowness(student: Side, teacher: Side, ratio: tuple[float, float, float], macs: float | None = None) -> str | None:
    """A sentence where a student is slower than its teacher beyond the interval of the measurement, else None.

    A pass over one image of each says why: an operation has a cost that does not fall with its size, so that a small model with fewer
    multiply-accumulates in more operations may take longer.

    Args:
        student, teacher: on one device.
        ratio: of the student's latency to the teacher's, between the ends of its interval.
        macs: of the student's multiply-accumulates to the teacher's; None: they are counted.
    """
    if ratio[0] <= 1:
        return None
    rounded, factored = (
        sum(isinstance(module, kind) for module in student.model.modules()) for kind in (Rounded, Factored)
    )
    ours, theirs = operations(student), operations(teacher)
    if macs is None:
        macs = cost.macs(student.model, student.input.size) / max(1, cost.macs(teacher.model, teacher.input.size))
    reasons = []
    if rounded:
        reasons.append(UNPACKED)
    if ours > theirs:
        why = f"; {factored} layers of low rank are two products each" * bool(factored)
        reasons.append(
            f"it runs {ours:,} operations for an image, the teacher {theirs:,}, and each has a fixed cost{why}"
        )
    if macs > 1:
        reasons.append(f"it has {macs:.2f} of its MACs")
    if reasons:
        return f"the student is slower than its teacher, likely because {'; and because '.join(reasons)}"
    return (
        f"the student is slower than its teacher, and neither its operations ({ours:,}, the teacher's {theirs:,}) nor its MACs "
        f"({macs:.2f} of them) say why"
    )


def operations(side: Side) -> int:
    """How many operations a model runs for an image, without those that only look at memory otherwise."""
    model, like = side.model.eval(), next(side.model.parameters())
    dtype = next((p.dtype for p in side.model.parameters() if p.is_floating_point()), torch.float32)
    image = torch.zeros(1, *side.input.size, device=like.device, dtype=dtype)
    with torch.no_grad(), _Operations() as counted:
        model(image)
    return counted.number


class _Operations(TorchDispatchMode):
    """Counts operations."""

    def __init__(self) -> None:
        super().__init__()
        self.number = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        aliases = [result.alias_info for result in func._schema.returns]
        self.number += not (aliases and all(alias is not None and not alias.is_write for alias in aliases))
        return func(*args, **(kwargs or {}))
