"""`apply`: run a recipe, and write the student and its results to a run folder."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass, field
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console
from torch import nn

from compressvit import processes
from compressvit.errors import UserError
from compressvit.fitting.choices import Choices
from compressvit.log import RunLog, log
from compressvit.notes import Note
from compressvit.recipe.recipe import Recipe, parse_recipe, read_recipe
from compressvit.recipe.yaml import dumped
from compressvit.runs.boards.base import Board, begin, find_boards, opened
from compressvit.runs.files import NoteRow, RecipePlan, Results
from compressvit.runs.finish import finish
from compressvit.runs.finished import FinishedRun, finished_run
from compressvit.runs.folder import RunFolder, refuse_processes
from compressvit.runs.job import Job, prepare, refuse_data, refuse_own_inputs
from compressvit.runs.keep import refuse_judged
from compressvit.runs.listed import is_listed, other_files, remove_remade, without_list, write_list
from compressvit.runs.merge import merge_folder, print_merge
from compressvit.runs.models import trains_teacher
from compressvit.runs.plan import plan_data, plan_job, require_no_conflicts
from compressvit.runs.plan_cache import count_answers
from compressvit.runs.resources import resource_faults
from compressvit.runs.run import Run, fill_teacher, measure_first
from compressvit.runs.tables import print_plan
from compressvit.runs.tags import scalar_tags, tag_of
from compressvit.runs.what_fits import what_fits
from compressvit.terminal import Terminal
from compressvit.training.stopping import Stoppable


@dataclass(frozen=True)
class RunResult:
    """The result of `apply`.

    Attributes:
        student, teacher: in eval mode, on the device of the run. If the run was finished before, they are read from its folder when
            they are first used.
        results: the content of `results.json`: scores and costs of `teacher` and `student`, `phases`, `ledger`, ….
        folder: the run folder.
        merged: the content of `merge.json` if the recipe ends with a merge, else None.
    """

    results: Results
    folder: Path
    merged: dict[str, Any] | None = None
    _models: Callable[[], tuple[nn.Module, nn.Module]] = field(repr=False, kw_only=True)

    @cached_property
    def _both(self) -> tuple[nn.Module, nn.Module]:
        return self._models()

    @property
    def student(self) -> nn.Module:
        return self._both[0]

    @property
    def teacher(self) -> nn.Module:
        return self._both[1]


def apply(
    recipe: Recipe | Mapping[str, Any] | str | Path,
    output: str | Path,
    *,
    overrides: Sequence[str] = (),
    device: str = "auto",
    resume: bool = False,
    overwrite: bool = False,
    console: Console | None = None,
    report: Callable[[Path], object] | None = None,
    command: Sequence[str] | None = None,
    log_to: Sequence[str] = (),
) -> RunResult:
    """Run a recipe, as `compressvit apply` does.

    Errors that can be found in advance, such as conflicting steps and missing data or weights, are raised before the folder is touched.

    Args:
        recipe: a `Recipe`, its content as a dictionary, the path of a YAML file, or the name of a shipped recipe.
        output: the run folder.
        overrides: changes to a recipe given as a name, path or dictionary, e.g. `["data.root=FOLDER", "seed=1"]`.
        device: 'auto', 'cpu', 'cuda', 'cuda:1', 'mps', …
        resume, overwrite: continue the run in a folder that is not empty, or replace it. In an empty one, as a run leaves it that was
            killed at once, `resume` begins it.
        console: shows progress and tables; `Console(quiet=True)` shows nothing.
        report: called with the run folder once the results are written, before a merge.
        command: the command line to record in `environment.json`; by default that of this process.
        log_to: words of boards beside TensorBoard that show the run, e.g. `["wandb"]`.

    Raises:
        UserError: the recipe cannot be run as requested.
        compressvit.training.loop.Interrupted: stopped by a signal; in a training after writing a checkpoint.

    Example:
        >>> import compressvit
        >>> run = compressvit.apply("quickstart", "runs/first", overrides=["seed=1"])  # doctest: +SKIP
        >>> run.results.student.top1  # doctest: +SKIP
        97.21
    """
    folder, boards = RunFolder(output), find_boards(log_to)
    with processes.joined(device):
        resume, overwrite = processes.led(lambda: _as_begun(folder, resume, overwrite))
        recipe, name, text = processes.first(lambda: _recipe(recipe, overrides, folder if resume else None))
        begun = _Begun(recipe, text, list(command or sys.argv), folder, resume, overwrite, boards)
        processes.led(begun.refuse)
        with Stoppable(folder.path if resume else None) as stoppable:
            if resume and (finished := _finished(recipe, folder, device, console, report)):
                return finished
            job, plan, moved = processes.first(lambda: _prepared(recipe, name, device, folder, resume, overwrite))
            with begun.owned():
                teacher, taught = processes.first(lambda: _fill_teacher(job, plan, folder, resume=resume))
                measured = processes.led_for(lambda: measure_first(job, teacher, folder, resume=resume), Choices())
                with begun.opened(plan, moved) as shown:
                    stoppable.run = folder.path
                    faults = resource_faults(recipe.data, partial(what_fits, job, plan))
                    with _logged(recipe, folder, console, shown) as run_log, faults:
                        run_log.show(lambda to: print_plan(plan, to))
                        return _run(Run(job, folder, run_log, measured), plan, teacher, taught, report)


@dataclass(frozen=True)
class _Begun:
    """What is asked of a run folder; only the leader looks at it and writes in it."""

    recipe: Recipe
    text: str
    words: list[str]
    folder: RunFolder
    resume: bool
    overwrite: bool
    boards: Sequence[type[Board]]

    def refuse(self) -> None:
        """Raise what speaks against a run there."""
        self.folder.refuse_or_clear(self.recipe, resume=self.resume, overwrite=self.overwrite)

    @contextmanager
    def owned(self) -> Iterator[None]:
        """Within, the folder is locked."""

        def lock() -> None:
            stack.enter_context(self.folder.owned())
            self.refuse()  # again: another run may have used it

        with ExitStack() as stack:
            processes.led(lock)
            yield

    @contextmanager
    def opened(self, plan: RecipePlan, moved: Note | None) -> Iterator[Sequence[Board]]:
        """Within, the folder has what is known before the first step, and boards show the run."""

        def open_() -> Sequence[Board]:
            shown = stack.enter_context(opened(self.boards, self.folder.path, self.recipe, new=not self.resume))
            self.folder.open(
                self.recipe, self.text, plan, self.words, resume=self.resume, overwrite=self.overwrite, moved=moved
            )
            return shown

        with ExitStack() as stack:
            yield processes.led_for(open_, [])


def _as_begun(folder: RunFolder, resume: bool, overwrite: bool) -> tuple[bool, bool]:
    """The two switches, as what is in the folder wants them: torchrun starts processes again with the words of the first time, and a run of
    which nothing had been written begins anew."""
    if processes.restarted() and (before := folder.environment()) and before.launch == processes.launch():
        return True, False
    return resume and (overwrite or not folder.blank), overwrite


def planned(recipe: Recipe, device: str, name: str = "recipe") -> RecipePlan:
    """The plan of a recipe with its data and weights, as `apply` makes it before it touches a folder.

    Raises:
        UserError: what `apply` would raise by then.
    """
    refuse_processes("a sweep")
    nowhere = RunFolder("")
    job, plan, _ = _prepared(recipe, name, device, nowhere, False, False)
    _fill_teacher(job, plan, nowhere, resume=False)
    return plan


def _prepared(
    recipe: Recipe, name: str, device: str, folder: RunFolder, resume: bool, overwrite: bool
) -> tuple[Job, RecipePlan, Note | None]:
    """The job and its plan, once nothing that can be found without values refuses it, and a note if its data is at another place now."""
    job = prepare(recipe, device, name=name)
    plan = plan_job(job)
    _refuse(job, plan, folder, overwrite=overwrite)
    moved = _note_data(job, plan, folder, resume=resume)
    count_answers(recipe, plan)
    return job, plan, moved


@contextmanager
def _logged(recipe: Recipe, folder: RunFolder, console: Console | None, boards: Sequence[Board]) -> Iterator[RunLog]:
    """The log of a run, which also has the error that ends it. It is the leader's; the other processes have one that shows nothing."""
    if not processes.leads():
        yield RunLog(None, Console(quiet=True))
        return
    run_log = RunLog(folder.path, console, partial(tag_of, tags=scalar_tags(recipe)), boards)
    try:
        begin(boards)
        yield run_log
    except UserError as error:
        log.error("%s", error, extra={"already_shown": True})
        raise
    finally:
        run_log.close()


def _finished(
    recipe: Recipe, folder: RunFolder, device: str, console: Console | None, report: Callable[[Path], object] | None
) -> RunResult | None:
    """The result of the run in the folder, if it is finished; only a missing report is then written."""
    if processes.told(folder.has_other_root(recipe)):  # the data there has to be compared first
        return None
    done = processes.led_for(lambda: _told(recipe, folder, console, report), None)
    if not processes.told(done is not None):
        return None
    done = done or finished_run(folder, recipe)
    assert done is not None, "the leader has read it"

    def models() -> tuple[nn.Module, nn.Module]:
        job = prepare(recipe, device)
        teacher, *_ = fill_teacher(job, folder, resume=True)
        return done.student.to(job.device), teacher.to(job.device).eval()

    return RunResult(done.results, folder.path, done.merged, _models=models)


def _told(
    recipe: Recipe, folder: RunFolder, console: Console | None, report: Callable[[Path], object] | None
) -> FinishedRun | None:
    """The finished run in the folder, once that was said, and its report is there; None if it is not finished."""
    with folder.owned():
        if (others := other_files(folder.path)) and _made_again(folder, others, Terminal(console)):
            return None
        done = finished_run(folder, recipe)
        if done is None:
            return None
        folder.clear_scratch()
        unreported = report is not None and not (folder.path / "report.html").exists()
        text = done.sentence("only its report is written" if unreported else "nothing to do")
        Terminal(console).print(text, highlight=False, soft_wrap=True)
        if report is not None and unreported:
            report(folder.path)
        if unreadable := without_list(folder.path):
            Terminal(console).print(unreadable, highlight=False, soft_wrap=True)
        if not is_listed(folder.path):  # it was killed before it wrote that
            write_list(folder.path)
        return done


def _made_again(folder: RunFolder, others: list[str], console: Terminal) -> bool:
    """Tell which files of a finished run are missing or damaged. Returns whether some are now removed, so that resuming it makes them."""
    again = remove_remade(folder.path, others)
    for names, what in (
        (again, "made again"),
        (sorted({*others} - {*again}), "left as they are: only training makes them"),
    ):
        if names:
            more = f" and {len(names) - 3} more" if len(names) > 3 else ""
            text = f"{folder.path}: {', '.join(names[:3])}{more}: missing or damaged, and {what}"
            console.print(text, highlight=False, soft_wrap=True)
    return bool(again)


def _run(
    run: Run, plan: RecipePlan, teacher: nn.Module, taught: bool, report: Callable[[Path], object] | None
) -> RunResult:
    """Train the teacher unless it is `taught`, run the parts of the recipe, and finish the run."""
    job, folder = run.job, run.folder
    if trains_teacher(job.recipe) and not taught:
        teacher = run.train_teacher(teacher)
    trained = run.parts(teacher)
    results = finish(job, run.scorer, folder, run.log, plan=plan, trained=trained)
    if report is not None:
        processes.led_for(lambda: report(folder.path), None)
    merged = None
    if job.recipe.merges:  # last, because a merge that is not exact is refused
        merged = processes.led(
            lambda: merge_folder(  # the recipe asks for it, and its plan says how large it is
                folder.path, overwrite=True, dense=True, device=str(job.device), datasets=job.datasets, owned=True
            )
        )
        run.log.show(partial(print_merge, merged))
    processes.led(lambda: write_list(folder.path))
    return RunResult(results, folder.path, merged, _models=lambda: (trained.student.model, trained.teacher.model))


def _recipe(
    given: Recipe | Mapping[str, Any] | str | Path, overrides: Sequence[str], resumed: RunFolder | None
) -> tuple[Recipe, str, str]:
    """A recipe, its name in messages, and its text; `resumed` is the folder of a run that it is to go on with."""
    recipe, name, text = _read(given, overrides)
    return (recipe if resumed is None else resumed.as_begun(recipe)), name, text


def _read(given: Recipe | Mapping[str, Any] | str | Path, overrides: Sequence[str]) -> tuple[Recipe, str, str]:
    if isinstance(given, Recipe):
        if overrides:
            raise UserError(
                f"overrides change a recipe that is read, and this one is a Recipe already: {overrides[0]}; give apply the "
                "dictionary or the path, or change it with recipe.model_copy(update={…})"
            )
        return given, "recipe", given.to_yaml()
    if isinstance(overrides, (str, Mapping)):
        raise UserError(f"overrides is a list of 'key=value', e.g. ['seed=1'], not {overrides!r}")
    if isinstance(given, Mapping):
        text, name = dumped(_plain(given, "")), "recipe"
    elif isinstance(given, (str, Path)):
        text, name = read_recipe(given), str(given)
    else:
        raise UserError(
            f"apply takes a Recipe, a dictionary, or the path or name of a recipe, not a {type(given).__name__}; "
            'e.g. apply("quickstart", "runs/first")'
        )
    return parse_recipe(text, name, list(overrides)), name, text


def _plain(value: Any, where: str) -> Any:
    """Convert Python values to those of YAML: paths to text, numpy numbers to numbers, tuples to lists."""
    if isinstance(value, Mapping):
        return {key: _plain(inner, f"{where}.{key}" if where else str(key)) for key, inner in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(inner, f"{where}[{i}]") for i, inner in enumerate(value)]
    if isinstance(value, os.PathLike):
        return os.fspath(value)
    if isinstance(value, np.generic):
        return value.item()
    if value is None or isinstance(value, (str, bool, int, float)):
        return value
    raise UserError(
        f"{where} of the dictionary is a {type(value).__name__}, which a recipe cannot hold; a step is written "
        "{'multiplex': {'share': 2}}"
    )


def _note_data(job: Job, plan: RecipePlan, folder: RunFolder, *, resume: bool) -> Note | None:
    """Add the data to the plan; a run that is resumed has the same as before. Returns a note if it is at another place now."""
    plan.data = plan_data(job)
    if not resume:
        return None
    before = folder.refuse_other_data(job.recipe, plan.data)
    begun = folder.plan()
    moves = [
        Note(row.what, row.count, row.text)
        for row in (begun.data.notes if begun and begun.data else ())
        if row.what == "moved"
    ]
    moved = None
    if before is not None:
        images = plan.data.train + plan.data.validation + (plan.data.test or 0)
        moved = Note("moved", images, f"resumed with data.root={job.recipe.data.root}, before {before}")
        moves.append(moved)
    job.datasets.found += moves
    plan.data = plan_data(job)
    return moved


def _fill_teacher(job: Job, plan: RecipePlan, folder: RunFolder, *, resume: bool) -> tuple[nn.Module, bool]:
    """As `fill_teacher`, with its notes on weights files in the plan; if the teacher was trained before the run was resumed, those on its
    file are from the plan of that time."""
    teacher, taught, notes = fill_teacher(job, folder, resume=resume)
    plan.weights = [NoteRow(**asdict(note)) for note in notes]
    before = folder.plan() if taught else None
    if before is not None:
        plan.weights += [note for note in before.weights if note not in plan.weights]
    return teacher, taught


def _refuse(job: Job, plan: RecipePlan, folder: RunFolder, *, overwrite: bool) -> None:
    """Raise errors that can be found before the folder is touched and before any training."""
    require_no_conflicts(plan)
    for part in job.recipe.parts():
        for spec in part.transforms:
            spec.require_inputs()
    if overwrite:
        refuse_own_inputs(job.recipe, folder)
    refuse_data(job)
    refuse_judged(job)
