"""The header of a safetensors file is read by our own code, before memory is taken for its tensors."""

from __future__ import annotations

import json
import os

import pytest
from helpers.models import build

from compressvit.artifacts.adapter import load_adapter
from compressvit.errors import UserError
from compressvit.model.header import Slot, read_header
from compressvit.model.weights import load_file
from compressvit.reading import Unreadable


def written(file, header, data=bytes(24), length=None):
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    file.write_bytes((len(text) if length is None else length).to_bytes(8, "little") + text + data)
    return file


def entry(dtype="F32", shape=(2, 3), offsets=(0, 24)):
    return {"dtype": dtype, "shape": list(shape), "data_offsets": list(offsets)}


def test_a_header_is_read(tmp_path):
    header = {"__metadata__": {"a": "b"}, "x": entry(shape=(2, 2), offsets=(0, 16)), "y": entry("F64", (), (16, 24))}
    assert read_header(written(tmp_path / "x", header)) == {"x": Slot("F32", (2, 2)), "y": Slot("F64", ())}
    assert Slot("F32", (2, 2)).elements == 4
    assert read_header(written(tmp_path / "x", {}, b"")) == {}
    header = {"x": entry("F4", (48,))}  # a type that is newer than this: its size is not checked
    assert read_header(written(tmp_path / "x", header)) == {"x": Slot("F4", (48,))}


@pytest.mark.parametrize(
    ("header", "fault"),
    [
        ({"x": entry(shape=(2, 2))}, r"24 bytes for F32 of shape \[2, 2\]"),
        ({"x": entry("F16")}, "24 bytes for F16"),
        ({"x": entry(shape=(-2, -3))}, "a shape that is none"),
        ({"x": entry(shape=(2.0, 3))}, "a shape that is none"),
        ({"x": entry(offsets=(-24, 0))}, "a shape that is none"),
        ({"x": entry(shape=(True, 6))}, "a shape that is none"),
        ({"x": entry(offsets=(0, 24, 48))}, "its header is damaged"),
        ({"x": {"dtype": "F32", "shape": [6]}}, "its header is damaged"),
        ({"x": {"dtype": "F32", "shape": 6, "data_offsets": [0, 24]}}, "its header is damaged"),
        ({"x": 3}, "its header is damaged"),
        ([1, 2], "its header is damaged"),
        (b"\xff\xff", "its header is damaged"),
        (b"{", "it is not JSON"),
        (b"[" * 1000, "nested more than 64 deep"),
        ({"x": entry(offsets=(0, 16), shape=(4,))}, "truncated or was added to: 16 bytes of tensors, 24 are there"),
    ],
)
def test_a_header_that_is_none(tmp_path, header, fault):
    with pytest.raises(Unreadable, match=rf"x cannot be read: .*{fault}"):
        read_header(written(tmp_path / "x", header))


@pytest.mark.parametrize("length", [10**6, 2**63, 2**64 - 1])
def test_a_length_that_lies(tmp_path, length):
    with pytest.raises(Unreadable, match="its header is longer than the file"):
        read_header(written(tmp_path / "x", {"x": entry()}, length=length))


def test_a_file_with_a_hole_of_50_gigabytes_is_not_mapped(tmp_path):
    """As weights, and as an adapter."""
    file = written(tmp_path / "x.safetensors", {"x": entry()})
    os.truncate(file, 50 * 2**30)
    fault = "x.safetensors is not a complete safetensors file .*: it is truncated or was added to: 24 bytes of tensors"
    for read in (load_adapter, lambda model, path: load_file(model, path, "teacher.weights")):
        with pytest.raises(UserError, match=fault):
            read(build("vit"), file)


def test_a_header_of_50_megabytes_is_not_read(tmp_path):
    with pytest.raises(Unreadable, match="its header is longer than the file"):
        read_header(written(tmp_path / "x", b" " * 50_000_000))
