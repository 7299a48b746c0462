"""The recipe's `data` section, and the sets with a fixed shape: digits and Fashion-MNIST."""

from __future__ import annotations

import gzip
import struct
from pathlib import Path

import pytest
import torch
from helpers.images import CPU, write_idx

from compressvit.data.input import InputConfig
from compressvit.data.loaders import eval_loader
from compressvit.data.opening import open_data
from compressvit.data.sets import fashion_mnist
from compressvit.data.spec import Augment, Data, known_classes
from compressvit.errors import UserError

# ---- the recipe's section


def test_default_augmentation_is_none():
    augment = Augment()
    assert augment.scale is None
    assert augment.color_jitter is None
    assert augment.auto_augment is None
    assert (augment.hflip, augment.vflip, augment.random_erasing, augment.translate) == (0, 0, 0, 0)


def test_every_field_is_described():
    for spec in (Data, Augment):
        assert spec.model_fields
        assert [name for name, field in spec.model_fields.items() if not field.description] == []


@pytest.mark.parametrize(
    ("section", "words"),
    [
        (
            {"name": "digit"},
            [
                "no data set 'digit'",
                "did you mean 'digits'?",
                "fashion_mnist, folder, hmdb51, images, lists",
                "wds/NAME",
            ],
        ),
        ({"name": "cifar10"}, ["did you mean 'torch/cifar10'?"]),
        ({"name": "torch/cifar1000"}, ["did you mean 'torch/cifar100'?", "torch/imagenet"]),
        ({"name": "wds/"}, ["no data set 'wds/'"]),
        ({"name": "digits", "batch_sise": 3}, ["batch_sise: unknown key", "did you mean 'batch_size'?"]),
        ({"name": "digits", "batch_size": 0}, ["batch_size"]),
        ({"name": "digits", "batch_size": 2**64}, ["batch_size", "1048576"]),
        ({"name": "digits", "eval_batch_size": 10**12}, ["eval_batch_size", "1048576"]),
        ({"name": "digits", "num_workers": 10**6}, ["num_workers", "1024"]),
        ({"name": "digits", "augment": {"translate": 10**60}}, ["translate", "65536"]),
        ({"name": "digits", "mean": ()}, ["0 numbers", "one for each channel of the model, or one for all"]),
        ({"name": "digits", "std": (0.0,)}, ["above 0"]),
        ({"name": "digits", "interpolation": "cubic"}, ["interpolation", "bicubic"]),
        ({"name": "images", "val_fraction": 0.9}, ["val_fraction"]),
        ({"name": "digits", "augment": {"scale": (0.9, 0.1)}}, ["not a range"]),
        ({"name": "digits", "augment": {"scale": (0.9, 1.1)}}, ["larger than the image"]),
        ({"name": "digits", "augment": {"auto_augment": "rond-m9"}}, ["'rond-m9'", "rand-m9-mstd0.5-inc1"]),
        ({"name": "digits", "augment": {"erasing_mode": "white"}}, ["erasing_mode", "pixel"]),
    ],
)
def test_a_bad_section_is_refused(section, words):
    with pytest.raises(UserError) as error:
        Data(**section)
    for word in words:
        assert word in str(error.value)


@pytest.mark.parametrize(
    ("section", "classes"),
    [
        ({"name": "digits"}, 10),
        ({"name": "fashion_mnist"}, 10),
        ({"name": "torch/cifar10"}, 10),
        ({"name": "torch/CIFAR100"}, 100),
        ({"name": "folder"}, None),
        ({"name": "folder", "num_classes": 7}, 7),
        ({"name": "wds/mine"}, None),
        ({"name": "images"}, None),
    ],
)
def test_known_classes_touches_no_disk(section, classes):
    assert known_classes(Data(**section)) == classes


# ---- digits


def test_digits_are_split_by_class_and_always_alike():
    data = Data(name="digits")
    first, second = open_data(data), open_data(data)
    assert (len(first.train), len(first.validation)) == (1437, 360)
    assert (first.num_classes, first.class_names, first.labelled) == (10, list("0123456789"), True)
    assert torch.equal(first.train.source.data, second.train.source.data)
    assert first.validation.source.targets.bincount().min() >= 33
    image, target = first.train[0]
    assert (image.size, image.mode) == ((8, 8), "L")
    assert 0 <= target < 10
    assert first.train.source.data.max() == 255


def test_limits_are_spread_evenly():
    full = open_data(Data(name="digits"))
    part = open_data(Data(name="digits", limit_train=100, limit_val=7))
    assert (len(part.train), len(part.validation)) == (100, 7)
    assert [part.train[i][1] for i in (0, 1, 99)] == [full.train[i][1] for i in (0, 14, 1422)]
    assert len(open_data(Data(name="digits", limit_train=10**6)).train) == 1437


def test_more_classes_than_declared():
    with pytest.raises(UserError, match=r"data\.num_classes=4, but digits has 10 classes.*set 10"):
        open_data(Data(name="digits", num_classes=4))
    assert open_data(Data(name="digits", num_classes=12)).num_classes == 12


# ---- Fashion-MNIST


@pytest.fixture
def no_fashion(tmp_path, monkeypatch):
    monkeypatch.setattr(fashion_mnist, "FASHION_CACHE", tmp_path / "cache")
    monkeypatch.setattr(fashion_mnist, "FASHION_DEBIAN", tmp_path / "debian")
    return tmp_path


@pytest.mark.parametrize("packed", [True, False])
@pytest.mark.parametrize("below", [".", "FashionMNIST/raw"])
def test_fashion_mnist_files_are_found_in_root(no_fashion, below, packed):
    root = no_fashion / "mine"
    write_idx(root / below, packed=packed)
    before = sorted(no_fashion.rglob("*"))
    datasets = open_data(Data(name="fashion_mnist", root=str(root)))
    assert (len(datasets.train), len(datasets.validation), datasets.num_classes) == (20, 10, 10)
    assert datasets.class_names[0] == "T-shirt/top"
    assert [datasets.train[i][1] for i in range(12)] == [0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 0, 1]
    assert datasets.train[0][0].size == (28, 28)
    assert sorted(no_fashion.rglob("*")) == before  # nothing is unpacked to where another run would find it


@pytest.mark.parametrize("place", ["cache", "debian"])
def test_fashion_mnist_is_found_without_root(no_fashion, place):
    write_idx(no_fashion / place)
    assert len(open_data(Data(name="fashion_mnist")).train) == 20


def test_fashion_mnist_missing_says_every_way_to_supply_it(no_fashion):
    for section in ({}, {"root": str(no_fashion / "nowhere")}):
        with pytest.raises(UserError) as error:
            open_data(Data(name="fashion_mnist", **section))
        for word in ("not found in", "data.root=FOLDER", "cache", "dataset-fashion-mnist", "data.download=true"):
            assert word in str(error.value)
    assert "nowhere" in str(error.value)


def test_fashion_mnist_download_is_asked_of_torchvision(no_fashion, monkeypatch):
    def download(self):
        write_idx(Path(self.raw_folder), packed=False)

    monkeypatch.setattr("torchvision.datasets.FashionMNIST.download", download)
    assert len(open_data(Data(name="fashion_mnist", root=str(no_fashion / "new"), download=True)).train) == 20

    def offline(self):
        raise RuntimeError("Error downloading train-images-idx3-ubyte.gz")

    monkeypatch.setattr("torchvision.datasets.FashionMNIST.download", offline)
    with pytest.raises(UserError, match="could not be downloaded: Error downloading"):
        open_data(Data(name="fashion_mnist", root=str(no_fashion / "newer"), download=True))


@pytest.mark.parametrize(
    ("fault", "words"),
    [
        (lambda f: (f / "train-images-idx3-ubyte.gz").write_bytes(b"no gzip"), "cannot be read"),
        (lambda f: (f / "t10k-images-idx3-ubyte.gz").write_bytes(gzip.compress(b"\0" * 99)), "cannot be read"),
        (
            lambda f: (f / "train-labels-idx1-ubyte.gz").write_bytes(
                gzip.compress(struct.pack(">II", 0x801, 3) + b"123")
            ),
            "20 images, 3 labels",
        ),
    ],
)
def test_fashion_mnist_damaged_files(no_fashion, fault, words):
    root = write_idx(no_fashion / "mine")
    fault(root)
    with pytest.raises(UserError, match=words):
        open_data(Data(name="fashion_mnist", root=str(root)))


def test_fashion_mnist_label_out_of_range(no_fashion):
    root = write_idx(no_fashion / "mine", labels=12)
    with pytest.raises(UserError, match="label 11 is out of range for 10 classes"):
        open_data(Data(name="fashion_mnist", root=str(root)))


@pytest.mark.skipif(not fashion_mnist.FASHION_DEBIAN.is_dir(), reason="Debian's dataset-fashion-mnist is not installed")
def test_the_real_fashion_mnist():
    data = Data(name="fashion_mnist", root=str(fashion_mnist.FASHION_DEBIAN), batch_size=500)
    datasets = open_data(data)
    assert (len(datasets.train), len(datasets.validation)) == (60000, 10000)
    config = InputConfig(1, 28, 28, (0.2860,), (0.3530,), "bicubic", 1.0)
    images, targets = next(iter(eval_loader(datasets, data, config, CPU)))
    assert images.shape == (500, 1, 28, 28)
    assert abs(images.mean()) < 0.05
    assert abs(images.std() - 1) < 0.05
    assert targets[:5].tolist() == [9, 2, 1, 1, 6]  # the published test labels
