"""Data sets as registered things: a new one that nothing else in the package knows."""

from __future__ import annotations

import pytest
import torch
from helpers.images import CPU
from torch.utils.data import Dataset

from compressvit.data.data_set import SETS, data_set, find_set, list_of_sets
from compressvit.data.input import InputConfig, input_config
from compressvit.data.loaders import eval_loader, train_loader
from compressvit.data.opening import open_data
from compressvit.data.pixels import Pixels
from compressvit.data.spec import Data, known_classes
from compressvit.errors import UserError
from compressvit.recipe.schema import documentation, json_schema

GRAY = InputConfig(1, 8, 8, (0.5,), (0.5,), "bicubic", 1.0)


class Unlabelled(Dataset):
    """Images of somebody's own, whose second half of an item means nothing."""

    def __init__(self, count: int):
        self.pixels = Pixels(
            torch.arange(count).view(-1, 1, 1).expand(-1, 8, 8).to(torch.uint8), torch.zeros(count), []
        )

    def __len__(self) -> int:
        return len(self.pixels)

    def __getitem__(self, index: int):
        return self.pixels[index]


@pytest.fixture
def registered(monkeypatch):
    """Takes what a test registers out again."""
    len(SETS)  # found, so that what is added below can be taken out
    for table in ("_entries", "_modules"):
        monkeypatch.setattr(SETS, table, dict(getattr(SETS, table)))


def test_a_new_set_is_opened_and_read(registered):
    @data_set("toys", note="two kinds", classes=2, full_frame=True)
    def open_toys(data: Data):
        targets = torch.arange(20) % 2
        pixels = (targets * 200).view(-1, 1, 1).expand(-1, 8, 8).to(torch.uint8)
        return Pixels(pixels, targets, ["dark", "light"]), Pixels(pixels[:6], targets[:6], ["dark", "light"])

    data = Data(name="toys", batch_size=4, limit_train=10)
    assert known_classes(data) == 2
    assert input_config(torch.nn.Conv2d(3, 4, 2), data).crop_pct == 1.0
    datasets = open_data(data)
    assert (len(datasets.train), len(datasets.validation), datasets.class_names) == (10, 6, ["dark", "light"])
    images, targets = next(iter(train_loader(datasets, data, GRAY, CPU)))
    assert torch.equal(images[:, 0, 0, 0] > 0, targets == 1)
    assert "toys (two kinds)" in json_schema()["$defs"]["Data"]["properties"]["name"]["description"]
    assert "toys (two kinds)" in {name: text for name, _, text in documentation("data")}["name"]
    with pytest.raises(ValueError, match=r"no data set 'toy'; did you mean 'toys'\? \(known: .*toys"):
        Data(name="toy")


def test_a_new_set_without_labels_has_none(registered):
    @data_set("snaps", labelled=False)
    def open_snaps(data: Data):
        return Unlabelled(12), Unlabelled(4)

    data = Data(name="snaps", batch_size=4, limit_val=2)
    assert not data.labelled
    datasets = open_data(data)
    assert (len(datasets.train), len(datasets.validation), datasets.num_classes, datasets.labelled) == (
        12,
        2,
        None,
        False,
    )
    _, targets = next(iter(eval_loader(datasets, data, GRAY, CPU)))
    assert targets.tolist() == [-1, -1]


def test_a_new_prefix_stands_for_all_its_names(registered):
    opened = []

    @data_set("lake/NAME", package="no_such_package_anywhere")
    def open_lake(data: Data):
        opened.append(data.name)

    assert Data(name="Lake/Geneva").name == "Lake/Geneva"
    assert find_set("lake/x").open is open_lake
    with pytest.raises(UserError, match="lake/x needs a package: pip install no-such-package-anywhere"):
        open_data(Data(name="lake/x"))
    assert not opened
    with pytest.raises(UserError, match="no data set 'lake/'"):
        find_set("lake/")


def test_a_name_is_given_once(registered):
    with pytest.raises(TypeError, match="two data sets are called 'digits'"):
        data_set("digits")(lambda data: None)


def test_the_names_of_a_closed_prefix_are_listed_and_any_case_does():
    assert find_set("torch/SVHN") is find_set("torch/svhn")
    with pytest.raises(
        UserError, match=r"no data set 'torch/svhm'; did you mean 'torch/svhn'\? \(known: torch/cifar10, "
    ):
        find_set("torch/svhm")
    with pytest.raises(UserError, match=r"no data set 'Digits'; did you mean 'digits'\?"):
        find_set("Digits")
    listed = list_of_sets()
    assert listed.index("images") < listed.index("torch/cifar10")
    assert "wds/NAME" in listed
