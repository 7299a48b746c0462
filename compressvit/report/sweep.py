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
from compressvit.recipe.recipe import load_recipe
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
        The content of `sweep.json`: `runs`, `failed` (what was wrong, by name), `rows` of the comparison, and `best`.

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
    """The rows of finished runs and the best of them, printed too."""
    if not runs:
        return {"rows": [], "best": []}
    rows = compare(runs, output=output, console=console)
    best = best_of(rows)
    for one in best:
        where = f"{one['task']}: " if len(best) > 1 else ""
        console.print(where + one["text"], highlight=False, soft_wrap=True)
    return {"rows": rows, "best": best}


def _plan_table(runs: Sequence[Mapping[str, Any]]) -> Table:
    table = Table(title=f"{len(runs)} runs", title_justify="left")
    for column in ("run", "parameters", "MACs", "state"):
        table.add_column(column, justify="right" if column in ("parameters", "MACs") else "left")
    for run in runs:
        table.add_row(run["name"], f"{run['parameters']:,}", f"{run['macs'] / 1e6:,.2f} M", run["state"])
    return table


@dataclass(frozen=True)
class _Chosen:
    """What a run is judged by: a figure, and of which images it is."""

    quality: Quality
    value: float
    images: str


def best_of(rows: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """The best row of `compare` for each pair of data and teacher: by the mean over its seeds of the figure that decides for the task (the
    first of its ranking that was measured), then by fewer parameters.

    The figure is of the images held out for validation. Where there is a test it is the last evaluation of the last phase, so that the test
    says nothing of the choice; a run without a phase has none such and is judged by the test.
    """
    found = []
    for task in dict.fromkeys(row["task"] for row in rows):
        chosen = [(row, [_judged(Path(run)) for run in row["runs"]]) for row in rows if row["task"] == task]
        keys = {one.quality.key for _, many in chosen for one in many if one is not None}
        if len(chosen) < 2 or len(keys) != 1 or any(None in many for _, many in chosen):
            continue
        quality = next(one.quality for _, many in chosen for one in many if one is not None)
        means = [(row, mean(one.value for one in many if one is not None)) for row, many in chosen]
        sign = 1 if quality.lower_is_better else -1
        row, value = min(means, key=lambda pair: (sign * pair[1], pair[0]["parameters"]))
        images = {one.images for _, many in chosen for one in many if one is not None}
        found.append(
            {
                "task": task,
                "label": row["label"],
                "runs": row["runs"],
                "key": quality.key,
                "value": value,
                "images": sorted(images),
                "text": f"best by {quality.in_text}: {row['label']}, {quality.text(value)}{_seeds(row)}, {' and '.join(sorted(images))}",
            }
        )
    return found


def _seeds(row: Mapping[str, Any]) -> str:
    return f" (mean of {counted(len(row['runs']), 'seed')})" if len(row["runs"]) > 1 else ""


def _judged(run: Path) -> _Chosen | None:
    recipe, results = load_recipe(run / RESOLVED), read_results(run)
    task = find_task(recipe.data.usual_task)
    scores = results.student.model_dump()
    if results.reported_on == "test" and (last := _last_evaluation(run, results)) is not None:
        ranked, scores, images = (
            task.ranked(last),
            last,
            "on the images held out for validation, so that the test chose nothing",
        )
    else:
        ranked = task.ranked(scores)
        whose = "of the test" if results.reported_on == "test" else "held out"
        images = (
            f"on {counted(scores['images'] or 0)} {whose}, which chose it, so on others it tends to be a little worse"
        )
    return _Chosen(ranked[0], float(scores[ranked[0].key]), images) if ranked else None


def _last_evaluation(run: Path, results: Results) -> dict[str, float] | None:
    """The scores on the images of validation of the weights that the last phase kept; None where there is no phase."""
    if not results.phases:
        return None
    phase = list(results.phases)[-1]
    rows = [row for row in read_metrics(run / "metrics.jsonl") if isinstance(row, EvaluationRow) and row.phase == phase]
    kept = results.phases[phase].kept_epoch
    own = [row for row in rows if row.epoch == kept] or rows
    return own[-1].values if own else None
