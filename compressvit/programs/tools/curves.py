"""Training curves: loss and evaluations over the steps of every phase, for one run or several in one chart.

Phases are named without their position (distill, not 1_distill), so that runs of different recipes share a panel.

example:
  compressvit apply quickstart --output runs/distilled
  compressvit apply quickstart 'steps.1={finetune: {epochs: 15}}' --output runs/finetuned
  compressvit tool curves runs/distilled runs/finetuned
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence

from compressvit.programs.curves import curves_finding, curves_summary, read_curves
from compressvit.programs.program import Findings, program, table_of
from compressvit.programs.recorded import Run


def look(runs: list[Run], arguments: argparse.Namespace) -> Findings:
    """The requested curves, or the most informative ones."""
    curves = read_curves(runs, arguments.show)
    return [table_of("Curves", curves_summary(curves))], [curves_finding(curves)]


def options(parser: argparse.ArgumentParser) -> None:
    """Options of this program."""
    parser.add_argument(
        "--show",
        metavar="TAG",
        nargs="+",
        help="as TensorBoard calls them, e.g. distill/train/gradient_norm (default: accuracy, and the mean loss of epochs)",
    )


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point; returns the exit code."""
    return program("curves", __doc__, look, argv, options=options)
