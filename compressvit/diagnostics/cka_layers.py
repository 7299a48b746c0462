"""The `cka` diagnostic: layer-wise similarity of two models. (A module named `cka` would hide the function of that name.)"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext

import numpy as np
import torch
from pydantic import Field

from compressvit import processes
from compressvit.charts.findings import Finding
from compressvit.data.input import Side
from compressvit.diagnostics.base import Context, MeasuredOnImages, diagnostic
from compressvit.diagnostics.features import Batches, Subject, require_taps, subject, walk
from compressvit.diagnostics.kernel_alignment import LEAST, CKAResult, Kernel, MinibatchCKA
from compressvit.errors import UserError
from compressvit.log import progress
from compressvit.training.spec import Training


def cka_matrix(
    first: Subject,
    second: Subject,
    batches: Batches,
    device: torch.device,
    *,
    images: int = 512,
    batch_size: int = 64,
    kernel: Kernel = "linear",
    bandwidth: float = 1.0,
    together: Callable[[], AbstractContextManager[None]] = nullcontext,
) -> CKAResult:
    """CKA of every tap of one model (rows) with every tap of another (columns).

    The features of an image are all its tokens, flattened, as in Raghu et al. (https://arxiv.org/abs/2108.08810).

    Args:
        first, second: the models; the same object twice is run once.
        batches: returns batches of images (B, C, H, W), normalised for the first model.
        images: number of images.
        batch_size: number of images whose features are in memory together; at least 4.
        kernel, bandwidth: as for `compressvit.diagnostics.cka`.
        together: as of a `Context`; batches are dealt out to the processes, and their sums added up.

    Raises:
        UserError: there are fewer than 4 images or no taps, a tap does not exist, or features are not finite.
    """
    if not (first.taps and second.taps):
        raise UserError("CKA compares layers, and a model without any tap was given; name at least one of each")
    if batch_size < LEAST:
        raise UserError(f"CKA: batches of {batch_size} images are too small; it needs at least {LEAST} in each")
    stream = MinibatchCKA(first.taps, second.taps, kernel, bandwidth)
    subjects = [first] if first is second else [first, second]
    failed: Exception | None = None
    with together():
        world, rank = processes.count(), processes.rank()
        others = [0] if kernel == "rbf" else []  # its distances are those of the first batch, which every process needs
        mine: Callable[[int], bool] = lambda number: number % world == rank or number in others  # noqa: E731
        steps = walk(subjects, batches, device, images, size=batch_size, least=LEAST, mine=mine)
        try:
            seen = progress(steps, "CKA", -(-images // batch_size // world))
            for number, (ours, *theirs) in zip(filter(mine, itertools.count()), seen, strict=False):
                use = stream.add if number % world == rank else stream.look
                use(ours, theirs[-1] if theirs else ours)
        except Exception as error:  # the others have to know, and wait
            failed = error
        faults = processes.gathered(None if failed is None else str(failed) or type(failed).__name__)
        if not any(faults):
            stream.sum_up()
    if failed is not None:
        raise failed
    if fault := next(filter(None, faults), None):
        raise UserError(fault)
    return stream.result()


def cka_records(result: CKAResult) -> list[dict]:
    """One record per pair of layers, `row` and `column`; `best` marks the most similar column of every row."""
    values = result.values
    best = values.argmax(dim=1)
    width = result.half_width
    return [
        {
            "row": r,
            "column": c,
            "cka": round(values[i, j].item(), 6),
            "plus_minus": None if width is None else round(width[i, j].item(), 6),
            "best": bool(best[i] == j),
        }
        for i, r in enumerate(result.rows)
        for j, c in enumerate(result.columns)
    ]


def cka_finding(result: CKAResult, row: str = "student", column: str = "teacher") -> Finding:
    """The matrix as a chart with a caption; `row` and `column` name the two models."""
    return Finding(
        "cka",
        f"CKA of the layers of {row} and {column}",
        f"Similarity of two layers' features of the same {result.images} images: 1 is equal up to rotation and scale, 0 unrelated. Models "
        f"that are similar throughout are bright on the diagonal; a ring marks the layer of {column} most similar to each layer of {row}.",
        "heatmap",
        cka_records(result),
        {
            "x": "column",
            "y": "row",
            "colour": "cka",
            "best": "best",
            "titles": {"cka": "CKA", "row": row, "column": column},
        },
    )


def cka_layers_finding(
    result: CKAResult, when: str, row: str = "the student", column: str = "the teacher"
) -> Finding | None:
    """CKA of every layer with the other model's layer of the same index, as in MiniViT's figure 5; None if the depths differ."""
    if len(result.rows) != len(result.columns):
        return None
    values, width = result.values.diagonal().tolist(), result.half_width
    spread = [None] * len(values) if width is None else width.diagonal().tolist()
    records = [
        {
            "when": when,
            "layer": i,
            "path": path,
            "cka": round(v, 6),
            **({} if w is None else {"low": round(v - w, 6), "high": round(v + w, 6)}),
        }
        for i, (path, v, w) in enumerate(zip(result.rows, values, spread, strict=True))
    ]
    band = {} if width is None else {"low": "low", "high": "high"}
    return Finding(
        "cka_layers",
        f"CKA of every layer of {row} with the layer of {column} in the same place",
        "1 means that both layers represent the images the same way. In MiniViT's figure 5 sharing alone falls in the last layers. "
        + ("The band is the 95 % interval." if band else "One batch was measured, so there is no interval."),
        "lines",
        records,
        {
            "x": "layer",
            "y": "cka",
            "colour": "when",
            **band,
            "titles": {"cka": "CKA", "layer": "layer, from the input", "when": ""},
        },
    )


@diagnostic("cka")
class CKA(MeasuredOnImages):
    """Similarity (CKA) of every layer of the student with every layer of the teacher, with its confidence interval."""

    needs_teacher = True

    images: int = Field(512, ge=LEAST, description="Evaluation images, evenly spaced over the set.")
    kernel: Kernel = Field(
        "linear", description="linear, or rbf: exp(−d² / 2σ²) with the distance d between two images."
    )
    bandwidth: float = Field(1.0, gt=0, description="σ of rbf, in multiples of the median distance.")
    batch_size: int = Field(64, ge=LEAST, description="Images whose features are in memory at once.")
    student_taps: tuple[str, ...] | None = Field(
        None, min_length=1, description="Paths of modules; null for the blocks."
    )
    teacher_taps: tuple[str, ...] | None = Field(None, min_length=1, description="The same for the teacher.")

    def refuse(self, phase: Training, student: Side, teacher: Side | None) -> None:
        if teacher is not None:
            for one in (subject(student, self.student_taps), subject(teacher, self.teacher_taps)):
                require_taps(one)

    def measure(self, context: Context) -> list[Finding]:
        assert context.teacher is not None, "needs_teacher"
        result = cka_matrix(
            subject(context.student, self.student_taps),
            subject(context.teacher, self.teacher_taps),
            lambda: context.images(self.images),
            context.device,
            images=self.images,
            batch_size=self.batch_size,
            kernel=self.kernel,
            bandwidth=self.bandwidth,
            together=context.together,
        )
        layers = cka_layers_finding(result, context.when)
        return [cka_finding(result), *([layers] if layers else [])]


def likeness(
    student: Side, teacher: Side, batches: Batches, device: torch.device, *, images: int
) -> Callable[[Sequence[str], Sequence[str]], np.ndarray]:
    """CKA of the student's blocks at these paths with those of the teacher on these images, for `distill.layers: auto`."""

    def measure(ours: Sequence[str], theirs: Sequence[str]) -> np.ndarray:
        pair = subject(student, ours), subject(teacher, theirs)
        return cka_matrix(*pair, batches, device, images=images).values.numpy()

    return measure
