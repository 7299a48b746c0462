"""A run folder as far as it goes: what is whole is read, and what is missing or damaged is said in a sentence each."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, TypeVar

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from compressvit import __version__
from compressvit.charts import findings
from compressvit.charts.findings import Finding
from compressvit.errors import UserError
from compressvit.model.old import current_recipe, current_text
from compressvit.rows import MetricsRow
from compressvit.runs.folder import RESOLVED, RunFolder


class _File(BaseModel):
    """What the report relies on; a file may say more."""

    model_config = ConfigDict(extra="allow")


class Side(_File):
    """Teacher or student in `results.json` and `plan.json`."""

    parameters: int
    bytes: int
    macs: int
    images: int | None = None
    latency_ms: float | None = None
    top1: float | None = None
    top5: float | None = None
    agreement: float | None = None
    cosine: float | None = None
    trained_adapter: int | None = None
    trained_head: int | None = None
    adapter_bytes: int | None = None


class LedgerRow(_File):
    """What a transform did to a module."""

    step: str
    path: str
    change: str
    before: int
    after: int
    weight_error: float | None = None
    output_error: float | None = None


class Phase(_File):
    """What a phase began with, and the epoch whose weights it kept."""

    start: dict[str, float | None] | None = None
    kept_epoch: int | None = None


class Results(_File):
    """`results.json`."""

    teacher: Side
    student: Side
    phases: dict[str, Phase] = {}
    ledger: list[LedgerRow] = []
    read_back_difference: float | None = None
    broken_images: int = 0


class Plan(_File):
    """`plan.json`."""

    teacher: Side
    student: Side


class Environment(_File):
    """`environment.json`."""

    command: list[str]
    compressvit: str
    python: str
    platform: str
    cpu_count: int | None = None
    torch_threads: int | None = None
    cuda: str | None = None
    gpus: list[str] = []
    versions: dict[str, str | None] = {}


class Answer(_File):
    """A model's first class of an image."""

    name: str = Field(alias="class")
    probability: float


class Example(_File):
    """An image worth looking at."""

    file: str
    value: float
    true: str | None = None
    teacher: Answer | None = None
    student: Answer | None = None


class ClassRow(_File):
    """Percent right in a class."""

    name: str = Field(alias="class")
    images: int
    teacher: float | None = None
    student: float


class Confusion(_File):
    """How often the images of a class are taken for another."""

    true: str
    answer: str
    teacher: int | None = None
    student: int


class PredictionsFile(_File):
    """`predictions.json`."""

    format: Literal[1]
    images: int
    compared: bool
    measure: Literal["shift", "cosine", "loss"]
    classes: list[ClassRow] | None
    confusions: list[Confusion] | None
    confusions_in_all: int | None = None  # older runs have none
    examples: list[Example]


F = TypeVar("F", bound=_File)


@dataclass
class Run:
    """What a report says of a run, with a sentence in `notes` for everything that is missing or damaged."""

    path: Path
    recipe_text: str | None = None
    resolved_text: str | None = None
    recipe: dict[str, Any] = field(default_factory=dict)
    environment: Environment | None = None
    plan: Plan | None = None
    results: Results | None = None
    predictions: PredictionsFile | None = None
    metrics: list[dict[str, Any]] = field(default_factory=list)
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
            "what the two write differently is left out."
        )
    run.plan = _json(run, "plan.json", Plan)
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
        run.notes.append(f"{RESOLVED} is damaged: it is no recipe.")
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


def _metrics(run: Run) -> list[dict[str, Any]]:
    """The whole lines; of a step that a resumed run took again, the later one."""
    text = _text(run, "metrics.jsonl")
    found: dict[tuple[str, str, int], dict[str, Any]] = {}
    damaged = []
    lines = current_text(text or "", run.recipe).splitlines()
    for number, line in enumerate(lines, 1):
        try:
            row = MetricsRow.model_validate_json(line).model_dump()
        except ValidationError:
            damaged.append(number)
            continue
        found[row["phase"], row["kind"], row["step"]] = row
    if damaged == [len(lines)]:
        run.notes.append("The last line of metrics.jsonl was cut off and is left out.")
    elif damaged:
        run.notes.append(
            f"{len(damaged)} of {len(lines)} lines of metrics.jsonl are damaged and left out; the first is line {damaged[0]}."
        )
    return list(found.values())
