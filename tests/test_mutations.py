"""Thousands of recipes, artifacts, files of weights, lists and run folders with random damage: each is read, or refused in a sentence; no
trace, no hang, no memory, nothing outside written, and no model is another one than what was written.

`tests/helpers/mutants.py` tries as many more as one likes, and makes a table of them.
"""

from __future__ import annotations

import logging
import os
import shutil
import signal
import sys
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import pytest
import torch
from helpers.bounds import SEEDS, Faults
from helpers.mutant_folders import Runs
from helpers.mutant_models import Mutant, Subject
from helpers.mutants import SUBJECTS, Table, rows, tried
from helpers.mutate import clear
from helpers.outside import surroundings, watching
from helpers.runs import done, refused

from compressvit.errors import UserError

pytestmark = [
    pytest.mark.slow,
    pytest.mark.timeout(1800),
    pytest.mark.skipif(sys.platform != "linux", reason="bounds of a process are Linux's"),
]
MUTANTS = {"recipes": 150, "artifacts": 80, "weights": 50, "lists": 80, "runs": 50}  # of each seed


@pytest.mark.parametrize(
    ("read", "words"),
    [
        (lambda: 1 / 0, "ZeroDivisionError"),
        (lambda: _loops(), "ExceededError"),
        (lambda: _suppresses(_loops), "ExceededError"),
        (lambda: bytearray(3 * 2**30), "MemoryError"),
        (lambda: _refuses(lambda: torch.zeros(2**30)), "a lack of memory became UserError"),
    ],
)
def test_a_fault_is_noted(read, words, monkeypatch):
    monkeypatch.setattr("helpers.bounds.SECONDS", 0.2)
    faults = Faults()
    faults.attempt(read, "it")
    assert len(faults) == 1
    assert words in faults[0]


def _loops() -> None:
    while True:
        pass


def _suppresses(work: Callable[[], object]) -> None:
    with suppress(Exception):
        work()


def _refuses(work: Callable[[], object]) -> None:
    try:
        work()
    except Exception as error:
        raise UserError("it does not fit") from error


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda path: path.write_text("x"), "open"),
        (lambda path: path.mkdir(), "os.mkdir"),
        (lambda path: os.mkdir(path.name, dir_fd=os.open(path.parent, os.O_RDONLY)), "os.mkdir"),
        (lambda path: (path.parent / "there").unlink(), "os.remove"),
        (lambda path: os.remove("there", dir_fd=os.open(path.parent, os.O_RDONLY)), "os.remove"),
        (lambda path: (path.parent / "there").rename(path), "os.rename"),
        (lambda path: path.symlink_to("x"), "os.symlink"),
        (lambda path: torch.save({}, path), ""),  # not by Python
    ],
)
def test_a_change_outside_is_noted(change, words, tmp_path):
    inside, outside = tmp_path / "in", tmp_path / "out"
    for folder in (inside, outside):
        folder.mkdir()
    (outside / "there").touch()
    (inside / "link").symlink_to(outside)
    before = surroundings(tmp_path, inside)
    with watching(inside) as found:
        (inside / "x").write_text("x")
        os.remove(inside / "x")
        (outside / "there").read_text()
    assert (found, surroundings(tmp_path, inside)) == ([], before)
    with watching(inside) as found:
        change(inside / "link" / "new")
    assert surroundings(tmp_path, inside) != before
    assert str(outside) in "".join(found) if words else True
    assert any(words in what for what in found) or not words


class Odd(Subject):
    """Of three mutants one is accepted, one leaves a file behind, and one is refused."""

    def __init__(self, folder: Path):
        self.lies = folder

    def mutant(self, chance, folder):
        (self.lies / "drawn").touch()
        self.number = getattr(self, "number", -1) + 1
        read = {
            0: lambda: None,
            1: lambda: (folder.parent / "left").write_text("x"),
            2: lambda: _refuses(lambda: 1 / 0),
        }[self.number % 3]
        return Mutant(f"kind {self.number % 3}", "it", read)


class Dies(Odd):
    def mutant(self, chance, folder):
        mutant = super().mutant(chance, folder)
        ends = {1: lambda: os.kill(os.getpid(), signal.SIGKILL), 2: lambda: signal.pause()}
        return mutant._replace(read=ends.get(self.number, mutant.read))


@pytest.fixture
def root(tmp_path, monkeypatch):
    """A folder that stays as it is but for what is tried in it; temporary files have one of their own."""
    root = tmp_path / "root"
    (root / "tmp").mkdir(parents=True)
    monkeypatch.setattr("tempfile.tempdir", str(root / "tmp"))
    return root


def test_a_table_of_mutants(root, tmp_path):
    table = Table()
    for row in rows(Odd(tmp_path), "odd", list(range(3)), 0, root):
        table.add("odd", row)
    assert "| **odd** | 3 | 1 | 1 | 1 (outside 1) |" in str(table)
    assert "| kind 1 | 1 | 0 | 0 | 1 (outside 1) |" in str(table)
    assert len(table.faults) == 1
    assert "outside of its folder: open" in table.faults[0]


def test_a_process_that_dies_or_hangs_is_named_and_the_rest_goes_on(root, tmp_path, monkeypatch):
    monkeypatch.setattr("helpers.mutants.HANGS", 2)
    found = list(rows(Dies(tmp_path), "odd", [5, 6, 7], 0, root))  # after a fault a process begins at its mutant 0
    assert [row[:3] for row in found] == [
        [5, "kind 0", "accepted"],
        [6, "(not known)", "ends its process (-9)"],
        [7, "kind 0", "accepted"],
    ]
    found = list(rows(Hangs(tmp_path), "odd", [5, 6], 0, root))
    assert [row[:3] for row in found] == [[5, "(not known)", "hangs"], [6, "(not known)", "hangs"]]


class Hangs(Odd):
    def mutant(self, chance, folder):
        return Mutant(
            "", "", lambda: (signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGALRM}) and None) or signal.pause()
        )


@pytest.fixture(scope="module")
def subjects(tmp_path_factory):
    """Makes a subject once."""
    made = {}

    def subject(name: str) -> Subject:
        if name not in made:
            made[name] = SUBJECTS[name](tmp_path_factory.mktemp(name))
            made[name].make()
            made[name].begin()
        return made[name]

    return subject


@pytest.fixture
def _no_log():
    """Names of damaged images are not all text that pytest's workers can pass on."""
    logging.disable()
    yield
    logging.disable(logging.NOTSET)


@pytest.mark.usefixtures("_no_log")
@pytest.mark.parametrize("name", SUBJECTS)
@pytest.mark.parametrize("seed", SEEDS)
def test_mutants(seed, name, subjects, root):
    subject, faults = subjects(name), Faults()
    for number in range(MUTANTS[name]):
        tried(subject, name, number, seed, root, faults)
    faults.none_of(MUTANTS[name])


def test_what_is_damaged_is_sound_before(subjects, tmp_path):
    runs = subjects("runs")
    assert isinstance(runs, Runs)
    for original in runs.originals:
        for words in runs.verbs(original, tmp_path / original.name):
            shutil.copytree(original, tmp_path / original.name)
            (refused if words[0] == "merge" else done)(*words)  # shared layers are not folded
            clear(tmp_path / original.name)
