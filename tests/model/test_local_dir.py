"""`config.json` beside weights: what timm writes and has written, and what others write."""

from __future__ import annotations

import json

import pytest

from compressvit.errors import UserError
from compressvit.model.local_dir import read_local_dir

OWN = {"mean": [0.1], "std": [0.2], "interpolation": "nearest", "crop_pct": 0.8, "crop_mode": "squash"}


@pytest.fixture
def folder(tmp_path):
    """A function that writes a `config.json` beside tensors."""

    def write(content):
        (tmp_path / "config.json").write_text(json.dumps(content))
        (tmp_path / "model.safetensors").touch()
        return tmp_path

    return write


@pytest.mark.parametrize(
    "content",
    [
        {"architecture": "vit", "num_classes": 7, "model_args": {"depth": 2}, "pretrained_cfg": OWN},
        {"architecture": "vit", "model_args": {"depth": 2, "num_classes": 7}, **OWN, "label_names": ["a"]},
        {"architecture": "vit", "num_classes": 3, "model_args": {"depth": 2, "num_classes": 7}, "pretrained_cfg": OWN},
    ],
    ids=["nested", "flat", "an argument before a key"],
)
def test_what_timm_writes(folder, content):
    path = folder(content)
    for given in (path, path / "model.safetensors"):
        found = read_local_dir(given)
        assert found is not None
        assert (found.files[0], found.architecture) == (path / "model.safetensors", "vit")
        assert found.args == {"num_classes": 7, "depth": 2}
        assert found.input == OWN


def test_another_file_of_tensors_beside_it_is_not_described(folder):
    path = folder({"architecture": "vit", "pretrained_cfg": OWN})
    (path / "other.safetensors").touch()
    assert read_local_dir(path / "other.safetensors") is None
    (path / "pytorch_model.bin").touch()
    for name in ("pytorch_model.bin", "model.safetensors"):
        found = read_local_dir(path / name)
        assert found is not None
        assert found.files == (path / name,)
    found = read_local_dir(path)
    assert found is not None
    assert found.files[0].name == "model.safetensors"


@pytest.mark.parametrize("content", [{"model_type": "bert"}, [], {"architecture": 3}])
def test_a_description_by_others(folder, content):
    path = folder(content)
    assert read_local_dir(path / "model.safetensors") is None  # the file alone is what was asked for
    with pytest.raises(UserError, match=r"does not say which model it describes"):
        read_local_dir(path)


def test_a_folder_without_tensors(tmp_path):
    assert read_local_dir(tmp_path) is None
    (tmp_path / "config.json").write_text('{"architecture": "vit"}')
    with pytest.raises(UserError, match=r"has a config.json and no model.safetensors or pytorch_model.bin"):
        read_local_dir(tmp_path)
