"""The verb `export` on a run: what it writes and prints, what it keeps, and that a file that computes something else is not left."""

from __future__ import annotations

import json
import math
import shutil
from types import SimpleNamespace

import pytest
import torch
from helpers.models import build
from helpers.runs import done, refused, run

import compressvit
from compressvit.artifacts.formats.base import FORMATS, Opened
from compressvit.artifacts.formats.safetensors import Safetensors
from compressvit.errors import UserError
from compressvit.runs.export import TOLERANCES
from compressvit.runs.export import _require_alike as require_alike
from compressvit.runs.owned import foreign
from compressvit.tasks.likeness import Likeness


@pytest.fixture
def ended(finished, tmp_path):
    """A copy of a finished run, of a student with shared weights."""
    return shutil.copytree(finished, tmp_path / "run")


@pytest.fixture(scope="module")
def finished_plain(tmp_path_factory):
    """The artifact of a plain model, which timm takes."""
    torch.manual_seed(0)
    return compressvit.save(build("vit"), tmp_path_factory.mktemp("plain") / "student")


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
    out = done("export", ended, "--to", "safetensors", "--precision", "fp16")
    assert "weights alone are rounded, and compared in float32; so there is no latency" in out
    assert " ms" not in out
    for name in ("notes.txt", "my_server.py", "student.py", "my.onnx", "student_int4.onnx"):
        (file.parent / name).touch()
        assert foreign(ended) == file.parent / name
        (file.parent / name).unlink()


def test_an_artifact_alone_is_compared_on_made_up_images(ended, tmp_path):
    shutil.move(ended / "student", tmp_path / "model")
    told = json.loads(done("export", tmp_path / "model", "--to", "safetensors", "--precision", "fp16", "--json"))
    assert told["written"] == str(tmp_path / "exported" / "model_fp16.safetensors")
    assert told["compared_on"] == "64 made-up images"
    assert 0 < told["difference"] < 2e-2  # measured 3e-4
    words = (
        "export",
        tmp_path / "model",
        "--to",
        "safetensors",
        "--overwrite",
        "data.name=digits",
        "data.limit_val=20",
    )
    assert json.loads(done(*words, "--json"))["compared_on"] == "20 held-out images of the data given"
    assert (told["rounded"], told["latency_ms"], told["latency_ratio"]) == ("weights", None, None)
    file = tmp_path / "exported" / "model_fp16.safetensors"
    assert "is a file, which compressvit.load and `compressvit evaluate` alone read" in refused("merge", file)
    assert "--output" in refused("export", tmp_path / "model", "--to", "pt2", "--output", tmp_path)


@pytest.mark.parametrize("name", ["student/model.safetensors", "student/other/new.safetensors", "link.safetensors"])
def test_the_artifact_that_is_exported_is_never_replaced(ended, name):
    source, target = ended / "student" / "model.safetensors", ended / name
    values = source.read_bytes()
    if name == "link.safetensors":
        target.hardlink_to(source)
    words = ("--to", "safetensors", "--precision", "fp16", "--output", target, "--overwrite")
    assert "the artifact" in refused("export", ended / "student", *words)
    assert source.read_bytes() == values


@pytest.mark.parametrize("fmt", ["safetensors", "timm"])
def test_what_is_exported_can_be_read_by_those_who_may_read_new_files(finished_plain, tmp_path, fmt):
    """safetensors writes for the owner alone."""
    (tmp_path / "usual").touch()
    target = tmp_path / f"student{FORMATS[fmt].suffix}"
    done("export", finished_plain, "--to", fmt, "--output", target)
    files = [*finished_plain.iterdir(), *(target.iterdir() if target.is_dir() else [target])]
    assert {file.stat().st_mode for file in files} == {(tmp_path / "usual").stat().st_mode}
    if target.is_dir():
        assert {file.name for file in target.iterdir()} == {"config.json", "export.json", "model.safetensors"}
        assert json.loads((target / "export.json").read_text())["task"] == "classification"


def test_a_folder_is_replaced_only_where_an_export_wrote_it(finished_plain, tmp_path):
    target = tmp_path / "teacher"
    words = ("export", finished_plain, "--to", "timm", "--output", target, "--overwrite")
    target.mkdir()
    for name in ("config.json", "model.safetensors"):
        (target / name).write_text("a user's")
    assert "no export wrote it (it has no export.json)" in refused(*words)
    assert {file.read_text() for file in target.iterdir()} == {"a user's"}
    for file in target.iterdir():
        file.unlink()
    done(*words)
    assert "is there already. Give --overwrite" in refused(*words[:-1])
    done(*words)
    (target / "notes.txt").touch()
    assert "holds notes.txt, which no export wrote" in refused(*words)


def test_weights_that_lay_beside_an_earlier_file_are_replaced_with_it(ended, monkeypatch):
    """As those of a large model in ONNX."""
    monkeypatch.setattr(Safetensors, "beside", lambda self, name: [f"{name}.data"])
    other = ended / "exported" / "student.safetensors.data"
    other.parent.mkdir()
    other.touch()
    assert f"{other.name} is there already. Give --overwrite" in refused("export", ended, "--to", "safetensors")
    done("export", ended, "--to", "safetensors", "--overwrite")
    assert [file.name for file in other.parent.iterdir()] == ["student.safetensors"]
    assert FORMATS["onnx"].beside("a.onnx") == ["a_predict.py", "a.onnx.data"]


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
        (("--to", "safetensors", "--device", "cuda"), "--device cuda: files are written and compared on the CPU"),
        (("--to", "pt2", "--opset", "18"), "--opset 18: opsets are of ONNX"),
        (("--to", "openvino", "--precision", "bf16"), "--precision bf16: OpenVINO is written in fp32 or fp16"),
        (("--to", "timm"), "--to timm: multiplex cannot be folded"),
        (
            ("--to", "onnx", "--images", "64"),
            "--images 64: ranges are measured on images for --precision int8-static alone",
        ),
        (
            ("--to", "onnx", "--precision", "int8-static", "--images", "8"),
            "--images 8: ranges are measured on at least 16",
        ),
        (
            ("data.mean=[0.5]", "--to", "pt2"),
            "data.mean=[0.5]: the student is exported for images as it was trained on",
        ),
        (("data.name=folder", "data.root=nowhere", "--to", "pt2"), "data.root=nowhere: there is no such folder"),
        (
            ("--to", "onnx", "--least-agreement", "0.9"),
            "--least-agreement 0.9 is for int8 and int8-static; a file in fp32 computes what the artifact does, or is refused",
        ),
        (
            ("--to", "onnx", "--precision", "int8", "--least-agreement", "95"),
            "--least-agreement 95: an agreement is above 0 and at most 1",
        ),
        (("--to", "pt2", "--output", "student.pt"), "a file of --to pt2 ends in .pt2; name it student.pt.pt2"),
    ],
)
def test_what_cannot_be_is_refused_before_anything_is_written(ended, words, message):
    assert message in refused("export", ended, *words)
    assert not list(ended.glob("exported/*"))


def test_an_int8_file_that_differs_more_than_rounding_is_kept_where_that_is_asked():
    source, fmt = SimpleNamespace(precision="int8"), SimpleNamespace(runtime="onnxruntime", title="ONNX")

    def check(least, difference=0.26):
        likeness = Likeness(difference, 0.9598, "smallest cosine of an image 0.9598", False, "0.975 of the smallest")
        require_alike(likeness, source, fmt, "64 images", least)

    with pytest.raises(
        UserError,
        match=r"on 64 images outputs differ by 2\.6e-01 of the largest \(smallest cosine of an image 0\.9598\), and at most 0\.5, and "
        r"0\.975 of the smallest is asked for\. Nothing was written: .*keep it all the same: least_agreement='0\.95'$",
    ):
        check(None)
    check(0.95)
    with pytest.raises(UserError, match=r"and an agreement of 0\.97 is asked for"):
        check(0.97)
    with pytest.raises(UserError, match="differ by nan"):
        check(0.95, math.nan)


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
    other = json.loads(done("evaluate", file, "data.mean=[0.9]", "--json"))
    assert other["loss"] == pytest.approx(
        json.loads(done("evaluate", ended, "data.mean=[0.9]", "--json"))["loss"], abs=1e-5
    )
    assert other["loss"] != figures["loss"]
    assert figures["bytes"] == file.stat().st_size
    code, _, err = run("evaluate", file, "--require", "top1>=0", "--require", "loss<=0")
    assert code == 1
    assert err.startswith("compressvit: --require loss<=0: loss is ")
    shutil.copy(file, ended.parent / "alone.onnx")
    assert "its data is not known; add data.name=digits" in refused("evaluate", ended.parent / "alone.onnx")
    assert json.loads(done("evaluate", ended.parent / "alone.onnx", "data.name=digits", "--json"))["images"] > 16
    (ended.parent / "other.onnx").write_bytes(b"no model")
    assert "is not a model that onnxruntime reads" in refused("evaluate", ended.parent / "other.onnx")


@pytest.mark.wide
def test_ranges_are_measured_on_training_images_of_the_run_or_of_the_data_given(ended):
    pytest.importorskip("onnxscript")
    pytest.importorskip("onnxruntime")
    words = ("export", ended, "--to", "onnx", "--precision", "int8-static")
    told = json.loads(done(*words, "--images", "20", "--json"))
    file = ended / "exported" / "student_int8-static.onnx"
    assert (told["written"], told["rounded"]) == (str(file), "weights and arithmetic")
    assert told["ranges_of"].startswith("20 of ")
    assert told["ranges_of"].endswith(" training images of the run")
    assert told["latency_ratio"][1] > 0
    assert foreign(ended) is None
    assert "ranges measured on 24 of 24 training images of the data given" in done(
        *words, "--overwrite", "data.limit_train=24"
    )
    assert json.loads(done("evaluate", file, "--json"))["images"] > 0
    before = file.read_bytes()
    message = refused(*words, "--overwrite", "data.limit_train=9")
    assert "at least 16 images, and of the data given 9 training images can be read" in message
    assert file.read_bytes() == before
    shutil.move(ended / "student", ended.parent / "model")
    message = refused("export", ended.parent / "model", *words[2:])
    assert "is in no run folder; add data.name=images data.root=FOLDER" in message


def test_whatever_a_format_writes_in_a_run_is_the_runs_own(tmp_path):
    """Or the run could no longer be started again in its folder."""
    for fmt in FORMATS.values():
        for precision in ("", *(f"_{word}" for word in TOLERANCES if word != "fp32")):
            name = f"student{precision}{fmt.suffix or f'_{fmt.name}'}"
            inside = [f"{name}/{file}" for file in (*fmt.inside, "export.json")]
            for file in inside if not fmt.suffix else [name, *fmt.beside(name)]:
                path = tmp_path / fmt.name / "exported" / file
                path.parent.mkdir(parents=True, exist_ok=True)
                path.touch()
        assert foreign(tmp_path / fmt.name) is None, fmt.name
