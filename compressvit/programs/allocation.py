"""Numbers of neurons that pruning left, compared between runs; printed and drawn by `compressvit tool allocation`."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from compressvit.charts.findings import Finding
from compressvit.diagnostics.allocation import History
from compressvit.programs.recorded import Run, not_recorded
from compressvit.rows import WidthsRow, read_metrics
from compressvit.runs.files import read_results


def final_allocation_finding(histories: Mapping[str, tuple[str, History]]) -> Finding:
    """`allocation_final`: the final numbers of neurons, one bar per adapter, with runs side by side."""
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
    """Table rows, one per adapter and history: neurons after every removal."""
    longest = max(len(history) for _, history in histories.values())
    found = []
    for panel, (scope, history) in histories.items():
        for adapter in history[0]:
            left = [widths.get(adapter, 0) for widths in history] + [None] * (longest - len(history))
            names = ["start", *(f"removal {i}" for i in range(1, longest))]
            found.append({"run": panel, "scope": scope, "adapter": adapter, **dict(zip(names, left, strict=True))})
    return found


def run_histories(run: Run) -> dict[str, tuple[str, History]]:
    """Scope and widths of every phase of a run that removes neurons; the run need not be finished.

    Raises:
        UserError: the run has no such phase, or is damaged.
    """
    results, metrics = run.path / "results.json", run.path / "metrics.jsonl"
    phases = {part.name: part.phase for part in run.recipe.parts() if part.phase is not None}
    scopes = {name: phase.removal_scope for name, phase in phases.items() if phase.removal_scope is not None}
    if not scopes:
        raise not_recorded(
            run, "`prune` step", "only pruning removes neurons: put a `prune` step after `adapters` or `adaptformer`"
        )
    histories: dict[str, History] = {}
    if results.is_file():
        histories = {name: report.widths for name, report in read_results(run.path).phases.items()}
    elif metrics.is_file():
        removals = sorted((r for r in read_metrics(metrics) if isinstance(r, WidthsRow)), key=lambda row: row.step)
        histories = {name: [row.widths for row in removals if row.phase == name] for name in scopes}
    known: dict[str, tuple[str, History]] = {
        phase: (scope, histories[phase]) for phase, scope in scopes.items() if histories.get(phase)
    }
    if not known:
        raise not_recorded(run, "pruning yet", "it has not reached its `prune` step; continue it with `--resume`")
    return known
