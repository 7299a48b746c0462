"""Reading a run folder, finished or not; every missing or damaged file is reported in the notes."""

from __future__ import annotations

import json
import os
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

from pydantic import ValidationError

from compressvit import __version__
from compressvit.charts import findings
from compressvit.charts.findings import Finding
from compressvit.errors import UserError
from compressvit.model.header import MANIFEST, TENSORS, read_header
from compressvit.model.old import current_recipe, current_text
from compressvit.reading import (
    MAX_BYTES,
    MAX_JSON,
    MAX_YAML,
    Unreadable,
    kind_of,
    parse_json,
    parse_yaml,
    read_json,
    read_text,
)
from compressvit.rows import MetricsRow, each_once, parse_metrics, read_rows
from compressvit.runs.files import (
    MEASURED,
    PICTURES,
    PREDICTIONS,
    Environment,
    MeasuredRow,
    PredictionsFile,
    RecipePlan,
    Results,
    RunFile,
)
from compressvit.runs.folder import RESOLVED, RunFolder
from compressvit.runs.listed import other_than_written
from compressvit.spec import first_fault

F = TypeVar("F", bound=RunFile)


@dataclass
class Run:
    """The data of a run for its report, with a message in `notes` for everything that is missing or damaged."""

    path: Path
    recipe_text: str | None = None
    resolved_text: str | None = None
    recipe: dict[str, Any] = field(default_factory=dict)
    environment: Environment | None = None
    plan: RecipePlan | None = None
    results: Results | None = None
    predictions: PredictionsFile | None = None
    metrics: list[MetricsRow] = field(default_factory=list)
    log: str | None = None
    findings: list[Finding] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)


def read_run(path: Path) -> Run:
    """Read a run folder found by `find_runs`."""
    run = Run(path)
    run.resolved_text = _text(run, RESOLVED, MAX_YAML)
    run.recipe_text = _text(run, "recipe.yaml", MAX_YAML)
    run.recipe = _recipe(run)
    run.environment = _json(run, "environment.json", Environment)
    if run.environment and run.environment.compressvit != __version__:
        run.notes.append(
            f"The run was made by compressvit {run.environment.compressvit}, and this page by {__version__}; "
            "anything that the two write differently is left out."
        )
    run.plan = _json(run, "plan.json", RecipePlan)
    finished = os.path.lexists(path / "results.json")
    if finished:
        run.results = _json(run, "results.json", Results)
    if os.path.lexists(path / "metrics.jsonl") or run.results is None or run.results.phases:
        run.metrics = _metrics(run)
    run.log = _text(run, "run.log")
    if os.path.lexists(path / PREDICTIONS):
        run.predictions = _json(run, PREDICTIONS, PredictionsFile)
    elif os.path.lexists(path / PICTURES):
        run.notes.append(f"There is no {PREDICTIONS}, although there is a folder {PICTURES}.")
    _findings(run)
    _artifacts(run, finished)
    if others := other_than_written(path, told=run.notes):
        run.notes.append(f"{others}. The page shows what is there now.")
    run.recipe = current_recipe(run.recipe)
    return run


def _text(run: Run, name: str, most: int = MAX_BYTES) -> str | None:
    try:
        return read_text(run.path / name, most=most, root=run.path)
    except Unreadable as error:
        run.notes.append(f"There is no {name}." if error.missing else f"{name} cannot be read: {error.fault}.")
    return None


def _recipe(run: Run) -> dict[str, Any]:
    """The resolved recipe as plain values, without validation; the report shows its text and needs only few values."""
    if run.resolved_text is None:
        return {}
    try:
        content = parse_yaml(run.resolved_text, RESOLVED)
    except UserError:
        content = None
    if not isinstance(content, dict):
        run.notes.append(f"{RESOLVED} is damaged: it is not a recipe.")
        return {}
    if lost := [key for key in ("teacher", "data", "steps") if key not in content]:
        run.notes.append(f"{RESOLVED} is damaged: it has no {' and no '.join(lost)}.")
    return content


def _json(run: Run, name: str, kind: type[F]) -> F | None:
    text = _text(run, name, MAX_JSON)
    if text is None:
        return None
    try:
        return kind.model_validate_json(json.dumps(parse_json(current_text(text, run.recipe), Path(name))))
    except Unreadable:
        what = "it is cut off, or no JSON"
    except ValidationError as error:
        what = first_fault(error)
    run.notes.append(f"{name} is damaged, or was written by another version, and is left out ({what}).")
    return None


def _findings(run: Run) -> None:
    """The findings, and a note for each that was recorded and cannot be shown."""
    folder = RunFolder(run.path).diagnostics
    if (kind := kind_of(folder)) not in (None, "a folder"):
        run.notes.append(f"diagnostics cannot be read: it is {kind}, not a folder.")
        return
    recorded: set[str] = set()
    try:
        if os.path.lexists(folder / MEASURED):
            recorded = {name for row in read_rows(folder / MEASURED, MeasuredRow) for name in row.findings}
    except UserError as error:
        run.notes.append(f"What was measured when is not known: {error}.")
    for file in sorted(folder.glob("*.json")):
        recorded.discard(file.stem)
        try:
            run.findings.append(findings.read(file))
        except UserError as error:
            run.notes.append(f"A diagnostic is left out: {error}.")
    run.notes += [f"A diagnostic is left out: there is no diagnostics/{name}.json." for name in sorted(recorded)]


def _artifacts(run: Run, finished: bool) -> None:
    """A note for a model that is missing or damaged; its tensors are not read."""
    for name in ("student", "teacher"):
        folder = run.path / name
        if not os.path.lexists(folder):
            if finished and name == "student":
                run.notes.append("There is no student.")
            continue
        for file, read in ((folder / MANIFEST, read_json), (folder / TENSORS, read_header)):
            try:
                read(file, run.path)
            except Unreadable as error:
                run.notes.append(f"{name}/{file.name} cannot be read: {error.fault}.")


def _metrics(run: Run) -> list[MetricsRow]:
    """The complete rows; of a step that a resumed run repeated, only the later one."""
    text = _text(run, "metrics.jsonl")
    found: list[MetricsRow] = []
    damaged = []
    lines = current_text(text or "", run.recipe).splitlines()
    if text is not None and not lines:
        run.notes.append("metrics.jsonl is empty.")
    for number, line in enumerate(lines, 1):
        try:
            found.append(parse_metrics(line))
        except ValidationError:
            damaged.append(number)
    if damaged == [len(lines)]:
        run.notes.append("The last line of metrics.jsonl was cut off and is left out.")
    elif damaged:
        run.notes.append(
            f"{len(damaged)} of {len(lines)} lines of metrics.jsonl are damaged and left out; the first is line {damaged[0]}."
        )
    return each_once(found)
