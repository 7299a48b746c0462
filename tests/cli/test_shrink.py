"""`compressvit shrink`: from a model and a folder of images to a student and its page, and one sentence for what cannot be done."""

from __future__ import annotations

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
from helpers.runs import done, refused, run
from helpers.training import tiny_vit
from PIL import Image
from rich.console import Console
from safetensors.torch import load_file, save_file
from timm.models import _registry, model_entrypoint

import compressvit
from compressvit.cli import main
from compressvit.cli.shrink import UNITS
from compressvit.data.sets.folder import class_folders as class_folders_of
from compressvit.data.spec import Data
from compressvit.recipe.recipe import parse_recipe
from compressvit.recipe.yaml import dumped
from compressvit.runs import shrink as verb
from compressvit.runs.files import read_results
from compressvit.runs.keep import OnHeldOut
from compressvit.runs.plan import plan_recipe
from compressvit.transforms.shrink import spec
from compressvit.transforms.shrink.spec import ShrinkBudget

CLASSES = tuple("abcd")


@pytest.fixture(autouse=True)
def _in_this_process(monkeypatch):
    """Images are read here, where they are a few."""
    built = verb.shrink_recipe

    def without_workers(*words, **options):
        recipe = built(*words, **options)
        recipe["data"]["num_workers"] = 0
        return recipe

    monkeypatch.setattr(verb, "shrink_recipe", without_workers)


@pytest.fixture(scope="module")
def photos(tmp_path_factory):
    folder = tmp_path_factory.mktemp("photos")
    for i in range(20):
        (folder / f"{chr(97 + i)}.jpg").write_bytes(jpeg(i))
    return folder


@pytest.fixture(scope="module")
def labelled(tmp_path_factory):
    return class_folders(tmp_path_factory.mktemp("labelled"), classes=CLASSES, each=3)


@pytest.fixture(scope="module")
def headless(tmp_path_factory):
    """A weights file without a classifier, of two blocks of timm's smallest ViT, for images of 32×32 pixels."""
    whole = model_entrypoint("test_vit")

    def shallow(pretrained=False, **args):
        return whole(pretrained, **{"depth": 2, **args})

    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(_registry._model_entrypoints, "test_vit", shallow)
        yield _written(tmp_path_factory.mktemp("weights") / "backbone.safetensors")


def _written(file):
    torch.manual_seed(0)
    save_file(timm.create_model("test_vit", img_size=32, num_classes=0).state_dict(), file)
    return file


@pytest.fixture(scope="module")
def classifier(tmp_path_factory):
    """An artifact of a model with as many classes as `labelled`."""
    return compressvit.save(tiny_vit(num_classes=len(CLASSES)), tmp_path_factory.mktemp("artifact") / "teacher")


def plain(i):
    buffer = io.BytesIO()
    Image.new("RGB", (40, 30), (20 * i, 255 - 20 * i, 7 * i)).save(buffer, "PNG")
    return buffer.getvalue()


def file_of(headless):
    return (headless, "--model", "test_vit", "--img-size", 32)


def share(results, unit):
    return getattr(results.student, unit) / getattr(results.teacher, unit)


# --- done


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
    assert share(read_results(tmp_path / "run"), "macs") <= 0.9


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
        (labelled / "train", "images", "not in train/ and val/ with a folder per class"),
        (photos, "images", "not in train/ and val/"),
    ):
        recipe = verb.shrink_recipe(classifier, images)
        assert (recipe["data"]["name"], words in recipe["description"]) == (name, True), recipe["description"]


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
        ({"model": "vit_tiny_patch16_224", "weights": __file__}, "test_shrink"),
    ):
        assert str(verb.default_output({"teacher": teacher})) == f"runs/shrink_{name}"


def test_limits_and_their_units():
    assert verb.limits(["0.5"]) == {"parameters": 0.5}
    assert verb.limits(["2e6"], "macs") == {"macs": 2e6}
    assert verb.limits(["parameters=0.5", "macs=0.25"]) == {"parameters": 0.5, "macs": 0.25}
    assert verb.limits(["bytes=1000", "0.5"], "macs") == {"bytes": 1000, "macs": 0.5}
    assert set(UNITS) == ShrinkBudget.model_fields.keys()


# --- refused


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (["{file}", "{photos}"], ["does not say which model", "--model NAME"]),
        (["{file}", "{photos}", "--model", "test_vot"], ["no model 'test_vot'", "'test_vit'"]),
        (["{file}", "{photos}", "--model", "resnet18"], ["resnet18 is a ResNet"]),
        (["resnet18", "{photos}"], ["resnet18 is a ResNet"]),
        (["convnextv2_atto", "{photos}"], ["has no block that can be made narrower", "low_rank works on it"]),
        (["test_vit", "{photos}", "--model", "test_vit2"], ["--model test_vit2", "test_vit is a pretrained model"]),
        (["{artifact}", "{photos}", "--model", "test_vit"], ["is a vit_tiny_patch16_224", "leave --model out"]),
        (["test_vot", "{photos}"], ["no file or folder test_vot", "did you mean 'test_vit'"]),
        (["test_vit.nope", "{photos}"], ["no pretrained weights 'test_vit.nope'", "r160_in1k"]),
        (["nowhere.pth", "{photos}"], ["no file or folder nowhere.pth"]),
        (["timm/test_vit", "{photos}"], ["no file or folder timm/test_vit", "is written test_vit"]),
        (["{photos}", "{photos}"], ["a folder without a model", "compressvit.json"]),
        (["{artifact}/model.safetensors", "{photos}"], ["part of an artifact; give its folder"]),
        (["{artifact}", "nowhere"], ["no folder nowhere"]),
        (["{artifact}", "{file}"], ["is a file; give a folder"]),
        (["{artifact}", "{empty}"], ["no images in"]),
        (["{artifact}", "{photos}", "--to", "0"], ["--to parameters=0: a limit is above 0"]),
        (["{artifact}", "{photos}", "--to", "-2"], ["--to parameters=-2: a limit is above 0"]),
        (["{artifact}", "{photos}", "--to", "nan"], ["--to parameters=nan: a limit is above 0"]),
        (["{artifact}", "{photos}", "--to", "1"], ["--to parameters=1 is no smaller than the teacher", "parameters;"]),
        (["{artifact}", "{photos}", "--to", "0.5", "macs=1e12"], ["--to macs=1e+12 is no smaller", "MACs"]),
        (["{artifact}", "{photos}", "--to", "latency=1"], ["--to latency=1 is no faster than the teacher"]),
        (["{artifact}", "{photos}", "--to", "0.5", "--batch", "4"], ["--batch 4 is for latency"]),
        (["{artifact}", "{photos}", "--to", "0.01"], ["parameters (the smallest that", "cannot be met"]),
        (["{artifact}", "{photos}", "--to", "latency=0.001"], ["ms latency (the smallest that", "measured on cpu"]),
        (["{artifact}", "{photos}", "--keep", "cosine"], ["--keep cosine: give NAME=NUMBER"]),
        (
            ["{artifact}", "{photos}", "--keep", "cosin=0.9"],
            ["--keep cosin: nothing is called", "did you mean 'cosine'"],
        ),
        (["{artifact}", "{photos}", "--keep", "cosine=2"], ["--keep: ShrinkKeep: cosine", "less than 1"]),
        (["{artifact}", "{photos}", "--keep", "cosine=0.9", "cosine=0.8"], ["two limits of cosine"]),
        (["{artifact}", "{photos}", "--keep", "cosine=0.9", "--to", "0.5"], ["--to and --keep both say"]),
        (["{artifact}", "{photos}", "--keep", "cosine=0.9", "--batch", "2"], ["--batch 2 is for latency"]),
        (
            ["{artifact}", "{photos}", "--keep", "top1_drop=1"],
            ["shrink.keep.top1_drop", "have no labels", "cosine: 0.98"],
        ),
        (["{artifact}", "{labelled}", "--keep", "worst_domain_drop=1"], ["several domains", "val/CLASS/DOMAIN"]),
        (
            ["{file}", "{photos}", "--model", "test_vit", "--img-size", "32", "--keep", "worst_class_drop=1"],
            ["shrink.keep.worst_class_drop", "the model has no classifier"],
        ),
        (["{artifact}", "{photos}", "--to", "parameters=0.5", "0.4"], ["two limits of parameters"]),
        (["{artifact}", "{photos}", "--to", "half"], ["'half' is not a number"]),
        (["{artifact}", "{photos}", "--to", "mac=0.5"], ["no unit 'mac'", "'macs'"]),
        (["{artifact}", "{photos}", "--to", "macs=0.5", "--unit", "macs"], ["leave --unit out"]),
    ],
)
def test_one_sentence_for_what_cannot_be_done(words, expected, headless, classifier, photos, labelled, tmp_path):
    (tmp_path / "empty").mkdir()
    places = {"file": headless, "photos": photos, "artifact": classifier, "empty": tmp_path / "empty"}
    places["labelled"] = labelled
    code, _, err = run("shrink", *(word.format(**places) for word in words), "--output", tmp_path / "run")
    assert code == 2
    assert err.count("compressvit: ") == 1
    for word in expected:
        assert word in err
    assert not (tmp_path / "run").exists()


def _damaged(headless, folder, path, value):
    state = load_file(headless)
    state[path].flatten()[:2] = value
    save_file(state, folder / "damaged.safetensors")
    return folder / "damaged.safetensors"


@pytest.mark.parametrize(
    ("path", "value", "expected"),
    [
        (
            "blocks.1.mlp.fc2.weight",
            float("nan"),
            "blocks.1.mlp.fc2.weight holds numbers that are not finite; check the teacher's weights",
        ),
        ("norm.bias", float("inf"), "norm.bias holds numbers that are not finite; check the teacher's weights"),
        ("blocks.0.norm1.weight", 1e38, "blocks.0.attn.qkv sees numbers that are not finite on the calibration images"),
    ],
)
def test_numbers_that_are_not_finite_are_told_by_their_layer(path, value, expected, headless, photos, tmp_path):
    file = _damaged(headless, tmp_path, path, value)
    words = ["--model", "test_vit", "--img-size", 32, "--output", tmp_path / "run"]
    code, _, err = run("shrink", file, photos, *words)
    assert code == 2
    assert expected in err
    assert "Traceback" not in err


@pytest.mark.parametrize(
    ("pictures", "expected"),
    [
        ({i: jpeg(1) for i in range(12)}, "calibration images are alike, and a fit to it would hold for no other"),
        ({i: plain(i) for i in range(12)}, "calibration images have one colour each"),
        ({i: jpeg(i) for i in range(2)}, "there is only one calibration image"),
    ],
    ids=["copies", "plain colours", "two"],
)
def test_images_that_cannot_be_fitted_to(pictures, expected, headless, tmp_path):
    (tmp_path / "images").mkdir()
    for name, content in pictures.items():
        (tmp_path / "images" / f"{name}.png").write_bytes(content)
    words = ["--model", "test_vit", "--img-size", 32, "--output", tmp_path / "run"]
    code, _, err = run("shrink", headless, tmp_path / "images", *words)
    assert code == 2
    assert expected in err
    assert "Traceback" not in err


@pytest.mark.parametrize(("size", "told"), [(40, True), (56, False)])
def test_small_images_are_told_and_one_size_is_not(size, told, headless, tmp_path):
    for i in range(6):
        Image.new("RGB", (size, size - 10), (40 * i, 0, 0)).save(tmp_path / f"{i}.png")
    recipe = verb.shrink_recipe(headless, tmp_path, model="test_vit", img_size=112)
    notes = {note.what: note.text for note in plan_recipe(parse_recipe(dumped(recipe))).data.notes}
    assert ("small" in notes) is told
    if told:
        assert (
            "less than half as large as the model's 112×112 pixels, the largest 40×30: they are enlarged"
            in notes["small"]
        )


@pytest.mark.parametrize("words", [["--images", "0"], ["--img-size", "-3"], ["--images", "x"]])
def test_numbers_are_whole_and_above_0(words, classifier, photos):
    code, _, err = run("shrink", classifier, photos, *words)
    assert code == 2
    assert f"argument {words[0]}: '{words[1]}' is not a whole number above 0" in err


def test_weights_that_timm_cannot_get_may_be_given_as_a_file(photos, monkeypatch, tmp_path):
    def offline(config):
        raise OSError("no network")

    monkeypatch.setattr("compressvit.model.weights._require_reachable", offline)
    message = run("shrink", "test_vit", photos, "--img-size", 32, "--to", 0.7, "--output", tmp_path / "run")[2]
    assert "could not be downloaded" in message
    assert f"compressvit shrink PATH {photos} --model test_vit" in message
    assert not (tmp_path / "run").exists()


def test_a_student_is_not_shrunk_again(classifier, photos, tmp_path):
    student = compressvit.compress(compressvit.load(classifier), [compressvit.Multiplex(share=2)])
    compressvit.save(student, tmp_path / "run" / "student")
    assert "result of multiplex" in refused("shrink", tmp_path / "run" / "student", photos)
    assert f"did you mean {tmp_path / 'run' / 'student'}?" in refused("shrink", tmp_path / "run", photos)
