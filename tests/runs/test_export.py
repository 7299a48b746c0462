"""The verb `export` on a run: what it writes and prints, what it keeps, and that a file that computes something else is not left."""

from __future__ import annotations

import json
import shutil

import pytest
import torch
from helpers.runs import done, refused, run

import compressvit
from compressvit.artifacts.formats.base import Opened
from compressvit.artifacts.formats.safetensors import Safetensors
from compressvit.runs.owned import foreign


@pytest.fixture
def ended(finished, tmp_path):
    """A copy of a finished run, of a student with shared weights."""
    return shutil.copytree(finished, tmp_path / "run")


def test_a_run_is_exported_beside_its_student_and_compared_on_its_images(ended):
    told = json.loads(done("export", ended, "--to", "safetensors", "--json"))
    file = ended / "exported" / "student.safetensors"
    assert told["written"] == str(file)
    assert told["compared_on"] == "16 held-out images of the run"  # as many as data.limit_val
    assert (told["difference"], told["agreement"]) == (0.0, 1.0)
    assert told["bytes"] == {file.name: file.stat().st_size}
    assert [path.name for path in file.parent.iterdir()] == [file.name]
    expected, images = compressvit.load(ended / "student"), torch.randn(2, 1, 8, 8)
    assert torch.equal(compressvit.load(file)(images), expected(images))
    # what was there stays, unless it is to be replaced
    file.write_text("old")
    assert "student.safetensors is there already. Give --overwrite" in refused("export", ended, "--to", "safetensors")
    assert file.read_text() == "old"
    out = done("export", ended, "--to", "safetensors", "--overwrite")
    assert "compared on 16 held-out images of the run: the same class for 16 of 16" in out
    assert f"compressvit.load('{file}')" in out
    # a run with an export in it is a run folder all the same
    assert foreign(ended) is None
    (file.parent / "notes.txt").touch()
    assert foreign(ended) == file.parent / "notes.txt"


def test_an_artifact_alone_is_compared_on_made_up_images(ended, tmp_path):
    shutil.move(ended / "student", tmp_path / "model")
    told = json.loads(done("export", tmp_path / "model", "--to", "safetensors", "--precision", "fp16", "--json"))
    assert told["written"] == str(tmp_path / "exported" / "model_fp16.safetensors")
    assert told["compared_on"] == "64 made-up images"
    assert 0 < told["difference"] < 2e-2  # measured 3e-4
    assert "--output" in refused("export", tmp_path / "model", "--to", "pt2", "--output", tmp_path)


@pytest.mark.parametrize("fault", ["values", "shape", "file"])
def test_a_file_that_computes_something_else_is_not_left(ended, monkeypatch, fault):
    right = Safetensors.open

    def wrong(self, path, source):
        if fault == "file":
            raise RuntimeError("no such operator.")
        model = right(self, path, source)
        return Opened(lambda images: [part + 0.01 if fault == "values" else part[:, 1:] for part in model(images)])

    monkeypatch.setattr(Safetensors, "open", wrong)
    message = refused("export", ended, "--to", "safetensors")
    assert {
        "values": "is not what the artifact does: on 16 held-out images of the run outputs differ by",
        "shape": "outputs of shapes",
        "file": "could not be made into a file that compressvit opens: no such operator. Try another --to",
    }[fault] in message
    assert list((ended / "exported").iterdir()) == []


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("--to", "onx"), "--to onx: there is no such format; did you mean 'onnx'?"),
        (("--to", "pt2", "--opset", "18"), "--opset 18: opsets are of ONNX"),
        (("--to", "openvino", "--precision", "bf16"), "--precision bf16: OpenVINO is written in fp32 or fp16"),
        (("--to", "timm"), "--to timm: multiplex cannot be folded"),
        (("--to", "pt2", "--output", "student.pt"), "a file of --to pt2 ends in .pt2; name it student.pt.pt2"),
    ],
)
def test_what_cannot_be_is_refused_before_anything_is_written(ended, words, message):
    assert message in refused("export", ended, *words)
    assert not list(ended.glob("exported/*"))


@pytest.mark.wide
def test_a_run_in_onnx_at_once(ended):
    pytest.importorskip("onnxscript")
    pytest.importorskip("onnxruntime")
    told = json.loads(done("export", ended, "--to", "onnx", "--opset", "18", "--json"))
    assert told["opset"] == 18
    assert set(told["bytes"]) == {"student.onnx", "student_predict.py"}
    assert told["difference"] < 1e-5  # measured 4e-7
    assert "student_predict.py IMAGE…" in told["how"]
    file = ended / "exported" / "student.onnx"
    figures, own = (json.loads(done("evaluate", path, "--json")) for path in (file, ended))
    assert {key: figures[key] for key in ("images", "top1", "top5")} == {
        key: own[key] for key in ("images", "top1", "top5")
    }
    assert figures["loss"] == pytest.approx(own["loss"], abs=1e-5)  # measured 4e-8
    assert figures["bytes"] == file.stat().st_size
    code, _, err = run("evaluate", file, "--require", "top1>=0", "--require", "loss<=0")
    assert code == 1
    assert err.startswith("compressvit: --require loss<=0: loss is ")
    shutil.copy(file, ended.parent / "alone.onnx")
    assert "its data is not known; add data.name=digits" in refused("evaluate", ended.parent / "alone.onnx")
    assert json.loads(done("evaluate", ended.parent / "alone.onnx", "data.name=digits", "--json"))["images"] > 16
    (ended.parent / "other.onnx").write_bytes(b"no model")
    assert "is not a model that onnxruntime reads" in refused("evaluate", ended.parent / "other.onnx")
