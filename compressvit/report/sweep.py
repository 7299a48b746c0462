"""`sweep`: a recipe with every combination of some values, the runs compared, and the best of them by a rule that is told."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import mean
from typing import Any

from rich.console import Console
from rich.table import Table

from compressvit.data.notes import counted
from compressvit.errors import UserError, option
from compressvit.files import write_json
from compressvit.recipe.recipe import Recipe, load_recipe
from compressvit.report.compare import compare
from compressvit.rows import EvaluationRow, read_metrics
from compressvit.runs.boards.base import find_boards
from compressvit.runs.files import Results, read_results
from compressvit.runs.folder import RESOLVED
from compressvit.runs.sweep import cells_of, refuse_folder, run_cells
from compressvit.tasks.base import find_task
from compressvit.tasks.quality import Quality
from compressvit.terminal import Terminal, print_table

FILE = "sweep.json"


def sweep(
    recipe: str | Path,
    values: Sequence[str],
    output: str | Path,
    *,
    jobs: int = 1,
    device: str = "auto",
    resume: bool = False,
    dry_run: bool = False,
    console: Console | None = None,
    report: Callable[[Path], object] | None = None,
    command: Sequence[str] | None = None,
    log_to: Sequence[str] = (),
) -> dict[str, Any]:
    """Run a recipe with every combination of values, each in a folder of its own, and compare the runs. All are planned before the first
    begins, so that what cannot be done is told at once.

    Args:
        recipe: the path of a YAML file, or the name of a shipped recipe.
        values: `key=value,value,…` of the recipe, e.g. `["steps.0.multiplex.share=2,3", "seed=0,1,2"]`.
        output: the folder of the runs; `compare.md`, `.csv`, `.json`, `.png` and `sweep.json` are written there too.
        jobs: how many runs at once, each in a process.
        device: of every run, as for `apply`.
        resume: go on with the sweep in the folder: finished runs are passed over, interrupted ones continued, and others added.
        dry_run: only plan.
        console, report, command, log_to: as for `apply`.

    Returns:
        The content of `sweep.json`: `runs`, `failed` (what was wrong, by name), `rows` of `compare`, `best`, and `no_best` (why none).

    Raises:
        UserError: nothing varies, a run cannot be done, or the folder is in use.
        compressvit.runs.sweep.SweepStopped: by a signal.
    """
    console, output = Terminal(console), Path(output)
    if jobs < 1:
        raise UserError(f"{option('jobs', jobs)}: give how many runs at once, e.g. {option('jobs', 2)}")
    find_boards(log_to)
    refuse_folder(output, resume=resume)
    cells = cells_of(recipe, values, output, device=device, resume=resume)
    runs = [cell.as_dict() for cell in cells]
    result: dict[str, Any] = {"recipe": str(recipe), "output": str(output), "runs": runs}
    print_table(_plan_table(runs), console)
    if dry_run:
        return result
    result["failed"] = run_cells(
        cells,
        recipe=recipe,
        jobs=jobs,
        device=device,
        console=console,
        report=report,
        command=command,
        log_to=log_to,
    )
    result |= _compared([cell.folder.path for cell in cells if cell.name not in result["failed"]], output, console)
    write_json(output / FILE, result)
    for name, fault in result["failed"].items():
        console.print(f"not finished: {output / name}: {fault}", highlight=False, soft_wrap=True)
    return result


def _compared(runs: Sequence[Path], output: Path, console: Console) -> dict[str, Any]:
    """The rows of finished runs and the best of them, or why there is none; printed too."""
    if not runs:
        return {"rows": [], "best": [], "no_best": []}
    rows = compare(runs, output=output, console=console)
    best, none = best_of(rows)
    for one in (told := best + none):
        where = f"{one['task']}: " if len(told) > 1 else ""
        console.print(where + one["text"], highlight=False, soft_wrap=True)
    return {"rows": rows, "best": best, "no_best": none}


def _plan_table(runs: Sequence[Mapping[str, Any]]) -> Table:
    table = Table(title=f"{len(runs)} runs", title_justify="left")
    for column in ("run", "parameters", "MACs", "state"):
        table.add_column(column, justify="right" if column in ("parameters", "MACs") else "left")
    for run in runs:
        table.add_row(run["name"], f"{run['parameters']:,}", f"{run['macs'] / 1e6:,.2f} M", run["state"])
    return table


@dataclass(frozen=True)
class _Chosen:
    """What a run is judged by: a figure, and of which images it is; of two alike by its bytes."""

    quality: Quality
    value: float
    images: str
    bytes: int = 0

    @property
    def figure(self) -> str:
        return f"by {self.quality.in_text}"


def best_of(rows: Sequence[Mapping[str, Any]]) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """The best row of `compare` for each pair of data and teacher: by the mean over its seeds of the figure that decides for the task (the
    first of its ranking that was measured), then by fewer bytes. For pairs that have no best, why.

    The figure is of the images held out for validation. Where there is a test it is the evaluation of the last step there, so that the test
    says nothing of the choice. Only figures of the same images are ranked.
    """
    found: list[dict[str, Any]] = []
    none: list[dict[str, Any]] = []
    for task in dict.fromkeys(row["task"] for row in rows):
        own = [row for row in rows if row["task"] == task]
        judged = [[_judged(Path(run)) for run in row["runs"]] for row in own]
        known = [[one for one in many if one is not None] for many in judged]
        missing = [row["label"] for row, many in zip(own, judged, strict=True) if None in many]
        if why := _why_none(own, known, missing):
            none.append({"task": task, "text": f"there is no best: {why}"})
        else:
            found.append(_best(task, own, known))
    return found, none


def _why_none(
    rows: Sequence[Mapping[str, Any]], judged: Sequence[Sequence[_Chosen]], missing: Sequence[str]
) -> str | None:
    """Why rows cannot be ranked; None where they can."""
    if len(rows) < 2:
        return "the runs differ in their seeds alone" if len(rows[0]["runs"]) > 1 else "only one run is finished"
    if missing:
        return f"{', '.join(missing)}: no figure of what the last step left was measured on images held out"
    for attribute, what in (("figure", "by different figures"), ("images", "on different images")):
        each = [sorted({str(getattr(one, attribute)) for one in many}) for many in judged]
        if len({text for texts in each for text in texts}) > 1:
            pairs = (f"{row['label']} {' and '.join(texts)}" for row, texts in zip(rows, each, strict=True))
            return f"the students are judged {what}: {'; '.join(pairs)}"
    return None


def _best(task: str, rows: Sequence[Mapping[str, Any]], judged: Sequence[Sequence[_Chosen]]) -> dict[str, Any]:
    first = judged[0][0]
    quality, images = first.quality, first.images
    sign = 1 if quality.lower_is_better else -1
    means = [(mean(one.value for one in many), mean(one.bytes for one in many)) for many in judged]
    row, (value, _) = min(zip(rows, means, strict=True), key=lambda pair: (sign * pair[1][0], pair[1][1]))
    return {
        "task": task,
        "label": row["label"],
        "runs": row["runs"],
        "key": quality.key,
        "value": value,
        "images": images,
        "text": f"best by {quality.in_text}: {row['label']}, {quality.text(value)}{_seeds(row)}, {images}",
    }


def _seeds(row: Mapping[str, Any]) -> str:
    return f" (mean of {counted(len(row['runs']), 'seed')})" if len(row["runs"]) > 1 else ""


def _judged(run: Path) -> _Chosen | None:
    recipe, results = load_recipe(run / RESOLVED), read_results(run)
    task = find_task(recipe.data.usual_task)
    scores: Mapping[str, Any] = results.student.model_dump()
    of_test = results.reported_on == "test"
    if of_test:
        scores = _last_evaluation(run, recipe, results)
    ranked = task.ranked(scores)
    if not ranked:
        return None
    images = f"on {counted(int(scores.get('images') or 0))} held out"
    images += (
        " for validation, so that the test chose nothing"
        if of_test
        else ", which chose it, so on others it tends to be a little worse"
    )
    return _Chosen(ranked[0], float(scores[ranked[0].key]), images, results.student.bytes)


def _last_evaluation(run: Path, recipe: Recipe, results: Results) -> dict[str, float]:
    """The scores on the images of validation of what the last step left: of a phase the weights that it kept. None where that was not
    evaluated."""
    parts = recipe.parts()
    if not parts:
        return {}
    step, kept = parts[-1].transformed if parts[-1].phase is None else parts[-1].name, None
    if step in results.phases:
        kept = results.phases[step].kept_epoch
    rows = [row for row in read_metrics(run / "metrics.jsonl") if isinstance(row, EvaluationRow) and row.phase == step]
    own = [row for row in rows if row.epoch == kept] or rows
    return own[-1].values if own else {}
