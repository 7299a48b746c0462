"""Which layers of a model could share a weight, or have a low rank: run it before compressing the model.

For every pair of blocks, it computes the error that their layers would have if they shared the optimal common weight, measured in the
outputs on evaluation images or in the weights alone. Singular values show which rank a layer needs. Of a run, the teacher is examined
(with --student, the student); of an artifact, its model.

example:
  compressvit apply quickstart --output runs/quickstart
  compressvit tool similarity runs/quickstart
"""

from __future__ import annotations

import argparse
import copy
from collections.abc import Sequence
from typing import Any

from compressvit.diagnostics.similarity import sharing_finding, sharing_losses
from compressvit.diagnostics.spectra import spectra_findings
from compressvit.fitting.reference import Reference
from compressvit.model.backbone import describe
from compressvit.programs.opened import OpenedModels
from compressvit.programs.program import Findings, program_of_models, table_of, whole


def look(opened: OpenedModels, arguments: argparse.Namespace) -> Findings:
    """The matrices, the spectra, and a table of the pairs that would lose least, per kind of layer."""
    one = opened.models[0 if arguments.student else -1]
    on_images = not (arguments.weights or arguments.aligned)
    own = one.converter(opened.models[0].input)
    images = lambda: map(own, opened.images(arguments.images))  # noqa: E731
    reference = Reference(copy.deepcopy(one.model), images) if on_images else None
    records = sharing_losses(one.model, reference=reference, aligned=arguments.aligned)
    order = {info.path: info.index for info in describe(one.model).blocks}
    pairs = [r for r in records if order[r["block"]] < order[r["other"]]]
    kinds = dict.fromkeys(r["layer"] for r in pairs)  # each measure has its own scale
    best = [r for k in kinds for r in sorted((r for r in pairs if r["layer"] == k), key=_loss)[: arguments.show]]
    what = "outputs" if on_images else "weights"
    table = table_of(
        f"{one.label}: the pairs of each kind that lose least by sharing (relative error of the {what})",
        [{"layer": r["layer"], "block": r["block"], "with": r["other"], "error": r["loss"]} for r in best],
    )
    return [table], [sharing_finding(records, outputs=on_images), *spectra_findings({one.label: one.model})]


def _loss(record: dict[str, Any]) -> float:
    return record["loss"]


def options(parser: argparse.ArgumentParser) -> None:
    """Options of this program."""
    parser.add_argument("--student", action="store_true", help="look at the student of the run")
    parser.add_argument("--images", type=whole, default=256, help="evaluation images (default: 256)")
    parser.add_argument("--weights", action="store_true", help="compare the weights alone; needs no images")
    parser.add_argument(
        "--aligned", action="store_true", help="match neurons and heads first, as the align step does; compares weights"
    )
    parser.add_argument("--show", type=whole, default=3, help="pairs of every kind of layer in the table (default: 3)")


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point; returns the exit code."""
    return program_of_models("similarity", __doc__, look, argv, options=options, most=1)
