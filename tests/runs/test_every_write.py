"""At every change of a file that a run makes, the disk is full, or the run is killed: it goes on to the same end.

In process: Python tells an audit hook of every file that is opened to be written, folder that is made, and file that is
renamed or removed. The hook refuses one of them as a full disk does; or, as nothing of a killed process runs any more,
that one and all that follow. `tests/test_kills.py` kills processes, with all kinds of recipes.
"""

from __future__ import annotations

import errno
import functools
import gc
import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import pytest
from helpers.run_contents import contents, difference
from helpers.runs import QUICK, TINY, done, run

ADAPTED = TINY.partition("steps:")[0] + "steps: [repadapter: {width: 4}, finetune: {epochs: 1}, merge: {}]\n"
WORDS = ("apply", "../recipe.yaml", "--output", "run", "--no-report")


class Killed(BaseException):
    """Nothing of the run happens any more."""


class _Hook:
    """Counts the changes in a folder and refuses some of them."""

    def __init__(self) -> None:
        self.folder: str | None = None
        self.count, self.last, self.kills, self.refused = 0, 0, False, ""

    def __call__(self, event: str, args: tuple[Any, ...]) -> None:
        if self.folder is None:
            return
        paths: Any = ()
        # filelock opens the folder itself, to learn what it can, and takes no for an answer
        if event == "open" and not os.path.isdir(args[0]):
            paths = args[:1] if isinstance(args[2], int) and args[2] & (os.O_WRONLY | os.O_RDWR | os.O_CREAT) else ()
        elif event == "os.mkdir":
            paths = () if os.path.isdir(args[0]) else args[:1]
        elif event == "os.rename" or (self.kills and event in ("os.remove", "os.rmdir")):
            paths = args[:2]
        if not any(isinstance(p, (str, os.PathLike)) and os.path.abspath(p).startswith(self.folder) for p in paths):
            return
        self.count += 1
        if self.kills and self.count >= self.last > 0:
            raise Killed
        if self.count == self.last:
            self.refused = f"{event} {paths[0]}"
            raise OSError(errno.ENOSPC, "No space left on device", str(paths[0]))


@pytest.fixture(scope="module")
def hook() -> _Hook:
    hook = _Hook()
    sys.addaudithook(hook)  # for good; without a folder it does nothing
    return hook


@contextmanager
def watched(hook: _Hook, folder: Path, last: int = 0, *, kills: bool = False) -> Iterator[None]:
    hook.folder, hook.count, hook.last, hook.kills, hook.refused = os.path.realpath(folder), 0, last, kills, ""
    try:
        yield
    finally:
        hook.folder = None


class Whole(NamedTuple):
    """A recipe, its folder's content where nobody disturbs the run, and how many changes may be refused and may be the last."""

    recipe: str
    contents: dict[str, Any]
    refusable: int
    last: int


@functools.cache
def whole(recipe: str, hook: _Hook, folder: Path) -> Whole:
    counts, found = [], {}
    with pytest.MonkeyPatch.context() as patch:
        for kills in (False, True):
            work = folder / f"{len(recipe)}{kills}" / "work"
            work.mkdir(parents=True)
            (work.parent / "recipe.yaml").write_text(recipe)
            patch.chdir(work)
            with watched(hook, work, kills=kills):
                done(*WORDS)
            counts.append(hook.count)
            found = contents(work)
    assert counts[1] > counts[0] > 30
    return Whole(recipe, found, *counts)


def goes_on(run_before: Whole, folder: Path) -> None:
    """It is resumed, and ends as the one that nobody disturbed."""
    done(*WORDS, *(["--resume"] if (folder / "run").exists() else []))
    assert difference(run_before.contents, contents(folder)) is None


def filled(hook: _Hook, expected: Whole, folder: Path, number: int) -> None:
    with watched(hook, folder, number):
        code, out, err = run(*WORDS)
    assert hook.refused
    assert "Traceback" not in out + err
    if not code:  # a chart that was not drawn
        assert "o space left" in out + err, hook.refused
        return
    assert code == 2, (hook.refused, err)
    assert err.count("no space left on the disk") == 1, (hook.refused, err)
    goes_on(expected, folder)


def killed(hook: _Hook, expected: Whole, folder: Path, number: int) -> None:
    with watched(hook, folder, number, kills=True), pytest.raises(Killed):
        run(*WORDS)
    gc.collect()  # of a process that is killed nothing holds the lock any more
    goes_on(expected, folder)


@pytest.fixture
def tried(hook, tmp_path, tmp_path_factory, monkeypatch):
    """Disturbs a run of a recipe at the changes of these numbers, which are told where it does not end as it should."""

    def tried(recipe: str, disturb: Callable[[_Hook, Whole, Path, int], None], chosen: Callable[[int], range]) -> None:
        expected = whole(recipe, hook, tmp_path_factory.getbasetemp() / "whole")
        faults = []
        for number in chosen(expected.last if disturb is killed else expected.refusable):
            work = tmp_path / str(number) / "work"
            work.mkdir(parents=True)
            (work.parent / "recipe.yaml").write_text(recipe)
            monkeypatch.chdir(work)
            try:
                disturb(hook, expected, work, number)
            except (AssertionError, pytest.fail.Exception) as error:
                faults.append(f"{number} {hook.refused}: {str(error)[:300]}")
        assert not faults, "\n".join(faults)

    return tried


@pytest.mark.parametrize("disturb", [filled, killed])
def test_at_some_changes_of_files(tried, disturb):
    tried(QUICK, disturb, lambda count: range(1, count + 1, -(-count // 2)))


# minutes each
SHARES = [pytest.param(share, marks=pytest.mark.slow if share else pytest.mark.wide) for share in range(4)]


@pytest.mark.parametrize("share", SHARES)
@pytest.mark.parametrize("disturb", [filled, killed])
@pytest.mark.parametrize("recipe", [TINY, ADAPTED], ids=["shared", "adapted"])
def test_at_every_change_of_a_file(tried, recipe, disturb, share):
    tried(recipe, disturb, lambda count: range(1 + share, count + 1, 4))
