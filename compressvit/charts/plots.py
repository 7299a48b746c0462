"""The charts that a run and `frontier` write, as findings with captions."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from compressvit.charts.findings import Finding


def frontier_finding(rows: Sequence[Mapping[str, Any]], unit: str, quality: str, label: str, name: str) -> Finding:
    """Quality of the students before training against their size; the teacher's quality as a line.

    Args:
        rows: the teacher's first, then the students', with `unit` and `quality` among their keys.
        unit: 'parameters', 'bytes', 'macs' or 'latency', which is a ratio to the teacher's.
        quality: key of the quality, and `label` what the axis calls it.
        name: the teacher's, for the title.
    """
    teacher, students = rows[0], sorted(rows[1:], key=lambda row: row[unit])
    whole = 1.0 if unit == "latency" else teacher[unit]
    several = len({row.get("method") for row in students}) > 1
    return Finding(
        name="frontier",
        title=f"{name}: before any training",
        caption=f"Each point is a student for one budget of {unit}, evaluated before any training; the dashed line is the teacher. "
        "Where the curve leaves that line, compression starts to cost quality.",
        chart="points",
        records=[
            {
                "share": row[unit] / whole,
                "quality": row[quality],
                "written": f"{row[quality]:.4g}",
                **({"method": row["method"]} if several else {}),
            }
            for row in students
        ],
        options={
            **({"colour": "method"} if several else {}),
            "x": "share",
            "y": "quality",
            "joined": True,
            "label": "written",
            "levels": {"teacher": teacher[quality]},
            "titles": {"share": f"{unit} of the student / of the teacher", "quality": label, "method": ""},
        },
    )


def ranks_finding(ranks: Mapping[str, int | None], full: Mapping[str, int]) -> Finding:
    """Bars of the rank of every layer's term, in the order of the model, with its weight's full rank drawn in grey.

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
