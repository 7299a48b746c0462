"""The formats of `export`: each file, as its own runtime computes it, against the model; shared tensors once; what is refused."""

from __future__ import annotations

import dataclasses
import functools
import json
import subprocess
import sys
import types
import typing
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
from helpers.models import randomise
from PIL import ExifTags, Image
from safetensors import safe_open
from torch import nn

import compressvit
from compressvit.artifacts import predict
from compressvit.artifacts.archive import inspected
from compressvit.artifacts.formats.base import FORMATS, Source, find_format
from compressvit.artifacts.merge import photograph_like
from compressvit.data.image_transform import image_transform
from compressvit.data.input import InputConfig, input_config
from compressvit.data.pictures import BrokenPicture, read_picture
from compressvit.data.spec import Data, Interpolation
from compressvit.errors import UserError
from compressvit.model import stored, surgery, ties
from compressvit.model.families.adamixer import SMALL
from compressvit.model.weights import build
from compressvit.runs.export import TOLERANCES
from compressvit.tasks.base import task_of
from compressvit.transforms import LORS, Adapters, LoRA, LowRank, Multiplex, Narrow, Quantise
from compressvit.transforms.applying import compress

SIZE = 32
VIT = {"img_size": SIZE, "patch_size": 8, "embed_dim": 48, "depth": 2, "num_heads": 2}
SWIN = {"img_size": SIZE, "embed_dim": 16, "depths": (2, 2), "num_heads": (2, 2), "window_size": 2, "num_classes": 5}


def vit(classes: int = 5) -> nn.Module:
    torch.manual_seed(0)
    model = timm.create_model("vit_tiny_patch16_224", **VIT, num_classes=classes)
    randomise(model, 0.05)
    return model.eval()


def swin() -> nn.Module:
    torch.manual_seed(0)
    return timm.create_model("swin_tiny_patch4_window7_224", **SWIN).eval()


def adapted(model: nn.Module, *steps: object) -> nn.Module:
    made = compress(model, steps)
    added = surgery.added_parameters(made)
    randomise(nn.ParameterList(p for n, p in made.named_parameters() if n in added), 0.05)
    return made


def detector() -> nn.Module:
    torch.manual_seed(0)
    args = {"patch_size": 8, "embed_dim": 24, "depth": 1, "num_heads": 2}
    model = build("adamixer", **{**SMALL, "stages": 2, "backbone_args": args})
    randomise(model, 0.1)
    return model.eval()


MODELS = {
    "plain": vit,
    "shared": lambda: compress(vit(), [Multiplex(share=2, mlp_conv=3)]),
    "low_rank": lambda: compress(vit(0), [LowRank(budget={"parameters": 0.5}, metric="weights")]),
    "lors": lambda: adapted(vit(), LORS(share=2, rank=4, init="scratch"), LoRA(rank=2)),
    "adapters": lambda: adapted(vit(), Adapters(width=4)),
    "lora": lambda: adapted(vit(), LoRA(rank=2, alpha=3.0, targets=("q", "v", "fc1"))),
    "narrow": lambda: compress(vit(), [Narrow(neurons=0.5, head_dim=0.5)], calibration=torch.randn(64, 3, SIZE, SIZE)),
    "swin": lambda: compress(swin(), [Multiplex(share=2)]),
    "quantised": lambda: compress(vit(0), [LowRank(rank=30, metric="weights"), Quantise(bits=5, metric="weights")]),
    "detector": detector,
}
FAST = {
    ("shared", "safetensors", "fp16"),
    ("lors", "safetensors", "fp32"),
    ("plain", "pt2", "bf16"),
    ("plain", "timm", "fp16"),
}
NEEDS = {"onnx": ("onnx", "onnxscript", "onnxruntime"), "openvino": ("openvino",), "peft": ("peft",)}
CASES = [
    *((model, fmt, "fp32") for model in MODELS for fmt in ("onnx", "pt2", "safetensors")),
    *((model, "openvino", "fp32") for model in MODELS if model != "detector"),  # of which it lacks an operation
    *(("shared", fmt, "fp16") for fmt in ("onnx", "pt2", "safetensors", "openvino")),
    *((model, "pt2", "bf16") for model in ("plain", "shared")),
    *((model, "onnx", word) for model in ("plain", "shared", "low_rank", "swin") for word in ("int8", "int8-static")),
    ("detector", "onnx", "int8-static"),
    *((model, "openvino", "int8-static") for model in ("plain", "shared")),
    *(
        (model, fmt, precision)
        for model, fmt in (("plain", "timm"), ("lora", "peft"))
        for precision in ("fp32", "fp16", "bf16")
    ),
]


@functools.cache
def source_of(name: str, precision: str = "fp32") -> Source:
    model = MODELS[name]()
    config = input_config(model, Data(name="images"))
    if task_of(model).name == "classification":
        stored.name_classes(model, [f"class {i}" for i in range(5)])
    calibration = (photograph_like(16, config),) if precision == "int8-static" else ()
    return Source(model, task_of(model), config, precision, "run/student", calibration=calibration)


def written(tmp_path, name: str, fmt: str, precision: str = "fp32"):
    for package in NEEDS.get(fmt, ()):
        pytest.importorskip(package)
    file = tmp_path / f"student{FORMATS[fmt].suffix}"
    FORMATS[fmt].write(source_of(name, precision), file)
    return file


def unique_bytes(model: nn.Module, precision: str) -> int:
    share = {"fp32": 1.0, "int8": 0.25, "int8-static": 0.25}.get(precision, 0.5)
    return int(share * sum(tensor.numel() * tensor.element_size() for tensor in ties.unique_state(model).values()))


@torch.no_grad()
@pytest.mark.wide_unless(lambda name, fmt, precision: (name, fmt, precision) in FAST)
@pytest.mark.parametrize(("name", "fmt", "precision"), CASES)
def test_a_file_computes_what_the_model_does_and_holds_a_shared_tensor_once(tmp_path, name, fmt, precision):
    file, source = written(tmp_path, name, fmt, precision), source_of(name, precision)
    names = {file.name, *FORMATS[fmt].beside(file.name)} - {f"{file.name}.data"}  # of a large one
    assert {path.name for path in tmp_path.iterdir()} == names
    images = photograph_like(3, source.input)
    outputs = source.reference[0](images)
    expected = [outputs] if isinstance(outputs, torch.Tensor) else list(outputs)
    found = FORMATS[fmt].open(file, source)(images)
    # measured 6e-7 in fp32, 1e-3 in fp16, 1.4e-2 in bf16, 2.8e-2 in int8; of the detector, whose boxes are refined twice, 3e-5 in fp32 and
    # 0.13 in int8-static
    assert source.task.likeness(expected, found, TOLERANCES[precision]).alike
    assert not source.task.likeness([part + 1 for part in expected[:1]] + expected[1:], found, 1e-2).alike
    if fmt == "pt2":
        assert inspected(file.read_bytes())  # `evaluate` opens it
    if fmt in ("onnx", "safetensors"):
        assert file.stat().st_size <= 1.1 * unique_bytes(source.model, precision) + 200_000


@pytest.mark.wide
@pytest.mark.parametrize("name", ["shared", "lors", "swin"])
def test_onnx_adds_little_to_the_numbers_of_a_model(tmp_path, name):
    """Neither weights of layers that share them, nor what is computed of their parts, nor the stack of every operation."""
    file = written(tmp_path, name, "onnx")
    assert file.stat().st_size < unique_bytes(source_of(name).model, "fp32") + 40_000  # measured 8 to 22 kB
    assert b"site-packages" not in file.read_bytes()


@pytest.mark.wide
def test_onnx_holds_codes_and_not_the_weights_that_are_made_of_them(tmp_path, monkeypatch):
    model = timm.create_model("vit_tiny_patch16_224", img_size=SIZE, patch_size=8, depth=1, embed_dim=192, num_heads=3)
    student = compress(model.eval(), [Quantise(bits=3, metric="weights")])
    monkeypatch.setitem(MODELS, "wide", lambda: student)
    file = written(tmp_path, "wide", "onnx")
    assert file.stat().st_size < unique_bytes(student, "fp32") + 70_000  # measured 45 kB; the weights have 2.5 MB


@pytest.mark.wide
def test_onnx_has_what_a_reader_needs_to_know(tmp_path):
    file = written(tmp_path, "plain", "onnx")
    import onnx

    said = {entry.key: entry.value for entry in onnx.load(file).metadata_props}
    source = source_of("plain")
    assert said == source.metadata
    assert json.loads(said["label_names"]) == [f"class {i}" for i in range(5)]
    assert {key: json.loads(said[key]) for key in ("input_size", "mean", "std")} == {
        "input_size": [3, SIZE, SIZE],
        "mean": list(source.input.mean),
        "std": list(source.input.std),
    }
    assert (said["task"], said["interpolation"], said["source"]) == ("classification", "bicubic", "run/student")


@pytest.mark.wide
@pytest.mark.parametrize("opset", [18, 21])
def test_onnx_has_the_opset_that_was_asked_for(tmp_path, opset):
    for package in NEEDS["onnx"]:
        pytest.importorskip(package)
    source = dataclasses.replace(source_of("plain"), opset=opset)
    FORMATS["onnx"].write(source, tmp_path / "model.onnx")
    assert FORMATS["onnx"].chosen(tmp_path / "model.onnx") == {"opset": opset}
    with pytest.raises(UserError, match=r"opset='?99"):
        FORMATS["onnx"].write(dataclasses.replace(source, opset=99), tmp_path / "other.onnx")


def test_pt2_has_metadata_and_no_paths(tmp_path):
    file = written(tmp_path, "plain", "pt2", "bf16")
    content = {"compressvit.json": ""}
    torch.export.load(file, extra_files=content)
    assert json.loads(content["compressvit.json"]) == source_of("plain", "bf16").metadata
    assert b"site-packages" not in file.read_bytes()
    assert file.stat().st_size < unique_bytes(source_of("plain").model, "bf16") + 150_000  # measured 88 kB


def test_a_file_of_safetensors_is_a_whole_artifact(tmp_path):
    file, source = written(tmp_path, "shared", "safetensors", "fp16"), source_of("shared", "fp16")
    student = compressvit.load(file)
    assert {parameter.dtype for parameter in student.parameters()} == {torch.float16}
    assert ties.tied_groups(student) == ties.tied_groups(source.model)
    assert stored.class_names(student) == [f"class {i}" for i in range(5)]
    with safe_open(file, framework="pt") as opened:
        assert set(opened.keys()) == set(ties.unique_state(source.model))
    other = tmp_path / "plain.safetensors"
    from safetensors.torch import save_file

    save_file({"a": torch.zeros(2)}, other)
    with pytest.raises(UserError, match=r"has no compressvit\.json in its header"):
        compressvit.load(other)


# ------------------------------------------------------------------------------------------------------------------- refusals


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("shared", "multiplex cannot be folded"),
        ("low_rank", r"the student has [\d,]+ parameters, and with plain layers in the place of its own [\d,]+"),
        ("adapters", "adapters cannot be folded"),
        ("detector", "timm has no detector such as adamixer"),
    ],
)
def test_timm_takes_only_what_its_constructor_builds(name, words):
    source = source_of(name)
    with pytest.raises(UserError, match=rf"^to='timm': .*{words}.*; to onnx, openvino, pt2 and safetensors take it"):
        FORMATS["timm"].refuse(source)


def test_timm_refuses_narrower_blocks():
    model = compress(vit(), [Narrow(neurons=0.5)], calibration=torch.randn(64, 3, SIZE, SIZE))
    source = dataclasses.replace(source_of("plain"), model=model)
    with pytest.raises(
        UserError,
        match="each its own, which timm's constructors cannot build",
    ):
        FORMATS["timm"].refuse(source)


@torch.no_grad()
def test_timm_takes_a_low_rank_student_as_dense_layers_where_that_is_asked_for(tmp_path):
    source = dataclasses.replace(source_of("low_rank"), dense=True)
    FORMATS["timm"].refuse(source)
    FORMATS["timm"].write(source, tmp_path / "student")
    images = photograph_like(2, source.input)
    found = FORMATS["timm"].open(tmp_path / "student", source)(images)
    assert source.task.likeness([source.model(images)], found, 1e-4).alike  # measured 4e-7


@pytest.mark.parametrize(
    ("fmt", "precision", "opset", "words"),
    [
        (
            "onnx",
            "bf16",
            None,
            r"precision='bf16': ONNX is written in fp32 or fp16 or int8 or int8-static; bf16 can be had with to pt2 or ",
        ),
        ("onnx", "int4", None, r"precision='int4': ONNX is written in fp32 or fp16 or int8 or int8-static$"),
        (
            "openvino",
            "int8",
            None,
            r"OpenVINO is written in fp32 or fp16 or int8-static; int8 can be had with to onnx$",
        ),
        ("pt2", "fp32", 18, r"opset='18': opsets are of ONNX, and pt2 \(torch\.export\) has none; leave it out"),
    ],
)
def test_what_a_format_has_not_is_refused_by_name(fmt, precision, opset, words):
    with pytest.raises(UserError, match=words):
        FORMATS[fmt].require(precision, opset)


def test_an_unknown_format_gets_the_nearest():
    with pytest.raises(UserError, match=r"to='onx': there is no such format; did you mean 'onnx'\? \(known: onnx, op"):
        find_format("onx")


@pytest.mark.parametrize("fmt", NEEDS)
def test_missing_packages_are_named(monkeypatch, fmt):
    monkeypatch.setattr(type(FORMATS[fmt]), "packages", ("nowhere_at_all",))
    with pytest.raises(UserError, match=rf"needs nowhere_at_all: pip install 'compressvit\[{fmt}\]'"):
        FORMATS[fmt].require("fp32", None)


# -------------------------------------------------------------------------------------------------- the program beside a file


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
    assert predict.in_words(predict.answer({"outputs": np.ones((2, 3))}, (1, 1), {})).startswith("6 features: 1.0000")


@pytest.mark.wide
@pytest.mark.parametrize("name", ["plain", "low_rank", "detector"])
def test_the_program_answers_beside_the_file(tmp_path, name):
    """In a process that has neither torch nor compressvit."""
    file = written(tmp_path, name, "onnx")
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (50, 40, 3), np.uint8)).save(tmp_path / "image.png")
    script = tmp_path / "student_predict.py"
    blocked = "import sys, runpy; sys.modules.update(dict.fromkeys(('torch', 'timm', 'compressvit', 'onnx'))); "
    code = f"{blocked}sys.argv = ['p', '--json', {str(tmp_path / 'image.png')!r}]; runpy.run_path({str(script)!r}, run_name='__main__')"
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
    else:
        assert len(said["objects"]) == int((outputs[1] >= predict.SURE).sum())
