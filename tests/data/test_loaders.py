"""Loaders: the batches, that an epoch follows from its seed alone, augmentation, and processes that share an epoch."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from helpers.images import (
    COLOUR,
    CPU,
    CROPPED,
    GRAY,
    PLAIN,
    POLICY,
    as_multiset,
    class_folders,
    epoch,
    picture,
    seed_all,
)
from helpers.together import together
from PIL import Image
from torchvision.transforms.functional import to_tensor

from compressvit import processes
from compressvit.data import pixel_batches, samples
from compressvit.data.input import InputConfig
from compressvit.data.loaders import eval_loader, train_loader
from compressvit.data.opening import open_data
from compressvit.data.pixels import Pixels
from compressvit.data.spec import Augment, Data


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
    monkeypatch.setattr(pixel_batches, "_IN_MEMORY_BYTES", 0)
    slow = epoch(eval_loader(open_data(data), data, config, CPU))
    assert torch.equal(fast[1], slow[1])
    assert torch.equal(fast[0], slow[0])


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
        monkeypatch.setattr(pixel_batches, "_IN_MEMORY_BYTES", 0)
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
        monkeypatch.setattr(pixel_batches, "_IN_MEMORY_BYTES", 0)
    config = dataclasses.replace(GRAY, mean=(0.0,), std=(1.0,))
    data = Data(name="digits", augment=Augment(translate=2), batch_size=1437)
    datasets = open_data(data)
    white = Pixels(torch.full((1437, 8, 8), 255, dtype=torch.uint8), datasets.train.source.targets, "0123456789")
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


UNCHANGED = dataclasses.replace(GRAY, mean=(0.0,), std=(1.0,))
SHARED = Data(name="digits", batch_size=100, limit_train=1001, limit_val=101)


def share() -> tuple[int, list[bytes], list[bytes]]:
    """What one process sees: how many training batches, and the images of an epoch of training and of evaluation."""
    with processes.joined():
        torch.manual_seed(processes.rank())  # the processes draw differently, and still cut one permutation
        datasets = open_data(SHARED)
        train, validation = (
            make(datasets, SHARED, UNCHANGED, CPU, distributed=True) for make in (train_loader, eval_loader)
        )
        return len(train), images_of(train), images_of(validation)


def images_of(loader) -> list[bytes]:
    return as_multiset(torch.cat([images for images, _ in loader]))


def test_processes_share_an_epoch_out():
    first, second = together(2, share)
    assert first[0] == second[0] == 5  # each has 500 of 1001 images, in batches of 100
    datasets = open_data(SHARED)
    whole = images_of(eval_loader(datasets, SHARED, UNCHANGED, CPU))
    assert sorted(first[2] + second[2]) == whole
    assert (len(first[2]), len(second[2])) == (100, 1)  # batches are dealt out
    every = images_of(eval_loader(dataclasses.replace(datasets, validation=datasets.train), SHARED, UNCHANGED, CPU))
    shared = first[1] + second[1]
    assert len(shared) == 1000
    assert len(set(every) - set(shared)) <= 1
