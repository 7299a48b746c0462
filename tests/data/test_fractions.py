"""What `val_fraction` and `test_fraction` hold out: by names alone, in whole photographs, of every class."""

from __future__ import annotations

import random

import pytest
from helpers.images import class_folders

from compressvit.data.fractions import TEST, TRAIN, VALIDATION, parts_by_name
from compressvit.data.opening import open_data
from compressvit.data.spec import Data
from compressvit.errors import UserError

NAMES = [f"{kind}/{number:04d}_Bridge_{crop}.jpg" for kind in "abc" for number in range(200) for crop in range(3)]
ALONE = [f"{kind}/{i}.jpg" for kind in "abc" for i in range(400)]


def parts(paths, **options):
    data = Data(**{"name": "folder", "val_fraction": 0.1, **options})
    found, _ = parts_by_name(paths, [path[0] for path in paths], data, "photos/")
    return dict(zip(paths, found, strict=True))


def made(root, names):
    """Files under these names; nothing of them is read when they are opened."""
    for name in names:
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes(b"")
    return root


def opened(root, **options):
    return open_data(Data(**{"name": "folder", "root": str(root), **options}))


def names_of(part, root):
    return [part.name(i).removeprefix(f"{root}/") for i in range(len(part))]


@pytest.mark.parametrize(
    "options", [{}, {"test_fraction": 0.2}, {"group_by": None}, {"group_by": r"(\w)/(\d+)_Bridge"}]
)
def test_the_order_of_a_listing_changes_nothing(options):
    shuffled = random.Random(0).sample(NAMES, len(NAMES))
    assert parts(shuffled, **options) == parts(NAMES, **options)


@pytest.mark.parametrize("names", [NAMES, ALONE], ids=["crops", "alone"])
@pytest.mark.parametrize("options", [{}, {"test_fraction": 0.2}])
def test_nobody_changes_sides_where_files_are_added(names, options):
    whole = parts(names, **options)
    for seed in range(3):
        some = random.Random(seed).sample(names, len(names) // 2)  # among them first crops, whose others come later
        assert parts(some, **options).items() <= whole.items()


def test_the_test_is_the_same_whatever_the_validation_is():
    tests = [
        {path for path, part in parts(ALONE, val_fraction=share, test_fraction=0.2).items() if part == TEST}
        for share in (0.1, 0.5)
    ]
    assert tests[0] == tests[1]


def test_the_unicode_form_of_a_name_changes_nothing():
    for i in range(50):
        first = ["a/x.jpg", "a/y.jpg", "b/x.jpg", "b/y.jpg"]
        two = [parts([*first, f"a/{accented}{i}.jpg"], group_by=None) for accented in ("\u00e9", "e\u0301")]
        assert [*two[0].values()] == [*two[1].values()]


@pytest.mark.parametrize("options", [{}, {"group_by": "stem"}, {"group_by": r"(\d+)_Bridge"}])  # the last over classes
def test_no_photograph_is_on_two_sides(options):
    found = parts(NAMES, test_fraction=0.2, **options)
    key = (lambda path: path[2:6]) if "(" in options.get("group_by", "") else (lambda path: path[:6])
    sides = {}
    for path, part in found.items():
        sides.setdefault(key(path), set()).add(part)
    assert all(len(of) == 1 for of in sides.values())
    assert {*found.values()} == {TRAIN, VALIDATION, TEST}


def test_every_class_has_its_fractions():
    """Of 400 photographs 40 and 80 are expected; five standard deviations of so many draws are 30 and 40."""
    found = parts(ALONE, test_fraction=0.2)
    for kind in "abc":
        of_class = [part for path, part in found.items() if path[0] == kind]
        assert abs(of_class.count(VALIDATION) - 40) < 30
        assert abs(of_class.count(TEST) - 80) < 40


@pytest.mark.parametrize("each", [3, 4, 5])
def test_small_classes_have_an_image_on_every_side(each):
    names = [f"{kind}/{i}.jpg" for kind in "abcdefghij" for i in range(each)]
    found = parts(names, test_fraction=0.1, group_by=None)
    for kind in "abcdefghij":
        assert {part for path, part in found.items() if path[0] == kind} == {TRAIN, VALIDATION, TEST}
    data = Data(name="folder", val_fraction=0.1, test_fraction=0.1)
    _, notes = parts_by_name(names, [name[0] for name in names], data, "photos/")
    assert "held_out_nearest" in {note.what for note in notes}


def test_in_a_small_class_only_the_nearest_is_replaced():
    """No more than one photograph of a class changes sides where one is added, and it is then trained on."""
    changes = 0
    for i in range(30):
        before, after = (parts([f"a/{i}_{k}x.jpg" for k in range(count)], group_by=None) for count in (4, 5))
        moved = [path for path, part in before.items() if after[path] != part]
        assert [after[path] for path in moved] in ([], [TRAIN])
        changes += len(moved)
    assert changes < 15


def test_class_folders_are_split_and_that_is_told(tmp_path):
    root = made(tmp_path / "photos", [*ALONE, "a/notes.txt"])
    found = opened(root, val_fraction=0.1)
    train, held_out = names_of(found.train, root), names_of(found.validation, root)
    expected = parts(ALONE)
    assert {path for path, part in expected.items() if part == VALIDATION} == {*held_out}
    assert sorted(train + held_out) == sorted(ALONE)
    assert (found.class_names, found.test) == (["a", "b", "c"], None)
    notes = {note.what: note for note in found.notes()}
    assert notes.keys() == {"classes", "held_out", "other_types"}
    assert notes["held_out"].count == len(held_out)
    assert f"{len(held_out)} images of 1,200 of photos/ held out for validation" in notes["held_out"].text
    assert "(data.val_fraction=0.1)" in notes["held_out"].text
    assert "data.group_by keeps them together" in notes["held_out"].text


def test_three_parts_and_a_train_folder(tmp_path):
    root = made(tmp_path, [f"train/{name}" for name in ALONE])
    found = opened(root, val_fraction=0.1, test_fraction=0.2)
    expected = parts(ALONE, test_fraction=0.2)  # by names in train/
    for part, word in ((found.train, TRAIN), (found.validation, VALIDATION), (found.test, TEST)):
        assert {name.removeprefix("train/") for name in names_of(part, root)} == {
            path for path, of in expected.items() if of == word
        }
    assert found.fingerprint() != opened(root, val_fraction=0.1, test_fraction=0.1).fingerprint()


def test_a_test_folder_is_the_test(tmp_path):
    root = class_folders(tmp_path, splits=("train", "val", "test"))
    found = opened(root, test_split="test")
    assert {name.partition("/")[0] for name in names_of(found.validation, root)} == {"val"}
    assert {name.partition("/")[0] for name in names_of(found.test, root)} == {"test"}
    assert opened(root).test is None
    (root / "val").rename(root / "elsewhere")
    assert opened(root, test_split="test", val_fraction=0.3).test is not None
    with pytest.raises(UserError, match=r"nothing for data\.test_split=tset"):
        opened(root, test_split="tset", val_fraction=0.3)


def test_lists_are_split(tmp_path):
    made(tmp_path, ALONE[::10])
    lines = [f"{name} {'abc'.index(name[0])}\n" for name in ALONE[::10]]
    (tmp_path / "all.txt").write_text("".join(lines))
    found = opened(tmp_path, name="lists", train_split="all", val_fraction=0.2, test_fraction=0.2)
    expected = parts(ALONE[::10], val_fraction=0.2, test_fraction=0.2)
    for part, word in ((found.train, TRAIN), (found.validation, VALIDATION), (found.test, TEST)):
        assert {*names_of(part, tmp_path)} == {path for path, of in expected.items() if of == word}
    (tmp_path / "test.txt").write_text("".join(lines[::5]))
    assert len(opened(tmp_path, name="lists", train_split="all", val_fraction=0.2, test_split="test").test) == 24
    (tmp_path / "validation.txt").write_text("".join(lines))
    for options, words in (
        ({"val_fraction": 0.2}, "there is a .*validation.txt already"),
        ({"test_fraction": 0.2}, "data.val_fraction splits; give that too"),
        ({"test_split": "all"}, "data.test_split=all is another split too"),
    ):
        with pytest.raises(UserError, match=words):
            opened(tmp_path, name="lists", train_split="all", **options)


def test_images_without_labels_have_three_parts(tmp_path):
    root = made(tmp_path, ALONE)
    found = opened(root, name="images", test_fraction=0.2)
    assert [len(part) > 80 for part in (found.train, found.validation, found.test)] == [True] * 3
    made(root, ["test/x.jpg"])
    found = opened(root, name="images", test_split="test")
    assert (len(found.validation), names_of(found.test, root)) == (
        120,
        ["test/x.jpg"],
    )  # every tenth, as without a test
    assert "test/x.jpg" not in names_of(found.train, root)
    made(root, ["val/x.jpg"])
    assert len(opened(root, name="images", test_split="test").validation) == 1
    with pytest.raises(UserError, match="val/ already"):
        opened(root, name="images", test_fraction=0.2)


@pytest.mark.parametrize(
    ("names", "options", "words"),
    [
        (
            ALONE[::9],
            {},
            r"data.val_fraction=0.1 takes the 3 folders for classes and holds out a tenth of each; expected",
        ),
        ([f"train/{n}" for n in ALONE[::9]], {}, r"data.val_fraction=0.1 holds out a tenth of the training split; exp"),
        ([f"{s}/{n}" for s in ("train", "val") for n in ALONE[::9]], {"val_fraction": 0.1}, "has a val/ already"),
        ([f"{s}/{n}" for s in ("train", "test") for n in ALONE[::9]], {"val_fraction": 0.1}, "or data.test_split=test"),
        ([*ALONE[::9], "d/1.jpg"], {"val_fraction": 0.1}, "class 'd' has images of 1 photograph, so that none is left"),
        (
            [*ALONE[::9], "d/1.jpg", "d/2.jpg"],
            {"val_fraction": 0.1, "test_fraction": 0.1},
            "class 'd' has images of 2 photographs, .* it takes 3, one for each part",
        ),
        (ALONE[::9], {"val_fraction": 0.1, "group_by": "folder"}, "of 1 photograph.* data.group_by=folder says which"),
        (ALONE[::9], {"test_fraction": 0.1}, "data.val_fraction splits; give that too"),
        (["1.jpg", *ALONE[::9]], {"val_fraction": 0.1}, "images lie directly in it"),
        ([*ALONE[::9], "d.tar"], {"val_fraction": 0.1}, "splits folders of images, and there are tar files"),
        (
            [f"{s}/{n}" for s in ("train", "test") for n in ALONE[::9]],
            {"val_split": "test", "test_split": "test"},
            "both test",
        ),
    ],
)
def test_what_cannot_be_split_is_refused(tmp_path, names, options, words):
    with pytest.raises(UserError, match=words):
        opened(made(tmp_path, names), **options)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (
            {"name": "digits", "val_fraction": 0.1},
            "'digits' has splits of its own; leave it out .*folder, images, lists",
        ),
        ({"name": "coco", "test_split": "test"}, "test_split=test: data 'coco' has splits of its own"),
        ({"name": "folder", "val_fraction": 0.0}, "val_fraction"),
        ({"name": "folder", "val_fraction": 0.7}, "val_fraction"),
        ({"name": "folder", "val_fraction": 0.5, "test_fraction": 0.5}, "leave nothing to train on"),
        ({"name": "folder", "test_split": "test", "test_fraction": 0.5}, "give one of them"),
    ],
)
def test_senseless_options_are_refused(options, words):
    with pytest.raises(UserError, match=words):
        Data(**options)


def test_a_class_may_be_called_as_a_split_is(tmp_path):
    found = opened(made(tmp_path, [f"{kind}/{i}.jpg" for kind in ("car", "train") for i in range(9)]), val_fraction=0.3)
    assert found.class_names == ["car", "train"]
    assert {note.what: note.count for note in found.notes()}["named_as_splits"] == 1
