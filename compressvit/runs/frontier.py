"""`frontier`: quality of students before any training against what they cost, over a sweep of budgets, of one method or several."""

from __future__ import annotations

import csv
import io
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from compressvit.charts.plots import frontier_finding
from compressvit.data.input import Side
from compressvit.errors import UserError, option
from compressvit.files import write_json, write_text
from compressvit.model import cost, surgery
from compressvit.model.memory import inference_memory
from compressvit.recipe.recipe import Recipe
from compressvit.runs.methods import METHODS, budgeted, steps_of
from compressvit.runs.one_shot import OneShot, leading_transforms
from compressvit.runs.plan import plan_data
from compressvit.runs.tables import how_judged, how_measured, interval_text, megabytes, print_data, ratio_text
from compressvit.tasks.qualities import intervals as intervals_of
from compressvit.tasks.qualities import measured, qualities, words
from compressvit.terminal import print_table
from compressvit.transforms.shrink.spec import Shrink


def frontier(
    recipe: Recipe,
    *,
    budgets: list[float],
    unit: str,
    output: Path,
    device: str,
    console: Console,
    methods: Sequence[str] = (),
) -> list[dict[str, Any]]:
    """Apply the transforms before the recipe's first phase at every budget, evaluate, and write a table and a plot.

    The budget replaces the ranks or the budget of the last `shrink`, `low_rank`, `lors` or `quantise` step before the first phase. Nothing
    is trained. Of every student are measured parameters, bytes of its file, MACs, the memory of inference (`compressvit.model.memory`),
    the latency in turns with the teacher (`compressvit.model.cost.Latencies`), and what an evaluation measures.

    Args:
        recipe: has such a step before its first phase.
        budgets: in `unit`; values up to 1 are shares of the teacher's. A latency above 1 is in milliseconds.
        unit: 'parameters', 'bytes', 'macs' or 'latency', which only `shrink` spends: on `device`, of batches as the step says.
        output: folder for `frontier.csv`, `frontier.json` and `frontier.png`; created.
        device: as for `apply`.
        methods: words of `compressvit.runs.methods`, compared at every budget; each but the recipe's own has its default settings, in
            place of that step. None: the recipe's own alone.

    Returns:
        A row for the teacher and one for each method and budget that can be met. `latency` is the ratio to the teacher's, `latency_low` and
        `latency_high` are the ends of its interval.

    Raises:
        UserError: there is no such step, or it has no budgets in `unit`; the teacher has no values, or no budget can be met.
    """
    _require_spending(recipe, methods, unit)
    begin = OneShot(recipe, device, "frontier")

    batch = _batch(begin, unit)
    teacher = replace(begin.teacher, model=surgery.deep_copy(begin.teacher.model))
    rows = [_measured(begin, teacher, None, None, batch)]
    for method in methods or (None,):
        for budget in sorted(budgets, reverse=True):
            name = f"{method or ''} budget {budget:g}".strip()
            try:
                steps = steps_of(begin.transforms, method, begin.teacher.model, unit, budget)
                student, _ = begin.student(steps)
            except UserError as error:
                console.print(f"{name}: {error}", highlight=False)
                continue
            rows.append(_measured(begin, student, method, budget, batch))
            console.print(f"{name}: {words(rows[-1])}", highlight=False)
            if slower := begin.slower(student, _ratio(rows[-1])):
                console.print(f"{name}: {slower}", highlight=False)
    if len(rows) == 1:
        raise UserError("none of the budgets can be met; the messages above say which can")
    task = begin.scorer.task(begin.teacher)
    # the teacher agrees perfectly with itself; without labels, the last metric of the ranking is the most informative
    ranked = [q.key for q in task.ranked(rows[0])]
    _write(rows, output, unit, recipe.teacher.model, next((key for key in ranked if key in task.graded), ranked[-1]))
    _print(begin, rows, unit, batch, console)
    console.print(f"{output / 'frontier.png'}, {output / 'frontier.csv'}", highlight=False)
    return rows


def _print(begin: OneShot, rows: list[dict[str, Any]], unit: str, batch: int, console: Console) -> None:
    """The tables, and below them how it was measured and what the images and weights needed."""
    print_table(_costs(rows, unit), console)
    print_table(_quality(rows), console)
    console.print(
        f"latency: {how_measured(begin.where, batch)}\n"
        "memory: the weights, and the most that the tensors of one image's forward pass take at once",
        highlight=False,
        soft_wrap=True,
    )
    for text in how_judged({**rows[-1], "intervals": intervals_of(rows[-1])}):
        console.print(text, highlight=False, soft_wrap=True)
    print_data(plan_data(begin.job), console)
    for note in begin.weights:
        console.print(f"weights: {note.text}", highlight=False)
    if broken := begin.job.datasets.broken.count:
        console.print(f"{broken} broken image files were skipped", highlight=False)


def _require_spending(recipe: Recipe, methods: Sequence[str], unit: str) -> None:
    """Raise a `UserError` unless a step whose size follows from a budget precedes the first phase, and it (or all methods) can be given one
    in this unit."""
    specs = [spec for spec in leading_transforms(recipe) if spec.budget_units]
    if not specs:
        names = ", ".join(step.name for step in recipe.steps)
        raise UserError(
            "frontier spends its budgets on a `shrink`, `low_rank`, `lors` or `quantise` step before the first phase; the steps of this "
            f"recipe are {names}"
        )
    scratch = next((spec.name for spec in specs if getattr(spec, "init", None) == "scratch"), None)
    if scratch:
        raise UserError(
            f"frontier spends its budgets by the errors of a teacher's weights, which {scratch}.init=scratch does not use"
        )
    own = specs[budgeted(specs, unit)]
    units = {name: METHODS[name].units for name in methods} or {own.name: own.budget_units}
    without = [name for name, known in units.items() if unit not in known]
    if without:
        able = ", ".join(name for name, method in METHODS.items() if unit in method.units)
        raise UserError(
            f"{option('unit', unit)}: {' and '.join(without)} cannot be made for a budget of {unit}; of the methods only {able} can "
            f"({option('methods', able)}), or give another unit: {', '.join(units[without[0]])}"
        )


def _batch(begin: OneShot, unit: str) -> int:
    """Images at once for which latency counts: that of the recipe's step where it is the unit, else one."""
    own = begin.transforms[budgeted(begin.transforms, unit)]
    return own.batch if unit == "latency" and isinstance(own, Shrink) else 1


def _measured(begin: OneShot, side: Side, method: str | None, budget: float | None, batch: int) -> dict[str, Any]:
    """The row of a model; of the teacher without a budget."""
    scores, times = begin.scores(side), begin.times(side, batch)
    low, ratio, high = times.ratio(1)
    return {
        "method": method,
        "budget": budget,
        **cost.cost(side.model, side.input.size).as_dict(),
        "memory": inference_memory(side.model, side.input.size, begin.job.device),
        "latency_ms": times.medians[1],
        "latency": ratio,
        "latency_low": low,
        "latency_high": high,
        "images": scores["images"],
        "indexed": scores.get("indexed"),
        **{key: scores.get(key) for key in qualities()},
    }


def _ratio(row: dict[str, Any]) -> tuple[float, float, float]:
    return row["latency_low"], row["latency"], row["latency_high"]


def _costs(rows: list[dict[str, Any]], unit: str) -> Table:
    table = Table(title=f"What students cost (budgets: of the teacher's {unit})", title_justify="left")
    for column in ("budget", "parameters", "MACs", "file", "memory", "latency / teacher"):
        table.add_column(column, justify="right", no_wrap=column != "latency / teacher")
    for label, row in _labelled(rows, table):
        table.add_row(
            label,
            _short(row["parameters"]),
            _short(row["macs"]),
            megabytes(row["bytes"]),
            megabytes(row["memory"]),
            f"{row['latency_ms']:.2f} ms" if row["budget"] is None else ratio_text(_ratio(row)),
        )
    return table


def _quality(rows: list[dict[str, Any]]) -> Table:
    table = Table(title="Quality before any training", title_justify="left")
    shown = measured(rows[-1])
    table.add_column("budget", justify="right", no_wrap=True)
    for quality in shown:
        table.add_column(quality.heading, justify="right")
    for label, row in _labelled(rows, table):
        intervals = {**row, "intervals": {} if row["budget"] is None else intervals_of(row)}
        table.add_row(
            label,
            *("" if row[q.key] is None else q.number(row[q.key]) + interval_text(intervals, q.key) for q in shown),
        )
    return table


def _labelled(rows: list[dict[str, Any]], table: Table) -> Iterator[tuple[str, dict[str, Any]]]:
    """Rows with what stands first in their line of a table, in which every method begins with a line of its own."""
    before = None
    for row in rows:
        if row["method"] != before:
            table.add_section()
            table.add_row(row["method"])
        before = row["method"]
        yield "teacher" if row["budget"] is None else f"{row['budget']:g}", row


def _short(count: int) -> str:
    """A number with three digits or a few more, as '12.34 M'."""
    for size, letter in ((1e9, "G"), (1e6, "M")):
        if count >= size:
            return f"{count / size:.2f} {letter}"
    return f"{count:,}"


def _write(rows: list[dict[str, Any]], output: Path, unit: str, name: str, quality: str) -> None:
    text = io.StringIO()
    writer = csv.DictWriter(text, fieldnames=list(rows[0]))
    writer.writeheader()
    writer.writerows(rows)
    write_text(output / "frontier.csv", text.getvalue())
    write_json(output / "frontier.json", rows)
    frontier_finding(rows, unit, quality, qualities()[quality].axis, name).picture(output / "frontier.png")
