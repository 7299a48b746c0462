"""The runs of a sweep: every combination of values of a recipe's keys, each in a folder of its own, one after another or side by side."""

from __future__ import annotations

import itertools
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

from rich.console import Console

from compressvit.errors import UserError, option, switch
from compressvit.recipe.recipe import Recipe, parse_recipe, read_recipe
from compressvit.runs.apply import apply, planned
from compressvit.runs.files import RecipePlan
from compressvit.runs.finished import finished_run
from compressvit.runs.folder import RESOLVED, RunFolder
from compressvit.runs.sweep_names import names_here, names_of
from compressvit.text import printable
from compressvit.training.stopping import HANG_UP, Interrupted, Signals, StopRequest

_PAUSE = 0.2  # seconds between two looks at the runs that are side by side
_COMMAND = (sys.executable, "-m", "compressvit", "apply")
Report = Callable[[Path], object]


@dataclass(frozen=True)
class Cell:
    """One run of a sweep.

    Attributes:
        name: of its folder: the values that differed when it began.
        overrides: of the recipe, as `apply` takes them.
        state: 'new', 'interrupted' or 'finished', before the sweep runs.
    """

    name: str
    overrides: tuple[str, ...]
    folder: RunFolder
    plan: RecipePlan
    state: str

    def as_dict(self) -> dict[str, Any]:
        """For tables and JSON."""
        return {
            "name": self.name,
            "folder": str(self.folder.path),
            "overrides": list(self.overrides),
            "state": self.state,
            "parameters": self.plan.student.parameters,
            "macs": self.plan.student.macs,
        }


class SweepStopped(Interrupted):
    """A signal stopped a sweep, and with it every run that was going on."""

    def __init__(self, signum: int, finished: int, count: int):
        super().__init__(
            signum,
            None,
            f"{finished} of {count} runs are finished, and those that had begun keep their checkpoints. "
            f"Continue with the same command and {switch('resume')}",
        )


def cells_of(recipe: str | Path, words: Sequence[str], output: Path, *, device: str, resume: bool) -> list[Cell]:
    """Every combination of the values in `words`, each a key of the recipe and values with commas between them: `seed=0,1,2`. Each is
    planned as `apply` plans it, with data and the teacher's weights; of cells that differ in their seed alone one is. A run of the same
    recipe that is in the folder keeps its name, whatever else varies now.

    Commas in brackets, braces and quotes belong to a value. The last key changes fastest.

    Raises:
        UserError: a word has no values or a key twice, nothing varies, a run cannot be done, or its folder is in use; what is wrong with
            runs is told at once.
    """
    choices = _choices(words)
    text = read_recipe(recipe)
    combinations = [dict(zip(choices, values, strict=True)) for values in itertools.product(*choices.values())]
    names = names_of(combinations, [key for key, values in choices.items() if len(values) > 1])
    parsed: list[Recipe | None] = [None] * len(combinations)
    all_overrides = [tuple(f"{key}={value}" for key, value in one.items()) for one in combinations]
    faults = _Faults(len(combinations))
    for number, overrides in enumerate(all_overrides):
        with faults.of(names[number]):
            parsed[number] = parse_recipe(text, str(recipe), list(overrides))
    names = names_here(output, names, parsed)
    plans: dict[str, RecipePlan] = {}
    found = []
    for name, overrides, own in zip(names, all_overrides, parsed, strict=True):
        if own is None:
            continue
        with faults.of(name):
            folder = RunFolder(output / name)
            begun = (folder.path / RESOLVED).is_file()
            own = folder.as_begun(own) if begun else own
            folder.refuse_or_clear(own, resume=resume and begun, overwrite=False)
            key = own.model_copy(update={"seed": 0}).to_yaml()
            if key not in plans:
                plans[key] = planned(own, device, str(recipe))
            done = begun and finished_run(folder, own) is not None
            state = "finished" if done else "interrupted" if begun else "new"
            found.append(Cell(name, overrides, folder, plans[key], state))
    faults.tell()
    return found


def _choices(words: Sequence[str]) -> dict[str, list[str]]:
    found: dict[str, list[str]] = {}
    for word in words:
        key, equals, text = word.partition("=")
        if not equals or not key:
            raise UserError(f"'{word}' is no key=value,value,…; e.g. seed=0,1,2 or steps.0.multiplex.share=2,3")
        if key in found:
            raise UserError(f"{key} is given twice; write its values in one: {key}={','.join([*found[key], text])}")
        values = _values(text)
        if len(values) > 1 and "" in values:
            raise UserError(f"'{word}' has an empty value; write null where a key is to have none")
        if twice := [value for value, count in Counter(values).items() if count > 1]:
            raise UserError(f"'{word}' has the value {twice[0]} twice")
        found[key] = values
    if not any(len(values) > 1 for values in found.values()):
        raise UserError(
            "nothing varies in this sweep: give a key several values, e.g. seed=0,1,2; `compressvit apply` makes a single run"
        )
    return found


def _values(text: str) -> list[str]:
    """A text at its commas, but for those in brackets, braces and quotes."""
    values, depth, quote = [""], 0, ""
    for character in text:
        if quote:
            quote = "" if character == quote else quote
        elif character in "'\"":
            quote = character
        elif character in "[{":
            depth += 1
        elif character in "]}":
            depth -= 1
        elif character == "," and depth == 0:
            values.append("")
            continue
        values[-1] += character
    return [value.strip() for value in values]


class _Faults:
    """What is wrong with cells, told at once: a message with the names of those that have it."""

    def __init__(self, count: int):
        self._count, self._names = count, dict[str, list[str]]()

    @contextmanager
    def of(self, name: str) -> Iterator[None]:
        try:
            yield
        except UserError as error:
            self._names.setdefault(str(error), []).append(name)

    def tell(self) -> None:
        """Raise a `UserError` with all of them, if there are any."""
        if not self._names:
            return
        wrong = sum(map(len, self._names.values()))
        lines = [f"{', '.join(names[:3])}{', …' * (len(names) > 3)}: {text}" for text, names in self._names.items()]
        raise UserError(
            f"{wrong} of {self._count} runs of the sweep cannot be done, and none was begun:\n" + "\n".join(lines)
        )


def run_cells(
    cells: Sequence[Cell],
    *,
    recipe: str | Path,
    jobs: int,
    device: str,
    console: Console,
    report: Report | None,
    command: Sequence[str] | None,
    log_to: Sequence[str] = (),
) -> dict[str, str]:
    """Run the cells that are not finished, the interrupted ones from where they stopped; one that fails does not end the others.

    Args:
        jobs: how many at once; with one they run in this process.
        report, command, log_to: as of `apply`; of several jobs each writes the report of `apply`.

    Returns:
        What was wrong, by the name of the run.

    Raises:
        SweepStopped: by a signal, which every run is given and all are waited for.
    """
    for cell in cells:
        if cell.state == "finished":
            console.print(f"passed over, finished before: {cell.folder.path}", highlight=False, soft_wrap=True)
    left = [cell for cell in cells if cell.state != "finished"]
    done = len(cells) - len(left)
    if jobs > 1 and len(left) > 1:
        words = ["--device", device, *(() if report is not None else ("--no-report",))]
        words += [word for board in log_to for word in ("--log-to", board)]
        return _Together(left, recipe, words, min(jobs, len(left)), console, done).run()
    failed: dict[str, str] = {}
    for number, cell in enumerate(left):
        console.print(f"\n[{done + number + 1}/{len(cells)}] {cell.name}", highlight=False)
        try:
            with Signals():
                apply(
                    recipe,
                    cell.folder.path,
                    overrides=cell.overrides,
                    device=device,
                    resume=cell.state == "interrupted",
                    console=console,
                    report=report,
                    command=command,
                    log_to=log_to,
                )
        except UserError as error:
            failed[cell.name] = str(error)
        except (Interrupted, KeyboardInterrupt) as stop:
            signum = getattr(stop, "signum", None) or (stop.args[0] if stop.args else 2)
            raise SweepStopped(int(signum), done + number - len(failed), len(cells)) from stop
    return failed


@dataclass
class _Process:
    """A run in a process of its own, and what it says is wrong."""

    cell: Cell
    process: subprocess.Popen[bytes]
    errors: IO[bytes]

    def fault(self) -> str | None:
        """What was wrong with a run that has ended; None if nothing was."""
        self.errors.seek(0)
        said = printable(self.errors.read()[-4000:].decode("utf-8", "replace")).strip()
        self.errors.close()
        code = self.process.returncode
        if code == 0:
            return None
        lines = [line for line in said.splitlines() if line.startswith("compressvit: ")]
        text = lines[-1].removeprefix("compressvit: ") if lines else (said.splitlines() or ["it said nothing"])[-1]
        return text if code > 0 else f"ended by signal {-code}; {text}"


class _Together:
    """Runs side by side, each a process of `compressvit apply` in a group of its own, so that a signal reaches each once, through us."""

    def __init__(
        self, cells: Sequence[Cell], recipe: str | Path, words: Sequence[str], jobs: int, console: Console, done: int
    ):
        self._waiting, self._recipe, self._words, self._jobs = list(cells), recipe, words, jobs
        self._console, self._done, self._count = console, done, done + len(cells)
        self._running: list[_Process] = []
        self._failed: dict[str, str] = {}
        threads = str(max(1, (os.cpu_count() or 1) // jobs))
        self._environment = {"OMP_NUM_THREADS": threads, **os.environ}
        self._say(
            f"{jobs} runs at once, with {self._environment['OMP_NUM_THREADS']} threads each; what they do is in their run.log"
        )

    def run(self) -> dict[str, str]:
        told: int | None = None
        try:
            with StopRequest(hang_up=True) as stop:
                while self._running or (self._waiting and stop.signum is None):
                    while stop.signum is None and self._waiting and len(self._running) < self._jobs:
                        self._start(self._waiting.pop(0), stop)
                    if stop.signum is not None and told is None:
                        told = stop.signum
                        for one in self._running:  # `apply` writes its checkpoint at SIGTERM
                            one.process.send_signal(signal.SIGTERM if told == HANG_UP else told)
                    time.sleep(_PAUSE)
                    self._look()
        finally:  # a second signal, or a fault of ours: none stays behind
            for one in self._running:
                one.process.kill()
                one.process.wait()
        if told is not None:
            raise SweepStopped(told, self._done, self._count)
        return self._failed

    def _start(self, cell: Cell, stop: StopRequest) -> None:
        errors = tempfile.TemporaryFile()  # noqa: SIM115  (closed when the run has ended)
        resume = ["--resume"] if cell.state == "interrupted" else []
        folder = str(cell.folder.path)
        with stop.held():  # a process that is not among those that run would stay behind
            process = subprocess.Popen(
                [*_COMMAND, str(self._recipe), *cell.overrides, "--output", folder, *self._words, *resume],
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                stderr=errors,
                env=self._environment,
                start_new_session=True,
            )
            self._running.append(_Process(cell, process, errors))
        self._say(f"begun: {folder}")

    def _look(self) -> None:
        for one in [one for one in self._running if one.process.poll() is not None]:
            self._running.remove(one)
            fault = one.fault()
            if fault is None:
                self._done += 1
                self._say(f"finished, {self._done} of {self._count}: {one.cell.folder.path}")
            else:
                self._failed[one.cell.name] = fault
                self._say(f"not finished: {one.cell.folder.path}: {fault}")

    def _say(self, text: str) -> None:
        with suppress(OSError):  # of a terminal that is closed
            self._console.print(text, highlight=False, soft_wrap=True)


def refuse_folder(output: Path, *, resume: bool) -> None:
    """Raise a `UserError` where the folder of a sweep is a file, or holds something while it is not to be resumed."""
    if output.exists() and not output.is_dir():
        raise UserError(f"{option('output', output)} is a file; name a folder")
    if not resume and output.is_dir() and any(output.iterdir()):
        raise UserError(
            f"{output} is not empty. Give {switch('resume')} to go on with the sweep in it (finished runs are passed over, others can be "
            f"added), or {option('output')} for another folder"
        )
