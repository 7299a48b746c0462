"""At every change of a file that a run makes, the disk is full, or the run is killed: it goes on to the same end.

In process: Python tells an audit hook of every file that is opened to be written, folder that is made, and file that is
renamed or removed. The hook refuses one of them as a full disk does; or, as nothing of a killed process runs any more,
that one and all that follow. `tests/test_kills.py` kills processes, with all kinds of recipes.
"""

from __future__ import annotations

import errno
import json
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from helpers.kills import contents, difference
from helpers.runs import TINY, done, run

ADAPTED = TINY.partition("steps:")[0] + "steps: [repadapter: {width: 4}, finetune: {epochs: 1}, merge: {}]\n"


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
        paths = ()
        if event == "open":
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


@pytest.fixture(scope="module", params=[TINY, ADAPTED], ids=["shared", "adapted"])
def whole(request, tmp_path_factory, hook):
    """The words of a run, its folder's content where nobody disturbs it, and how many changes it makes when it is killed or not."""
    folder = tmp_path_factory.mktemp("whole")
    (folder / "recipe.yaml").write_text(request.param)
    counts = {}
    with pytest.MonkeyPatch.context() as patch:
        for kills in (True, False):
            (folder / str(kills)).mkdir()
            patch.chdir(folder / str(kills))
            with watched(hook, folder / str(kills), kills=kills):
                done("apply", "../recipe.yaml", "--output", "run", "--no-report")
            counts[kills] = hook.count
    assert counts[True] > counts[False] > 50
    return Path("../recipe.yaml"), contents(folder / "False"), counts, request.param


def goes_on(recipe: Path, folder: Path, expected: dict[str, Any]) -> None:
    """It is resumed, and ends as the one that nobody disturbed."""
    again = ["--resume"] if (folder / "run").exists() else []
    done("apply", recipe, "--output", "run", "--no-report", *again)
    assert difference(expected, contents(folder)) is None


def filled(hook: _Hook, whole: Any, folder: Path, number: int) -> None:
    recipe, expected, *_ = whole
    with watched(hook, folder, number):
        code, out, err = run("apply", recipe, "--output", "run", "--no-report")
    if not code:  # a chart that was not drawn, or a list of event files
        assert hook.refused
        assert "No space left" in out + err or "no space left" in out + err, hook.refused
        return
    assert code == 2, (hook.refused, err)
    assert "Traceback" not in out + err
    assert err.count("no space left on the disk") == 1, (hook.refused, err)
    goes_on(recipe, folder, expected)


def killed(hook: _Hook, whole: Any, folder: Path, number: int) -> None:
    recipe, expected, *_ = whole
    with watched(hook, folder, number, kills=True), pytest.raises(Killed):
        run("apply", recipe, "--output", "run", "--no-report")
    goes_on(recipe, folder, expected)


@pytest.mark.wide
@pytest.mark.parametrize("kills", [False, True], ids=["full", "killed"])
@pytest.mark.parametrize("share", range(4))
def test_at_every_change_of_a_file(hook, whole, tmp_path, monkeypatch, kills, share):
    faults = []
    for number in range(1 + share, whole[2][kills] + 1, 4):
        (folder := tmp_path / str(number)).mkdir()
        (tmp_path / "recipe.yaml").write_text(whole[3])
        monkeypatch.chdir(folder)
        try:
            (killed if kills else filled)(hook, whole, folder, number)
        except (AssertionError, BaseException) as error:
            faults.append(f"{number} {hook.refused}: {str(error)[:250]}")
    assert not faults, json.dumps(faults, indent=1)
