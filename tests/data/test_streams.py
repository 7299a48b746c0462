"""What is counted while a set streams."""

from __future__ import annotations

import io
import json
import logging
import tarfile

import numpy as np
import pytest
import torch
from helpers.images import COLOUR, CPU, GRAY, UNCHANGED, epoch, grays, jpeg, picture
from helpers.together import together
from PIL import Image
from timm.data import IterableImageDataset
from torch.utils.data import get_worker_info

from compressvit import processes
from compressvit.data.loaders import calibration_batches, eval_loader, train_loader
from compressvit.data.opening import open_data
from compressvit.data.spec import Data
from compressvit.errors import UserError

TURNED = Image.Exif()
TURNED[274] = 6


class Reader:
    """Ten samples of which the second is passed over as timm's reader of shards does it; the others need one conversion each. Workers
    share them out."""

    def __len__(self):
        return 10

    def __iter__(self):
        worker = get_worker_info()
        for i in range(10) if worker is None else range(worker.id, 10, worker.num_workers):
            if i == 1:
                logging.getLogger("timm.data.readers.reader_wds").warning("Handling webdataset error (…). Ignoring.")
                continue
            yield self.image(i), i % 2

    def image(self, i: int) -> Image.Image:
        if i < 4:
            return Image.fromarray(np.full((8, 8), 40_000, dtype=np.uint16))
        if i < 6:
            return picture(i).convert("CMYK")
        file = io.BytesIO()
        picture(i).save(file, "PNG", exif=TURNED if i < 8 else None)
        return Image.open(file)


@pytest.fixture
def streaming(monkeypatch):
    monkeypatch.setattr("timm.data.create_dataset", lambda name, **_: IterableImageDataset(None, reader=Reader()))
    monkeypatch.setattr("importlib.util.find_spec", lambda name: name)


@pytest.mark.wide_unless(lambda workers: not workers)
@pytest.mark.parametrize("workers", [0, 2])
def test_a_stream_is_counted_once_however_often_it_is_read(streaming, workers):
    data = Data(name="wds/mine", root="somewhere", num_classes=2, batch_size=4, num_workers=workers)
    datasets = open_data(data)
    assert (datasets.notes(), datasets.broken.count) == ([], 0)
    for _ in range(3):
        epoch(train_loader(datasets, data, GRAY, CPU))
    for _ in calibration_batches(datasets, data, GRAY, CPU, images=2, seed=0):  # not the whole of it
        pass
    once = {"passed_over": 1, "sixteen_bits": 3, "cmyk": 2, "turned": 2}
    assert {note.what: note.count for note in datasets.notes()} == once
    assert datasets.broken.count == 1
    for _ in range(2):
        assert len(epoch(eval_loader(datasets, data, COLOUR, CPU))[0]) == 9
    both = {"sixteen_bits": 6, "cmyk": 4, "turned": 4}
    notes = datasets.notes()
    assert {note.what: note.count for note in notes[2:]} == both
    assert [(note.what, note.count) for note in notes[:2]] == [("passed_over", 1)] * 2
    assert notes[0].text == "1 sample of the stream that could not be read passed over; timm's warnings say why"
    assert datasets.broken.count == 2
    assert datasets.broken.paths == []
    datasets.broken.report()


@pytest.mark.parametrize("exif", [False, True])
def test_pictures_of_a_stream_are_turned_by_option(streaming, exif):
    data = Data(name="wds/mine", root="somewhere", num_classes=2, exif=exif)
    sizes = []
    datasets = open_data(data)
    datasets.validation.transform = lambda image: sizes.append(image.size)
    list(datasets.validation)
    assert sizes.count((20, 24)) == 2 * exif


def write_shard(path, samples):
    """A tar file of WebDataset with pictures of class 1, by name as (ending, content)."""
    with tarfile.open(path, "w") as tar:
        for name, picture_file in samples.items():
            for ending, content in (picture_file, ("cls", b"1")):
                entry = tarfile.TarInfo(f"{name}.{ending}")
                entry.size = len(content)
                tar.addfile(entry, io.BytesIO(content))


def data_of(folder, split, **settings):
    return Data(name="wds/mine", root=str(folder), train_split=split, val_split=split, num_classes=2, **settings)


@pytest.mark.parametrize("workers", [0, 2])
def test_shards_of_webdataset(tmp_path, workers):
    pytest.importorskip("webdataset")
    sixteen = io.BytesIO()
    Image.fromarray(np.full((8, 8), 40_000, dtype=np.uint16)).save(sixteen, "PNG")
    contents = [("jpg", jpeg(0)), ("jpg", b"no picture"), ("png", sixteen.getvalue()), ("jpg", jpeg(1))]
    for shard in range(2):
        write_shard(tmp_path / f"val-{shard}.tar", {f"{shard}{i}": content for i, content in enumerate(contents)})
    split = "val-{0..1}.tar|8"
    data = data_of(tmp_path, split, batch_size=4, num_workers=workers)
    datasets = open_data(data)
    assert len(epoch(eval_loader(datasets, data, COLOUR, CPU))[0]) == 6
    assert (
        json.dumps([(note.what, note.count) for note in datasets.notes()])
        == '[["passed_over", 2], ["sixteen_bits", 2]]'
    )
    assert datasets.broken.count == 2


def shards(folder, counts):
    """Tar files of so many samples, of which every one is of another gray."""
    gray = 0
    for shard, count in enumerate(counts):
        samples = {}
        for _ in range(count):
            file = io.BytesIO()
            Image.new("L", (8, 8), gray := gray + 1).save(file, "PNG")
            samples[str(gray)] = ("png", file.getvalue())
        write_shard(folder / f"part-{shard}.tar", samples)
    return f"part-{{0..{len(counts) - 1}}}.tar|{gray}"


@pytest.mark.wide_unless(lambda counts: len(counts) == 5)
@pytest.mark.parametrize("counts", [(3, 2, 4, 1, 3), (7,), (2, 2)])
def test_processes_see_every_sample_of_shards_once(tmp_path, counts):
    pytest.importorskip("webdataset")
    split = shards(tmp_path, counts)
    data = data_of(tmp_path, split, batch_size=2)

    def seen():
        with processes.joined():
            datasets = open_data(data)
            divided = processes.count() > 1
            part = grays(eval_loader(datasets, data, UNCHANGED, CPU, distributed=divided))
            return part, grays(eval_loader(datasets, data, UNCHANGED, CPU))

    every = list(range(1, sum(counts) + 1))
    (one, whole), (two, other) = together(2, seen)
    assert sorted(one + two) == whole == other == every
    assert bool(two) is (len(counts) > 1)


@pytest.mark.parametrize("workers", [0, pytest.param(2, marks=pytest.mark.wide)])
def test_processes_train_on_every_sample_of_equal_shards_once(tmp_path, workers):
    pytest.importorskip("webdataset")
    split = shards(tmp_path, (4, 4, 4, 4))
    data = data_of(tmp_path, split, batch_size=2, num_workers=workers)

    def seen():
        with processes.joined():
            torch.manual_seed(0)
            loader = train_loader(open_data(data), data, UNCHANGED, CPU)
            return [grays(loader) for _ in range(2)]

    for one, two in zip(*together(2, seen), strict=True):
        assert len(one) == len(two) == 8
        assert sorted(one + two) == list(range(1, 17))


def test_too_few_shards_for_processes_and_workers(tmp_path):
    """One of them would have none, and the others would wait for it."""
    pytest.importorskip("webdataset")
    split = shards(tmp_path, (4, 4, 4))
    data = data_of(tmp_path, split, batch_size=2, num_workers=2)

    def refused():
        with processes.joined(), pytest.raises(UserError) as told:
            train_loader(open_data(data), data, UNCHANGED, CPU)
        return str(told.value)

    message, _ = together(2, refused)
    assert message.startswith("3 shards to train on are too few for 2 processes with 2 workers each")
    assert "data.num_workers=1" in message
