"""On which images `keep: best` chooses, on which a run reports, and that both are said."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest
from helpers.images import class_folders, jpeg
from helpers.runs import TINY, done, run

from compressvit.data.opening import open_data
from compressvit.data.spec import Data
from compressvit.recipe.recipe import parse_recipe
from compressvit.runs.deciding import set_aside

DIGITS = "name: digits, batch_size: 32, limit_train: 64, limit_val: 32"
BEST = TINY.replace("- distill: {epochs: 1}", "- distill: {epochs: 2, keep: best}").replace(
    "in_chans: 1", "in_chans: 3"
)


def recipe_on(folder, data, text=BEST):
    file = folder / "recipe.yaml"
    file.write_text(text.replace(DIGITS, data))
    return file


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """A run on 24 images of each of two classes, of which the images of the test are as many as no other part has."""
    root = class_folders(tmp_path_factory.mktemp("images"), splits=(".",), each=24)
    own = tmp_path_factory.mktemp("evidence")
    recipe = recipe_on(own, f"name: folder, root: {root}, batch_size: 16, val_fraction: 0.2, test_fraction: 0.3")
    folder = own / "run"
    return (
        Data(name="folder", root=str(root), val_fraction=0.2, test_fraction=0.3),
        folder,
        done("apply", recipe, "--output", folder),
    )


def test_figures_at_the_end_are_of_the_test(finished):
    data, folder, out = finished
    datasets = open_data(data)
    sizes = [len(part) for part in (datasets.train, datasets.validation, datasets.test)]
    assert len({*sizes}) == 3
    results = json.loads((folder / "results.json").read_text())
    assert (results["reported_on"], results["student"]["images"], results["teacher"]["images"]) == (
        "test",
        *[sizes[2]] * 2,
    )
    assert json.loads((folder / "predictions.json").read_text())["images"] == sizes[2]
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    assert {row["images"] for row in rows if row["kind"] == "evaluate"} == {sizes[1]}
    assert results["phases"]["1_distill"]["start"]["images"] == sizes[1]
    plan = json.loads((folder / "plan.json").read_text())["data"]
    assert [plan[part] for part in ("train", "validation", "test")] == sizes
    assert f"data: {sizes[0]} images to train on, {sizes[1]} held out for validation, {sizes[2]} for the test" in out


def test_which_images_are_which_is_said(finished):
    data, folder, out = finished
    held_out = len(open_data(data).validation)
    of_test = len(open_data(data).test)
    said = (
        f"the figures at the end are of {of_test} images of the test, on which nothing is chosen; keep: best (steps[1].distill) chooses on "
        f"{held_out} images held out for validation"
    )
    assert said in out
    assert said in (folder / "results.json").read_text()
    page = " ".join((folder / "report.html").read_text().split())
    assert said in page
    assert f"{of_test} test images" in page
    assert f"test ({of_test} images)" in done("compare", folder)


def test_evaluate_takes_the_test_too(finished):
    data, folder, _ = finished
    found = json.loads(done("evaluate", folder, "--json"))
    assert (found["reported_on"], found["images"]) == ("test", len(open_data(data).test))
    ours = json.loads((folder / "results.json").read_text())["student"]
    assert found["top1"] == ours["top1"]
    other = json.loads(done("evaluate", folder, "--json", "data.test_fraction=null"))
    assert (other["reported_on"], other["images"]) == ("validation", len(open_data(data).validation))


def test_that_the_same_images_choose_and_report_is_said():
    datasets = open_data(Data(name="digits", limit_val=32))
    for text, words in ((BEST, ["chosen_on_evidence"]), (TINY, [])):
        found = set_aside(datasets, parse_recipe(text))
        assert [note.what for note in found.found] == words
        assert set_aside(found, parse_recipe(text)) is found
    assert (
        set_aside(datasets, parse_recipe(BEST))
        .found[0]
        .text.startswith(
            "keep: best (steps[1].distill) chooses on 32 images held out, and the figures at the end are of the same, which makes them"
        )
    )


def test_where_there_is_a_test_all_of_the_validation_decides():
    datasets = open_data(Data(name="digits", limit_val=100))
    datasets = replace(datasets, test=datasets.validation.part(range(10)))
    recipe = parse_recipe(
        "teacher: {model: vit_tiny_patch16_224}\ndata: {name: digits}\nsteps: [{shrink: {keep: {cosine: 0.9}}}]"
    )
    found = set_aside(datasets, recipe)
    assert found.deciding is found.validation is datasets.validation
    assert found.evidence().validation is datasets.test
    assert [note.text for note in found.found] == [
        "100 images held out for validation decide how small the student becomes",
        "the figures at the end are of 10 images of the test, on which nothing is chosen",
    ]


@pytest.mark.parametrize(
    ("classes", "data", "code", "words"),
    [
        (
            3,
            "val_fraction: 0.2",
            2,
            "the data has 3 classes, and the teacher's head has only 2; leave teacher.num_classes out",
        ),
        (2, "val_fraction: 0.2", 0, "recipe.yaml: valid"),
        (3, "val_fraction: 0.2, num_classes: 2", 0, "recipe.yaml: valid"),
    ],
)
def test_validate_and_plan_look_at_class_folders(tmp_path, classes, data, code, words):
    root = tmp_path / "images"
    for kind in range(classes):
        (root / f"c{kind}").mkdir(parents=True)
        for i in range(3):
            (root / f"c{kind}" / f"{i}.jpg").write_bytes(jpeg(i))
    (root / "empty").mkdir()
    text = TINY.replace("weights: train", "weights: random").replace("  finetune: {epochs: 1}\n", "  num_classes: 2\n")
    recipe = recipe_on(tmp_path, f"name: folder, root: {root}, {data}", text)
    found, out, err = run("validate", recipe)
    assert (found, words in out + err) == (code, True), out + err
    if code:
        found, out, _ = run("plan", recipe)
        assert (found, "the data has 3 classes, and the teacher's head has only 2" in out) == (2, True), out


def test_validate_knows_the_head_of_a_pretrained_model(tmp_path):
    class_folders(tmp_path / "images", splits=("train", "val"))
    text = TINY.replace("weights: train", "weights: pretrained").replace("  finetune: {epochs: 1}\n", "")
    recipe = recipe_on(tmp_path, f"name: folder, root: {tmp_path / 'images'}", text)
    assert "valid; the data has 2 classes and the teacher's head 1000: accuracy is meaningless" in done(
        "validate", recipe
    )
    recipe = recipe_on(tmp_path, f"name: folder, root: {tmp_path / 'gone'}", text)
    assert done("validate", recipe).endswith(f"recipe.yaml: valid; data.root: there is no {tmp_path / 'gone'}")
