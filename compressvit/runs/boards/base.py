"""The interface of a board, and the registry of boards.

One board is one file in `compressvit/runs/boards/`, or of a package that offers it (entry points `compressvit.boards`).
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import ClassVar, TypeVar

from compressvit.artifacts.export import require_packages
from compressvit.charts.findings import Finding
from compressvit.errors import UserError, did_you_mean, option
from compressvit.recipe.recipe import Recipe
from compressvit.registry import Registry
from compressvit.runs.files import Results

ALWAYS = "tensorboard"


class Board(ABC):
    """What shows a run while it goes on, and many runs side by side.

    Curves are named alike in all runs (`compressvit.runs.tags`). What fails on the way to a server must not end a training: a board that
    sends to one catches and tells it.

    It is opened before anything is written, so that a run which it cannot show does not begin; `begin` then says that it has.

    Args:
        folder: of the run, which exists; nothing is written there yet, and what it holds of a run before may be deleted. A resumed run is
            opened again.
        recipe: of the run; None of a distillation from Python, which has none.
        new: the run is not one that is resumed.

    Attributes:
        name: its word, set by `board`.
        title: what messages call it.
        packages: what must be installed, as Python imports it; imported when a board is opened, not before.
        install: what `pip install` takes for them.
    """

    name: ClassVar[str]
    title: ClassVar[str]
    packages: ClassVar[Sequence[str]] = ()
    install: ClassVar[str] = ""

    @abstractmethod
    def __init__(self, folder: Path, recipe: Recipe | None, *, new: bool):
        """Open it; raises a `UserError` where that cannot be."""

    @abstractmethod
    def begin(self) -> None:
        """The run has begun: from now on files may be written in its folder, and the rest is called."""

    @abstractmethod
    def scalars(self, group: str, values: Mapping[str, float], step: int) -> None:
        """Show numbers as curves `GROUP/NAME`; the group is `PHASE/KIND`, and `step` counts the phase's optimiser steps."""

    @abstractmethod
    def finding(self, finding: Finding, folder: Path) -> None:
        """Show a finding, whose `NAME.png` is in `folder`, in place of an earlier one of its name."""

    @abstractmethod
    def results(self, recipe: Recipe, results: Results) -> None:
        """Show the recipe and the figures at the end of the run."""

    @abstractmethod
    def close(self) -> None:
        """End it; also called where the run failed, was stopped or did not begin, and there are no results."""


BOARDS: Registry[type[Board]] = Registry("board", "compressvit.runs.boards")
T = TypeVar("T", bound=type[Board])


def board(name: str) -> Callable[[T], T]:
    """Register a board under its word. A second one of the same word is refused at import."""

    def register(kind: T) -> T:
        kind.name = name
        BOARDS.add(name, kind, kind.__module__)
        return kind

    return register


def find_boards(words: Sequence[str]) -> list[type[Board]]:
    """The boards of these words, after those that are always written.

    Raises:
        UserError: there is none of a word, or its packages are missing.
    """
    found = []
    for word in dict.fromkeys([ALWAYS, *words]):
        if word not in BOARDS:
            raise UserError(
                BOARDS.fault(word)
                or f"{option('log_to', word)}: there is no such board; {did_you_mean(word, list(BOARDS))}"
            )
        kind = BOARDS[word]
        require_packages(kind.title, kind.packages, kind.install)
        found.append(kind)
    return found


@contextmanager
def opened(kinds: Sequence[type[Board]], folder: Path, recipe: Recipe | None, *, new: bool) -> Iterator[list[Board]]:
    """Boards of a run that is about to begin, which are closed at the end of the block."""
    with ExitStack() as stack:
        boards = []
        for kind in kinds:
            boards.append(kind(folder, recipe, new=new))
            stack.callback(boards[-1].close)
        yield boards


def begin(boards: Sequence[Board]) -> None:
    """Tell boards that their run has begun."""
    for one in boards:
        one.begin()
