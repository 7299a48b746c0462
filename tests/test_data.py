"""Opening data sets, the loaders over them, and what every bad input is told."""

from __future__ import annotations

import dataclasses
import gzip
import io
import logging
import multiprocessing
import pickle
import random
import struct
import tarfile
from multiprocessing.reduction import ForkingPickler
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
from PIL import Image
from pydantic import ValidationError
from torch import nn
from torchvision.transforms.functional import to_tensor

from compressvit import loaders, samples, sources
from compressvit.data import (
    Augment,
    Data,
    InputConfig,
    eval_loader,
    input_config,
    known_classes,
    open_data,
    renormalise,
    train_loader,
)
from compressvit.errors import UserError

CPU = torch.device("cpu")
COLOUR = InputConfig(3, 32, 32, (0.5, 0.4, 0.3), (0.2, 0.25, 0.3), "bicubic", 0.9)
GRAY = InputConfig(1, 8, 8, (0.5,), (0.25,), "bicubic", 1.0)
PLAIN = InputConfig(3, 20, 24, (0.0,) * 3, (1.0,) * 3, "bicubic", 1.0)  # pixel values in 0..1, as large as `picture`


def picture(seed: int) -> Image.Image:
    noise = np.random.default_rng(seed).integers(0, 256, (5, 6, 3), dtype=np.uint8)
    return Image.fromarray(noise).resize((24, 20), Image.Resampling.BILINEAR)


def jpeg(seed: int) -> bytes:
    buffer = io.BytesIO()
    picture(seed).save(buffer, "JPEG")
    return buffer.getvalue()


def class_folders(root: Path, splits=("train", "val"), classes=("cat", "dog"), each: int = 6) -> Path:
    for s, split in enumerate(splits):
        for c, name in enumerate(classes):
            folder = root / split / name
            folder.mkdir(parents=True)
            for i in range(each):
                (folder / f"{i}.jpg").write_bytes(jpeg(100 * s + 10 * c + i))
    return root


def tar_of(folder: Path) -> None:
    with tarfile.open(folder.with_suffix(".tar"), "w") as tar:
        tar.add(folder, arcname=folder.name)


def write_idx(folder: Path, *, train: int = 20, test: int = 10, size: int = 28, labels: int = 10, packed: bool = True):
    folder.mkdir(parents=True, exist_ok=True)
    for split, count in (("train", train), ("t10k", test)):
        rng = np.random.default_rng(count)
        images = struct.pack(">IIII", 0x803, count, size, size) + rng.integers(0, 256, count * size**2, "u1").tobytes()
        targets = struct.pack(">II", 0x801, count) + (np.arange(count) % labels).astype("u1").tobytes()
        for name, content in ((f"{split}-images-idx3-ubyte", images), (f"{split}-labels-idx1-ubyte", targets)):
            (folder / (name + ".gz" * packed)).write_bytes(gzip.compress(content) if packed else content)
    return folder


def seed_all(seed: int) -> None:
    random.seed(seed)
    np.random.seed(seed)
    torch.manual_seed(seed)


def epoch(loader, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    """An epoch's images and targets, with draws in between as a training step would make them."""
    seed_all(seed)
    images, targets = [], []
    for batch_images, batch_targets in loader:
        images.append(batch_images)
        targets.append(batch_targets)
        torch.rand(3), random.random(), np.random.rand()
    return torch.cat(images), torch.cat(targets)


def as_multiset(images: torch.Tensor) -> list[bytes]:
    return sorted(image.tobytes() for image in (images * 255).round().to(torch.uint8).numpy())


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
            ["no data set 'digit'", "did you mean 'digits'?", "fashion_mnist, folder, images", "wds/NAME"],
        ),
        ({"name": "cifar10"}, ["did you mean 'torch/cifar10'?"]),
        ({"name": "torch/cifar1000"}, ["did you mean 'torch/cifar100'?", "torch/imagenet"]),
        ({"name": "wds/"}, ["no data set 'wds/'"]),
        ({"name": "digits", "batch_sise": 3}, ["batch_sise", "Extra inputs"]),
        ({"name": "digits", "batch_size": 0}, ["batch_size"]),
        ({"name": "digits", "mean": (0.5, 0.5)}, ["2 numbers", "grayscale", "colour"]),
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
    with pytest.raises(ValidationError) as error:
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
    assert (first.num_classes, first.class_names, first.labeled) == (10, list("0123456789"), True)
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
    monkeypatch.setattr(sources, "FASHION_CACHE", tmp_path / "cache")
    monkeypatch.setattr(sources, "FASHION_DEBIAN", tmp_path / "debian")
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

    monkeypatch.setattr(sources.FashionMNIST, "download", download)
    assert len(open_data(Data(name="fashion_mnist", root=str(no_fashion / "new"), download=True)).train) == 20

    def offline(self):
        raise RuntimeError("Error downloading train-images-idx3-ubyte.gz")

    monkeypatch.setattr(sources.FashionMNIST, "download", offline)
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


@pytest.mark.skipif(not sources.FASHION_DEBIAN.is_dir(), reason="Debian's dataset-fashion-mnist is not installed")
def test_the_real_fashion_mnist():
    data = Data(name="fashion_mnist", root=str(sources.FASHION_DEBIAN), batch_size=500)
    datasets = open_data(data)
    assert (len(datasets.train), len(datasets.validation)) == (60000, 10000)
    config = InputConfig(1, 28, 28, (0.2860,), (0.3530,), "bicubic", 1.0)
    images, targets = next(iter(eval_loader(datasets, data, config, CPU)))
    assert images.shape == (500, 1, 28, 28)
    assert abs(images.mean()) < 0.05
    assert abs(images.std() - 1) < 0.05
    assert targets[:5].tolist() == [9, 2, 1, 1, 6]  # the published test labels


# ---- class folders and tars


@pytest.mark.parametrize("val", ["val", "valid", "validation", "test"])
def test_class_folders(tmp_path, val):
    root = class_folders(tmp_path, splits=("train", val))
    datasets = open_data(Data(name="folder", root=str(root)))
    assert (len(datasets.train), len(datasets.validation)) == (12, 12)
    assert (datasets.num_classes, datasets.class_names) == (2, ["cat", "dog"])
    assert [datasets.validation[i][1] for i in (0, 5, 6, 11)] == [0, 0, 1, 1]
    assert datasets.broken.count == 0


def test_named_split_is_taken_at_its_word(tmp_path):
    class_folders(tmp_path, splits=("train", "val", "odd"))
    assert (
        open_data(Data(name="folder", root=str(tmp_path), val_split="odd"))
        .validation.name(0)
        .startswith(str(tmp_path / "odd"))
    )
    with pytest.raises(
        UserError, match=r"nothing for data\.val_split=other \(looked for other, as a folder or \.tar\)"
    ):
        open_data(Data(name="folder", root=str(tmp_path), val_split="other"))


@pytest.mark.parametrize("layout", ["a tar per split", "a tar per class"])
@pytest.mark.parametrize("workers", [0, 2])
def test_tars(tmp_path, layout, workers):
    folders = class_folders(tmp_path / "folders")
    packed = tmp_path / "packed"
    for split in ("train", "val"):
        if layout == "a tar per split":
            packed.mkdir(exist_ok=True)
            with tarfile.open(packed / f"{split}.tar", "w") as tar:
                tar.add(folders / split, arcname=split)
        else:
            (packed / split).mkdir(parents=True)
            for name in ("cat", "dog"):
                with tarfile.open(packed / split / f"{name}.tar", "w") as tar:
                    for file in sorted((folders / split / name).iterdir()):
                        tar.add(file, arcname=f"{name}_{file.name}")
    results = []
    for root in (folders, packed):
        data = Data(name="folder", root=str(root), batch_size=5, num_workers=workers)
        datasets = open_data(data)
        assert datasets.class_names == ["cat", "dog"]
        results.append(epoch(eval_loader(datasets, data, PLAIN, CPU)))
    assert torch.equal(results[0][1], results[1][1])
    assert as_multiset(results[0][0]) == as_multiset(results[1][0])
    datasets.train[0]
    ForkingPickler.dumps(datasets.train)  # no open file, whose position forked workers would share
    assert not list(packed.rglob("*.pickle"))


@pytest.mark.parametrize(
    ("build", "words"),
    [
        (lambda r: None, ["nothing for data.train_split=train", "found none", "FOLDER/train/CLASS"]),
        (
            lambda r: class_folders(r, splits=("tranin", "val")),
            ["data.train_split=train", "training", "found tranin, val"],
        ),
        (lambda r: class_folders(r, splits=("train",)), ["data.val_split=validation", "valid", "test", "found train"]),
        (lambda r: class_folders(r, each=0), ["train: no images", ".webp"]),
        (lambda r: class_folders(r, classes=("cat",)), ["only one class, 'cat'", "data.name=images"]),
        (lambda r: class_folders(r, classes=("",)), ["images lie directly in it"]),
        (lambda r: (r / "train.tar").write_bytes(b"no tar") or (r / "val").mkdir(), ["train.tar: no images", ".png"]),
    ],
)
def test_bad_class_folders(tmp_path, build, words):
    build(tmp_path)
    with pytest.raises(UserError) as error:
        open_data(Data(name="folder", root=str(tmp_path)))
    for word in words:
        assert word in str(error.value)


def test_classes_of_the_splits_differ(tmp_path):
    class_folders(tmp_path, splits=("train",), classes=("cat", "dog", "eel"))
    class_folders(tmp_path, splits=("val",), classes=("cat", "dogs"))
    with pytest.raises(UserError) as error:
        open_data(Data(name="folder", root=str(tmp_path)))
    assert "only in training: dog, eel" in str(error.value)
    assert "only in validation: dogs" in str(error.value)


def test_root_is_needed_and_must_exist(tmp_path):
    for name in ("folder", "images"):
        with pytest.raises(UserError, match=rf"data\.name={name} needs data\.root=FOLDER"):
            open_data(Data(name=name))
        with pytest.raises(UserError, match="there is no such folder"):
            open_data(Data(name=name, root=str(tmp_path / "missing")))
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match="this is a file"):
        open_data(Data(name="folder", root=str(tmp_path / "file")))
    with pytest.raises(UserError, match=r"torch/cifar10 needs data\.root=FOLDER"):
        open_data(Data(name="torch/cifar10"))


# ---- images without labels


def test_unlabeled_images_are_held_out_by_position(tmp_path):
    (tmp_path / "deeper").mkdir()
    for i in range(20):
        suffix = ("jpg", "png", "webp", "bmp")[i % 4]
        picture(i).save(tmp_path / ("deeper" if i % 2 else ".") / f"{i:02}.{suffix}")
    (tmp_path / "notes.txt").write_text("not an image")
    data = Data(name="images", root=str(tmp_path), val_fraction=0.2, batch_size=4)
    datasets = open_data(data)
    assert (datasets.num_classes, datasets.class_names, datasets.labeled) == (None, None, False)
    assert (len(datasets.train), len(datasets.validation)) == (16, 4)
    train = [datasets.train.name(i) for i in range(16)]
    held_out = [datasets.validation.name(i) for i in range(4)]
    files = sorted(str(file) for file in tmp_path.rglob("*.*") if file.suffix != ".txt")
    assert held_out == files[4::5]
    assert sorted(train + held_out) == files
    for loader in (train_loader(datasets, data, COLOUR, CPU), eval_loader(datasets, data, COLOUR, CPU)):
        assert set(epoch(loader)[1].tolist()) == {-1}


def test_too_few_unlabeled_images(tmp_path):
    with pytest.raises(UserError, match=r"no images in .* or below \(\.jpg"):
        open_data(Data(name="images", root=str(tmp_path)))
    picture(0).save(tmp_path / "0.png")
    with pytest.raises(UserError, match="one image"):
        open_data(Data(name="images", root=str(tmp_path)))
    picture(1).save(tmp_path / "1.png")
    datasets = open_data(Data(name="images", root=str(tmp_path)))
    assert (len(datasets.train), len(datasets.validation)) == (1, 1)


# ---- what timm reads


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


def test_a_torchvision_set_that_is_not_there(tmp_path):
    with pytest.raises(UserError) as error:
        open_data(Data(name="torch/cifar10", root=str(tmp_path)))
    for word in ("data.name=torch/cifar10", "data.train_split=train", "not found", "data.download=true"):
        assert word in str(error.value)


def test_a_missing_package_is_named(monkeypatch):
    monkeypatch.setattr(sources.importlib.util, "find_spec", lambda name: None)
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
        return sources.IterableImageDataset(None, reader=streams[split])

    monkeypatch.setattr(sources, "create_dataset", create)
    monkeypatch.setattr(sources.importlib.util, "find_spec", lambda name: name)
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


# ---- broken files


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


def test_a_small_set_of_broken_files_is_refused(tmp_path):
    root = class_folders(tmp_path, each=2)
    for file in (root / "train").rglob("*.jpg"):
        file.write_text("text")
    data = Data(name="folder", root=str(root))
    with pytest.raises(UserError, match="4 consecutive image files cannot be decoded"):
        epoch(train_loader(open_data(data), data, COLOUR, CPU))


# ---- loaders


def test_batches_are_normalised(tmp_path):
    root = class_folders(tmp_path)
    data = Data(name="folder", root=str(root), batch_size=5)
    datasets = open_data(data)
    loader = eval_loader(datasets, data, dataclasses.replace(PLAIN, mean=COLOUR.mean, std=COLOUR.std), CPU)
    batches = list(loader)
    assert len(loader) == len(batches) == 3
    assert [len(targets) for _, targets in batches] == [5, 5, 2]
    images, targets = batches[0]
    assert (images.dtype, targets.dtype) == (torch.float32, torch.int64)
    expected = to_tensor(Image.open(datasets.validation.name(0)))
    expected = (expected - torch.tensor(COLOUR.mean)[:, None, None]) / torch.tensor(COLOUR.std)[:, None, None]
    torch.testing.assert_close(images[0], expected, atol=1e-5, rtol=0)


@pytest.mark.parametrize(("channels", "mode"), [(1, "RGB"), (3, "L"), (3, "P"), (1, "RGBA")])
def test_images_take_the_channels_of_the_model(tmp_path, channels, mode):
    for i in range(4):
        picture(i).convert(mode).save(tmp_path / f"{i}.png")
    config = InputConfig(channels, 20, 24, (0.0,) * channels, (1.0,) * channels, "bicubic", 1.0)
    for section in ({}, {"augment": Augment(scale=(0.5, 1), auto_augment="rand-m9-mstd0.5", color_jitter=0.3)}):
        data = Data(name="images", root=str(tmp_path), batch_size=3, **section)
        images, _ = epoch(train_loader(open_data(data), data, config, CPU))
        assert images.shape == (3, channels, 20, 24)
        assert 0 <= images.min() < images.max() <= 1


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize(("size", "crop_pct"), [(8, 1.0), (20, 1.0), (8, 0.8)])
def test_memory_and_files_give_the_same_batches(monkeypatch, channels, size, crop_pct):
    config = InputConfig(channels, size, size, (0.5,) * channels, (0.25,) * channels, "bicubic", crop_pct)
    data = Data(name="digits", limit_val=50)
    fast = epoch(eval_loader(open_data(data), data, config, CPU))
    monkeypatch.setattr(loaders, "_IN_MEMORY_BYTES", 0)
    slow = epoch(eval_loader(open_data(data), data, config, CPU))
    assert torch.equal(fast[1], slow[1])
    assert torch.equal(fast[0], slow[0])


CROPPED = Augment(scale=(0.3, 1.0), hflip=0.5, color_jitter=0.4, random_erasing=0.5)
POLICY = Augment(scale=(0.3, 1.0), auto_augment="rand-m9-mstd0.5-inc1", translate=2)


@pytest.mark.parametrize("augment", [CROPPED, POLICY], ids=["crop", "policy"])
def test_an_epoch_is_a_function_of_its_seed_alone(tmp_path, augment):
    root = class_folders(tmp_path, each=12)
    runs = {}
    for workers in (0, 2):
        data = Data(name="folder", root=str(root), batch_size=5, num_workers=workers, augment=augment)
        loader = train_loader(open_data(data), data, COLOUR, CPU)
        assert len(loader) == 4
        runs[workers] = [epoch(loader, seed) for seed in (0, 1, 0)]
        assert torch.equal(runs[workers][0][0], runs[workers][2][0])
        assert torch.equal(runs[workers][0][1], runs[workers][2][1])
        assert not torch.equal(runs[workers][0][1], runs[workers][1][1])
    assert torch.equal(runs[0][0][0], runs[2][0][0])  # whatever the number of workers


def test_an_epoch_in_memory_is_a_function_of_its_seed_alone():
    data = Data(name="digits", augment=Augment(hflip=0.5, translate=1, random_erasing=0.5))
    loader = train_loader(open_data(data), data, GRAY, CPU)
    assert len(loader) == 22
    first, other, again = (epoch(loader, seed) for seed in (0, 1, 0))
    assert torch.equal(first[0], again[0])
    assert torch.equal(first[1], again[1])
    assert not torch.equal(first[1], other[1])


def test_the_epoch_begins_with_iter_and_can_be_resumed():
    data = Data(name="digits", augment=Augment(random_erasing=0.5))
    loader = train_loader(open_data(data), data, GRAY, CPU)
    whole = list(zip(range(4), iter_after_seed(loader), strict=False))
    batches = iter_after_seed(loader)
    torch.manual_seed(99)  # as a resumed run restores its generators after the epoch has begun
    for _ in range(2):
        next(batches)
    torch.rand(7)
    assert torch.equal(next(batches)[0], whole[2][1][0])


def iter_after_seed(loader):
    seed_all(5)
    return iter(loader)


def test_leaving_an_epoch_early_does_not_disturb_the_next(tmp_path):
    root = class_folders(tmp_path, each=12)
    data = Data(name="folder", root=str(root), batch_size=3, num_workers=2, augment=CROPPED)
    loader = train_loader(open_data(data), data, COLOUR, CPU)
    whole = epoch(loader)
    next(iter_after_seed(loader))
    assert torch.equal(whole[0], epoch(loader)[0])


def test_evaluation_draws_nothing(tmp_path):
    root = class_folders(tmp_path)
    for section in (
        {"name": "digits"},
        {"name": "folder", "root": str(root)},
        {"name": "folder", "root": str(root), "num_workers": 2},
    ):
        data = Data(**section)
        loader = eval_loader(open_data(data), data, COLOUR, CPU)
        seed_all(3)
        before = torch.get_rng_state()
        list(loader)
        assert torch.equal(before, torch.get_rng_state())


def test_small_sets_are_one_whole_batch(tmp_path):
    data = Data(name="folder", root=str(class_folders(tmp_path, each=3)), batch_size=64)
    loader = train_loader(open_data(data), data, COLOUR, CPU)
    assert (len(loader), loader.batch_size) == (1, 6)
    assert [len(targets) for _, targets in loader] == [6]


def test_drop_last_and_batch_size():
    data = Data(name="digits", limit_train=100, limit_val=100, batch_size=32, eval_batch_size=64)
    datasets = open_data(data)
    sizes = {
        "default": train_loader(datasets, data, GRAY, CPU),
        "kept": train_loader(datasets, data, GRAY, CPU, drop_last=False),
        "given": train_loader(datasets, data, GRAY, CPU, batch_size=50),
        "eval": eval_loader(datasets, data, GRAY, CPU),
    }
    assert {k: [len(t) for _, t in loader] for k, loader in sizes.items()} == {
        "default": [32, 32, 32],
        "kept": [32, 32, 32, 4],
        "given": [50, 50],
        "eval": [64, 36],
    }
    assert {k: (len(loader), loader.batch_size) for k, loader in sizes.items()} == {
        "default": (3, 32),
        "kept": (4, 32),
        "given": (2, 50),
        "eval": (2, 64),
    }


@pytest.mark.parametrize("memory", [True, False])
@pytest.mark.parametrize(("augment", "axis"), [(Augment(hflip=1.0), 3), (Augment(vflip=1.0), 2)])
def test_flips(monkeypatch, memory, augment, axis):
    if not memory:
        monkeypatch.setattr(loaders, "_IN_MEMORY_BYTES", 0)
    config = dataclasses.replace(GRAY, mean=(0.0,), std=(1.0,))
    data = Data(name="digits", limit_train=40, augment=augment, batch_size=40)
    datasets = open_data(data)
    plain, _ = epoch(eval_loader(dataclasses.replace(datasets, validation=datasets.train), data, config, CPU))
    flipped, _ = epoch(train_loader(datasets, data, config, CPU))
    assert as_multiset(flipped) == as_multiset(plain.flip(axis))
    assert as_multiset(flipped) != as_multiset(plain)


@pytest.mark.parametrize("memory", [True, False])
def test_translation_shifts_and_fills_with_black(monkeypatch, memory):
    if not memory:
        monkeypatch.setattr(loaders, "_IN_MEMORY_BYTES", 0)
    config = dataclasses.replace(GRAY, mean=(0.0,), std=(1.0,))
    data = Data(name="digits", augment=Augment(translate=2), batch_size=1437)
    datasets = open_data(data)
    white = sources.Pixels(
        torch.full((1437, 8, 8), 255, dtype=torch.uint8), datasets.train.source.targets, "0123456789"
    )
    datasets = dataclasses.replace(datasets, train=samples.Samples(white))
    images, _ = epoch(train_loader(datasets, data, config, CPU))
    assert set(images.unique().tolist()) == {0.0, 1.0}
    assert images.amax((1, 2, 3)).min() == 1
    seen = {(int(m.sum(0).amax()), int(m.sum(1).amax()), bool(m[0].any()), bool(m[:, 0].any())) for m in images[:, 0]}
    heights = {h for h, *_ in seen}
    assert heights == {6, 7, 8}  # up to two rows, and never more, are lost
    assert {top for *_, top, _ in seen} == {left for *_, left in seen} == {True, False}  # both ways


def test_random_erasing_is_for_training_only():
    data = Data(name="digits", augment=Augment(random_erasing=1.0, erasing_mode="const"), limit_train=60, batch_size=60)
    datasets = open_data(data)
    config = dataclasses.replace(GRAY, mean=(-1.0,))  # no pixel is normalised to 0, which erasing writes
    assert (epoch(train_loader(datasets, data, config, CPU))[0] == 0).any((1, 2, 3)).float().mean() > 0.9
    assert not (epoch(eval_loader(datasets, data, config, CPU))[0] == 0).any()


def test_training_without_augmentation_sees_what_evaluation_sees(tmp_path):
    root = class_folders(tmp_path / "set")
    data = Data(name="folder", root=str(root), batch_size=12)
    datasets = open_data(data)
    same = dataclasses.replace(datasets, validation=datasets.train)
    config = dataclasses.replace(COLOUR, mean=(0.0,) * 3, std=(1.0,) * 3)
    plain = epoch(eval_loader(same, data, config, CPU))[0]
    assert as_multiset(epoch(train_loader(same, data, config, CPU))[0]) == as_multiset(plain)


def test_what_a_worker_needs_can_be_sent_to_it(damaged):
    data = Data(name="folder", root=str(damaged), augment=POLICY)
    loader = train_loader(open_data(data), data, COLOUR, CPU)
    sent = ForkingPickler.dumps(loader.dataset)
    received = pickle.loads(sent)
    assert received[0][0].shape == (3, 32, 32)
    received[1]
    assert loader.dataset.broken.sum() == 1  # the record is shared, not copied


UNCHANGED = dataclasses.replace(GRAY, mean=(0.0,), std=(1.0,))
SHARED = Data(name="digits", batch_size=100, limit_train=1001, limit_val=101)


def share(rank: int) -> tuple[int, list[bytes], list[bytes]]:
    """What one process sees: how many training batches, and the images of an epoch of training and of evaluation."""
    torch.manual_seed(rank)  # the processes draw differently, and still cut one permutation
    datasets = open_data(SHARED)
    train, validation = (
        make(datasets, SHARED, UNCHANGED, CPU, distributed=True) for make in (train_loader, eval_loader)
    )
    return len(train), images_of(train), images_of(validation)


def images_of(loader) -> list[bytes]:
    return as_multiset(torch.cat([images for images, _ in loader]))


def check_shares(first, second) -> None:
    assert first[0] == second[0] == 5  # each has 501 of 1001 images, one of them twice, in batches of 100
    datasets = open_data(SHARED)
    whole = images_of(eval_loader(datasets, SHARED, UNCHANGED, CPU))
    assert sorted(first[2] + second[2]) == whole
    assert (len(first[2]), len(second[2])) == (51, 50)
    every = images_of(eval_loader(dataclasses.replace(datasets, validation=datasets.train), SHARED, UNCHANGED, CPU))
    shared = first[1] + second[1]
    assert len(shared) == 1000
    assert len(set(every) - set(shared)) <= 2


def test_processes_share_an_epoch_out(monkeypatch):
    sent = []

    def broadcast(objects, src):
        if torch.distributed.get_rank() == src:
            sent[:] = objects
        objects[:] = sent

    monkeypatch.setattr(torch.distributed, "get_world_size", lambda: 2)
    monkeypatch.setattr(torch.distributed, "broadcast_object_list", broadcast)
    shares = []
    for rank in (0, 1):
        monkeypatch.setattr(torch.distributed, "get_rank", lambda rank=rank: rank)
        shares.append(share(rank))
    check_shares(*shares)


def _process(rank: int, folder: str, results) -> None:
    torch.distributed.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=2)
    results[rank] = share(rank)
    torch.distributed.destroy_process_group()


@pytest.mark.slow
def test_real_processes_share_an_epoch_out(tmp_path):
    with torch.multiprocessing.Manager() as manager:
        results = manager.dict()
        torch.multiprocessing.spawn(_process, (str(tmp_path), results), nprocs=2)
        check_shares(results[0], results[1])


# ---- what a model takes


def test_input_config_of_a_model():
    model = timm.create_model("vit_tiny_patch16_224", img_size=32, patch_size=8, in_chans=1, depth=1)
    config = input_config(model, Data(name="digits"))
    assert config == InputConfig(1, 32, 32, (0.5,), (0.5,), "bicubic", 1.0, "center")
    config = input_config(model, Data(name="folder"))
    assert config.crop_pct == 0.9
    data = Data(name="digits", mean=(0.2, 0.3, 0.4), std=(0.5,), crop_pct=0.8, interpolation="nearest")
    config = input_config(model, data)
    assert config.mean == pytest.approx((0.3,))
    assert (config.std, config.crop_pct, config.interpolation) == ((0.5,), 0.8, "nearest")


def test_input_config_of_colour_models():
    swin = timm.create_model("swin_tiny_patch4_window7_224", img_size=(112, 224), depths=(1,))
    config = input_config(swin, Data(name="folder"))
    assert (config.channels, config.height, config.width) == (3, 112, 224)
    assert config.mean == pytest.approx((0.485, 0.456, 0.406))
    assert input_config(swin, Data(name="folder", mean=(0.1,))).mean == (0.1,) * 3
    resnet = timm.create_model("resnet10t")
    assert input_config(resnet, Data(name="folder")).height == resnet.default_cfg["input_size"][1]


def test_input_config_of_a_model_with_odd_channels():
    model = timm.create_model("vit_tiny_patch16_224", img_size=32, in_chans=4, depth=1)
    with pytest.raises(UserError, match="takes 4 channels; images have 1"):
        input_config(model, Data(name="digits"))


def test_input_config_of_any_module():
    assert input_config(nn.Sequential(nn.Conv2d(1, 2, 3)), Data(name="digits")).channels == 1


# ---- renormalise


def test_renormalise_returns_the_same_tensor_when_nothing_differs():
    images = torch.randn(2, 3, 32, 32)
    assert renormalise(images, COLOUR, dataclasses.replace(COLOUR, crop_pct=0.5)) is images


def test_renormalise_statistics():
    pixels = torch.rand(2, 3, 32, 32)
    normalised = (pixels - torch.tensor(COLOUR.mean)[:, None, None]) / torch.tensor(COLOUR.std)[:, None, None]
    plain = dataclasses.replace(COLOUR, mean=(0.0,) * 3, std=(1.0,) * 3)
    torch.testing.assert_close(renormalise(normalised, COLOUR, plain), pixels)
    torch.testing.assert_close(renormalise(pixels, plain, COLOUR), normalised)


def test_renormalise_channels_as_pillow_does():
    image = picture(0)
    colour = InputConfig(3, 20, 24, (0.0,) * 3, (1.0,) * 3, "bicubic", 1.0)
    gray = InputConfig(1, 20, 24, (0.0,), (1.0,), "bicubic", 1.0)
    luma = renormalise(to_tensor(image)[None], colour, gray)
    torch.testing.assert_close(luma[0], to_tensor(image.convert("L")), atol=1 / 255, rtol=0)
    assert torch.equal(renormalise(luma, gray, colour), luma.expand(1, 3, 20, 24))


def test_renormalise_size():
    images = torch.full((1, 3, 32, 32), 0.5)
    larger = renormalise(images, COLOUR, dataclasses.replace(COLOUR, height=48, width=40))
    assert larger.shape == (1, 3, 48, 40)
    torch.testing.assert_close(larger, torch.full_like(larger, 0.5), atol=1e-5, rtol=0)
    assert renormalise(images.bfloat16(), COLOUR, dataclasses.replace(COLOUR, mean=(0.1,) * 3)).dtype == torch.bfloat16
