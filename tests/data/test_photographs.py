"""Crops and frames of one photograph are found, held out together, and counted as one."""

from __future__ import annotations

import pytest
import torch
from helpers.images import CPU, jpeg, picture, write_idx

from compressvit.data.input import InputConfig
from compressvit.data.loaders import calibration_batches
from compressvit.data.opening import Datasets, open_data
from compressvit.data.photographs import FEW, MOST, numbered, photographs, spread
from compressvit.data.spec import Data

CROPS = [f"{number:04d}_Bridge_by_X_{crop}.jpg" for number in range(40) for crop in range(3)]


def sets_of(paths: list[str], by: str | None) -> list[set[str]]:
    """The photographs that several images are of."""
    found, _ = photographs(paths, by)
    together: dict[str, set[str]] = {}
    for path, photograph in zip(paths, found, strict=True):
        together.setdefault(photograph, set()).add(path)
    return [images for images in together.values() if len(images) > 1]


def folder(root, names) -> Data:
    """Different pictures under these names; only their names are read when they are opened."""
    for name in names:
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes(b"")
    return Data(name="images", root=str(root))


def sides(datasets: Datasets) -> list[list[str]]:
    return [
        [part.name(i).rpartition("/")[2] for i in range(len(part))] for part in (datasets.train, datasets.validation)
    ]


def test_names_tell_crops():
    assert sets_of(CROPS, "auto") == sets_of(CROPS, "stem") == [set(CROPS[i : i + 3]) for i in range(0, 120, 3)]
    assert sets_of(CROPS, "none") == sets_of(CROPS, None) == []
    some = [name for i, name in enumerate(CROPS) if i % 3 or i % 2]  # crops that were deleted
    assert len(sets_of(some, "auto")) == 40
    assert sets_of(["a/x-1.png", "a/x-2.png", "b/x-1.png", "b/y.png", "a/x.png", "c.png"], "auto") == [
        {"a/x-1.png", "a/x-2.png"}
    ]


@pytest.mark.parametrize(
    "paths",
    [
        [f"{i}.jpg" for i in range(50)],
        [f"IMG_{i:04d}.jpg" for i in range(50)],  # a camera's
        [f"{kind}_{i}.jpg" for kind in ("cat", "dog", "fox") for i in range(20)],
        [f"{kind}/{kind}_{i}.jpg" for kind in "abcdefgh" for i in range(20)],  # classes
        [f"{kind}_{i}.jpg" for kind in "abcdefgh" for i in range(MOST + 1)],
        [f"n{kind:08d}_{97 * i}.JPEG" for kind in range(20) for i in range(20)],  # ImageNet's, thinned
    ],
    ids=["numbers", "camera", "few", "folders", "many", "gaps"],
)
def test_names_that_tell_nothing(paths):
    assert sets_of(paths, "auto") == []


@pytest.mark.parametrize("by", ["auto", "stem", "folder", "(\\d+)_Bridge"])
def test_no_photograph_is_on_both_sides(tmp_path, by):
    names = [f"{name[:4]}/{name}" for name in CROPS] if by == "folder" else CROPS
    data = folder(tmp_path, names).model_copy(update={"group_by": by, "val_fraction": 0.2})
    found = open_data(data)
    train, held_out = sides(found)
    assert sorted(train + held_out) == sorted(CROPS)
    assert not {name[:4] for name in train} & {name[:4] for name in held_out}
    assert len(held_out) == 24
    assert {note.what: note.count for note in found.notes()} == {"held_out": 24, "photographs": 32}


def test_what_was_decided_is_told(tmp_path):
    found = open_data(folder(tmp_path, CROPS)).notes()
    assert [note.text for note in found] == [
        "12 images of 120 held out: all of every 10th of 40 photographs, by name (data.group_by)",
        "108 images of 36 photographs (by name) to train on",
    ]
    few = open_data(folder(tmp_path / "few", CROPS[: 3 * FEW]))
    assert [note.what for note in few.notes()] == ["held_out", "photographs", "few_photographs"]


def test_few_photographs_are_told_where_nothing_is_held_out(tmp_path):
    for count, words in ((FEW, ["photographs"]), (FEW - 1, ["photographs", "few_photographs"])):
        root = tmp_path / str(count)
        folder(root / "val", ["a.jpg"])
        folder(root / "train", CROPS[: 3 * count])
        notes = open_data(Data(name="images", root=str(root))).notes()
        assert [(note.what, note.count) for note in notes] == [(word, count) for word in words]
    assert notes[1].text.startswith("only 31 photographs: others would help more than further crops")


def test_images_that_are_photographs_of_their_own_are_held_out_as_before(tmp_path):
    data = folder(tmp_path, [f"{i}.jpg" for i in range(57)])
    found, before = open_data(data), open_data(data.model_copy(update={"group_by": None}))
    assert sides(found)[1] == [f"{i}.jpg" for i in range(9, 57, 10)]
    assert found.fingerprint() == before.fingerprint()
    assert found.notes() == before.notes()


def test_crops_are_held_out_one_by_one_on_request(tmp_path):
    data = folder(tmp_path, CROPS).model_copy(update={"group_by": "none"})
    found = open_data(data)
    assert sides(found)[1] == CROPS[9::10]
    assert [note.what for note in found.notes()] == ["held_out"]


def test_few_images_are_of_as_many_photographs_as_possible():
    numbers = numbered([name[:4] for name in CROPS])
    order = torch.randperm(120, generator=torch.Generator().manual_seed(0))
    spread_out = spread(order, numbers)
    assert sorted(spread_out.tolist()) == list(range(120))
    for third in spread_out.split(40):
        assert len(numbers[third].unique()) == 40
    assert spread_out[:40].tolist() == [i for k, i in enumerate(order.tolist()) if numbers[i] not in numbers[order[:k]]]
    assert torch.equal(spread(order, torch.arange(120)), order)


def test_calibration_knows_the_photograph_of_every_image(tmp_path):
    """Two of each of 20, however many files cannot be read."""
    for i, name in enumerate(CROPS[:60]):
        picture(i).resize((32, 32)).save(tmp_path / name.replace("jpg", "png"))
    (tmp_path / "val").mkdir()
    (tmp_path / "val" / "0.jpg").write_bytes(jpeg(0))
    data = Data(name="images", root=str(tmp_path))
    datasets = open_data(data)
    for broken in (17, 30, 33):
        (tmp_path / CROPS[broken].replace("jpg", "png")).write_bytes(b"")
    config = InputConfig(3, 32, 32, (0.0,) * 3, (1.0,) * 3, "bicubic", 1.0)
    batches = list(calibration_batches(datasets, data, config, CPU, images=40, seed=3))
    seen = torch.cat([batch.images for batch in batches])
    numbers = torch.cat([batch.photographs for batch in batches])
    assert len(seen) == len(numbers) < 40, "no broken file was drawn"
    assert len(numbers.unique()) == 20
    for image, number in zip(seen, numbers.tolist(), strict=True):
        pixels = (image * 255).round().byte().permute(1, 2, 0).numpy().tobytes()
        assert pixels in {picture(i).resize((32, 32)).tobytes() for i in range(3 * number, 3 * number + 3)}


@pytest.mark.parametrize("by", ["auto", "folder", "none"])
def test_calibration_images_without_names_are_drawn_as_before(tmp_path, by):
    data = Data(name="fashion_mnist", root=str(write_idx(tmp_path / "FashionMNIST" / "raw")), group_by=by)
    datasets = open_data(data.model_copy(update={"root": str(tmp_path)}))
    config = InputConfig(1, 28, 28, (0.0,), (1.0,), "bicubic", 1.0)
    (batch,) = calibration_batches(datasets, data, config, CPU, images=12, seed=1)
    drawn = torch.randperm(20, generator=torch.Generator().manual_seed(1))[:12]
    assert torch.equal((batch.images[:, 0] * 255).round().byte(), datasets.train.source.data[drawn])
    assert len(batch.photographs.unique()) == 12
