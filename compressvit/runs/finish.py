"""The end of a run: write the student, read it back, compare it with its teacher, and write `results.json`."""

from __future__ import annotations

from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

from torch import nn

from compressvit import processes
from compressvit.artifacts import artifact
from compressvit.artifacts.adapter import save_adapter
from compressvit.data.input import Side, class_mismatch
from compressvit.files import disk_faults, write_json
from compressvit.log import RunLog
from compressvit.log import log as warnings
from compressvit.model import cost, stored
from compressvit.runs.evaluate import Scorer
from compressvit.runs.files import RecipePlan, Results
from compressvit.runs.folder import RunFolder
from compressvit.runs.generalisation import beside
from compressvit.runs.job import Job
from compressvit.runs.models import has_own_head
from compressvit.runs.predictions import Predictions
from compressvit.runs.run import Trained
from compressvit.runs.slowness import slowness
from compressvit.runs.tables import how_judged, how_measured, results_table
from compressvit.tasks.qualities import differences, intervals
from compressvit.terminal import print_table
from compressvit.transforms.record import compression_of, only_adapted, trained_names, trained_parameters


def finish(job: Job, scorer: Scorer, folder: RunFolder, log: RunLog, *, plan: RecipePlan, trained: Trained) -> Results:
    """Write the student, read it back, compare, measure, and print the table.

    Args:
        job, scorer, folder, log: those of the run.
        plan: contains the costs of the teacher.
        trained: the result of the parts of the recipe.

    Returns:
        The content of `results.json`.
    """
    teacher, student = trained.teacher, trained.student
    stored.name_classes(student.model, job.datasets.class_names)
    difference = processes.led(lambda: save_student(student, folder.student))
    answers = scorer.task(student).answers(student.model, job.datasets.class_names, job.datasets.labelled)
    predictions = Predictions(student.input, answers)
    scores, theirs = _scores(scorer, student, teacher, predictions)
    job.datasets.broken.gather()
    found = _Found(difference, scores, theirs, predictions)
    return processes.led(lambda: _written(job, scorer, folder, log, plan, trained, found))


@dataclass(frozen=True)
class _Found:
    """What was found out about the student that was read back: the difference of its outputs, the scores of both models, and examples."""

    difference: float
    scores: dict[str, Any]
    theirs: dict[str, Any]
    predictions: Predictions


def _written(
    job: Job, scorer: Scorer, folder: RunFolder, log: RunLog, plan: RecipePlan, trained: Trained, found: _Found
) -> Results:
    """Measure, write the results and print the table."""
    teacher, student, scores = trained.teacher, trained.student, found.scores
    fitted = beside(trained.fitted, scores.get("cosine"))
    costs = cost.cost(student.model, student.input.size).as_dict()
    costs["bytes"] = (folder.student / stored.TENSORS).stat().st_size
    if only_adapted(student.model) and trained_names(student.model):
        with disk_faults(folder.path):
            file = save_adapter(student.model, folder.path / "adapter.safetensors")
        costs["adapter_bytes"] = file.stat().st_size
    times = cost.latencies([teacher.model, student.model], [teacher.input.size, student.input.size], device=job.device)
    results = Results.model_validate(
        {
            "teacher": {
                **plan.teacher.model_dump(exclude={"model"}),
                "images": scores["images"],
                **found.theirs,
                "latency_ms": times.medians[0],
            },
            "student": {
                **costs,
                **scores,
                **_trained(student.model, costs["parameters"]),
                "latency_ms": times.medians[1],
                **{"latency_ratio": times.ratio(1), "latency_confidence": cost.CONFIDENCE},
            },
            "reported_on": "validation" if job.datasets.test is None else "test",
            "phases": trained.phases,
            "ledger": [asdict(entry) for entry in compression_of(student.model).ledger],
            "sizes": _sizes(student.model),
            "fitted": None if fitted is None else fitted.model_dump(),
            "read_back_difference": found.difference,
            "broken_images": job.datasets.broken.count,
            "data_notes": [asdict(note) for note in job.datasets.notes()],
            "weights_notes": [note.model_dump() for note in plan.weights],
            "slower": slowness(student, teacher, times.ratio(1), costs["macs"] / max(1, plan.teacher.macs)),
        }
    )
    log.show_on_boards(lambda board: board.results(job.recipe, results))
    found.predictions.write(folder.path)
    log.each_once()
    write_json(folder.path / "results.json", results.model_dump(exclude_unset=True))  # last: it marks a run as finished
    needed = scorer.task(teacher).needs_classes(job.datasets.num_classes or 0)
    heads = getattr(teacher.model, "num_classes", 0)
    _report(job, folder, log, results, class_mismatch(needed, heads, new_head=has_own_head(job.recipe)))
    return results


def _trained(model: nn.Module, parameters: int) -> dict[str, int]:
    """Numbers of trained parameters; `trained_adapter` only if a part of the model is frozen."""
    counts = trained_parameters(model)
    if sum(counts.values()) == parameters:
        del counts["trained_adapter"]
    return counts


def _sizes(model: nn.Module) -> list[dict[str, Any]]:
    """How its steps came to the size of the student, where they tried several."""
    plans = compression_of(model).plans
    return [asdict(replace(sizes, step=plan.transform)) for plan in plans for sizes in plan.sizes()]


def save_student(student: Side, folder: Path) -> float:
    """Write the student, and read it back before it replaces an earlier one; returns the difference to the model's outputs."""
    differences: list[float] = []

    def check(written: Path) -> None:
        differences.append(artifact.read_back_difference(written, student.model, student.input.size))

    with disk_faults(folder):
        artifact.save(student.model, folder, input_config=student.input.as_dict(), check=check)
    return differences[0]


def _scores(
    scorer: Scorer, student: Side, teacher: Side, predictions: Predictions
) -> tuple[dict[str, Any], dict[str, Any]]:
    """The scores of the student compared with its teacher and those of the teacher alone, with intervals; on the test if there is one."""
    scorer = replace(scorer, datasets=scorer.datasets.evidence())
    comparable = scorer.comparable(teacher)
    scores = scorer.score(student, comparable, predictions.add, search=True)
    theirs = {key: scores.pop(f"teacher_{key}", None) for key in scorer.task(student).graded}
    apart = differences(scores)
    if comparable and teacher.input != student.input:
        # compared on the student's images, but its accuracy is that on images with its own preprocessing
        own = scorer.score(teacher, None, search=True)
        theirs, apart = {key: own.get(key) for key in theirs}, {}
    of_teacher = intervals({**theirs, "images": scores["images"]})
    return {**scores, "intervals": intervals(scores), "differences": apart}, {**theirs, "intervals": of_teacher}


def _report(job: Job, folder: RunFolder, log: RunLog, results: Results, mismatch: str | None) -> None:
    log.show(partial(print_table, results_table(results, f"{job.recipe.teacher.model} → {folder.student}")))
    if mismatch and job.recipe.student.head != "new":
        warnings.warning("warning: %s", mismatch)
    log.say(
        f"latency: {how_measured(f'{job.device}, {cost.threads_text()}')}. "
        f"The student was read back from disk: largest difference of its outputs {results.read_back_difference:.1e}"
    )
    if results.slower is not None:
        log.say(results.slower)
    if results.fitted is not None:
        log.say(results.fitted.text)
    for text in how_judged(results.student.figures):
        log.say(text)
    if files := len(job.datasets.broken.paths):
        log.say(f"{files} broken image files were skipped; run.log names them")
    for note in job.datasets.broken.notes():  # the others stand in the plan
        log.say(f"data: {note.text}")
    log.say(f"run folder: {folder.path}")
