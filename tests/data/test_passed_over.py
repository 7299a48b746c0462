"""What is found in folders and lists, and that everything passed over or guessed is counted: nested folders, links, types, holding out."""

from __future__ import annotations

import os
import tarfile
import unicodedata

import pytest
from helpers.images import class_folders, jpeg, picture

from compressvit.data.opening import open_data
from compressvit.data.spec import Data
from compressvit.errors import UserError


def opened(root, name="folder", **section):
    return open_data(Data(name=name, root=str(root), **section))


def notes_of(datasets) -> dict[str, list[int]]:
    found: dict[str, list[int]] = {}
    for note in datasets.notes():
        assert note.count > 0
        found.setdefault(note.what, []).append(note.count)
    return found


def names_of(samples, root) -> list[str]:
    return [os.path.relpath(samples.name(i), root) for i in range(len(samples))]


def put(*files) -> None:
    for i, file in enumerate(files):
        file.parent.mkdir(parents=True, exist_ok=True)
        picture(i).save(file)


def images(folder, count: int) -> None:
    put(*(folder / f"{i:02}.png" for i in range(count)))


# ---- classes


def test_classes_are_the_first_folders_below_a_split(tmp_path):
    for split in ("train", "val"):
        for name in ("cat", "dog"):
            for camera in ("left", "right"):
                images(tmp_path / split / name / camera, 2)
    found = opened(tmp_path)
    assert found.class_names == ["cat", "dog"]
    assert [found.train[i][1] for i in range(8)] == [0] * 4 + [1] * 4
    assert notes_of(found) == {"classes": [2], "deeper": [8, 8]}
    assert found.notes()[0].text == "2 classes: the folders directly in train/, in natural order"
    assert "e.g. cat/left/00.png" in found.notes()[1].text


def test_equal_folder_names_of_two_parents_are_two_classes(tmp_path):
    for split in ("train", "val"):
        for parent in ("indoor", "outdoor"):
            images(tmp_path / split / parent / "plants", 2)
    assert opened(tmp_path).class_names == ["indoor", "outdoor"]


def test_a_tar_is_read_as_its_folders_are(tmp_path):
    for split in ("train", "val"):
        for name in ("cat", "dog"):
            put(
                tmp_path / "plain" / split / name / "left" / "0.png",
                tmp_path / "plain" / split / name / "right" / "1.gif",
            )
        with tarfile.open(tmp_path / f"{split}.tar", "w") as tar:
            tar.add(tmp_path / "plain" / split, arcname=split)
    found = opened(tmp_path)
    assert found.class_names == ["cat", "dog"]
    assert [found.train[i][1] for i in range(4)] == [0, 0, 1, 1]


def test_natural_and_plain_order_and_a_file(tmp_path):
    root = class_folders(tmp_path / "set", classes=("1", "2", "10"), each=2)
    natural, plain = opened(root), opened(root, classes="plain")
    assert (natural.class_names, plain.class_names) == (["1", "2", "10"], ["1", "10", "2"])
    assert opened(root, classes="natural").class_names == natural.class_names
    for found, targets in ((natural, [0, 0, 1, 1, 2, 2]), (plain, [0, 0, 2, 2, 1, 1])):
        assert [found.train[i][1] for i in range(6)] == targets
        assert notes_of(found) == {"classes": [3], "class_order": [2]}
        assert "class 1 is '10' or '2'" in found.notes()[1].text
    file = tmp_path / "names.txt"
    file.write_text("\ufeff10\n3\n2\n1\n", encoding="utf-8")
    given = opened(root, classes=str(file))
    assert (given.class_names, given.num_classes) == (["10", "3", "2", "1"], 4)
    assert [given.validation[i][1] for i in range(6)] == [3, 3, 2, 2, 0, 0]
    assert notes_of(given) == {"classes": [4], "missing_classes": [1, 1]}
    assert "class_order" not in notes_of(opened(class_folders(tmp_path / "other")))


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ("cat\n", "it has 1 line"),
        ("cat\n\ndog\n", "line 2 is empty"),
        ("cat\ndog\ncat\n", "'cat' is on line 1 and on line 3"),
        ("cat\nowl\n", "1 folder of train/ not among its 2 names, first 'dog'"),
        (b"caf\xe9\n", "cannot be read as UTF-8"),
    ],
)
def test_a_file_of_classes_that_does_not_fit(tmp_path, content, words):
    root = class_folders(tmp_path / "set", each=2)
    file = tmp_path / "names.txt"
    file.write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(UserError, match=words):
        opened(root, classes=str(file))
    with pytest.raises(UserError, match=r"data.classes=gone.txt: there is no such file; give natural, plain"):
        opened(root, classes="gone.txt")


def test_other_sets_take_names_from_a_file_but_no_order(tmp_path):
    file = tmp_path / "names.txt"
    file.write_text("0\n1\n")
    with pytest.raises(UserError, match="orders the class folders"):
        open_data(Data(name="digits", classes="plain"))
    with pytest.raises(UserError, match="its names are not those of digits in their order, which begins 0, 1, 2"):
        open_data(Data(name="digits", classes=str(file)))
    images(tmp_path / "set", 4)
    with pytest.raises(UserError, match="have no classes"):
        opened(tmp_path / "set", "images", classes=str(file))


def test_a_rare_class_may_be_missing_in_validation(tmp_path):
    class_folders(tmp_path, splits=("train",), classes=("cat", "dog", "eel"), each=2)
    class_folders(tmp_path, splits=("val",), classes=("dog", "eel"), each=2)
    found = opened(tmp_path)
    assert [found.validation[i][1] for i in range(4)] == [1, 1, 2, 2]
    (note,) = [note for note in found.notes() if note.what == "missing_classes"]
    assert note.text == "val: 1 class without an image: cat"


def test_unicode_forms_of_a_name_are_one_class(tmp_path):
    composed, decomposed = (unicodedata.normalize(form, "café") for form in ("NFC", "NFD"))
    class_folders(tmp_path, splits=("train",), classes=(composed, "tea"), each=2)
    class_folders(tmp_path, splits=("val",), classes=(decomposed, "tea"), each=2)
    found = opened(tmp_path)
    assert [found.validation[i][1] for i in range(4)] == [0, 0, 1, 1]
    class_folders(tmp_path / "twins", classes=(composed, decomposed), each=2)
    with pytest.raises(UserError, match="two folders are called 'café', in different Unicode forms"):
        opened(tmp_path / "twins")


# ---- files and links


def test_files_of_other_types_are_counted(tmp_path):
    root = class_folders(tmp_path, each=2)
    for name in ("a.txt", "b.TXT", "c.heic", "README"):
        (root / "train" / "cat" / name).touch()
    (root / "train" / "eel").mkdir()
    put(root / "train" / "cat" / "0.gif")
    found = opened(root)
    assert len(found.train) == 5
    assert notes_of(found) == {"classes": [2], "other_types": [4], "empty_folders": [1]}
    (note,) = [note for note in found.notes() if note.what == "other_types"]
    assert note.text == "train: 4 files of types that are not read, passed over: 2 .txt, 1 .heic, 1 no extension"


@pytest.mark.parametrize("name", ["folder", "images"])
def test_a_loop_of_links_counts_pictures_once(tmp_path, name):
    root = class_folders(tmp_path, each=3)
    (root / "train" / "cat" / "loop").symlink_to(root / "train")
    (root / "train" / "cat" / "self").symlink_to(root / "train" / "cat" / "self")
    (root / "train" / "dog" / "cats").symlink_to(root / "train" / "cat")
    found = opened(root, name)
    assert len(found.train) == 6
    assert notes_of(found)["again"] == [2]
    assert notes_of(found)["dangling"] == [1]
    assert "first cat/loop" in next(note.text for note in found.notes() if note.what == "again")


def test_a_folder_is_searched_at_its_own_place(tmp_path):
    """And not at that of a link to it, whichever comes first."""
    for split in ("train", "val"):
        (tmp_path / split).mkdir()
        for name in "abcd":
            (tmp_path / split / name).symlink_to("m")
        images(tmp_path / split / "m", 2)
        images(tmp_path / split / "n", 2)
        for name in "wxyz":
            (tmp_path / split / name).symlink_to("m")
    found = opened(tmp_path)
    assert found.class_names == ["m", "n"]
    assert notes_of(found)["again"] == [8, 8]


def test_many_links_to_one_another_are_searched_once(tmp_path):
    root = class_folders(tmp_path / "set", each=1)
    for depth in range(24):  # 2 ** 24 paths
        folder = tmp_path / "deep" / str(depth)
        folder.mkdir(parents=True)
        for side in ("a", "b"):
            (folder / side).symlink_to(tmp_path / "deep" / str(depth + 1))
    images(tmp_path / "deep" / "24", 2)
    (root / "train" / "cat" / "deep").symlink_to(tmp_path / "deep" / "0")
    assert len(opened(root).train) == 4


def test_links_out_of_the_root_are_followed_and_counted(tmp_path):
    """An ImageNet of links: to the splits, to class folders, to files."""
    store = class_folders(tmp_path / "store", classes=("cat", "dog", "eel"), each=2)
    root = tmp_path / "subset"
    (root / "train").mkdir(parents=True)
    (root / "val").symlink_to(store / "val")
    (root / "train" / "cat").symlink_to(store / "train" / "cat")
    (root / "train" / "dog").mkdir()
    (root / "train" / "dog" / "0.jpg").symlink_to(store / "train" / "dog" / "0.jpg")
    (root / "train" / "eel").mkdir()
    (root / "train" / "eel" / "0.jpg").write_bytes(jpeg(0))
    (root / "train" / "eel" / "1.jpg").symlink_to(root / "train" / "eel" / "0.jpg")
    found = opened(root)
    assert (len(found.train), len(found.validation)) == (5, 6)
    assert notes_of(found) == {"classes": [3], "from_outside": [3, 6]}
    with pytest.raises(UserError, match="is a link out of"):
        opened(root, outside=False)
    (root / "val").unlink()
    class_folders(root, splits=("val",), classes=("eel",), each=2)
    with pytest.raises(UserError, match="only one class, 'eel'"):
        opened(root, outside=False)
    (root / "train" / "dog" / "1.jpg").write_bytes(jpeg(1))
    found = opened(root, outside=False)
    assert names_of(found.train, root / "train") == ["dog/1.jpg", "eel/0.jpg", "eel/1.jpg"]
    assert notes_of(found)["outside"] == [2]
    linked = tmp_path / "linked"
    linked.symlink_to(root)
    assert "from_outside" not in notes_of(opened(linked, outside=False)), "the root itself may be a link"


def test_a_folder_beside_the_root_is_outside_though_its_name_begins_alike(tmp_path):
    root = class_folders(tmp_path / "set", each=2)
    images(tmp_path / "set2", 1)
    (root / "train" / "cat" / "9.png").symlink_to(tmp_path / "set2" / "00.png")
    assert notes_of(opened(root))["from_outside"] == [1]


def test_a_pipe_is_refused_by_name(tmp_path):
    root = class_folders(tmp_path, each=2)
    os.mkfifo(root / "train" / "cat" / "9.jpg")
    with pytest.raises(UserError, match=r"cat/9.jpg is a named pipe, not an image; remove it"):
        opened(root)
    (root / "train" / "cat" / "9.jpg").unlink()
    (root / "train" / "cat" / "8.jpg").symlink_to("/dev/zero")
    with pytest.raises(UserError, match=r"cat/8.jpg is a device"):
        opened(root)


@pytest.mark.skipif(not os.path.isdir("/proc/self"), reason="there is no /proc")
@pytest.mark.parametrize("target", ["/proc/self", "/proc", "/sys"])
def test_the_kernels_folders_are_not_searched(tmp_path, target):
    root = class_folders(tmp_path, each=2)
    (root / "train" / "cat" / "more").symlink_to(target)
    with pytest.raises(UserError, match=r"cat/more is a folder of the operating system, not of pictures; remove it"):
        opened(root)


@pytest.mark.parametrize("split", ["x" * 300, "x" * 5000, "a\0b"])
@pytest.mark.parametrize("name", ["folder", "images", "lists"])
def test_a_split_that_no_file_can_be_called(tmp_path, name, split):
    class_folders(tmp_path, each=2)
    (tmp_path / "train.txt").write_text("train/cat/0.jpg 0")
    if name == "images":  # which has another way to hold out
        assert notes_of(opened(tmp_path, name, val_split=split))["held_out"] == [1]
        return
    with pytest.raises(UserError, match=r"nothing for data.val_split|there is no"):
        opened(tmp_path, name, val_split=split)


def test_files_are_in_natural_order_as_timm_reads_them(tmp_path):
    from timm.data import create_dataset

    for split in ("train", "val"):
        for name in ("b2", "B10", "a"):
            put(*(tmp_path / split / name / f for f in ("10.png", "9.png", "x1.PNG", "X02.png", "é.png", "²3.png")))
    found, theirs = opened(tmp_path), create_dataset("", root=str(tmp_path / "train"), search_split=False)
    assert found.train.source.samples == theirs.reader.samples
    assert found.class_names == list(theirs.reader.class_to_idx)


# ---- images without classes


def test_val_is_never_trained_on(tmp_path):
    images(tmp_path, 5)
    images(tmp_path / "more", 5)
    images(tmp_path / "val", 4)
    images(tmp_path / "test", 3)
    found = opened(tmp_path, "images")
    assert names_of(found.validation, tmp_path) == [f"val/{i:02}.png" for i in range(4)]
    assert names_of(found.train, tmp_path) == [f"{i:02}.png" for i in range(5)] + [f"more/{i:02}.png" for i in range(5)]
    assert found.notes()[0].text == "10 images outside val/, test/ to train on; validation is val/"
    images(tmp_path / "train", 2)
    found = opened(tmp_path, "images")
    assert (len(found.train), len(found.validation)) == (2, 4)
    assert notes_of(found) == {"beside_splits": [7]}
    assert len(opened(tmp_path, "images", val_split="test").validation) == 3


def test_val_alone_has_nothing_to_train_on(tmp_path):
    images(tmp_path / "val", 4)
    with pytest.raises(UserError, match=r"no images in .* or below outside val"):
        opened(tmp_path, "images")


def test_how_images_are_held_out_is_said(tmp_path):
    images(tmp_path, 20)
    found = opened(tmp_path, "images")
    assert names_of(found.validation, tmp_path) == ["09.png", "19.png"]
    (note,) = found.notes()
    assert (note.what, note.count) == ("held_out", 2)
    assert "2 images of 20 held out: every 10th image" in note.text
    assert "data.group_by keeps them together" in note.text
    seventh = opened(tmp_path, "images", val_fraction=0.15)  # 1 / 0.15 = 6.67
    assert names_of(seventh.validation, tmp_path) == ["06.png", "13.png"]
    assert "2 images of 20 held out: every 7th image" in seventh.notes()[0].text


@pytest.mark.parametrize("group_by", ["folder", "photo(\\d+)", "/(photo\\d+)_"])
def test_groups_are_held_out_whole(tmp_path, group_by):
    for photo in range(10):
        images(tmp_path / f"photo{photo}" if group_by == "folder" else tmp_path, 0)
        for crop in range(3):
            put(tmp_path / f"photo{photo}" / f"photo{photo}_{crop}.png")
    found = opened(tmp_path, "images", group_by=group_by, val_fraction=0.2)
    sides = [{name.split("/")[0] for name in names_of(part, tmp_path)} for part in (found.train, found.validation)]
    assert sides[1] == {"photo4", "photo9"}
    assert not sides[0] & sides[1]
    assert (len(found.train), len(found.validation)) == (24, 6)
    assert "all of every 5th of 10 groups" in found.notes()[0].text


def test_groups_that_do_not_group(tmp_path):
    images(tmp_path, 10)
    found = opened(tmp_path, "images", group_by="photo(\\d)")
    assert notes_of(found) == {"held_out": [1], "ungrouped": [10]}
    with pytest.raises(UserError, match="all 10 images are of one group"):
        opened(tmp_path, "images", group_by="png")
    with pytest.raises(ValueError, match=r"nor a regular expression"):
        Data(name="images", group_by="(")
    for word in ("auto", "stem", "folder", "none", None):
        assert Data(name="images", group_by=word).group_by == word
