"""The program that `export` writes beside a file: it prepares images, reads pictures and answers as compressvit does."""

from __future__ import annotations

import dataclasses
import json
import os
import subprocess
import sys
import types
import typing
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers.bands import bands, npy, npy_header
from helpers.formats import source_of, written
from PIL import ExifTags, Image

from compressvit.artifacts import predict
from compressvit.data.image_transform import image_transform
from compressvit.data.input import InputConfig
from compressvit.data.pictures import FORMATS, BrokenPicture, read_picture
from compressvit.data.spec import Interpolation
from compressvit.tasks.overlap import on_picture


@pytest.mark.parametrize("size", [(41, 60), (60, 41), (20, 20), (96, 33)], ids=str)
@pytest.mark.parametrize("crop_mode", ["center", "squash", "border"])
def test_the_program_prepares_images_as_compressvit_does(size, crop_mode):
    generator = np.random.default_rng(0)
    for mode, channels, pixels in (
        ("RGB", 3, (32, 32)),
        ("L", 1, (32, 32)),
        ("RGB", 3, (24, 40)),
        ("RGBA", 4, (32, 32)),
    ):
        config = InputConfig(channels, *pixels, (0.4,) * channels, (0.3,) * channels, "bicubic", 0.9, crop_mode)
        values = generator.integers(0, 256, (*size, channels), np.uint8).squeeze()
        image = Image.fromarray(values, mode)
        expected = image_transform(config, None)(image).float().numpy()
        found = predict.prepare(image, config.as_dict())
        assert np.abs(found - (expected / 255 - 0.4) / 0.3).max() < 1e-5  # measured 5e-7


def test_the_program_reads_pictures_of_16_bits():
    config = InputConfig(1, 8, 8, (0.0,), (1.0,), "bilinear", 1.0)
    image = Image.fromarray(np.arange(64, dtype=np.uint16).reshape(8, 8) * 1000)
    expected = image_transform(config, None)(image).float().numpy() / 255
    assert np.abs(predict.prepare(image, config.as_dict()) - expected).max() < 1e-6


@pytest.mark.parametrize(
    ("values", "message"),
    [
        (np.array([[0.0, 200.0]], np.float32), "its floats reach from 0 to 200; 0 to 1 are read"),
        (np.array([[0.0, np.nan]], np.float32), "its floats reach from nan to nan; 0 to 1 are read"),
        (np.array([[0, 70_000]], np.int32), "its integers reach from 0 to 70000; 0 to 65535 are read"),
    ],
)
def test_the_program_refuses_the_values_that_compressvit_refuses(values, message):
    config = InputConfig(1, 8, 8, (0.0,), (1.0,), "bilinear", 1.0)
    image = Image.fromarray(values)
    with pytest.raises(ValueError, match=message):
        predict.prepare(image, config.as_dict())
    with pytest.raises(BrokenPicture, match=r"reach from .* are read"):
        image_transform(config, None)(image)


@pytest.mark.parametrize("word", [*typing.get_args(Interpolation), "nearest-exact", "random"])
def test_the_program_knows_every_interpolation(word):
    config = InputConfig(3, 8, 8, (0.0,) * 3, (1.0,) * 3, word, 1.0)
    assert predict.prepare(Image.new("RGB", (20, 30)), config.as_dict()).shape == (3, 8, 8)


@pytest.mark.parametrize("crop_mode", ["center", "squash", "border"])
@pytest.mark.parametrize("channels", [1, 2, 3, 4, 5])
def test_the_program_prepares_arrays_as_compressvit_does(tmp_path, channels, crop_mode):
    statistics = (0.4, 0.5, 0.1, 0.9, 0.3)[:channels]
    config = InputConfig(channels, 24, 32, statistics, statistics, "bicubic", 0.9, crop_mode)
    values = bands(channels, (41, 60))
    for stored in (values, values.astype(np.uint16) * 257, (values / 255).astype(np.float16), values / 255):
        np.save(tmp_path / "image.npy", stored)
        image = read_picture(tmp_path / "image.npy", channels=channels)[0]
        pixels = image_transform(config, None)(image).float().numpy() / 255
        mean = np.array(statistics).reshape(-1, 1, 1)
        found = predict.prepare(predict.read(tmp_path / "image.npy", {}), config.as_dict())
        assert np.abs(found - (pixels - mean) / mean).max() < 1e-5  # measured 9e-7


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (npy(bands(4)), "it has 4 channels, and the model takes 5; bands are read from an array"),
        (npy(bands(3)), "it has 3 channels, and the model takes 5; bands are read"),
        (npy(bands(5))[:-1], "its array cannot be read: mmap length is greater than file size"),
        (npy(np.array([[None]])), "its array cannot be read: Array can't be memory-mapped"),
        (npy_header((10**6, 10**6, 5)), "its array cannot be read: mmap length is greater"),
        (npy_header((2**64, 2**64)), "its array cannot be read"),
        (b"\x93NUMPY\x01\x00\xe8\x23" + b"-" * 9191 + b"1", "its array cannot be read: MemoryError"),
        (npy(bands(5).astype(np.int64)), "its values are int64; uint8, 16 bits"),
        (npy(np.full((4, 4, 5), 2.0)), "its floats reach from 2 to 2; 0 to 1 are read"),
        (npy(np.zeros((4, 4, 5, 1), np.uint8)), r"its shape is \(4, 4, 5, 1\), not"),
        (npy(np.zeros((0, 4, 5), np.uint8)), r"its shape is \(0, 4, 5\), not"),
        (b"text", r"it is no image of a format that is read \(JPEG, PNG, .*\); bands are read from an array"),
    ],
)
def test_the_program_refuses_arrays_that_it_cannot_use(tmp_path, content, message):
    (tmp_path / "image.npy").write_bytes(content)
    about = InputConfig(5, 8, 8, (0.0,) * 5, (1.0,) * 5, "bilinear", 1.0).as_dict()
    with pytest.raises(ValueError, match=message):
        predict.prepare(predict.read(tmp_path / "image.npy", {}), about)


def test_the_program_starts_no_other_one(tmp_path):
    """Alone, as it lies beside a model: in a process that has not imported compressvit."""
    mark, program, picture = tmp_path / "started", tmp_path / "bin" / "gs", tmp_path / "x.png"
    program.parent.mkdir()
    program.write_text(f"#!/bin/sh\ntouch {mark}\n")
    program.chmod(0o755)
    picture.write_bytes(b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 8 8\n%%EndComments\nshowpage\n%%EOF\n")
    lines = f"import sys, pathlib; sys.path.insert(0, {str(Path(predict.__file__).parent)!r}); import predict\n"
    lines += f"try: predict.read(pathlib.Path({str(picture)!r}), {{}})\nexcept ValueError as error: print(error)\n"
    path = f"{program.parent}:{os.environ['PATH']}"
    done = subprocess.run(
        [sys.executable, "-c", lines], env={**os.environ, "PATH": path}, capture_output=True, text=True, check=True
    )
    assert "it is no image of a format that is read" in done.stdout
    assert not mark.exists()


def test_the_program_reads_the_formats_that_runs_read():
    assert tuple(predict.FORMATS) == tuple(FORMATS)


def test_the_program_turns_pictures_as_its_run_did(tmp_path):
    values = np.random.default_rng(0).integers(0, 256, (20, 30, 3), np.uint8)
    exif = Image.Exif()
    exif[ExifTags.Base.Orientation] = 6
    Image.fromarray(values).save(tmp_path / "image.png", exif=exif)
    source = source_of("plain")
    for turned in (False, True):
        said = dataclasses.replace(source, exif=turned).metadata
        about = {**source.input.as_dict(), "exif": json.loads(said["exif"])}
        image = predict.read(tmp_path / "image.png", about)
        assert image.size == ((20, 30) if turned else (30, 20))
        assert np.array_equal(image, read_picture(tmp_path / "image.png", exif=turned)[0])


def test_the_program_needs_only_what_it_uses_of_the_metadata(monkeypatch):
    said = {**source_of("plain").metadata, "onnx.infer": "onnxruntime.quant"}
    session = types.SimpleNamespace(get_modelmeta=lambda: types.SimpleNamespace(custom_metadata_map=said))
    runtime = types.SimpleNamespace(SessionOptions=types.SimpleNamespace, InferenceSession=lambda *_, **__: session)
    monkeypatch.setitem(sys.modules, "onnxruntime", runtime)
    _, about = predict.open_model(Path("student.onnx"))
    config = source_of("plain").input.as_dict()
    assert {key: about[key] for key in config} == config
    assert about["label_names"] == [f"class {i}" for i in range(5)]
    del said["std"]
    with pytest.raises(ValueError, match="its metadata have no std"):
        predict.open_model(Path("student.onnx"))


def test_the_program_says_what_outputs_mean():
    about = {"label_names": ["cat", "dog"]}
    said = predict.answer({"logits": np.array([0.0, np.log(3)], np.float32)}, (10, 20), about)
    assert predict.in_words(said) == "dog 75.0 %  cat 25.0 %"
    found = {
        "boxes": np.array([[0, 0.5, 0.5, 1], [0, 0, 1, 1]]),
        "scores": np.array([0.9, 0.1]),
        "labels": np.array([1, 0]),
    }
    said = predict.answer(found, (10, 20), about)
    assert said == {"objects": [{"class": "dog", "score": 0.9, "box": [0.0, 10.0, 5.0, 20.0]}]}
    assert predict.in_words(said) == "dog 0.90 at [0, 10, 5, 20]"
    pixels = np.array([[[0, 0, 2]], [[1, 1, 1]]], np.float32)  # two classes on three pixels
    said = predict.answer({"logits": pixels}, (6, 1), about)
    assert predict.in_words(said) == "dog on 66.7 %  cat on 33.3 %"
    assert np.asarray(predict.mask_of(pixels, (6, 2))).tolist() == [[1, 1, 1, 1, 0, 0]] * 2
    assert predict.in_words(predict.answer({"outputs": np.ones((2, 3))}, (1, 1), {})).startswith("6 features: 1.0000")


@pytest.mark.wide
@pytest.mark.parametrize("name", ["plain", "low_rank", "detector", "segmenter"])
def test_the_program_answers_beside_the_file(tmp_path, name):
    """In a process that has neither torch nor compressvit."""
    file = written(tmp_path, name, "onnx")
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (50, 40, 3), np.uint8)).save(tmp_path / "image.png")
    script = tmp_path / "student_predict.py"
    blocked = "import sys, runpy; sys.modules.update(dict.fromkeys(('torch', 'timm', 'compressvit', 'onnx'))); "
    words = [
        "p",
        "--json",
        *(["--masks", str(tmp_path / "masks")] if name == "segmenter" else []),
        str(tmp_path / "image.png"),
    ]
    code = f"{blocked}sys.argv = {words!r}; runpy.run_path({str(script)!r}, run_name='__main__')"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    said = json.loads(done.stdout)
    _, about = predict.open_model(file)
    with Image.open(tmp_path / "image.png") as image:
        pixels = predict.prepare(image, about)
    with torch.no_grad():
        outputs = source_of(name).reference[0](torch.from_numpy(pixels[None]))
    if name == "plain":
        shares = outputs[0].softmax(0)
        assert [row["class"] for row in said["classes"]] == [f"class {i}" for i in shares.argsort(descending=True)]
        assert said["classes"][0]["probability"] == pytest.approx(float(shares.max()), abs=1e-5)
    elif name == "low_rank":
        assert said["features"] == pytest.approx(outputs[0].tolist(), abs=1e-5)
    elif name == "segmenter":
        counts = torch.bincount(outputs[0].argmax(0).flatten(), minlength=5) / outputs[0, 0].numel()
        assert [row["share"] for row in said["pixels"]] == pytest.approx(
            sorted(filter(None, counts.tolist()), reverse=True), abs=2e-3
        )
        with Image.open(tmp_path / "masks" / "image.png") as mask:
            resized = on_picture(outputs[0], (50, 40))
            assert (
                torch.from_numpy(np.array(mask)) == resized
            ).float().mean() > 0.99  # Pillow resizes by float32, too; measured 1.0
    else:
        assert len(said["objects"]) == int((outputs[1] >= predict.SURE).sum())
