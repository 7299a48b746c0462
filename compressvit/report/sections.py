"""The content of a run's page as plain values for the template: the verdict, tables, predictions, commands."""

from __future__ import annotations

import base64
import hashlib
import io
import itertools
import shlex
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from PIL import Image

from compressvit.charts.findings import Finding
from compressvit.reading import Unreadable, open_regular, read_bytes
from compressvit.report.record import Run
from compressvit.runs.files import (
    PICTURES,
    Answer,
    ClassRow,
    Environment,
    LedgerRow,
    PredictionsFile,
    Results,
    TriedRow,
)
from compressvit.runs.tables import cost_text, how_judged, latency_spread, ratio_text, results_rows
from compressvit.tasks.base import TASKS, Measure
from compressvit.tasks.qualities import qualities

CLASSES = 40  # more would be illegible; those that changed most are drawn
LOG_LINES = 8
SMALL_PICTURE = 96  # pixels; a larger one, in which something is drawn, gets more room
MAX_PICTURE = 2**20  # bytes; those of a run are a hundredth of it


def title(run: Run) -> str:
    """The recipe's description, or the folder's name."""
    return str(run.recipe.get("description") or run.path.resolve().name)


def facts(run: Run) -> list[str]:
    """Folder, teacher and data, for the line below the title."""
    teacher, data = (run.recipe.get(name) for name in ("teacher", "data"))
    words = [
        run.path.resolve().name,
        teacher.get("model") if isinstance(teacher, dict) else None,
        data.get("name") if isinstance(data, dict) else None,
        f"seed {run.recipe.get('seed', 0)}",
    ]
    return [str(word) for word in words if word]


def verdict(run: Run) -> str:
    """The result of the run in one sentence."""
    if run.results is None:
        return _not_finished(run)
    teacher, student = run.results.teacher, run.results.student
    parts = []
    if student.adapted:
        stored = f", stored in {student.adapter_bytes / 1e3:,.1f} kB" if student.adapter_bytes else ""
        parts.append(
            f"With {student.trained_adapter or 0:,} trained parameters and a classifier of {student.trained_head or 0:,} beside "
            f"a frozen backbone{stored}, the student"
        )
    else:
        slower = ""
        if ratio := run.results.slowdown:
            slower = f" and {ratio:.2f} times its latency"
        parts.append(
            f"With {_share(student.parameters, teacher.parameters)} of the teacher's parameters{slower}, the student"
        )
    of = "test" if run.results.reported_on == "test" else "held-out"
    images = f"{student.images:,} {of} images" if student.images else f"the {of} images"
    ours, theirs = student.model_dump(), teacher.model_dump()
    verdicts = (text for task in TASKS.values() if (text := task.verdict(ours, theirs, images)))
    parts.append(next(verdicts, "was made; there was nothing to evaluate it on"))
    return " ".join(parts).replace(" %", "\u00a0%") + "."


def _share(part: int, whole: int) -> str:
    """Percent; of nothing, which only a damaged file says, the number itself."""
    return f"{100 * part / whole:.1f} %" if whole else f"{part:,} instead of none"


def _not_finished(run: Run) -> str:
    if (run.path / "results.json").is_file():
        return "This run has finished, but its results cannot be read; the rest is shown below."
    last = run.metrics[-1] if run.metrics else None
    where = f"its last log line is step {last.step:,} of phase {last.phase}" if last else "it trained no step"
    return f"This run has not finished: {where}; the results so far are shown below."


def log_end(run: Run) -> str | None:
    """The last messages of run.log, without tables, if the run has not finished."""
    if run.results or not run.log:
        return None
    messages = [line for line in run.log.splitlines() if line[:1].isdigit() and line[-1:] != " "]
    return "\n".join(messages[-LOG_LINES:])


def measures(run: Run) -> list[tuple[str, str, str, str]]:
    """The rows of the table of teacher and student; those of the plan if there are no results."""
    summary = run.results or run.plan
    return results_rows(summary.teacher, summary.student) if summary else []


def details(run: Run) -> list[str]:
    """Small print below the table."""
    if run.results is None:
        return ["As planned, not measured."] if run.plan else []
    sentences = []
    if run.environment and run.results.student.latency_ms:
        where = ", ".join(run.environment.gpus) or _threads(run.environment)
        spread = f"; in brackets {latency_spread(run.results)}" if run.results.student.latency_ratio else ""
        sentences.append(
            f"Latency is the median for one image, teacher and student measured in turns on {where}{spread}."
        )
    if slower := run.results.slower:
        sentences.append(f"{slower[0].upper()}{slower[1:]}.")
    sentences += [f"{text[0].upper()}{text[1:]}." for text in how_judged(run.results.student.figures)]
    if fitted := run.results.fitted:
        sentences.append(f"{fitted.text[0].upper()}{fitted.text[1:]}.")
    for name, phase in run.results.phases.items():
        start = phase.start or {}
        figures = [q.had(v) for q in qualities().values() if q.curve and (v := start.get(q.key)) is not None]
        if figures:
            sentences.append(f"Before {name} the student had {figures[0]}.")
    if run.results.read_back_difference is not None:
        sentences.append(
            f"After reading the student back from disk, its outputs differ by at most {run.results.read_back_difference:.1e}."
        )
    if run.results.broken_images:
        sentences.append(f"{run.results.broken_images} broken image files were skipped; run.log names them.")
    sentences += [f"Figures: {text}." for text in (run.plan.figures if run.plan else ())]
    sentences += [f"Data: {note.text}." for note in run.results.data_notes]
    sentences += [f"Weights: {note.text}." for note in run.results.weights_notes]
    return sentences


def ledger(results: Results | None) -> list[tuple[str, list[LedgerRow], int, int]]:
    """For every step its name, its rows, and the total parameters before and after."""
    groups = itertools.groupby(results.ledger if results else [], lambda row: row.step)
    found = [(step, list(rows)) for step, rows in groups]
    return [(step, rows, sum(r.before for r in rows), sum(r.after for r in rows)) for step, rows in found]


def sizes(results: Results | None) -> list[dict[str, Any]]:
    """For every step that tried several sizes a sentence, and the headings and rows of its table."""
    found = []
    for search in results.sizes if results else []:
        names = list(dict.fromkeys(name for row in search.tried for name in row.figures))
        timed = "latency" in names
        predicted = ", as the table of its modules predicts it" if timed else ""
        unit = "MACs" if search.unit == "macs" else search.unit
        text = f"{search.step}: {search.asked}, on {search.where}. Sizes are parts of the teacher's {unit}{predicted}."
        heads = ["size", unit, *("latency / teacher" if n == "latency" else n.replace("_", " ") for n in names)]
        rows = [
            {
                "size": f"{row.size:.4g}",
                "cells": [cost_text(search.unit, row.spent), *(_tried(row, name) for name in names)],
                "kept": row.kept,
                "chosen": row.chosen,
            }
            for row in search.tried
        ]
        found.append({"text": text, "heads": heads, "rows": rows})
    return found


def _tried(row: TriedRow, name: str) -> str:
    """A figure of a size that was tried; empty if it has none."""
    value, interval = row.figures.get(name), row.intervals.get(name)
    if value is None:
        return ""
    return f"{value:#.4g}" if interval is None else ratio_text((interval[0], value, interval[1]))


def class_chart(predictions: PredictionsFile) -> Finding | None:
    """A chart with one row per class and one dot per model."""
    rows, what = list(predictions.classes or ()), predictions.class_figure
    if not rows:
        return None
    if predictions.compared:
        who: tuple[str, ...] = ("teacher", "student")
        order = "the line joins teacher and student, and the classes that lost most are at the top"
        kept, shown = "that changed most", sorted(rows, key=lambda row: -abs(_change(row)))[:CLASSES]
    else:
        who, order = ("student",), "the worst first"
        kept, shown = f"with the lowest {what}", sorted(rows, key=_change)[:CLASSES]
    cut = f"; the {CLASSES} of {len(rows):,} {kept} are shown" if len(shown) < len(rows) else ""
    rows = sorted(shown, key=_change)
    return Finding(
        name="classes",
        title=f"{what[0].upper()}{what[1:]} by class",
        caption=f"Each row is a class; {order}{cut}. In a class with few images a single one moves the dot far: hover to see how many "
        "there are.",
        chart="points",
        records=[
            {"class": row.name, "right": getattr(row, w), "model": w, "images": row.images} for row in rows for w in who
        ],
        options={
            "x": "right",
            "y": "class",
            "titles": {"right": f"{what} (%)", "class": "", "model": ""},
            **({"colour": "model", "span": True} if predictions.compared else {}),
        },
    )


def _change(row: ClassRow) -> float:
    return row.student - (row.teacher if row.teacher is not None else 0.0)


def measure_of(predictions: PredictionsFile) -> Measure | None:
    """The measure by which the images of a run were chosen; None if no installed task has it."""
    return next((t.measures[predictions.measure] for t in TASKS.values() if predictions.measure in t.measures), None)


def gallery(run: Run) -> list[dict[str, Any]]:
    """A card per stored image: its picture as a data URI, and lines of text, each marked as right or wrong."""
    if run.predictions is None:
        return []
    cards, lost = [], []
    measure = measure_of(run.predictions)
    for example in run.predictions.examples:
        # only pictures in the run's own folder, whatever path the file contains
        file = run.path / "predictions" / Path(example.file).name
        kind = {".png": "image/png", ".jpg": "image/jpeg"}.get(file.suffix)
        if kind is None or (found := _picture(file, run.path)) is None:
            lost.append(file.name)
            continue
        picture, size = found
        cards.append(
            {
                "picture": f"data:{kind};base64,{base64.b64encode(picture).decode()}",
                "pixelated": file.suffix == ".png",
                "large": max(size) > SMALL_PICTURE,
                "true": example.true,
                "lines": list(_answers(example.true, {"teacher": example.teacher, "student": example.student})),
                "value": measure.text(example.value) if measure else None,
            }
        )
    if lost:
        of = f"{len(lost)} of {len(run.predictions.examples)} pictures in {PICTURES}"
        run.notes.append(f"{of} cannot be read and are left out; the first is {lost[0]}.")
    return cards


def _picture(file: Path, run: Path) -> tuple[bytes, tuple[int, int]] | None:
    """The bytes of a small picture that a run kept, no link, and its size; None where it cannot be shown."""
    try:
        content = read_bytes(file, most=MAX_PICTURE, root=run)
        with Image.open(io.BytesIO(content), formats=("PNG", "JPEG")) as image:
            if max(image.size) > 4096:
                return None
            image.load()
            return content, image.size
    except Exception:  # what Pillow raises of a damaged picture has no common base
        return None


def _answers(true: str | None, answers: dict[str, Answer | str | None]) -> Iterator[dict[str, Any]]:
    for who, answer in answers.items():
        if isinstance(answer, str):
            yield {"who": who, "class": answer, "share": "", "right": None}
        elif answer is not None:
            yield {
                "who": who,
                "class": answer.name,
                "share": f"{100 * answer.probability:.0f} %",
                "right": None if true is None else answer.name == true,
            }


def overrides(command: Sequence[str]) -> list[str]:
    """The key=value arguments of a command, which override the recipe's file; `shrink` has none, and writes its limits so."""
    if "shrink" in command[1:2]:
        return []
    before = ["", *command]
    return [
        word
        for word, last in zip(command, before, strict=False)
        if "=" in word and not word.startswith("-") and last not in ("--output", "--device")
    ]


def reproduction(run: Run) -> list[tuple[str, str]]:
    """Commands to reproduce the run, each with its purpose."""
    found = []
    if run.environment:
        found.append(("the original command", shlex.join(run.environment.command)))
    found.append(
        (
            "the same run, with every default and override written out",
            f"compressvit apply {_quoted(run, 'resolved.yaml')} --output NEW_FOLDER",
        )
    )
    if (run.path / "student").is_dir():
        found.append(("evaluate the student", f"compressvit evaluate {shlex.quote(str(run.path))}"))
    elif run.results is None:
        found.append(("continue this run", f"compressvit apply {shlex.quote(str(run.path))} --resume"))
    return found


def _quoted(run: Run, name: str) -> str:
    return shlex.quote(str(run.path / name))


def environment(run: Run) -> list[tuple[str, str]]:
    """What the results may depend on besides the recipe."""
    recorded = run.environment
    if recorded is None:
        return []
    machine = ", ".join(recorded.gpus) + (f" (CUDA {recorded.cuda})" if recorded.cuda else "")
    rows = [
        ("compressvit", recorded.compressvit),
        ("Python", recorded.python),
        *((name, version) for name, version in recorded.versions.items() if version),
        ("platform", recorded.platform),
        ("processor", _threads(recorded)),
        ("graphics", machine),
    ]
    return [(name, value) for name, value in rows if value]


def _threads(environment: Environment) -> str:
    return f"{environment.cpu_count} CPU cores, of which PyTorch used {environment.torch_threads}"


def student_hash(run: Run) -> str | None:
    """SHA-256 of the student's tensors."""
    file = run.path / "student" / "model.safetensors"
    found = hashlib.sha256()
    try:
        with open_regular(file, run.path) as content:
            while block := content.read(2**20):
                found.update(block)
    except (Unreadable, OSError):  # `read_run` has left a note
        return None
    return found.hexdigest()
