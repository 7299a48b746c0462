"""A flipped bit or an edited manifest is named when a model is loaded; it never is another model in silence."""

from __future__ import annotations

import json

import pytest
import torch
from helpers.models import build, outputs
from safetensors import safe_open
from safetensors.torch import load_file, save_file

import compressvit
from compressvit.artifacts import adapter
from compressvit.artifacts.adapter import load_adapter, save_adapter
from compressvit.errors import UserError
from compressvit.files import load_checkpoint, save_checkpoint
from compressvit.model.checksums import content_checksum, tensor_checksums
from compressvit.model.weights import load_file as load_weights
from compressvit.transforms import LoRA, Multiplex


@pytest.fixture
def student(tmp_path):
    return compressvit.save(compressvit.compress(build("vit"), [Multiplex(share=2)]), tmp_path / "student")


def flip(file, position, bit=0):
    content = bytearray(file.read_bytes())
    content[position] ^= 1 << bit
    file.write_bytes(content)


@pytest.mark.parametrize("bit", [0, 6])
@pytest.mark.parametrize("place", [0.0, 0.5, 1.0])
def test_a_flipped_bit_is_named(student, place, bit):
    file = student / "model.safetensors"
    size = file.stat().st_size
    start = 8 + int.from_bytes(file.read_bytes()[:8], "little")
    flip(file, int(start + place * (size - 1 - start)), bit)
    intact = json.loads((student / "compressvit.json").read_text())["tensors"]
    wrong = [name for name, value in tensor_checksums(load_file(file)).items() if intact[name] != value]
    assert len(wrong) == 1
    with pytest.raises(
        UserError, match=rf"model\.safetensors is damaged: the checksum of {wrong[0]} .*1 of \d+ tensors"
    ):
        compressvit.load(student)
    with pytest.raises(UserError, match=r"is damaged: the checksum of"):  # as the weights of a teacher
        load_weights(build("vit"), student, "teacher.weights")


def test_a_zeroed_tail_is_named(student):
    file = student / "model.safetensors"
    content = file.read_bytes()
    file.write_bytes(content[:-4096] + bytes(4096))
    with pytest.raises(UserError, match="is damaged: the checksum of"):
        compressvit.load(student)


def test_an_edited_manifest_is_refused(student):
    file = student / "compressvit.json"
    before = outputs(compressvit.load(student))
    content = json.loads(file.read_text())
    content["input"]["mean"] = [0.25] * len(content["input"]["mean"])
    file.write_text(json.dumps(content))
    with pytest.raises(UserError, match=r"compressvit\.json is not what was written.*delete its line \"checksum\""):
        compressvit.load(student)
    del content["checksum"]  # on purpose
    file.write_text(json.dumps(content))
    assert torch.equal(outputs(compressvit.load(student)), before)


def test_heads_that_fit_are_not_believed(tmp_path):
    plain = compressvit.save(build("vit"), tmp_path / "plain")
    file = plain / "compressvit.json"
    content = json.loads(file.read_text())
    content["args"]["num_heads"] *= 2
    file.write_text(json.dumps(content))
    with pytest.raises(UserError, match="is not what was written"):
        compressvit.load(plain)


def test_the_order_of_keys_and_white_space_do_not_matter(student):
    file = student / "compressvit.json"
    content = json.loads(file.read_text())
    assert content["checksum"] == content_checksum(content)
    file.write_text(json.dumps(dict(reversed(content.items())), indent=8))
    compressvit.load(student)


def test_a_checksum_depends_on_type_and_shape():
    zeros = torch.zeros(2, 3)
    others = [zeros.half(), zeros.reshape(3, 2), zeros.int()]
    assert len({tensor_checksums({"x": tensor})["x"] for tensor in [zeros, *others]}) == 4
    assert tensor_checksums({"x": zeros}) == tensor_checksums({"x": torch.zeros(3, 2).T})


def test_an_adapter_file_is_checked(tmp_path):
    model = compressvit.compress(build("vit"), [LoRA(rank=2)])
    file = save_adapter(model, tmp_path / "adapter.safetensors")
    tensors = {name: tensor.clone() for name, tensor in load_file(file).items()}
    flip(file, file.stat().st_size - 3)
    backbone = build("vit")
    with pytest.raises(UserError, match="is damaged: its tensors"):
        load_adapter(backbone, file)
    with safe_open(file, framework="pt") as opened:
        header = json.loads(opened.metadata()["compressvit"])
    header["transforms"][0]["plan"]["alpha"] = 64.0
    save_file(tensors, file, metadata={"compressvit": json.dumps(header)})
    with pytest.raises(UserError, match="is damaged: its header"):
        load_adapter(backbone, file)


def test_an_adapter_file_stays_readable_when_headers_get_a_field(tmp_path, monkeypatch):
    class Later(adapter.AdapterHeader):
        colour: str | None = None

    file = save_adapter(compressvit.compress(build("vit"), [LoRA(rank=2)]), tmp_path / "adapter.safetensors")
    monkeypatch.setattr(adapter, "AdapterHeader", Later)
    load_adapter(build("vit"), file)


def test_torch_files_are_checked(tmp_path):
    model = build("vit")
    save_checkpoint(tmp_path / "weights.pt", model.state_dict())
    flip(tmp_path / "weights.pt", (tmp_path / "weights.pt").stat().st_size // 2)
    with pytest.raises(UserError, match=r"weights\.pt is damaged \(the checksum of .*data/"):
        load_checkpoint(tmp_path / "weights.pt")
    with pytest.raises(UserError, match=r"teacher\.weights: .*weights\.pt is damaged"):
        load_weights(model, tmp_path / "weights.pt", "teacher.weights")


def test_torch_files_without_checksums_are_read(tmp_path):
    before = torch.serialization.get_crc32_options()
    try:
        torch.serialization.set_crc32_options(False)
        torch.save(build("vit").state_dict(), tmp_path / "weights.pt")
    finally:
        torch.serialization.set_crc32_options(before)
    load_weights(build("vit", seed=3), tmp_path / "weights.pt", "teacher.weights")
