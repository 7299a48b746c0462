"""`compressvit shrink`: from a model and a folder of images to a student and its page."""

from __future__ import annotations

import argparse
import contextlib
import io
import json
import shutil

import pytest
import timm
import torch
import yaml
from helpers.images import class_folders, jpeg
from helpers.latency import table_of
from helpers.runs import done, refused
from helpers.shrink import CLASSES, file_of
from rich.console import Console
from safetensors.torch import load_file, save_file

import compressvit
from compressvit.cli import main
from compressvit.cli.shrink import UNITS
from compressvit.data.opening import open_data
from compressvit.data.sets.folder import class_folders as class_folders_of
from compressvit.data.spec import Data
from compressvit.errors import UserError
from compressvit.runs import shrink as verb
from compressvit.runs.files import read_results
from compressvit.runs.keep import OnHeldOut
from compressvit.runs.shrink_words import arguments_of, limits
from compressvit.transforms.shrink import spec
from compressvit.transforms.shrink.spec import ShrinkBudget


def share(results, unit):
    return getattr(results.student, unit) / getattr(results.teacher, unit)


def test_a_checkpoint_of_timms_training_says_what_it_is_of(headless, photos, tmp_path):
    content = {"arch": "test_vit", "state_dict": load_file(headless), "args": argparse.Namespace(lr=0.1)}
    torch.save(content, tmp_path / "model_best.pth.tar")
    recipe = verb.shrink_recipe(tmp_path / "model_best.pth.tar", photos, img_size=32)
    assert recipe["teacher"]["model"] == "test_vit"
    torch.save({**content, "arch": "no_model_of_timms"}, tmp_path / "other.pth.tar")
    with pytest.raises(UserError, match="does not say which model it is of"):
        verb.shrink_recipe(tmp_path / "other.pth.tar", photos, img_size=32)


def test_a_checkpoint_may_be_of_a_model_built_with_arguments(headless, photos, labelled, tmp_path):
    model = timm.create_model("test_vit", img_size=48, patch_size=8, num_classes=4, depth=3)
    save_file(model.state_dict(), tmp_path / "tuned.safetensors")
    words = ["patch_size=8", "depth=3", "img_size=[48, 48]"]
    given = {"patch_size": 8, "depth": 3, "img_size": [48, 48]}
    assert arguments_of(words) == given
    for more, classes, what in (({}, 4, "accuracy"), ({"num_classes": 0}, 0, "k-NN accuracy")):
        recipe = verb.shrink_recipe(tmp_path / "tuned.safetensors", labelled, model="test_vit", args={**given, **more})
        assert recipe["teacher"]["args"] == given
        assert recipe["teacher"]["num_classes"] == classes
        assert f"; {what} by the labels of 4 class folders" in recipe["description"]
    file = ("shrink", tmp_path / "tuned.safetensors", photos, "--model", "test_vit", "--output", tmp_path / "run")
    assert "given as --args patch_size=8 …" in refused(*file, "--args", "patch_size=8")  # and two blocks


@pytest.mark.wide
def test_bits_are_chosen_together_with_what_is_removed(headless, photos, tmp_path):
    source, *options = file_of(headless)
    words = ("shrink", source, photos, *options, "--images", 12, "--no-report", "--quantise")
    done(*words, "--to", "bytes=0.2", "--output", tmp_path / "run")
    results = read_results(tmp_path / "run")
    limit = int(0.2 * results.teacher.bytes)
    shrink, quantise = yaml.safe_load((tmp_path / "run" / "recipe.yaml").read_text())["steps"]
    assert shrink == {"shrink": {"budget": {"bytes": 0.2}, "rounded": True}}
    assert quantise == {"quantise": {"budget": {"bytes": limit}}}
    assert 0.9 * limit < results.student.bytes <= limit
    done(*words, "--to", "macs=0.7", "--output", tmp_path / "other")
    steps = yaml.safe_load((tmp_path / "other" / "recipe.yaml").read_text())["steps"]
    assert steps == [{"shrink": {"budget": {"macs": 0.7}}}, {"quantise": {"bits": 4}}]
    assert "before they are rounded" in refused(*words, "--keep", "cosine=0.9", "--output", tmp_path / "third")


def test_a_headless_checkpoint_and_photos_become_a_student_and_its_page(headless, photos, tmp_path):
    folder = tmp_path / "run"
    source, *options = file_of(headless)
    out = done("shrink", source, photos, *options, "--images", 12, "--output", folder)
    recipe = yaml.safe_load((folder / "recipe.yaml").read_text())
    assert " ".join((folder / "recipe.yaml").read_text().split()) in out
    assert recipe["teacher"] == {
        "model": "test_vit",
        "weights": str(headless),
        "args": {"img_size": 32},
        "num_classes": 0,
    }
    assert recipe["data"]["name"] == "images"
    assert recipe["calibration"] == {"images": 12, "tokens": 48}
    assert recipe["steps"] == [{"shrink": {"budget": {"parameters": 0.5}}}]
    assert "no labels: the images are not in train/ and val/ with a folder per class" in recipe["description"]
    results = read_results(folder)
    assert 0.4 < share(results, "parameters") <= 0.5
    assert results.student.top1 is None
    assert results.student.cosine is not None
    assert (folder / "report.html").is_file()
    assert f'compressvit.load("{folder / "student"}") in Python; compressvit evaluate {folder}' in out
    assert compressvit.load(folder / "student")(torch.zeros(1, 3, 32, 32)).shape == (1, 64)


def test_labels_are_used_where_they_fit_the_classifier_and_all_limits_hold(classifier, labelled, tmp_path):
    folder = tmp_path / "run"
    limits = ["parameters=0.8", "macs=0.7"]
    words = [
        "shrink",
        classifier,
        labelled,
        "--to",
        *limits,
        "--images",
        8,
        "--no-report",
        "--json",
        "--output",
        folder,
    ]
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        assert main([str(word) for word in words]) == 0
    content = json.loads(out.getvalue())  # nothing else is printed there
    assert "name: folder" in err.getvalue()
    assert content["run"] == str(folder)
    assert content["artifact"] == str(folder / "student")
    assert content["report"] is None
    assert not (folder / "report.html").exists()
    assert content["student"] == json.loads((folder / "results.json").read_text())["student"]
    assert "ledger" not in content
    assert content["student"]["images"] == 12
    assert content["student"]["top1"] is not None
    results = read_results(folder)
    assert share(results, "parameters") <= 0.8
    assert share(results, "macs") <= 0.7


@pytest.mark.wide
def test_latency_is_a_limit_like_others_and_is_measured_once(classifier, photos, tmp_path, monkeypatch):
    asked = []

    def measure(model, found, *, batch, **options):
        asked.append(batch)
        return table_of(model, found, batch=batch)

    monkeypatch.setattr(spec, "measure", measure)
    words = [
        "--to",
        "macs=0.9",
        "latency=0.7",
        "--batch",
        "2",
        "--images",
        8,
        "--no-report",
        "--output",
        tmp_path / "run",
    ]
    done("shrink", classifier, photos, *words)
    (step,) = yaml.safe_load((tmp_path / "run" / "recipe.yaml").read_text())["steps"]
    assert step == {"shrink": {"budget": {"macs": 0.9, "latency": 0.7}, "batch": 2}}
    (stored,) = json.loads((tmp_path / "run" / "student" / "compressvit.json").read_text())["transforms"]
    latency = stored["plan"]["latency"]
    assert asked == [latency["table"]["batch"]] == [2]
    assert latency["predicted"] <= 0.7
    assert (
        f"latency: {latency['predicted']:.2f} of the teacher's predicted" in (tmp_path / "run" / "run.log").read_text()
    )
    assert len(latency["measured"]) == 3
    (sizes,) = read_results(tmp_path / "run").sizes
    assert (sizes.asked, sizes.unit, sizes.where.endswith("batch 2, float32")) == ("latency ≤ 0.70", "latency", True)
    (row,) = [row for row in sizes.tried if row.chosen]
    assert (row.size, row.figures) == (latency["predicted"], {"latency": latency["measured"][1]})
    assert share(read_results(tmp_path / "run"), "macs") <= 0.9


@pytest.mark.wide
def test_the_smallest_student_that_keeps_something_also_after_an_interruption(
    classifier, labelled, tmp_path, monkeypatch
):
    folder, asked, figures = tmp_path / "run", [], OnHeldOut.figures

    def stopped(judge, student, wanted):
        asked.append(wanted)
        if len(asked) == 3:
            raise compressvit.UserError("no power")
        return figures(judge, student, wanted)

    monkeypatch.setattr(OnHeldOut, "figures", stopped)
    words = ["--keep", "top1_drop=30", "cosine=0.5", "--unit", "macs", "--images", 8, "--no-report", "--output", folder]
    assert "no power" in refused("shrink", classifier, labelled, *words)
    done("shrink", classifier, labelled, *words, "--resume")
    assert asked == [["cosine", "top1_drop"]] * 7  # six, of which one was tried twice
    recipe = yaml.safe_load((folder / "recipe.yaml").read_text())
    assert recipe["steps"] == [{"shrink": {"keep": {"cosine": 0.5, "top1_drop": 30.0}, "unit": "macs"}}]
    assert "as few MACs as keep cosine ≥ 0.5 and top1_drop ≤ 30" in recipe["description"]
    (stored,) = json.loads((folder / "student" / "compressvit.json").read_text())["transforms"]
    kept = stored["plan"]["kept"]
    results = read_results(folder)
    assert results.student.macs == min(trial["spent"] for trial in kept["trials"] if trial["kept"])
    (sizes,) = results.sizes
    assert (sizes.step, sizes.unit, sizes.where) == ("shrink", "macs", kept["images"])
    assert [(row.size, row.spent, row.figures, row.kept) for row in sizes.tried] == [
        (trial["size"], trial["spent"], trial["figures"], trial["kept"]) for trial in kept["trials"]
    ]
    assert [row.spent for row in sizes.tried if row.chosen] == [results.student.macs]
    # with so few, those that decide are the evidence, too
    assert kept["images"] == "12 images held out"
    assert results.student.cosine >= 0.5
    assert results.teacher.top1 - results.student.top1 <= 30
    notes = [note["text"] for note in json.loads((folder / "plan.json").read_text())["data"]["notes"]]
    assert any("12 images of 12 photographs held out decide how small" in text for text in notes)
    assert "size 1 of 6: " in (folder / "run.log").read_text()


def test_labels_of_other_classes_are_not_used(classifier, labelled, photos, tmp_path):
    few = class_folders(tmp_path / "few", classes=("x", "y"), each=1)
    for images, name, words in (
        (labelled, "folder", "accuracy by the labels of 4 class folders"),
        (few, "images", "there are 2 class folders, and the model has 4 classes"),
        (
            labelled / "train",
            "images",
            "the 4 folders of the images are not taken for classes, which are folders in train/",
        ),
        (photos, "images", "not in train/ and val/"),
    ):
        recipe = verb.shrink_recipe(classifier, images)
        assert (recipe["data"]["name"], words in recipe["description"]) == (name, True), recipe["description"]


def test_folders_are_classes_on_request(classifier, headless, labelled, photos):
    for source, options, what in (
        (classifier, {}, "accuracy by the labels of 4 class folders"),
        (headless, {"model": "test_vit", "img_size": 32}, "k-NN accuracy by the labels of 4 class folders"),
    ):
        recipe = verb.shrink_recipe(source, labelled / "train", val_fraction=0.3, **options)
        assert what in recipe["description"]
        assert recipe["data"] | {"name": "folder", "val_fraction": 0.3} == recipe["data"]
        found = open_data(Data(**recipe["data"]))
        assert (len(found.train) + len(found.validation), found.num_classes) == (12, 4)
    source, *options = file_of(headless)
    for images, model, fraction, words in (
        (
            photos,
            [source, *options],
            0.1,
            "--val-fraction 0.1 takes the folders directly in IMAGES for classes, and there are 0",
        ),
        (labelled, [source, *options], 0.1, "has a val/ already"),
        (labelled / "train", [source, *options], 0.9, "val_fraction"),
    ):
        assert words in refused("shrink", model[0], images, *model[1:], "--val-fraction", fraction)
    (few := labelled.parent / "few").mkdir()
    for name in "ab":
        shutil.copytree(labelled / "train" / name, few / name)
    with pytest.raises(compressvit.UserError, match="there are 2, where the model has 4 classes; leave it out"):
        verb.shrink_recipe(classifier, few, val_fraction=0.1)


@pytest.mark.wide
def test_labels_of_a_backbone_are_those_of_its_neighbours(headless, labelled, tmp_path):
    folder = tmp_path / "run"
    source, *options = file_of(headless)
    out = done("shrink", source, labelled, *options, "--images", 8, "--output", folder)
    recipe = yaml.safe_load((folder / "recipe.yaml").read_text())
    assert recipe["data"]["name"] == "folder"
    assert recipe["data"]["limit_val"] > 0
    assert "k-NN accuracy by the labels of 4 class folders" in recipe["description"]
    results = read_results(folder)
    searched = "the class of 12 held-out images, by votes of the nearest of 12 training images (k-NN)"
    for side in (results.teacher, results.student):
        low, high = side.intervals["knn"]
        assert low < side.knn < high
    assert results.student.recall_10 is not None
    assert searched in out
    assert searched in (folder / "report.html").read_text()
    content = json.loads(done("evaluate", folder, "--json"))
    assert (content["knn"], content["indexed"]) == (pytest.approx(results.student.knn), 12)
    assert searched in done("evaluate", folder)


def test_class_folders_that_differ_are_not_used_by_a_backbone(headless, tmp_path):
    class_folders(tmp_path, splits=("train",), classes=("x", "y"), each=1)
    class_folders(tmp_path, splits=("val",), classes=("x", "z"), each=1)
    recipe = verb.shrink_recipe(headless, tmp_path, model="test_vit", img_size=32)
    assert recipe["data"]["name"] == "images"
    assert (
        "labels are not used: val/ has 2 class folders, not all of them among the 2 of train/" in recipe["description"]
    )


@pytest.mark.parametrize("prefix", ["", "module."])
def test_the_classifier_of_a_file_says_how_many_classes_the_model_has(prefix, headless, labelled, tmp_path):
    """Also behind a prefix. `headless` keeps the model small."""
    model = timm.create_model("test_vit", img_size=32, num_classes=4)
    save_file({f"{prefix}{name}": value for name, value in model.state_dict().items()}, tmp_path / "four.safetensors")
    recipe = verb.shrink_recipe(tmp_path / "four.safetensors", labelled, model="test_vit", img_size=32)
    assert recipe["teacher"]["num_classes"] == 4
    assert recipe["data"]["name"] == "folder"


def test_a_file_is_not_taken_for_a_word_of_recipes(headless, photos, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    shutil.copy(headless, "pretrained")
    with pytest.raises(compressvit.UserError, match="not a file of plain tensors"):  # without the ending of safetensors
        verb.shrink_recipe("pretrained", photos, model="test_vit", img_size=32)
    torch.save(timm.create_model("test_vit", img_size=32, num_classes=0).state_dict(), "pretrained")
    recipe = verb.shrink_recipe("pretrained", photos, model="test_vit", img_size=32)
    assert recipe["teacher"]["weights"] == "./pretrained"


@pytest.mark.parametrize("packed", ["classes", "splits"])
def test_class_folders_may_be_tars(packed, labelled, tmp_path):
    for split in ("train", "val"):
        for source in sorted((labelled / split).iterdir()) if packed == "classes" else [labelled / split]:
            target = tmp_path / source.relative_to(labelled)
            target.parent.mkdir(exist_ok=True)
            shutil.make_archive(str(target), "tar", source)
    assert class_folders_of(Data(name="folder", root=str(tmp_path))) == (set(CLASSES), set(CLASSES))
    (tmp_path / "val").mkdir(exist_ok=True)
    (tmp_path / "val" / "1.jpg").write_bytes(jpeg(1))
    assert class_folders_of(Data(name="folder", root=str(tmp_path))) is None


@pytest.mark.wide
def test_from_python_a_finished_run_is_read_from_its_folder(classifier, photos, tmp_path):
    quiet = Console(quiet=True)
    first = compressvit.shrink(classifier, photos, {"macs": 0.6}, tmp_path / "run", calibration=8, console=quiet)
    assert share(first.results, "macs") <= 0.6
    again = compressvit.shrink(
        classifier, photos, {"macs": 0.6}, tmp_path / "run", calibration=8, console=quiet, resume=True
    )
    images = torch.randn(2, 1, 8, 8)
    with torch.inference_mode():
        assert torch.equal(again.student(images), first.student(images))


def test_the_run_folder_is_called_after_the_model_or_the_file():
    for teacher, name in (
        ({"model": "vit_tiny_patch16_224.augreg_in21k", "weights": "pretrained"}, "vit_tiny_patch16_224.augreg_in21k"),
        ({"model": "vit_tiny_patch16_224", "weights": __file__}, "test_done_vit_tiny_patch16_224"),
    ):
        assert str(verb.default_output({"teacher": teacher})) == f"runs/shrink_{name}"


def test_limits_and_their_units():
    assert limits(["0.5"]) == {"parameters": 0.5}
    assert limits(["2e6"], "macs") == {"macs": 2e6}
    assert limits(["parameters=0.5", "macs=0.25"]) == {"parameters": 0.5, "macs": 0.25}
    assert limits(["bytes=1000", "0.5"], "macs") == {"bytes": 1000, "macs": 0.5}
    assert set(UNITS) == ShrinkBudget.model_fields.keys()
