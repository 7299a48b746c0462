"""Data sets that timm reads: torchvision's, packages that may be missing, and streams."""

from __future__ import annotations

import pytest
from helpers.images import COLOUR, CPU, GRAY, class_folders, epoch, picture, write_idx
from timm.data import IterableImageDataset

from compressvit.data.loaders import eval_loader, train_loader
from compressvit.data.opening import open_data
from compressvit.data.spec import Data
from compressvit.errors import UserError


def test_a_torchvision_set(tmp_path):
    write_idx(tmp_path / "MNIST" / "raw", packed=False)
    data = Data(name="torch/mnist", root=str(tmp_path), batch_size=6)
    datasets = open_data(data)
    assert (len(datasets.train), len(datasets.validation), datasets.num_classes) == (20, 10, 10)
    images, targets = epoch(eval_loader(datasets, data, COLOUR, CPU))
    assert images.shape == (10, 3, 32, 32)
    assert targets.tolist() == list(range(10))


def test_a_torchvision_folder_with_a_broken_file(tmp_path):
    root = class_folders(tmp_path)
    (root / "val" / "cat" / "0.jpg").write_bytes(b"no image")
    data = Data(name="torch/image_folder", root=str(root), batch_size=4)
    datasets = open_data(data)
    assert datasets.class_names == ["cat", "dog"]
    assert epoch(eval_loader(datasets, data, COLOUR, CPU))[1].tolist() == [0] * 5 + [1] * 6
    assert datasets.broken.paths == [str(root / "val" / "cat" / "0.jpg")]


def test_splits_of_a_torchvision_folder_with_other_classes(tmp_path):
    """As many, so that nothing but their names could tell."""
    class_folders(tmp_path, splits=("train",))
    class_folders(tmp_path, splits=("val",), classes=("cat", "owl"))
    with pytest.raises(UserError) as error:
        open_data(Data(name="torch/image_folder", root=str(tmp_path)))
    for words in ("have different classes", "only in training: dog", "only in validation: owl"):
        assert words in str(error.value)


def test_a_torchvision_set_that_is_not_there(tmp_path):
    with pytest.raises(UserError) as error:
        open_data(Data(name="torch/cifar10", root=str(tmp_path)))
    for word in ("data.name=torch/cifar10", "data.train_split=train", "not found", "data.download=true"):
        assert word in str(error.value)


def test_a_missing_package_is_named(monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(UserError, match="hfds/food101 needs a package: pip install datasets"):
        open_data(Data(name="hfds/food101"))
    with pytest.raises(UserError, match="pip install tensorflow-datasets"):
        open_data(Data(name="tfds/food101"))


class Stream:
    """A reader of a streaming set: what timm's readers of WebDataset shards do, without the shards."""

    def __init__(self, count: int, highest: int = 3):
        self.count, self.highest, self.epochs = count, highest, []

    def __len__(self):
        return self.count

    def __iter__(self):
        return ((picture(i), i % (self.highest + 1)) for i in range(self.count))

    def set_epoch(self, number):
        self.epochs.append(number)


@pytest.fixture
def streaming(monkeypatch):
    streams = {"train": Stream(10), "validation": Stream(7)}

    def create(name, split, **_):
        return IterableImageDataset(None, reader=streams[split])

    monkeypatch.setattr("timm.data.create_dataset", create)
    monkeypatch.setattr("importlib.util.find_spec", lambda name: name)
    return streams


def test_a_streaming_set(streaming):
    data = Data(name="wds/mine", root="somewhere", num_classes=4, batch_size=4)
    datasets = open_data(data)
    train, validation = train_loader(datasets, data, GRAY, CPU), eval_loader(datasets, data, COLOUR, CPU)
    assert (len(train), len(validation)) == (2, 2)
    assert epoch(train)[0].shape == (8, 1, 8, 8)
    assert epoch(validation)[0].shape == (7, 3, 32, 32)
    epoch(train, seed=0), epoch(train, seed=1)
    first, again, other = streaming["train"].epochs
    assert first == again
    assert first != other
    assert streaming["validation"].epochs == []
    assert datasets.broken.count == 0


def test_what_a_streaming_set_cannot_do(streaming):
    data = Data(name="wds/mine", root="somewhere", num_classes=4)
    with pytest.raises(UserError, match=r"data\.limit_val=3: a streaming set"):
        open_data(data.model_copy(update={"limit_val": 3}))
    with pytest.raises(UserError, match=r"does not say how many classes it has; give data\.num_classes=N"):
        open_data(data.model_copy(update={"num_classes": None}))
    narrow = data.model_copy(update={"num_classes": 3})
    with pytest.raises(UserError, match="label 3 is out of range for 3 classes"):
        epoch(eval_loader(open_data(narrow), narrow, COLOUR, CPU))
    streaming["validation"].count = 0
    with pytest.raises(UserError, match=r"val_split=validation.*does not say how many"):
        open_data(data)
