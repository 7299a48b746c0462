"""Where pruning left neurons, run beside run; what `tools/allocation.py` prints and draws."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from compressvit.charts.findings import Finding
from compressvit.diagnostics.allocation import History
from compressvit.programs.recorded import Run, not_recorded
from compressvit.rows import WidthsRow, read_metrics
from compressvit.runs.files import read_results
from compressvit.training.phases.prune.spec import Prune


def final_allocation_finding(histories: Mapping[str, tuple[str, History]]) -> Finding:
    """`allocation_final`: neurons that are left in the end, a bar an adapter, runs side by side."""
    records = [
        {"run": run, "scope": scope, "layer": adapter, "start": start, "neurons": history[-1].get(adapter, 0)}
        for run, (scope, history) in histories.items()
        for adapter, start in history[0].items()
    ]
    return Finding(
        name="allocation_final",
        title="Neurons of every adapter in the end",
        caption="A bar an adapter, a colour a run. Runs of one size that differ in form put their neurons into other layers; global "
        "pruning (MiMi) may empty an adapter, local pruning leaves the same share of each.",
        chart="bars",
        records=records,
        options={
            "x": "neurons",
            "y": "layer",
            "colour": "run",
            "titles": {"neurons": "neurons left", "layer": "", "run": ""},
        },
    )


def allocation_summary(histories: Mapping[str, tuple[str, History]]) -> list[dict[str, Any]]:
    """A row an adapter for a table: neurons after every removal, of every history one after the other."""
    longest = max(len(history) for _, history in histories.values())
    found = []
    for panel, (scope, history) in histories.items():
        for adapter in history[0]:
            left = [widths.get(adapter, 0) for widths in history] + [None] * (longest - len(history))
            names = ["start", *(f"removal {i}" for i in range(1, longest))]
            found.append({"run": panel, "scope": scope, "adapter": adapter, **dict(zip(names, left, strict=True))})
    return found


def run_histories(run: Run) -> dict[str, tuple[str, History]]:
    """Scope and widths of every `prune` phase of a run, finished or not.

    Raises:
        UserError: it has none, or is damaged.
    """
    results, metrics = run.path / "results.json", run.path / "metrics.jsonl"
    scopes = {f"{i}_prune": s.spec.scope for i, s in enumerate(run.recipe.steps) if isinstance(s.spec, Prune)}
    if not scopes:
        raise not_recorded(
            run, "`prune` step", "only pruning removes neurons: put a `prune` step after `adapters` or `adaptformer`"
        )
    histories: dict[str, History] = {}
    if results.is_file():
        phases = read_results(run.path).phases
        histories = {phase: phases[phase].widths if phase in phases else [] for phase in scopes}
    elif metrics.is_file():
        by_phase: dict[str, dict[int, dict[str, int]]] = {phase: {} for phase in scopes}
        for row in read_metrics(metrics):
            if isinstance(row, WidthsRow) and row.phase in scopes:
                by_phase[row.phase][row.step] = row.widths  # a killed run says a removal again when it goes on
        histories = {phase: [by_step[step] for step in sorted(by_step)] for phase, by_step in by_phase.items()}
    known: dict[str, tuple[str, History]] = {
        phase: (scope, histories[phase]) for phase, scope in scopes.items() if histories.get(phase)
    }
    if not known:
        raise not_recorded(run, "pruning yet", "it has not reached its `prune` step; continue it with `--resume`")
    return known
