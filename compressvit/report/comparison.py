"""Several runs side by side: the tables of `compare`, and quality against size, separately for each task."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from compressvit.errors import UserError
from compressvit.report.compare import cells, gather, latency_text
from compressvit.report.page import Page
from compressvit.report.record import Run
from compressvit.report.trade_off import compare_findings


def comparison(runs: Sequence[Run], page: Page) -> dict[str, Any]:
    """Tables, charts, and a note for every run that was left out."""
    finished = [run for run in runs if run.results]
    notes = [f"Left out, without results: {run.path}." for run in runs if not run.results]
    rows: list[dict[str, Any]] = []
    if finished:
        try:
            rows = gather([run.path for run in finished], lambda text: notes.append(f"{text[0].upper()}{text[1:]}."))
        except UserError as error:  # e.g. the recipe of another version
            notes.append(f"There is no comparison: {error}.")
    tables = []
    for task in dict.fromkeys(row["task"] for row in rows):
        heads, written = cells([row for row in rows if row["task"] == task])
        tables.append({"task": task, "heads": heads, "rows": written})
    # with a single recipe there is nothing to compare
    charts = [page.figure(found) for found in compare_findings(rows) if len(found.records) > 1]
    return {"notes": notes, "tables": tables, "charts": charts, "latency": latency_text(rows)}
