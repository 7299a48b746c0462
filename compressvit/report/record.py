"""Reads a run folder, finished or not: every file that is missing or damaged gets a sentence in the notes."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

import yaml
from pydantic import ValidationError

from compressvit import __version__
from compressvit.charts import findings
from compressvit.charts.findings import Finding
from compressvit.errors import UserError
from compressvit.model.old import current_recipe, current_text
from compressvit.rows import MetricsRow, each_once, parse_metrics
from compressvit.runs.files import Environment, PredictionsFile, RecipePlan, Results, RunFile
from compressvit.runs.folder import RESOLVED, RunFolder

F = TypeVar("F", bound=RunFile)


@dataclass
class Run:
    """What a report says of a run, with a sentence in `notes` for everything that is missing or damaged."""

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
    """Read a run folder that `find_runs` found."""
    run = Run(path)
    run.resolved_text = _text(run, RESOLVED)
    run.recipe_text = _text(run, "recipe.yaml")
    run.recipe = _recipe(run)
    run.environment = _json(run, "environment.json", Environment)
    if run.environment and run.environment.compressvit != __version__:
        run.notes.append(
            f"The run was made by compressvit {run.environment.compressvit}, and this page by {__version__}; "
            "anything that the two write differently is left out."
        )
    run.plan = _json(run, "plan.json", RecipePlan)
    finished = (path / "results.json").is_file()
    if finished:
        run.results = _json(run, "results.json", Results)
    if (path / "metrics.jsonl").is_file() or run.results is None or run.results.phases:
        run.metrics = _metrics(run)
    run.log = _text(run, "run.log")
    if (path / "predictions.json").is_file():
        run.predictions = _json(run, "predictions.json", PredictionsFile)
    for file in sorted(RunFolder(path).diagnostics.glob("*.json")):
        try:
            run.findings.append(findings.read(file))
        except UserError as error:
            run.notes.append(f"A diagnostic is left out: {error}.")
    run.recipe = current_recipe(run.recipe)
    return run


def _text(run: Run, name: str) -> str | None:
    try:
        return (run.path / name).read_text(encoding="utf-8")
    except FileNotFoundError:
        run.notes.append(f"There is no {name}.")
    except (OSError, UnicodeDecodeError) as error:
        run.notes.append(f"{name} cannot be read: {error}.")
    return None


def _recipe(run: Run) -> dict[str, Any]:
    """The resolved recipe as plain values; the report shows its text and needs few of them."""
    if run.resolved_text is None:
        return {}
    try:
        content = yaml.safe_load(run.resolved_text)
    except yaml.YAMLError:
        content = None
    if not isinstance(content, dict):
        run.notes.append(f"{RESOLVED} is damaged: it is not a recipe.")
        return {}
    return content


def _json(run: Run, name: str, kind: type[F]) -> F | None:
    text = _text(run, name)
    if text is None:
        return None
    try:
        return kind.model_validate_json(current_text(text, run.recipe))
    except ValidationError as error:
        fault = error.errors()[0]
        where = ".".join(map(str, fault["loc"]))
        what = f"{where}: {fault['msg'].lower()}" if where else "it is cut off, or no JSON"
        run.notes.append(f"{name} is damaged, or was written by another version, and is left out ({what}).")
    return None


def _metrics(run: Run) -> list[MetricsRow]:
    """The whole lines; of a step that a resumed run took again, the later one."""
    text = _text(run, "metrics.jsonl")
    found: list[MetricsRow] = []
    damaged = []
    lines = current_text(text or "", run.recipe).splitlines()
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
