"""Gradient norms per layer over training, for one run or several side by side (MiniViT, figure 4).

A run records them if its recipe has `diagnostics: [gradients]`. For shared tensors, the gradient of each block's own use counts.

example:
  compressvit apply quickstart 'diagnostics=[gradients]' --output runs/multiplexing
  compressvit tool gradients runs/multiplexing
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence

from compressvit.diagnostics.gradient_findings import gradient_findings, gradient_summary, layers_finding
from compressvit.diagnostics.gradients import gradient_rows
from compressvit.programs.program import Findings, program, table_of
from compressvit.programs.recorded import Run


def look(runs: list[Run], arguments: argparse.Namespace) -> Findings:
    """All phases of a single run; of several runs only the last phase of each, to compare students."""
    rows = []
    for run in runs:
        own = gradient_rows(run.path, arguments.phase, last=len(runs) > 1)
        rows += [{**row, "run": run.label} for row in own] if len(runs) > 1 else own
    table = table_of("Norm of the gradient, before clipping", gradient_summary(rows))
    return [table], [*gradient_findings(rows), layers_finding(rows)]


def options(parser: argparse.ArgumentParser) -> None:
    """Options of this program."""
    parser.add_argument("--phase", help="teacher, 1_distill, … (default: all phases; of several runs the last of each)")


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point; returns the exit code."""
    return program("gradients", __doc__, look, argv, options=options)
