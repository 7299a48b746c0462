"""`compressvit shrink`: one sentence for what cannot be done."""

from __future__ import annotations

import pytest
from helpers.images import jpeg
from helpers.runs import refused, run
from helpers.shrink import plain
from PIL import Image
from safetensors.torch import load_file, save_file

import compressvit
from compressvit.recipe.recipe import parse_recipe
from compressvit.recipe.yaml import dumped
from compressvit.runs import shrink as verb
from compressvit.runs.plan import plan_recipe


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
        (["{artifact}", "{photos}", "--args", "depth"], ["--args depth: give KEY=VALUE"]),
        (["{artifact}", "{photos}", "--args", "=3"], ["--args =3: give KEY=VALUE"]),
        (["{artifact}", "{photos}", "--args", "patch_siz=4"], ["patch_siz=4", "did you mean 'patch_size'?"]),
        (
            ["{artifact}", "{photos}", "--img-size", "8", "--args", "img_size=8"],
            ["--img-size 8 and --args both give img_size"],
        ),
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


@pytest.mark.wide_unless(lambda keep, images: keep == "worst_class_drop" or (keep, images) == ("top1_drop", "labelled"))
@pytest.mark.parametrize(
    ("keep", "images", "expected"),
    [
        ("top1_drop", "photos", "the images of data 'images' have no labels; give keep: {cosine: 0.98}"),
        ("worst_class_drop", "nowhere", "the images of data 'images' have no labels; give keep: {cosine: 0.98}"),
        ("worst_domain_drop", "labelled", "worst_domain_drop needs images of several domains"),
        ("top1_drop", "labelled", None),
    ],
)
def test_a_plan_refuses_what_cannot_be_kept(keep, images, expected, classifier, photos, labelled, tmp_path):
    places = {"photos": photos, "nowhere": tmp_path / "nowhere", "labelled": labelled}
    recipe = verb.shrink_recipe(classifier, photos if images == "nowhere" else places[images])
    recipe["data"]["root"] = str(places[images])
    recipe["steps"] = [{"shrink": {"keep": {keep: 1.0}}}]
    (tmp_path / "recipe.yaml").write_text(dumped(recipe))
    code, out, _ = run("plan", tmp_path / "recipe.yaml")
    assert code == (0 if expected is None else 2)
    assert out.count("conflict:") == (expected is not None)
    if expected is None:
        return
    assert expected in out
    told = run("apply", tmp_path / "recipe.yaml", "--output", tmp_path / "run")[2]
    assert images == "nowhere" or expected in told
    assert not (tmp_path / "run").exists()


def _damaged(headless, folder, path, value):
    state = load_file(headless)
    state[path].flatten()[:2] = value
    save_file(state, folder / "damaged.safetensors")
    return folder / "damaged.safetensors"


@pytest.mark.wide_unless(lambda path: path == "blocks.0.norm1.weight")
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


@pytest.mark.wide_unless(lambda pictures: len(pictures) == 2)
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
