"""Logging of a run to the console, run.log, metrics.jsonl and boards such as TensorBoard."""

from __future__ import annotations

import io
import logging
import math
import time
import traceback
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol, TypeVar

from compressvit import processes
from compressvit.errors import UserError
from compressvit.files import disk_faults
from compressvit.rows import append_row, keep_metrics, metrics_row, read_metrics
from compressvit.text import complain, printable

if TYPE_CHECKING:  # rich is imported only where something is printed
    from rich.console import Console

log = logging.getLogger("compressvit")


@log.addFilter
def _printable(record: logging.LogRecord) -> bool:
    """Whatever handlers there are, a message has no character that a terminal obeys or a file cannot hold."""
    record.msg, record.args = printable(record.getMessage()), ()
    return True


class Board(Protocol):
    """What shows a run while it goes on; `compressvit.runs.boards.base` has the interface."""

    def scalars(self, group: str, values: Mapping[str, float], step: int) -> None: ...
    def finding(self, finding: Any, folder: Path) -> None: ...
    def results(self, recipe: Any, results: Any) -> None: ...


class RunLog:
    """The log of one run. Scalars of a phase are written to `metrics.jsonl`, one line per step, and to boards as `phase/kind/name`.

    Args:
        folder: the run folder; None writes no files.
        console: for the progress bar and messages.
        tag: maps the name of a phase to its name on boards (`compressvit.runs.tags`).
        boards: are shown what is written to `metrics.jsonl`, and by others what is no number; the caller closes them.
    """

    def __init__(
        self,
        folder: Path | None,
        console: Console | None = None,
        tag: Callable[[str], str] = str,
        boards: Sequence[Board] = (),
    ):
        from rich.logging import RichHandler

        from compressvit.terminal import Terminal

        self.console = Terminal(console)
        self.folder = folder
        self._tag = tag
        self.boards = boards
        _silence()
        log.setLevel(logging.INFO)
        log.propagate = False
        console_handler = RichHandler(
            console=self.console, show_path=False, show_time=False, show_level=False, markup=False
        )
        console_handler.addFilter(lambda record: not getattr(record, "already_shown", False))
        log.addHandler(console_handler)
        if folder is not None:
            with disk_faults(folder):
                handler = logging.FileHandler(folder / "run.log", encoding="utf-8")
                handler.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(message)s"))
                log.addHandler(handler)

    def show(self, what: Any) -> None:
        """A table, or whatever a function prints to the console it is given: to the console and to run.log."""
        from compressvit.terminal import Terminal

        text = io.StringIO()
        for console in (self.console, Terminal(file=text, width=160)):
            what(console) if callable(what) else console.print(what)
        log.info("%s", "\n" + text.getvalue().rstrip(), extra={"already_shown": True})

    def say(self, text: str) -> None:
        """Log one line for people."""
        log.info(text)

    def scalars(self, phase: str, kind: str, step: int, values: dict[str, float | int | None]) -> None:
        """Record numbers of a phase. `kind` is the kind of a row class in `compressvit.rows`; `step` counts the phase's optimiser steps."""
        if self.folder is None:
            return
        known = {
            k: v for k, v in values.items() if v is not None and math.isfinite(v)
        }  # JSON cannot represent infinity
        row = metrics_row(kind, {"time": round(time.time(), 3), "phase": phase, "step": step, **known})
        append_row(self.folder / "metrics.jsonl", row)
        for board in self.boards:
            board.scalars(f"{self._tag(phase)}/{kind}", known, step)

    def recorded(self, phase: str, kind: str, step: int) -> bool:
        """Whether `metrics.jsonl`, if there is one to write, has a row of this kind and step already."""
        if self.folder is None:
            return True
        path, rows = self.folder / "metrics.jsonl", []
        with warn_and_continue("earlier metrics cannot be read"):
            rows = read_metrics(path) if path.is_file() else []
        return any((row.phase, row.kind, row.step) == (phase, kind, step) for row in rows)

    def forget(self, phase: str, step: int) -> None:
        """Remove the rows of a phase after a step from `metrics.jsonl`: a run that goes on from there writes them again."""
        path = None if self.folder is None else self.folder / "metrics.jsonl"
        if path is not None and path.is_file():
            with warn_and_continue("earlier metrics cannot be read"):
                keep_metrics(path, lambda row: row.phase != phase or row.step <= step)

    def each_once(self) -> None:
        """Remove the rows of `metrics.jsonl` that later ones repeat: of steps that were done again, as a run was killed before it had
        written its first checkpoint."""
        path = None if self.folder is None else self.folder / "metrics.jsonl"
        if path is not None and path.is_file():
            with warn_and_continue("earlier metrics cannot be read"):
                keep_metrics(path, lambda row: True)

    def show_on_boards(self, show: Callable[[Board], object]) -> None:
        """Call a function with each board, to show something other than scalars there."""
        for board in self.boards:
            show(board)

    @contextmanager
    def progress(self, description: str, total: int, completed: int = 0) -> Iterator[Any]:
        """A progress bar with numbers below it. Yields `advance`, to be called after every step, optionally with new numbers: labels and
        values, separated by two spaces."""
        from rich.console import Group
        from rich.live import Live
        from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
        from rich.text import Text

        from compressvit.terminal import wrapped_items

        bar = Progress(TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
        task = bar.add_task(description, total=total, completed=completed)
        numbers = Text()
        with Live(Group(bar, numbers), console=self.console, transient=True, refresh_per_second=4):

            def advance(text: str | None = None) -> None:
                if text is not None:
                    numbers.plain = wrapped_items(text, self.console.width)
                bar.advance(task)

            yield advance

    def close(self) -> None:
        """Flush and close the files."""
        _silence()


@contextmanager
def warn_and_continue(what: str) -> Iterator[None]:
    """Report any exception as a warning and continue: an error in a chart or page must not end a training."""
    try:
        yield
    except Exception as error:  # possibly a bug of compressvit: run.log keeps the traceback
        kind = "" if isinstance(error, UserError) else f"{type(error).__name__}: "
        log.warning("%s: %s%s", what, kind, error)
        if kind:
            log.info("%s", traceback.format_exc(), extra={"already_shown": True})


T = TypeVar("T")


_LINE_EVERY = 5.0  # seconds between two lines of progress where there is no terminal, in the first minute
_LATER = 12  # so many times as long after it


def progress(items: Iterable[T], description: str, total: int | None = None) -> Iterator[T]:
    """`items`, showing progress while they are iterated, as `working` does."""
    with working(description, total) as advance:
        for number, item in enumerate(items):
            if number:
                advance()
            yield item


@contextmanager
def working(description: str, total: int | None = None) -> Iterator[Callable[..., None]]:
    """Show the progress of what is done inside: a bar on stderr if that is a terminal, otherwise a line every few seconds, and after the
    first minute every minute.

    The lines go to the handlers of the logger 'compressvit', or to stderr if there are none. Of bars only the outer one is shown.

    Args:
        description: of the work.
        total: number of its parts.

    Yields:
        `advance(parts=1)`, to be called after each part, or with 0 in the middle of a long one.
    """
    from compressvit.terminal import Terminal

    global _bar_is_shown
    console = Terminal(stderr=True)
    if not processes.leads():
        yield lambda parts=1: None
    elif not console.is_terminal:
        yield _Lines(description, total).advance
    elif _bar_is_shown:
        yield lambda parts=1: None
    else:
        from rich.progress import Progress

        _bar_is_shown = True
        try:
            with Progress(console=console, transient=True) as bar:
                task = bar.add_task(description, total=total)
                yield lambda parts=1: bar.advance(task, parts)
        finally:
            _bar_is_shown = False


_bar_is_shown = False


class _Lines:
    """Progress as lines of the log."""

    def __init__(self, description: str, total: int | None):
        self.description, self.total = description, total
        self.parts = 0
        self.start = self.shown = time.monotonic()

    def advance(self, parts: int = 1) -> None:
        self.parts += parts
        now = time.monotonic()
        if now - self.shown < _LINE_EVERY * (_LATER if now - self.start > _LATER * _LINE_EVERY else 1):
            return
        self.shown = now
        count = f"{self.parts} of {self.total}" if self.total is not None else str(self.parts)
        text = f"{self.description}: {count} done in {now - self.start:.0f} s"
        if log.hasHandlers():
            log.info("%s", text)
        else:
            complain("compressvit", text)


def _silence() -> None:
    for handler in list(log.handlers):
        log.removeHandler(handler)
        handler.close()
    log.propagate = True
