"""`frontier`: quality of students before any training against their size, over a sweep of budgets."""

from __future__ import annotations

import csv
import io
from dataclasses import replace
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from compressvit.charts.plots import frontier_finding
from compressvit.data.input import Side
from compressvit.errors import UserError
from compressvit.files import write_json, write_text
from compressvit.fitting.allocate import Budget
from compressvit.model import cost, surgery
from compressvit.recipe.recipe import Recipe
from compressvit.runs.one_shot import OneShot, leading_transforms
from compressvit.runs.plan import plan_data
from compressvit.runs.tables import megabytes, print_data
from compressvit.tasks.qualities import measured, qualities, words
from compressvit.transforms.base import Transform


def frontier(
    recipe: Recipe, *, budgets: list[float], unit: str, output: Path, device: str, console: Console
) -> list[dict[str, Any]]:
    """Apply the transforms before the recipe's first phase at every budget, evaluate, and write a table and a plot.

    The budget replaces the ranks or the budget of the last `shrink`, `low_rank` or `lors` step before the first phase. Nothing is trained.

    Args:
        recipe: has such a step before its first phase.
        budgets: in `unit`; values up to 1 are shares of the teacher's.
        unit: 'parameters', 'bytes' or 'macs'.
        output: folder for `frontier.csv`, `frontier.json` and `frontier.png`; created.
        device: as for `apply`.

    Returns:
        A row for the teacher and one for each budget that can be met.

    Raises:
        UserError: there is no such step, the teacher has no values, or no budget can be met.
    """
    _require_ranks(recipe)
    begin = OneShot(recipe, device, "frontier")

    def measure(side: Side, budget: float | None) -> dict[str, Any]:
        scores = begin.scores(side)
        costs = cost.cost(side.model, side.input.size).as_dict()
        return {"budget": budget, **costs, **{k: scores.get(k) for k, q in qualities().items() if not q.detail}}

    rows = [measure(replace(begin.teacher, model=surgery.deep_copy(begin.teacher.model)), None)]
    for budget in sorted(budgets, reverse=True):
        try:
            student, _ = begin.student(_with_budget(begin.transforms, Budget(**{unit: budget})))
        except UserError as error:
            console.print(f"budget {budget:g}: {error}", highlight=False)
            continue
        rows.append(measure(student, budget))
        console.print(f"budget {budget:g}: {words(rows[-1])}", highlight=False)
    if len(rows) == 1:
        raise UserError("none of the budgets can be met; the messages above say which can")
    task = begin.scorer.task(begin.teacher)
    # the teacher agrees perfectly with itself; without labels, the last metric of the ranking is the most informative
    graded = (q.key for q in task.ranked(rows[0]) if q.key in task.graded)
    _write(rows, output, unit, recipe.teacher.model, next(graded, task.ranking[-1]))
    console.print(_table(rows, unit))
    print_data(plan_data(begin.job), console)
    for note in begin.weights:
        console.print(f"weights: {note.text}", highlight=False)
    if broken := begin.job.datasets.broken.count:
        console.print(f"{broken} broken image files were skipped", highlight=False)
    console.print(f"{output / 'frontier.png'}, {output / 'frontier.csv'}", highlight=False)
    return rows


def _require_ranks(recipe: Recipe) -> None:
    """Raise a `UserError` unless a step whose size follows from a budget precedes the first phase."""
    specs = [spec for spec in leading_transforms(recipe) if _spends(spec)]
    if not specs:
        names = ", ".join(step.name for step in recipe.steps)
        raise UserError(
            f"frontier spends its budgets on a `shrink`, `low_rank` or `lors` step before the first phase; the steps of this recipe are "
            f"{names}"
        )
    scratch = next((spec.name for spec in specs if getattr(spec, "init", None) == "scratch"), None)
    if scratch:
        raise UserError(
            f"frontier spends its budgets by the errors of a teacher's weights, which {scratch}.init=scratch does not use"
        )


def _with_budget(specs: list[Transform], budget: Budget) -> list[Transform]:
    last = max(i for i, spec in enumerate(specs) if _spends(spec))
    return [(spec.with_budget(budget) or spec) if i == last else spec for i, spec in enumerate(specs)]


def _spends(spec: Transform) -> bool:
    return type(spec).with_budget is not Transform.with_budget


def _table(rows: list[dict[str, Any]], unit: str) -> Table:
    table = Table(title=f"Before any training (share: of the teacher's {unit})", title_justify="left")
    shown = measured(rows[-1])
    for column in ("budget", "parameters", "bytes", "MACs", "share"):
        table.add_column(column, justify="right", no_wrap=True)
    for quality in shown:
        table.add_column(quality.heading, justify="right")
    for row in rows:
        table.add_row(
            "teacher" if row["budget"] is None else f"{row['budget']:g}",
            f"{row['parameters']:,}",
            megabytes(row["bytes"]),
            f"{row['macs'] / 1e6:,.1f} M" if row["macs"] < 1e9 else f"{row['macs'] / 1e9:,.2f} G",
            f"{row[unit] / rows[0][unit]:.3f}",
            *(q.number(row[q.key]) for q in shown),
        )
    return table


def _write(rows: list[dict[str, Any]], output: Path, unit: str, name: str, quality: str) -> None:
    text = io.StringIO()
    writer = csv.DictWriter(text, fieldnames=list(rows[0]))
    writer.writeheader()
    writer.writerows(rows)
    write_text(output / "frontier.csv", text.getvalue())
    write_json(output / "frontier.json", rows)
    frontier_finding(rows, unit, quality, qualities()[quality].axis, name).picture(output / "frontier.png")
