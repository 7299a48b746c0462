"""What a machine lacks while a run reads its data, workers or memory, is said in a sentence."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from helpers import process
from helpers.images import class_folders
from helpers.models import build, images_for

import compressvit
from compressvit.data.spec import Data
from compressvit.errors import UserError
from compressvit.runs.resources import resource_faults
from compressvit.training.phases.distill import Distill


@pytest.fixture
def at_once(monkeypatch):
    """Nobody waits for the system to tell that a worker has died: none has."""
    monkeypatch.setattr("compressvit.runs.resources.time.sleep", lambda seconds: None)


@pytest.mark.parametrize(
    ("error", "words"),
    [
        (
            torch.cuda.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB."),
            "smaller data.batch_size \\(now 7\\)",
        ),
        (RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried"), "memory ran out"),
        (MemoryError(), "memory ran out: MemoryError"),
        (
            ConnectionResetError("Connection reset by peer"),
            "a process that loads images has ended: Connection reset by peer",
        ),
        (
            RuntimeError("DataLoader worker (pid 7) is killed by signal: Killed. "),
            "is killed by signal: Killed. Most often memory ran out: give fewer data.num_workers \\(now 3\\)",
        ),
    ],
)
def test_a_lack_of_memory_is_a_sentence(error, words, at_once):
    with pytest.raises(UserError, match=words), resource_faults(Data(name="digits", batch_size=7, num_workers=3)):
        raise error


def test_other_faults_stay_what_they_are():
    with pytest.raises(RuntimeError, match="shapes"), resource_faults(Data(name="digits")):
        raise RuntimeError("shapes do not fit")


KILLED = """
import os, signal
from compressvit.data import samples
from compressvit.data.loaders import eval_loader
from compressvit.data.opening import open_data
from compressvit.data.spec import Data
from compressvit.runs.recorder import evaluation_images
from compressvit.runs.resources import resource_faults
from compressvit.training.phases.distill import Distill
from helpers.images import COLOUR, CPU

read = samples.Samples.read
def dies(self, position, *more):
    if position == 5:
        os.kill(os.getpid(), signal.SIGKILL)
    return read(self, position, *more)
samples.Samples.read = dies
data = Data(name="folder", root={root!r}, batch_size=2, num_workers=1)
with resource_faults(data):
    for _ in eval_loader(open_data(data), data, COLOUR, CPU):
        pass
"""


def test_a_worker_that_is_killed_is_a_sentence(tmp_path):
    root = class_folders(tmp_path)
    found = process.python("-c", KILLED.format(root=str(root)), path=[Path(__file__).parents[1]])
    last = found.err.strip().splitlines()[-1]
    assert (
        "UserError: a process that loads images has ended: " in last
    )  # torch's words, or those of a connection that was reset
    assert "give fewer data.num_workers (now 1), 0 to load them in the training process" in last


def test_batches_of_ones_own_have_sentences_of_their_own(at_once):
    with (
        pytest.raises(UserError, match=r"memory ran out: MemoryError\. Give smaller batches, or precision='bf16'$"),
        resource_faults(),
    ):
        raise MemoryError
    with pytest.raises(UserError, match="give the DataLoader fewer num_workers"), resource_faults():
        raise RuntimeError("DataLoader worker (pid 7) is killed by signal: Killed. ")
    with pytest.raises(EOFError, match="of a data set"), resource_faults():  # no worker of torch has ended
        raise EOFError("of a data set")


def test_distill_says_that_memory_ran_out(monkeypatch):
    def run(*_):
        raise MemoryError

    monkeypatch.setattr(Distill, "run", run)
    teacher = build("vit")
    student = compressvit.compress(teacher, [compressvit.Multiplex(share=2)])
    with pytest.raises(UserError, match="memory ran out"):
        compressvit.distill(student, teacher, [images_for(teacher)], layers=(), device="cpu")
