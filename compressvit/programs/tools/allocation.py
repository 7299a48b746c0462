r"""Numbers of neurons that pruning left in each adapter, for one run or several side by side (MiMi, figure 5: local against global).

Every run with a `prune` step records them; the run need not be finished.

example:
  compressvit apply quickstart 'steps=[adapters: {ratio: 0.5}, prune: {target: {neurons: 0.1}, epochs: 3}]' --output runs/global
  compressvit apply quickstart 'steps=[adapters: {ratio: 0.5}, prune: {target: {neurons: 0.1}, epochs: 3, scope: local}]' \
    --output runs/local teacher.weights=runs/global/teacher teacher.finetune=null
  compressvit tool allocation runs/global runs/local
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence

from compressvit.diagnostics.allocation import allocation_finding
from compressvit.programs.allocation import allocation_summary, final_allocation_finding, run_histories
from compressvit.programs.program import Findings, program, table_of
from compressvit.programs.recorded import Run


def look(runs: list[Run], arguments: argparse.Namespace) -> Findings:
    """Tables and charts of every `prune` phase of every run."""
    histories = {}
    for run in runs:
        own = run_histories(run)
        for phase, history in own.items():
            histories[run.label if len(own) == 1 else f"{run.label}, {phase}"] = history
    table = table_of("Neurons of adapters", allocation_summary(histories))
    return [table], [allocation_finding(histories), final_allocation_finding(histories)]


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point; returns the exit code."""
    return program("allocation", __doc__, look, argv)
