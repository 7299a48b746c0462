"""Image files that cannot be decoded: left out of evaluation, replaced in training, refused when many."""

from __future__ import annotations

import errno
import gc
import logging
import multiprocessing
import pickle
from dataclasses import replace
from multiprocessing.reduction import ForkingPickler
from pathlib import Path

import pytest
import timm
from helpers.images import COLOUR, CPU, PLAIN, POLICY, as_multiset, class_folders, epoch, jpeg
from PIL import Image
from torch.utils.data import Dataset

from compressvit.data import samples
from compressvit.data.input import Side
from compressvit.data.loaders import eval_loader, train_loader
from compressvit.data.opening import open_data
from compressvit.data.pictures import TooManyFiles
from compressvit.data.samples import BrokenFiles
from compressvit.data.spec import Data
from compressvit.errors import UserError
from compressvit.runs.evaluate import Scorer
from compressvit.runs.resources import resource_faults


@pytest.fixture
def damaged(tmp_path) -> Path:
    """Two of six images of each split cannot be decoded: a truncated JPEG, and text."""
    root = class_folders(tmp_path, each=3)
    for split in ("train", "val"):
        (root / split / "cat" / "1.jpg").write_bytes(jpeg(1)[:250])
        (root / split / "dog" / "2.jpg").write_text("this is text")
    return root


@pytest.mark.parametrize("workers", [0, 2])
def test_broken_files_are_left_out_of_evaluation(damaged, workers, caplog):
    data = Data(name="folder", root=str(damaged), batch_size=2, num_workers=workers)
    datasets = open_data(data)
    loader = eval_loader(datasets, data, COLOUR, CPU)
    with caplog.at_level(logging.WARNING, logger="compressvit"):
        for _ in range(2):
            images, targets = epoch(loader)
            assert targets.tolist() == [0, 0, 1, 1]
            assert len(images) == 4
    assert datasets.broken.count == 2
    expected = [str(damaged / "val" / "cat" / "1.jpg"), str(damaged / "val" / "dog" / "2.jpg")]
    assert datasets.broken.paths == expected
    messages = [record.getMessage() for record in caplog.records]
    assert len(messages) == 2  # once each, in two epochs
    assert all(path in message for path, message in zip(expected, messages, strict=True))
    assert messages[0].startswith("skipped a broken image: ")
    assert messages[1].endswith("it is not an image")


@pytest.mark.parametrize("workers", [0, 2])
def test_what_is_found_in_a_part_is_counted_and_told(damaged, workers, caplog):
    Image.new("CMYK", (40, 30)).save(damaged / "train" / "cat" / "2.jpg")
    data = Data(name="folder", root=str(damaged), batch_size=2, num_workers=workers)
    datasets = open_data(data)
    part = datasets.train.part([1, 2, 5]).part([0, 1])  # of a part
    loader = eval_loader(replace(datasets, validation=part), data, COLOUR, CPU)
    with caplog.at_level(logging.WARNING, logger="compressvit"):
        for _ in range(2):
            assert len(epoch(loader)[0]) == 1
    assert datasets.broken.paths == [str(damaged / "train" / "cat" / "1.jpg")]
    assert len(caplog.records) == 1
    assert [(note.what, note.count) for note in datasets.broken.notes()] == [("cmyk", 1)]


def test_broken_files_of_an_index_are_counted(damaged):
    data = Data(name="folder", root=str(damaged), batch_size=4)
    datasets = open_data(data)
    side = Side.of(timm.create_model("test_vit", img_size=32, num_classes=0), data)
    scores = Scorer(datasets, data, CPU).score(side, search=True)
    assert (scores["images"], scores["indexed"]) == (4, 4)
    assert datasets.broken.count == 4


@pytest.mark.parametrize("workers", [0, 2])
def test_broken_files_are_replaced_in_training(damaged, workers):
    data = Data(name="folder", root=str(damaged), batch_size=3, num_workers=workers)
    datasets = open_data(data)
    images, targets = epoch(train_loader(datasets, data, PLAIN, CPU))
    assert len(targets) == 6
    assert datasets.broken.count == 2
    assert sorted(targets.tolist()) == [0, 0, 0, 0, 1, 1]  # cat/1 by cat/2, and dog/2, the last of all, by cat/0
    assert len(set(as_multiset(images))) == 4


def test_an_item_that_is_no_image_says_so(damaged):
    datasets = open_data(Data(name="folder", root=str(damaged)))
    assert datasets.validation[1][1] == samples.NO_IMAGE
    assert datasets.validation[0][1] == 0


def test_a_batch_of_broken_files_is_skipped(tmp_path):
    root = class_folders(tmp_path, each=4)
    for name in ("cat/0", "cat/1"):
        (root / "val" / f"{name}.jpg").write_text("text")
    data = Data(name="folder", root=str(root), batch_size=2)
    datasets = open_data(data)
    assert epoch(eval_loader(datasets, data, COLOUR, CPU))[1].tolist() == [0, 0, 1, 1, 1, 1]


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("make", [train_loader, eval_loader])
def test_a_set_of_broken_files_is_refused(tmp_path, workers, make):
    root = class_folders(tmp_path, each=30)
    for split in ("train", "val"):
        for file in [*(root / split / "cat").iterdir(), *sorted((root / split / "dog").iterdir())[:25]]:
            file.write_text("text")
    data = Data(name="folder", root=str(root), batch_size=16, num_workers=workers)
    before = set(multiprocessing.active_children())
    loader = make(open_data(data), data, COLOUR, CPU)
    with pytest.raises(UserError, match=r"^50 consecutive image files cannot be decoded .* of 60 so far") as error:
        epoch(loader)
    assert "worker process" not in str(error.value)
    assert set(multiprocessing.active_children()) <= before


def test_the_garbage_collector_ends_workers(tmp_path):
    """Of a loader in a cycle, as there is one with any exception that is kept."""
    data = Data(name="folder", root=str(class_folders(tmp_path)), batch_size=2, num_workers=2)
    before = set(multiprocessing.active_children())
    loader = train_loader(open_data(data), data, COLOUR, CPU)
    epoch(loader)
    workers = set(multiprocessing.active_children()) - before
    cycle = [loader]
    cycle.append(cycle)
    del loader, cycle
    gc.collect()
    assert [worker.exitcode for worker in workers] == [0, 0]  # None if they were not told and still live


def test_what_a_worker_finds_amid_a_report_is_not_overlooked(tmp_path, monkeypatch):
    held_out = open_data(Data(name="folder", root=str(class_folders(tmp_path, each=30)))).validation
    broken = BrokenFiles(held_out)
    held_out.broken[:49] = 1
    found = broken._found

    def and_one_more():
        held_out.broken[49] = 1
        return found()

    monkeypatch.setattr(broken, "_found", and_one_more)

    def twice():
        broken.report()
        broken.report()

    with pytest.raises(UserError, match="50 consecutive image files"):
        twice()


def test_a_small_set_of_broken_files_is_refused(tmp_path):
    root = class_folders(tmp_path, each=2)
    for file in (root / "train").rglob("*.jpg"):
        file.write_text("text")
    data = Data(name="folder", root=str(root))
    with pytest.raises(UserError, match="4 consecutive image files cannot be decoded"):
        epoch(train_loader(open_data(data), data, COLOUR, CPU))


def test_what_a_worker_needs_can_be_sent_to_it(damaged):
    data = Data(name="folder", root=str(damaged), augment=POLICY)
    loader = train_loader(open_data(data), data, COLOUR, CPU)
    sent = ForkingPickler.dumps(loader.dataset)
    received = pickle.loads(sent)
    assert received[0][0].shape == (3, 32, 32)
    received[1]
    assert loader.dataset.broken.sum() == 1  # the record is shared, not copied


@pytest.mark.parametrize(("workers", "at"), [(0, "open"), (0, "orientation"), (1, "open")])
@pytest.mark.parametrize(
    ("error", "words"),
    [
        (MemoryError(), r"memory ran out: .*cat/2\.jpg\. Give a smaller data\.batch_size \(now 2\)"),
        (OSError(errno.ENOMEM, "Cannot allocate memory"), r"memory ran out: .*2\.jpg: \[Errno 12\] Cannot allocate"),
        (OSError(errno.EMFILE, "Too many open files", "x.jpg"), r"no more files: \[Errno 24\] .*'x\.jpg'; give fewer"),
        (
            OSError(errno.ENFILE, "Too many open files in system"),
            r"no more files: .* in system; give fewer data\.num_work",
        ),
    ],
)
def test_a_lack_of_memory_or_handles_is_no_fault_of_a_picture(damaged, monkeypatch, workers, error, words, at):
    data = Data(name="folder", root=str(damaged), batch_size=2, num_workers=workers)
    datasets = open_data(data)
    opened = Image.open

    def fails(file, **settings):
        if not str(file).endswith("cat/2.jpg"):
            return opened(file, **settings)
        if at == "open":
            raise error
        image = opened(file, **settings)
        monkeypatch.setattr(type(image), "getexif", raises)
        return image

    def raises(image):
        raise error

    monkeypatch.setattr(Image, "open", fails)
    with pytest.raises(UserError, match=words), resource_faults(data):
        epoch(train_loader(datasets, data, PLAIN, CPU))
    assert str(damaged / "train" / "cat" / "2.jpg") not in datasets.broken.paths


@pytest.mark.parametrize("number", [errno.EMFILE, errno.EIO])
def test_a_set_that_opens_its_files_itself(damaged, number):
    class Own(Dataset):
        def __len__(self):
            return 2

        def __getitem__(self, index):
            raise OSError(number, "no")

    found = samples.Samples(Own())
    if number == errno.EIO:
        assert found[0][1] == samples.NO_IMAGE
        return
    with pytest.raises(TooManyFiles):
        found[0]
