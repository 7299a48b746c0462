"""The chart of `compare`: quality of students against their cost, with the Pareto front."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from compressvit.charts.findings import Finding
from compressvit.tasks.qualities import qualities, ranking


def compare_findings(rows: Sequence[Mapping[str, Any]]) -> list[Finding]:
    """Accuracy (or another metric) against the number of trained parameters, or against the student's size if nothing is frozen.

    Args:
        rows: from `compressvit.report.compare.Row.as_dict`.

    Returns:
        A finding per task with anything to draw; students are coloured by the first words of their label.
    """
    found = []
    for number, task in enumerate(dict.fromkeys(row["task"] for row in rows)):
        own = [row for row in rows if row["task"] == task]
        frozen = any(row["adapter_bytes"] is not None for row in own)
        size = "trained_adapter" if frozen else "parameters"
        key = next((key for key in ranking() if any(row[key] is not None for row in own)), None)
        drawn = [row for row in own if key and row[key] is not None and row[size] is not None]
        if key is None or not drawn:
            continue
        quality = qualities()[key]
        sign = -1 if quality.lower_is_better else 1
        # includes the classifier: if only that is trained, 0 would not fit on a logarithmic axis
        what = "trained parameters, with the classifier" if frozen else "parameters of the student"
        records = [
            {
                "student": row["label"],
                "method": " + ".join(word.split(" ")[0] for word in row["label"].split(" + ")),
                "size": row[size] + (row["trained_head"] or 0 if frozen else 0),
                "quality": row[key],
                "deviation": row[f"{key}_std"] or 0.0,
            }
            for row in drawn
        ]
        found.append(
            Finding(
                name=f"compare_{number}",
                title=task,
                caption="Each point is a recipe, with a bar of one standard deviation if it has several seeds. "
                f"{'Lower' if quality.lower_is_better else 'Higher'} is better and further left is smaller; the dashed line is the Pareto "
                "front: no other recipe is both as small and as good.",
                chart="points",
                records=[{**record, "front": _unbeaten(record, records, sign)} for record in _by_size(records)],
                options={
                    "x": "size",
                    "y": "quality",
                    "colour": "method",
                    "error": "deviation",
                    "front": "front",
                    "scales": {"size": "log"},
                    "titles": {"size": what, "quality": quality.heading, "method": "", "deviation": "±"},
                },
            )
        )
    return found


def _by_size(records: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return sorted(records, key=lambda record: record["size"])


def _unbeaten(one: Mapping[str, Any], records: Sequence[Mapping[str, Any]], sign: int) -> bool:
    """Whether no other record is at least as small and as good, and better in one of the two; `sign` is −1 if less is better."""
    gains = [(one["size"] - other["size"], sign * (other["quality"] - one["quality"])) for other in records]
    return not any(min(gain) >= 0 and max(gain) > 0 for gain in gains)
