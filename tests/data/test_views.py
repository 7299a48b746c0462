"""Views: what an image looks like in one is a function of seed, view and image, whatever the order, the batch and the process."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from helpers.images import COLOUR, CPU, CROPPED, GRAY, POLICY, class_folders, seed_all
from helpers.together import together

from compressvit import processes
from compressvit.data.loaders import train_loader
from compressvit.data.opening import open_data
from compressvit.data.order import View, refuse_views
from compressvit.data.spec import Augment, Data
from compressvit.errors import UserError

MOVED = Augment(hflip=0.5, vflip=0.5, translate=2, random_erasing=0.5)


def shown(data, config, view, *, seed=0, batch=4, **options):
    """The images of an epoch by their places, and the places in their order."""
    loader = train_loader(open_data(data), data, config, CPU, batch_size=batch, **options)
    loader.show(view)
    seed_all(seed)
    images, order = {}, []
    for i, (pictures, _) in enumerate(loader):
        places = loader.shown(i).tolist()
        assert len(places) == len(pictures)
        order += places
        images |= dict(zip(places, pictures.clone(), strict=True))
    return images, order


def alike(one, other):
    common = one.keys() & other.keys()
    assert common
    return sum(torch.equal(one[place], other[place]) for place in common) / len(common)


@pytest.fixture(params=["cropped", "policy", "in memory", "in memory, by image"])
def kind(request, tmp_path):
    if "memory" in request.param:
        augment = MOVED if request.param == "in memory" else MOVED.model_copy(update={"scale": (0.5, 1.0)})
        return Data(name="digits", limit_train=24, augment=augment, num_workers=0), GRAY
    augment = {"cropped": CROPPED, "policy": POLICY}[request.param]
    return Data(name="folder", root=str(class_folders(tmp_path)), augment=augment, num_workers=0), COLOUR


def test_an_image_in_a_view_is_the_same_in_every_epoch(kind):
    view = View(7, 1)
    first, order = shown(*kind, view)
    again, other = shown(*kind, view, seed=1, batch=3)
    assert order != other
    assert alike(first, again) == 1
    for another in (View(7, 2), View(8, 1)):
        assert alike(first, shown(*kind, another)[0]) < 0.5
    assert len({image.numpy().tobytes() for image in first.values()}) > len(first) / 2


def test_workers_and_processes_show_the_same(kind):
    data, config = kind
    whole, _ = shown(data, config, View(0, 0))

    def part():
        with processes.joined():
            return shown(data, config, View(0, 0), batch=2)[0]

    parts = [shown(data.model_copy(update={"num_workers": 2}), config, View(0, 0))[0], *together(2, part)]
    assert [alike(whole, other) for other in parts] == [1, 1, 1]
    assert not parts[1].keys() & parts[2].keys()


def test_an_ordered_view_has_its_batches_again(kind):
    assert shown(*kind, View(0, 3, ordered=True))[1] == shown(*kind, View(0, 3, ordered=True), seed=5)[1]
    assert shown(*kind, View(0, 3, ordered=True))[1] != shown(*kind, View(0, 4, ordered=True))[1]


def test_what_stands_in_for_a_broken_file_has_no_place(tmp_path):
    root = class_folders(tmp_path)
    (root / "train" / "cat" / "2.jpg").write_bytes(b"no picture")
    data = Data(name="folder", root=str(root), augment=CROPPED, num_workers=0)
    _, order = shown(data, COLOUR, View(0, 0))
    assert sorted(order) == [-1, 0, 1, *range(3, 12)]


def test_the_identity_is_of_all_that_decides_an_image(tmp_path):
    data = Data(name="folder", root=str(class_folders(tmp_path)), augment=CROPPED)

    def identity(data, config=COLOUR):
        return train_loader(open_data(data), data, config, CPU).identity()

    same = identity(data)
    assert same == identity(data.model_copy(update={"batch_size": 3, "num_workers": 0}))
    fewer = data.model_copy(update={"limit_train": 8})
    for other in (data.model_copy(update={"augment": POLICY}), data.model_copy(update={"exif": True}), fewer):
        assert identity(other) != same
    first = tmp_path / "train" / "cat" / "0.jpg"
    first.write_bytes((tmp_path / "train" / "cat" / "1.jpg").read_bytes())  # another picture of the same name
    assert identity(data)["data"]["files"] == same["data"]["files"]
    assert identity(data) != same
    assert identity(data, dataclasses.replace(COLOUR, interpolation="bilinear")) != same


def test_data_without_places_is_refused():
    with pytest.raises(UserError, match="wds/imagenet streams its images, which have no numbers"):
        refuse_views(Data(name="wds/imagenet", root="nowhere", num_classes=3))
    with pytest.raises(UserError, match=r"data\.augment\.repeats=3 shows an image several times in an epoch"):
        refuse_views(Data(name="digits", augment={"repeats": 3}))
