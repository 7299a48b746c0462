"""Training curves from `metrics.jsonl`, with the same names as in TensorBoard."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from compressvit.charts.findings import Finding
from compressvit.errors import UserError, did_you_mean
from compressvit.programs.recorded import Run, not_recorded
from compressvit.rows import read_metrics
from compressvit.runs.tags import scalar_tags, tag_of
from compressvit.tasks.qualities import ranking

METRICS = "metrics.jsonl"
Curve = list[tuple[int, float]]  # optimiser step of the phase, value
Curves = dict[tuple[str, str], Curve]  # by label of the run and tag


def read_curves(runs: Sequence[Run], wanted: Sequence[str] | None = None) -> Curves:
    """The curves of runs.

    Args:
        wanted: tags, such as 'distill/evaluate/top1'; None: for every phase, the mean loss per epoch, and the first of top-1, agreement and
            cosine that its evaluations contain.

    Raises:
        UserError: a run has no metrics, or none of the runs has a tag.
    """
    everything: Curves = {}
    for run in runs:
        for tag, curve in _all_curves(run).items():
            everything[run.label, tag] = curve
    known = list(dict.fromkeys(tag for _, tag in everything))
    for tag in wanted or ():
        if tag not in known:
            near = did_you_mean(tag, known, list_at_most=40) or f"there are e.g. {', '.join(known[:6])}"
            raise UserError(f"there is no curve {tag!r} in these runs; {near}")
    chosen = wanted or [tag for tag in known if _says_most(tag, known)]
    return {
        (label, tag): everything[label, tag]
        for tag in chosen
        for label in (r.label for r in runs)
        if (label, tag) in everything
    }


def _all_curves(run: Run) -> dict[str, Curve]:
    path = run.path / METRICS
    rows = read_metrics(path) if path.is_file() else []
    if not rows:
        raise not_recorded(
            run,
            "metrics yet",
            "they are written from the first steps of its first phase on; continue it with `--resume`",
        )
    tags = scalar_tags(run.recipe)
    points: dict[str, Curve] = {}
    for row in rows:
        for name, value in row.values.items():
            points.setdefault(f"{tag_of(row.phase, tags)}/{row.kind}/{name}", []).append((row.step, value))
    return {tag: sorted(curve) for tag, curve in sorted(points.items())}


def _says_most(tag: str, known: Sequence[str]) -> bool:
    place, _, name = tag.rpartition("/")
    if place.endswith("/evaluate"):
        return name == next((q for q in ranking() if f"{place}/{q}" in known), None)
    return place.endswith("/epoch") and name == "loss"


def curves_finding(curves: Curves) -> Finding:
    """`curves`: a chart with one panel per tag and one line per run."""
    records = [
        {"run": label, "curve": tag, "step": step, "value": value}
        for (label, tag), curve in curves.items()
        for step, value in curve
    ]
    return Finding(
        name="curves",
        title="Training curves",
        caption="A panel a quantity, a line a run, over the optimiser steps of a phase; step 0 is before its first. Loss counts every term "
        "after weighting, so losses compare only between runs with the same terms; accuracies always do.",
        chart="lines",
        records=records,
        options={
            "x": "step",
            "y": "value",
            "colour": "run",
            "facet": "curve",
            "titles": {"step": "optimiser step", "value": ""},
        },
    )


def curves_summary(curves: Curves) -> list[dict[str, Any]]:
    """First, last, lowest and highest value of every curve."""
    return [
        {
            "run": label,
            "curve": tag,
            "steps": curve[-1][0],
            "first": float(curve[0][1]),
            "last": float(curve[-1][1]),
            "lowest": float(min(value for _, value in curve)),
            "highest": float(max(value for _, value in curve)),
        }
        for (label, tag), curve in curves.items()
    ]
