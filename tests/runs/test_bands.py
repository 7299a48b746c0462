"""A run on images of five bands, from class folders of arrays and TIFFs to a file for other programs; and what is refused of them."""

from __future__ import annotations

import importlib.util
import json
import subprocess
import sys

import numpy as np
import pytest
import timm
import torch
import yaml
from helpers.bands import CLASSES, band_folders, bands, npy, of_class
from helpers.images import picture
from helpers.runs import done, refused, run

import compressvit
from compressvit.model import stored

ARGS = {"img_size": 16, "patch_size": 4, "embed_dim": 24, "depth": 2, "num_heads": 2, "in_chans": 5}
MEAN, STD = [0.1, 0.15, 0.3, 0.35, 0.4], [0.1, 0.15, 0.2, 0.25, 0.3]
TIFFS = importlib.util.find_spec("tifffile") is not None


@pytest.fixture(scope="module")
def recipe(tmp_path_factory):
    """A recipe, and beside it its images, of which two cannot be read."""
    folder = tmp_path_factory.mktemp("bands")
    root = band_folders(folder / "set", tiffs=TIFFS)
    (root / "val" / "water" / "damaged.npy").write_bytes(npy(of_class(2, 0))[:-1])
    (root / "val" / "field" / "four.npy").write_bytes(npy(bands(4)))
    content = {
        "teacher": {
            "model": "vit_tiny_patch16_224",
            "args": ARGS,
            "weights": "train",
            "finetune": {"epochs": 6, "lr": 2e-3, "warmup_epochs": 0},
        },
        "data": {
            "name": "folder",
            "root": str(root),
            "arrays": True,
            "batch_size": 12,
            "mean": MEAN,
            "std": STD,
            "augment": {"hflip": 0.5, "translate": 1, "scale": [0.7, 1.0], "random_erasing": 0.1},
        },
        "steps": [{"low_rank": {"budget": {"parameters": 0.6}}}, {"distill": {"epochs": 2, "lr": 1e-3}}],
    }
    (folder / "recipe.yaml").write_text(yaml.safe_dump(content))
    return folder / "recipe.yaml"


@pytest.fixture(scope="module")
def ended(recipe):
    done("apply", recipe, "--output", recipe.parent / "run")
    return recipe.parent / "run"


def test_a_student_of_five_bands_is_made_and_judged(ended):
    results = json.loads((ended / "results.json").read_text())
    for who in ("teacher", "student"):
        assert results[who]["top1"] > 90  # measured 100; by chance 33, and so from the first three bands
        assert results[who]["images"] == 24
    assert results["broken_images"] == 2
    notes = {row["what"]: row["count"] for row in results["data_notes"]}
    assert notes["sixteen_bits"] == (18 if TIFFS else 36)
    assert notes.get("float") == (18 if TIFFS else None)
    log = (ended / "run.log").read_text()
    assert "four.npy: it has 4 channels, and the model takes 5" in log
    assert "damaged.npy: it is truncated" in log


def test_the_artifact_keeps_its_channels_and_statistics(ended):
    manifest = stored.read_manifest(ended / "student")
    assert manifest.input["input_size"] == [5, 16, 16]
    assert (manifest.input["mean"], manifest.input["std"]) == (MEAN, STD)
    student = compressvit.load(ended / "student")
    assert student(torch.randn(2, 5, 16, 16)).shape == (2, 3)


def test_evaluate_reads_the_bands_again(ended):
    expected = json.loads((ended / "results.json").read_text())["student"]
    found = json.loads(done("evaluate", ended, "--json"))
    assert found["top1"] == expected["top1"]
    assert found["broken_images"] == 2
    shifted = json.loads(done("evaluate", ended, "--json", "data.mean=[0.4,0.3,0.2,0.1,0]", "data.std=[0.5]"))
    assert abs(shifted["loss"] - found["loss"]) > 0.01
    words = "data.mean=[0.1, 0.2, 0.3] is of 3 channels, and the model takes 5; give a number for each of these"
    assert words in refused("evaluate", ended, "data.mean=[0.1,0.2,0.3]")


def test_the_report_says_which_bands_it_shows(ended):
    done("report", ended)
    assert "Channels drawn: the first 3 of 5, as red, green and blue." in (ended / "report.html").read_text()


@pytest.mark.parametrize("asked", [True, False])
def test_the_plan_says_what_stands_for_statistics(recipe, asked):
    own = [] if asked else ["data.mean=null", "data.std=null"]
    plan = done("plan", recipe, *own)
    assert "data: 48 images to train on, 26 held out" in plan
    assert ("mean 0.1 0.15 0.3 0.35 0.4, std 0.1 0.15 0.2 0.25 0.3" in plan) == asked
    note = "the model has no statistics of its 5 channels: each has the mean of those of 3, mean 0.5 and std 0.5"
    assert (note in plan) != asked


@pytest.mark.wide
def test_the_program_beside_an_exported_file_reads_arrays(ended):
    for package in ("onnx", "onnxscript", "onnxruntime"):
        pytest.importorskip(package)
    done("export", ended, "--to", "onnx")
    file = ended / "exported" / "student.onnx"
    found, expected = (json.loads(done("evaluate", path, "--json")) for path in (file, ended))
    assert found["loss"] == pytest.approx(expected["loss"], abs=1e-5)  # measured 3e-8
    for label, name in enumerate(CLASSES):
        np.save(ended.parent / f"{name}.npy", of_class(label, 12345))
    picture(0).save(ended.parent / "picture.png")
    blocked = "import sys, runpy; sys.modules.update(dict.fromkeys(('torch', 'timm', 'compressvit', 'tifffile'))); "
    script = f"runpy.run_path({str(ended / 'exported' / 'student_predict.py')!r}, run_name='__main__')"

    def asked(*images):
        words = ["p", "--json", *(str(ended.parent / image) for image in images)]
        code = f"{blocked}sys.argv = {words!r}; {script}"
        return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)

    said = asked(*(f"{name}.npy" for name in CLASSES))
    assert said.returncode == 0, said.stderr
    assert [json.loads(line)["classes"][0]["class"] for line in said.stdout.splitlines()] == [*CLASSES]
    other = asked("picture.png")
    assert other.returncode == 2
    assert "picture.png: it has 3 channels, and the model takes 5; bands are read from an array" in other.stderr


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (
            ["teacher.args.in_chans=3", "data.mean=[0.5]", "data.std=[0.5]"],
            "its images have 5 channels, and the student, vit_tiny_patch16_224, takes 3; give images of 3, or a model of",
        ),
        (["data.mean=[0.1,0.2,0.3]"], "data.mean=[0.1, 0.2, 0.3] is of 3 channels, and the model takes 5"),
        (["data.std=[0.1,0.2,0.3,0.4]"], "data.std=[0.1, 0.2, 0.3, 0.4] is of 4 channels, and the model takes 5"),
        (
            ["data.augment.color_jitter=0.4"],
            "data.augment.color_jitter=0.4: its operations do not take bands that are no colours, and the model has 5",
        ),
        (["data.augment.auto_augment=rand-m9"], "data.augment.auto_augment=rand-m9: its operations do not take bands"),
        (
            [
                "student={model: vit_tiny_patch16_224, args: {img_size: 16, in_chans: 4}}",
                "data.mean=[0.5]",
                "data.std=[0.5]",
            ],
            "one model takes images of 5 channels and the other of 4; 1, 3 and 4 are converted into one another",
        ),
    ],
)
def test_what_does_not_fit_is_refused_before_training(recipe, tmp_path, words, message):
    assert message in refused("apply", recipe, "--output", tmp_path / "run", *words)
    assert not (tmp_path / "run").exists()
    code, out, err = run("plan", recipe, *words)
    assert code == 2
    assert message in out + err


def test_a_set_in_memory_does_not_fit_a_model_of_bands(recipe, tmp_path):
    words = ["data={name: digits}", "teacher.args.num_classes=10"]
    message = refused("apply", recipe, "--output", tmp_path / "run", *words)
    assert "data.name=digits: its images have 1 channel, and the student, vit_tiny_patch16_224, takes 5" in message


def test_the_plan_counts_images_of_other_channels(recipe, tmp_path):
    root = band_folders(tmp_path / "set", tiffs=False, train=4, val=1)
    (root / "train" / "water" / "0.npy").write_bytes(npy(bands(2)))
    plan = done("plan", recipe, f"data.root={root}")
    assert "1 of 12 images that were looked at have 2 channels, and the model takes 5: such images are passed" in plan


def test_shrink_takes_arrays_and_a_file_of_three_channels(recipe, tmp_path):
    """timm's weights of three channels go into a model of five, as its own `pretrained` does."""
    three = timm.create_model("vit_tiny_patch16_224", **{**ARGS, "in_chans": 3}, num_classes=0)
    torch.save(three.state_dict(), tmp_path / "three.pt")
    root = band_folders(tmp_path / "set", tiffs=False, train=8, val=4)
    args = [f"{name}={value}" for name, value in ARGS.items() if name != "img_size"]
    model = ["--model", "vit_tiny_patch16_224", "--img-size", 16, "--args", *args]
    said = done("shrink", tmp_path / "three.pt", root, *model, "--to", "parameters=0.6", "--output", tmp_path / "run")
    assert "repeated in turn to 5, and scaled by 3/5" in said
    assert compressvit.load(tmp_path / "run" / "student").patch_embed.proj.weight.shape[1] == 5


@pytest.mark.parametrize("channels", [2, 5, 13])
def test_distill_takes_batches_of_any_channels(tmp_path, channels):
    torch.manual_seed(0)
    teacher = timm.create_model("vit_tiny_patch16_224", **{**ARGS, "in_chans": channels}, num_classes=3)
    batches = [(torch.randn(4, channels, 16, 16), torch.randint(0, 3, (4,))) for _ in range(2)]
    student = compressvit.compress(
        teacher, [compressvit.LowRank(rank=4)], calibration=[images for images, _ in batches]
    )
    made = compressvit.distill(
        student, teacher, batches, validation=batches, epochs=1, device="cpu", output=tmp_path / "out"
    )
    assert made.figures["images"] == 8
    again = compressvit.load(tmp_path / "out" / "student")
    assert torch.equal(again(batches[0][0]), made.student(batches[0][0]))
    other = timm.create_model("vit_tiny_patch16_224", **{**ARGS, "in_chans": 3}, num_classes=3)
    with pytest.raises(
        compressvit.UserError, match=f"of {channels} channels and the other of 3;.*teacher_input=FUNCTION"
    ):
        compressvit.distill(student, other, batches, epochs=1, device="cpu")
    half = {"teacher_input": lambda images: images[:, [0, 1, 0]]}
    compressvit.distill(student, other, batches, epochs=1, device="cpu", losses={"prediction": {}}, **half)
