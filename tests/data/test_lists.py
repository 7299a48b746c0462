"""Sets whose splits are text files, as VTAB-1k is commonly prepared, and torchvision's sets that timm does not name."""

from __future__ import annotations

import os
import unicodedata

import numpy as np
import pytest
import scipy.io
from PIL import Image

from compressvit.data.opening import open_data
from compressvit.data.spec import Data
from compressvit.errors import UserError


@pytest.fixture
def task(tmp_path):
    """Six images of three classes: four to train on, two to hold out; a space in a folder's name."""
    lines = {"train800": [0, 1], "val200": [2, 1], "train800val200": [0, 1, 2, 1], "test": [1, 0]}
    for split, labels in lines.items():
        folder = tmp_path / "images" / f"the {split}"
        folder.mkdir(parents=True)
        for i, label in enumerate(labels):
            Image.fromarray(np.full((8, 10, 3), 40 * label + i, dtype=np.uint8)).save(folder / f"{i}.png")
        text = "".join(f"images/the {split}/{i}.png {label}\n" for i, label in enumerate(labels))
        (tmp_path / f"{split}.txt").write_text(text + "\n")
    return tmp_path


def data(root, **options) -> Data:
    return Data(**{"name": "lists", "root": str(root), "train_split": "train800val200", "val_split": "test", **options})


def test_splits_are_read_as_they_are(task):
    found = open_data(data(task))
    assert [found.train[i][1] for i in range(4)] == [0, 1, 2, 1]
    assert [found.validation[i][1] for i in range(2)] == [1, 0]
    assert found.num_classes == 3
    assert found.train[2][0].size == (10, 8)
    assert found.train[2][0].getpixel((0, 0)) == (82, 82, 82)
    chosen = open_data(data(task, train_split="train800.txt", val_split="val200"))
    assert (len(chosen.train), len(chosen.validation), chosen.num_classes) == (2, 2, 3)
    assert open_data(data(task, num_classes=7)).num_classes == 7


@pytest.mark.parametrize(("suffix", "between"), [(".csv", ","), (".tsv", "\t")])
@pytest.mark.parametrize("header", ["", "path{}label\n", "\ufeffimage{}class\n"])
def test_tables_are_lists_too(task, suffix, between, header):
    text = (task / "train800val200.txt").read_text().replace(".png ", f".png{between}")
    (task / "train800val200.txt").unlink()
    (task / f"train800val200{suffix}").write_text(header.format(between) + text)
    for split in ("train800val200", f"train800val200{suffix}"):
        found = open_data(data(task, train_split=split))
        assert [found.train[i][1] for i in range(4)] == [0, 1, 2, 1]
        told = [note.text for note in found.notes() if note.what == "header"]
        shown = repr(header.format(between).strip().lstrip("\ufeff"))
        of = f"train800val200{suffix}: the first line, {shown}, is taken for the names of columns"
        assert told == ([of] if header else [])
    (task / f"test{suffix}").write_text(f"images/the test/0.png{between}1\nimages/the test/1.png{between}none\n")
    with pytest.raises(UserError, match=rf"has test.txt and test{suffix}: name the one that is meant .*test.txt"):
        open_data(data(task))
    with pytest.raises(UserError, match=rf"test{suffix}, line 2: .*none' is not `PATH LABEL`"):
        open_data(data(task, val_split=f"test{suffix}"))


def test_a_broken_image_is_skipped_and_named(task):
    (task / "images" / "the train800val200" / "1.png").write_bytes(b"no image")
    found = open_data(data(task))
    found.train.training = True
    assert found.train[1][1] == 2
    assert found.broken.count == 1
    assert found.broken.paths[0].endswith("the train800val200/1.png")


def test_what_is_missing_is_said(task, tmp_path):
    for options, words in (
        ({"root": None}, "data.name=lists needs data.root=FOLDER; expected FOLDER/SPLIT.txt"),
        ({"root": str(tmp_path / "gone")}, "there is no such folder"),
        ({"train_split": "train80"}, "did you mean train800\\? lists there: test, train800, train800val200, val200"),
        ({"num_classes": 2}, "data.num_classes=2, but|label 2 is out of range"),
    ):
        with pytest.raises(UserError, match=words):
            open_data(data(**{"root": task, **options}) if "root" not in options else Data(name="lists", **options))
    (task / "odd.txt").write_text("images/the test/0.png 1\nimages/the test/1.png one\n")
    with pytest.raises(UserError, match=r"odd.txt, line 2: 'images/the test/1.png one' is not `PATH LABEL`"):
        open_data(data(task, val_split="odd"))
    (task / "odd.txt").write_text("images/a.png 1\nimages/b.png 0\n")
    with pytest.raises(UserError, match=r"2 of its 2 images are not there, first .*a.png"):
        open_data(data(task, val_split="odd"))
    (task / "odd.txt").write_text("\n")
    with pytest.raises(UserError, match=r"odd.txt lists no image"):
        open_data(data(task, val_split="odd"))


@pytest.mark.parametrize("name", ["svhn", "flowers102", "food101"])
def test_sets_of_torchvision_say_how_to_supply_them(name, tmp_path):
    with pytest.raises(UserError, match=f"data.name=torch/{name} needs data.root=FOLDER"):
        open_data(Data(name=f"torch/{name}"))
    with pytest.raises(
        UserError, match=f"data.name=torch/{name}, data.train_split=train.*data.download=true fetches it"
    ):
        open_data(Data(name=f"torch/{name}", root=str(tmp_path)))


def test_a_wrong_split_of_torchvision_is_named(tmp_path):
    with pytest.raises(UserError, match=r"data.train_split=trian.*Valid values are"):
        open_data(Data(name="torch/svhn", root=str(tmp_path), train_split="trian"))


def test_svhn_is_read(tmp_path, monkeypatch):
    monkeypatch.setattr("torchvision.datasets.svhn.check_integrity", lambda *_: True)
    for split in ("train", "test"):
        pixels = np.random.default_rng(0).integers(0, 255, (32, 32, 3, 20), dtype=np.uint8)
        labels = (np.arange(20) % 10 + 1)[:, None].astype(np.uint8)
        scipy.io.savemat(tmp_path / f"{split}_32x32.mat", {"X": pixels, "y": labels})
    found = open_data(Data(name="torch/svhn", root=str(tmp_path)))
    assert (len(found.train), len(found.validation), found.num_classes) == (20, 20, 10)
    assert found.train[0][0].size == (32, 32)
    assert found.train[9][1] == 0, "the digit 0 is stored as 10"


# ---- what lists are found with


def of(root, name: str, text: str, **options):
    (root / f"{name}.txt").write_bytes(text if isinstance(text, bytes) else text.encode())
    return open_data(data(root, train_split=name, **options))


@pytest.mark.parametrize(
    "text",
    [
        "\ufeffimages/the test/0.png 1\nimages/the test/1.png 0\n",
        "images/the test/0.png\t1\r\nimages/the test/1.png\t0\r\n",
        "images/the test/0.png,1\nimages/the test/1.png, 0\n",
        '"images/the test/0.png",1\n"images/the test/1.png",0',
    ],
    ids=["byte-order mark", "tab", "comma", "quotes"],
)
def test_a_list_may_be_written_in_several_ways(task, text):
    found = of(task, "other", text)
    assert [(found.train.name(i).rpartition("/")[2], found.train[i][1]) for i in range(2)] == [
        ("0.png", 1),
        ("1.png", 0),
    ]


@pytest.mark.parametrize("label", ["3000000000", "1" + "0" * 20, "9" * 5000])
def test_a_huge_label_is_one_sentence(task, label):
    with pytest.raises(UserError, match=r"odd.txt, line 1: label .* would make more than 1,000,000 classes") as error:
        of(task, "odd", f"images/the test/0.png {label}\n")
    assert len(str(error.value)) < 500


@pytest.mark.parametrize(
    ("path", "words"),
    [
        ("a" * 5000 + ".png", "1 of its 1 images are not there, first .*aaa…"),
        ("a\0.png", "are not there"),
        ("images", "are not there"),
    ],
    ids=["long", "zero byte", "folder"],
)
def test_what_no_file_can_be_called_is_not_there(task, path, words):
    with pytest.raises(UserError, match=words) as error:
        of(task, "odd", f"{path} 1\n")
    assert len(str(error.value)) < 800


def test_labels_from_1_are_noticed(task):
    found = of(task, "ones", "images/the test/0.png 1\nimages/the test/1.png 2\n", val_split="ones")
    assert found.num_classes == 3
    assert [(note.what, note.count) for note in found.notes()] == [("classes", 3), ("empty_class_0", 4)]
    found = of(task, "gap", "images/the test/0.png 0\nimages/the test/1.png 2\n", val_split="gap")
    assert found.notes()[1].text == "both lists: 1 class without an image: 1"
    assert [note.what for note in open_data(data(task)).notes()] == ["classes"]


def test_names_of_labels_from_a_file(task):
    (task / "names").write_text("ant\nbee\ncow\n")
    assert open_data(data(task, classes=str(task / "names"))).class_names == ["ant", "bee", "cow"]
    (task / "names").write_text("ant\nbee\n")
    with pytest.raises(UserError, match="has 2 names, and the lists go up to label 2"):
        open_data(data(task, classes=str(task / "names")))


def test_images_outside_the_root_are_read_by_option(task, tmp_path_factory):
    elsewhere = tmp_path_factory.mktemp("elsewhere") / "0.png"
    Image.new("L", (8, 8)).save(elsewhere)
    (task / "images" / "link.png").symlink_to(elsewhere)
    for path in (str(elsewhere), f"../{os.path.relpath(elsewhere, task.parent)}"):
        with pytest.raises(UserError, match=r"leads out of data.root=.*; data.outside=true reads such images, too"):
            of(task, "out", f"{path} 1\n")
        found = of(task, "out", f"{path} 1\n", outside=True)
        assert [(note.what, note.count) for note in found.notes()] == [("classes", 2), ("from_outside", 1)]
    assert of(task, "linked", "images/link.png 1\n").notes()[1].count == 1
    with pytest.raises(UserError, match="leads out of"):
        of(task, "linked", "images/link.png 1\n", outside=False)
    assert len(of(task, "inside", "images/../images/the test/0.png 1\n", outside=False).train) == 1


def test_a_pipe_in_a_list_is_refused(task):
    os.mkfifo(task / "images" / "pipe.png")
    with pytest.raises(UserError, match=r"images/pipe.png is a named pipe, not an image"):
        of(task, "odd", "images/pipe.png 1\n")


def test_a_path_in_another_unicode_form_is_found(task):
    composed, decomposed = (unicodedata.normalize(form, "café.png") for form in ("NFC", "NFD"))
    (task / "images" / "the test" / "0.png").rename(task / "images" / decomposed)
    found = of(task, "other", f"images/{composed} 1\n", val_split="other")
    assert found.train.name(0).endswith(decomposed)
    assert ("form", 1) in [(note.what, note.count) for note in found.notes()]


def test_a_list_with_a_hole_of_50_gigabytes_is_not_read(task):
    os.truncate(task / "train800val200.txt", 50 * 2**30)
    with pytest.raises(UserError, match=r"train800val200\.txt cannot be read: it has 53,687\.1 MB"):
        open_data(data(task))
