"""Processes that load images and die: they are started again once, and the epoch is the same; then it is told."""

from __future__ import annotations

import os
import signal
import time

import pytest
import torch
from helpers.images import COLOUR, CPU, CROPPED, class_folders

from compressvit.data import samples
from compressvit.data.loaders import eval_loader, train_loader
from compressvit.data.opening import open_data
from compressvit.data.spec import Data


@pytest.fixture
def data(tmp_path):
    root = class_folders(tmp_path / "set")
    return Data(name="folder", root=str(root), batch_size=2, num_workers=2, augment=CROPPED)


def dying(monkeypatch, folder, deaths: int, position: int = 5):
    """So many workers die at an image."""
    read = samples.Samples.read

    def dies(self, at, *more):
        if at == position and torch.utils.data.get_worker_info() is not None:
            for number in range(deaths):
                try:
                    (folder / f"death_{number}").touch(exist_ok=False)
                except FileExistsError:
                    continue
                os.kill(os.getpid(), signal.SIGKILL)
        return read(self, at, *more)

    monkeypatch.setattr(samples.Samples, "read", dies)


def batches(data, kind, pause: float = 0.0):
    torch.manual_seed(3)
    found = []
    for images, targets in kind(open_data(data), data, COLOUR, CPU):
        found.append((images.clone(), targets.clone()))
        time.sleep(pause)  # an optimiser step, in which a worker dies
    return found


# A death is told while a batch is waited for, or is over by then.
@pytest.mark.wide_unless(lambda kind, pause: kind is train_loader or not pause)
@pytest.mark.parametrize("pause", [0.0, 0.2])
@pytest.mark.parametrize("kind", [train_loader, eval_loader])
def test_workers_are_started_again_at_the_batch_that_is_next(data, tmp_path, monkeypatch, caplog, kind, pause):
    expected = batches(data, kind)
    handler = signal.getsignal(signal.SIGCHLD)
    dying(monkeypatch, tmp_path, 1)
    found = batches(data, kind, pause)
    assert (tmp_path / "death_0").exists()
    assert len(found) == len(expected) > 3
    for (images, targets), (images_before, targets_before) in zip(found, expected, strict=True):
        assert torch.equal(images, images_before)
        assert torch.equal(targets, targets_before)
    assert [record.message for record in caplog.records if "has ended" in record.message] == [
        "a process that loads images has ended; they are started again, this once"
    ]
    assert signal.getsignal(signal.SIGCHLD) is handler


def test_the_second_death_is_told(data, tmp_path, monkeypatch):
    dying(monkeypatch, tmp_path, 2)
    with pytest.raises((RuntimeError, ConnectionError, EOFError)) as caught:
        batches(data, train_loader)
    assert "DataLoader worker" in str(caught.value) or isinstance(caught.value, (ConnectionError, EOFError))
    assert (tmp_path / "death_1").exists()


def test_another_error_of_a_worker_is_no_death(data, monkeypatch):
    def fails(self, at, *more):
        raise RuntimeError("of a data set")

    monkeypatch.setattr(samples.Samples, "read", fails)
    with pytest.raises(RuntimeError, match="of a data set"):
        batches(data, train_loader)
