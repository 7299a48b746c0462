"""Sets of Hugging Face's `datasets` over processes and their workers: every sample once an epoch, by its gray."""

from __future__ import annotations

import io

import pytest
import torch
from helpers.images import CPU, UNCHANGED, grays
from helpers.together import together
from PIL import Image

from compressvit import processes
from compressvit.data.loaders import eval_loader, train_loader
from compressvit.data.opening import open_data
from compressvit.data.spec import Data
from compressvit.errors import UserError

datasets = pytest.importorskip("datasets")


def parquet(folder, counts) -> list[int]:
    """Files of so many pictures, each of another gray and all of class 1, for both splits. Returns the grays."""
    features = datasets.Features({"image": datasets.Image(), "label": datasets.ClassLabel(names=["a", "b"])})
    gray = 0
    for number, count in enumerate(counts):
        pictures = []
        for _ in range(count):
            file = io.BytesIO()
            Image.new("L", (8, 8), gray := gray + 1).save(file, "PNG")
            pictures.append({"bytes": file.getvalue(), "path": None})
        table = datasets.Dataset.from_dict({"image": pictures, "label": [1] * count}, features=features)
        for split in ("train", "validation"):
            table.to_parquet(folder / f"{split}-{number:05d}-of-{len(counts):05d}.parquet")
    return list(range(1, gray + 1))


def data_of(folder, kind, **settings):
    (folder / "set").mkdir(exist_ok=True)
    options = {"download": True} if kind == "hfids" else {}
    name, root = f"{kind}/{folder / 'set'}", str(folder / "cache")
    return Data(name=name, root=root, val_split="validation", num_classes=2, batch_size=2, **options, **settings)


def seen(data, evaluate):
    with processes.joined():
        torch.manual_seed(0)
        sets = open_data(data)
        if evaluate:
            return [grays(eval_loader(sets, data, UNCHANGED, CPU, distributed=processes.count() > 1))]
        loader = train_loader(sets, data, UNCHANGED, CPU)
        return [grays(loader) for _ in range(2)]


@pytest.mark.parametrize("kind", ["hfids", "hfds"])
@pytest.mark.parametrize("workers", [0, 2])
def test_processes_train_on_every_sample_once(tmp_path, kind, workers):
    data = data_of(tmp_path, kind, num_workers=workers)
    every = parquet(tmp_path / "set", (5, 3, 8))
    open_data(data)  # prepared once
    for one, two in zip(*together(2, seen, data, False), strict=True):
        assert len(one) == len(two) == 8
        assert sorted(one + two) == every


@pytest.mark.parametrize("kind", ["hfids", "hfds"])
def test_processes_evaluate_every_sample_once(tmp_path, kind):
    data = data_of(tmp_path, kind, num_workers=2)
    every = parquet(tmp_path / "set", (4, 3))
    open_data(data)
    (one,), (two,) = together(2, seen, data, True)
    assert sorted(one + two) == every


def test_what_does_not_divide_repeats_samples_and_leaves_none_out(tmp_path):
    """As timm's reader has it: every worker gives as many batches."""
    data = data_of(tmp_path, "hfids", num_workers=2)
    every = parquet(tmp_path / "set", (8, 6))
    open_data(data)
    for one, two in zip(*together(2, seen, data, False), strict=True):
        assert len(one) == len(two) == 8
        assert set(one + two) == set(every)


def test_too_few_samples_for_processes_and_workers(tmp_path):
    data = data_of(tmp_path, "hfids", num_workers=2)
    parquet(tmp_path / "set", (3,))
    open_data(data)

    def refused():
        with processes.joined(), pytest.raises(UserError) as told:
            train_loader(open_data(data), data, UNCHANGED, CPU)
        return str(told.value)

    message, _ = together(2, refused)
    assert message.startswith("3 samples to train on are too few for 2 processes with 2 workers each")
    assert "data.num_workers=1" in message
