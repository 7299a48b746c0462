"""Data sets of one's own: class folders, tars, and images without labels."""

from __future__ import annotations

import tarfile
from multiprocessing.reduction import ForkingPickler

import pytest
import torch
from helpers.images import COLOUR, CPU, PLAIN, as_multiset, class_folders, epoch, picture

from compressvit.data.loaders import eval_loader, train_loader
from compressvit.data.opening import open_data
from compressvit.data.spec import Data
from compressvit.errors import UserError

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


@pytest.mark.wide_unless(lambda workers, layout: not workers or layout == "a tar per split")
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
    assert (datasets.num_classes, datasets.class_names, datasets.labelled) == (None, None, False)
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
    with pytest.raises(UserError, match="a single image"):
        open_data(Data(name="images", root=str(tmp_path)))
    picture(1).save(tmp_path / "1.png")
    datasets = open_data(Data(name="images", root=str(tmp_path)))
    assert (len(datasets.train), len(datasets.validation)) == (1, 1)
