"""The pictures that a run, `frontier` and `compare` leave, as findings: what each shows and how to read it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from compressvit.charts.findings import Finding
from compressvit.charts.qualities import QUALITIES, RANKING


def frontier_finding(rows: Sequence[Mapping[str, Any]], unit: str, quality: str, label: str, name: str) -> Finding:
    """Quality of the students before training against their size; the teacher's quality as a line.

    Args:
        rows: the teacher's first, then the students', with `unit` and `quality` among their keys.
        unit: 'parameters', 'bytes' or 'macs'.
        quality: key of the quality, and `label` what the axis calls it.
        name: the teacher's, for the title.
    """
    teacher, students = rows[0], sorted(rows[1:], key=lambda row: row[unit])
    return Finding(
        name="frontier",
        title=f"{name}: before any training",
        caption=f"Each point is a student for one budget of {unit}, evaluated before any training; the dashed line is the teacher. "
        "Where the curve leaves that line, compression starts to cost quality.",
        chart="points",
        records=[
            {"share": row[unit] / teacher[unit], "quality": row[quality], "written": f"{row[quality]:.4g}"}
            for row in students
        ],
        options={
            "x": "share",
            "y": "quality",
            "joined": True,
            "label": "written",
            "levels": {"teacher": teacher[quality]},
            "titles": {"share": f"{unit} of the student / of the teacher", "quality": label},
        },
    )


def ranks_finding(ranks: Mapping[str, int | None], full: Mapping[str, int]) -> Finding:
    """Bars of the rank of every layer's term, in the order of the model, before the rank its weight could have.

    Args:
        ranks: of the terms, by layer; None for one that stays dense.
        full: the smaller side of each layer's weight.
    """
    return Finding(
        name="ranks",
        title="Rank of every layer",
        caption="A blue bar is the rank of a layer's low-rank term, the grey bar the full rank of its weight. "
        "A budget gives high ranks to the layers that would lose most without them; a layer marked as dense keeps its weight.",
        chart="bars",
        records=[
            {
                "layer": name,
                "rank": full[name] if rank is None else rank,
                "full": full[name],
                "kept": "dense" if rank is None else "",
            }
            for name, rank in ranks.items()
        ],
        options={
            "x": "rank",
            "y": "layer",
            "behind": "full",
            **({"note": "kept"} if None in ranks.values() else {}),
            "titles": {"rank": "rank (grey: of the full weight)", "layer": "", "full": "of the full weight"},
        },
    )


def compare_findings(rows: Sequence[Mapping[str, Any]]) -> list[Finding]:
    """Accuracy (or likeness to the teacher) against what is trained beside the backbone, or the student's size where nothing is frozen.

    Args:
        rows: as `compressvit.report.compare.Row.as_dict` makes them.

    Returns:
        A finding for every task with something to draw; a colour for the first words of a label.
    """
    found = []
    for number, task in enumerate(dict.fromkeys(row["task"] for row in rows)):
        own = [row for row in rows if row["task"] == task]
        frozen = any(row["adapter_bytes"] is not None for row in own)
        size = "trained_adapter" if frozen else "parameters"
        quality = next((q for q in RANKING if any(row[q] is not None for row in own)), None)
        drawn = [row for row in own if quality and row[quality] is not None and row[size] is not None]
        if quality is None or not drawn:
            continue
        # with the classifier: where it is all that is trained, there is no other place on a logarithmic axis
        what = "trained parameters, with the classifier" if frozen else "parameters of the student"
        records = [
            {
                "student": row["label"],
                "method": " + ".join(word.split(" ")[0] for word in row["label"].split(" + ")),
                "size": row[size] + (row["trained_head"] or 0 if frozen else 0),
                "quality": row[quality],
                "deviation": row[f"{quality}_std"] or 0.0,
            }
            for row in drawn
        ]
        found.append(
            Finding(
                name=f"compare_{number}",
                title=task,
                caption="Each point is a recipe, with a bar of one standard deviation if it has several seeds. Higher is better and "
                "further left is smaller; the dashed line is the Pareto front: no other recipe is both as small and as good.",
                chart="points",
                records=[{**record, "front": _unbeaten(record, records)} for record in _by_size(records)],
                options={
                    "x": "size",
                    "y": "quality",
                    "colour": "method",
                    "error": "deviation",
                    "front": "front",
                    "scales": {"size": "log"},
                    "titles": {"size": what, "quality": QUALITIES[quality].heading, "method": "", "deviation": "±"},
                },
            )
        )
    return found


def _by_size(records: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return sorted(records, key=lambda record: record["size"])


def _unbeaten(one: Mapping[str, Any], records: Sequence[Mapping[str, Any]]) -> bool:
    """Whether no other record is at least as small and as good, and better in one of both."""
    return not any(
        other["size"] <= one["size"]
        and other["quality"] >= one["quality"]
        and (other["size"] < one["size"] or other["quality"] > one["quality"])
        for other in records
    )
