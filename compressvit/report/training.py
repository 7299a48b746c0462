"""The training curves of a run: findings for loss, accuracy, gradient norm and learning rate of every phase."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Sequence
from typing import Any

from compressvit.charts.findings import Finding, stretches
from compressvit.rows import EpochRow, EvaluationRow, MetricsRow, TrainRow
from compressvit.tasks.qualities import graded, qualities

POINTS = 200  # approximate maximum per line; more are averaged over equal intervals
_RANGE = 30.0  # ratio of the largest to the smallest value above which an axis is logarithmic

# Keys of a training row that are not terms of the loss.
_NO_TERMS = ("images", "gradient_norm", "lr")


def phases(metrics: Sequence[MetricsRow]) -> dict[str, list[MetricsRow]]:
    """The rows of every phase that trained, in their order.

    The cycles of `prune` are concatenated to one phase, and an evaluation right before a phase is its step 0.
    """
    training = {row.phase for row in metrics if isinstance(row, (TrainRow, EpochRow))}
    found: dict[str, list[MetricsRow]] = {}
    before: MetricsRow | None = None
    cycle, passed = "", 0  # the cycle of the rows, and the number of steps before it
    for row in metrics:
        if row.phase not in training:
            before = row if isinstance(row, EvaluationRow) else before
            continue
        name = re.sub(r"_cycle\d+$", "", row.phase)
        own = found.setdefault(name, [before.model_copy(update={"step": 0})] if before else [])
        before = None
        if row.phase != cycle:
            cycle, passed = row.phase, own[-1].step if own else 0
        own.append(row.model_copy(update={"step": row.step + passed}))
    return found


def curves(phase: str, own: Sequence[MetricsRow]) -> list[Finding]:
    """The findings of a phase."""
    train = [row for row in own if isinstance(row, TrainRow)]
    candidates = (_loss(phase, train), _quality(phase, own), _gradient(phase, train), _rate(phase, train))
    return [finding for finding in candidates if finding is not None]


def _loss(phase: str, train: Sequence[MetricsRow]) -> Finding | None:
    others = {*_NO_TERMS, *graded(), *(f"teacher_{key}" for key in graded())}
    logged = dict.fromkeys(key for row in train for key in row.values if key not in others)
    # What else a term logs is named after it, as attention_relation_kl is, and not weighted.
    terms = [key for key in logged if not any(key.startswith(f"{term}_") for term in logged)]
    if terms[:1] == ["loss"] and len(terms) == 2:  # with a single term, the loss equals it
        terms = ["loss"]
    records = [record for term in terms for record in _series(train, term, term)]
    return _finding(
        f"{phase}_loss",
        "Loss and its terms" if len(terms) > 1 else "Loss",
        "The loss, which is minimised, and every term after weighting. It should fall and then level off; a rising term means that the "
        "others fall at its expense."
        if len(terms) > 1
        else "The loss, which is minimised. It should fall and then level off.",
        records,
        "loss",
    )


def _quality(phase: str, own: Sequence[MetricsRow]) -> Finding | None:
    epochs = [row for row in own if isinstance(row, EpochRow)]
    held_out = [row for row in own if isinstance(row, EvaluationRow)]
    for key, quality in qualities().items():
        records = [
            *_series(epochs, key, "training images"),
            *_series(held_out, key, "held-out images"),
            # last, because colours are assigned by order
            *_series(epochs, f"teacher_{key}", "teacher, training images"),
        ]
        if quality.curve is not None and records:
            name, title, caption = quality.curve.name, quality.curve.title, quality.curve.caption
            return _finding(f"{phase}_{name}", title, caption, records, quality.heading)
    return None


def _gradient(phase: str, train: Sequence[MetricsRow]) -> Finding | None:
    caption = "Norm of the gradient before clipping. Spikes are steps that may undo progress; a steady rise is a sign of divergence."
    return _finding(
        f"{phase}_gradient", "Gradient norm", caption, _series(train, "gradient_norm", "gradient norm"), "gradient norm"
    )


def _rate(phase: str, train: Sequence[MetricsRow]) -> Finding | None:
    caption = "The learning rate of every step: the warm-up, then the schedule."
    return _finding(f"{phase}_lr", "Learning rate", caption, _series(train, "lr", "learning rate"), "learning rate")


def _finding(name: str, title: str, caption: str, records: list[dict[str, Any]], axis: str) -> Finding | None:
    if len(records) < 2:  # a single value does not make a curve
        return None
    values = [record["value"] for record in records]
    log = min(values) > 0 and max(values) / min(values) > _RANGE and axis != "learning rate"
    series = {record["series"] for record in records}
    return Finding(
        name=name,
        title=title,
        caption=caption + (" The axis is logarithmic." if log else ""),
        chart="lines",
        records=records,
        options={
            "x": "step",
            "y": "value",
            **({"colour": "series"} if len(series) > 1 else {}),
            "titles": {"step": "step", "value": axis, "series": ""},
            "points": max(sum(r["series"] == s for r in records) for s in series) <= 25,
            **({"scales": {"value": "log"}} if log else {}),
        },
    )


def _series(rows: Iterable[MetricsRow], key: str, name: str) -> list[dict[str, Any]]:
    """A record per row that has the key, or per interval if there are more than `POINTS` rows."""
    found = ((row.step, row.value(key)) for row in rows)
    known = [(step, value) for step, value in found if value is not None and math.isfinite(value)]
    return [
        {"step": part[-1][0], "value": float(f"{sum(v for _, v in part) / len(part):.5g}"), "series": name}
        for part in stretches(known, POINTS)
    ]
