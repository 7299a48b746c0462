"""A trained teacher keeps its own mean, deviation and crop, wherever its values come from; a student's may differ, and the plan says so."""

from __future__ import annotations

import io
import json

import pytest
import torch
from helpers.runs import TINY as SHORTEST
from helpers.runs import done, refused
from timm.models import save_for_hf

from compressvit.artifacts import artifact
from compressvit.programs.opened import open_models
from compressvit.recipe.recipe import parse_recipe
from compressvit.runs.job import prepare
from compressvit.runs.plan import plan_recipe
from compressvit.runs.tables import print_plan
from compressvit.terminal import Terminal

TINY = SHORTEST.replace("num_heads: 2}", "num_heads: 2, weight_init: jax}")  # which learns in a few steps
OWN = {"mean": (0.3,), "std": (0.4,), "crop_pct": 0.75}


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A run whose teacher and student were trained with other statistics than timm's, and its teacher as timm writes it."""
    folder = tmp_path_factory.mktemp("statistics")
    (folder / "recipe.yaml").write_text(TINY.replace("multiplex: {share: 2}", "low_rank: {rank: 4}"))
    run = folder / "run"
    done(
        "apply",
        "--no-report",
        folder / "recipe.yaml",
        "--output",
        run,
        "data.mean=[0.3]",
        "data.std=[0.4]",
        "data.crop_pct=0.75",
        "teacher.finetune.epochs=5",
    )
    save_for_hf(artifact.load(run / "teacher"), str(folder / "timm"), safe_serialization=True)
    return folder


def top1(*words):
    return json.loads(done("evaluate", *words, "--json"))["top1"]


PLACES = ["run/teacher", "timm", "timm/model.safetensors"]


def recipe_of(weights, *overrides):
    text = TINY.replace("weights: train", f"weights: {weights}").replace("  finetune: {epochs: 1}\n", "")
    return parse_recipe(text, "recipe", list(overrides))


@pytest.mark.wide_unless(lambda place, asked: asked or place == PLACES[0])
@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("asked", [[], ["data.mean=[0.1]", "data.std=[0.9]", "data.interpolation=nearest"]])
def test_a_trained_teacher_keeps_its_own(trained, place, asked):
    recipe = recipe_of(trained / place, *asked)
    job = prepare(recipe, "cpu")
    assert {name: getattr(job.teacher.input, name) for name in OWN} == OWN
    assert job.teacher.input.interpolation == "bicubic"
    assert job.student.input.mean == ((0.1,) if asked else OWN["mean"])
    assert job.student.input.crop_pct == OWN["crop_pct"]
    notes = " ".join(plan_recipe(recipe).notes)
    assert ("data.mean is the student's: 0.1. The teacher keeps its own, 0.3" in notes) == bool(asked)
    assert "data.mean" not in " ".join(plan_recipe(recipe_of(trained / place, "data.mean=[0.3]")).notes)


def test_every_statistic_of_a_trained_teacher_is_its_own():
    """Timm's, where timm has trained it."""
    text = TINY.replace("weights: train", "weights: pretrained, num_classes: 1000").replace(
        "  finetune: {epochs: 1}\n", ""
    )
    text = text.replace("pretrained, num_classes: 1000", "pretrained\n  num_classes: 1000")
    own = [
        "data.mean=[0.1]",
        "data.std=[0.9]",
        "data.interpolation=nearest",
        "data.crop_pct=0.3",
        "data.crop_mode=squash",
    ]
    plain, asked = (prepare(parse_recipe(text, "recipe", more), "cpu") for more in ([], own))
    assert asked.teacher.input == plain.teacher.input
    assert asked.student.input.as_dict() == {
        "input_size": [1, 8, 8],
        "mean": [0.1],
        "std": [0.9],
        "interpolation": "nearest",
        "crop_pct": 0.3,
        "crop_mode": "squash",
    }
    from_nothing = prepare(parse_recipe(TINY, "recipe", own), "cpu")
    assert from_nothing.teacher.input == asked.student.input
    assert plain.student.input.crop_pct == 1.0  # digits fill their frame
    other = prepare(
        parse_recipe(text.replace("name: digits", "name: images, root: x"), "recipe"), "cpu", without_data=True
    )
    assert other.student.input.crop_pct == 0.9


@pytest.mark.wide_unless(lambda place: place == "timm")  # an artifact keeps more
@pytest.mark.parametrize("place", PLACES)
def test_its_accuracy_is_the_same_wherever_it_comes_from(trained, place, tmp_path):
    expected = json.loads((trained / "run/results.json").read_text())["teacher"]["top1"]
    (tmp_path / "recipe.yaml").write_text(
        TINY.replace("weights: train", f"weights: {trained / place}").replace("  finetune: {epochs: 1}\n", "")
    )
    done("apply", tmp_path / "recipe.yaml", "--output", tmp_path / "run", "data.mean=[0.9]", "data.std=[0.2]")
    found = json.loads((tmp_path / "run/results.json").read_text())["teacher"]["top1"]
    assert found == expected
    assert expected > 30  # measured 53; with the statistics of the data it is another model's


def test_an_artifact_is_evaluated_with_its_own(trained):
    run = trained / "run"
    expected = json.loads((run / "results.json").read_text())
    assert top1(run / "teacher") == expected["teacher"]["top1"]
    assert top1(run) == expected["student"]["top1"]
    alone = [run / "teacher", "data.name=digits", "data.limit_val=32"]
    assert top1(*alone) == expected["teacher"]["top1"]
    assert top1(*alone, "data.mean=[0.3]", "data.std=[0.4]") == expected["teacher"]["top1"]
    assert top1(*alone, "data.mean=[-3]", "data.std=[0.1]") != expected["teacher"]["top1"]  # as it was asked for


@pytest.mark.wide
def test_the_programs_look_at_a_model_with_its_own(trained, tmp_path):
    """Also at one that was trained with other statistics than the run whose data is looked at."""
    (tmp_path / "recipe.yaml").write_text(TINY)
    done(
        "apply",
        "--no-report",
        tmp_path / "recipe.yaml",
        "--output",
        tmp_path / "other",
        "data.mean=[0.9]",
        "steps.1.distill.max_steps=1",
    )
    opened = open_models([str(tmp_path / "other"), str(trained / "run/teacher")], torch.device("cpu"))
    assert [model.input.mean for model in opened.models] == [(0.9,), OWN["mean"]]
    assert opened.models[1].input.crop_pct == OWN["crop_pct"]
    opened = open_models([str(trained / "run"), "data.std=[0.1]"], torch.device("cpu"))
    assert [model.input.std for model in opened.models] == [(0.1,), (0.1,)]


@pytest.mark.parametrize(
    ("asked", "lines"),
    [
        ([], ["images: 8×8, crop 1, bicubic, mean 0.5, std 0.5"]),
        (
            ["teacher.weights=x", "data.mean=[0.123456]", "data.crop_pct=0.875", "data.crop_mode=squash"],
            ["images: 8×8, crop 0.875 (squash), bicubic, mean 0.1235, std 0.5"],
        ),
        (
            ["student.args={img_size: 16}", "student.weights=random"],
            [
                "images of the teacher: 8×8, crop 1, bicubic, mean 0.5, std 0.5",
                "images of the student: 16×16, crop 1, bicubic, mean 0.5, std 0.5",
            ],
        ),
    ],
)
def test_a_plan_prints_what_images_are_made_into(asked, lines):
    shown = io.StringIO()
    print_plan(plan_recipe(parse_recipe(TINY, "recipe", asked)), Terminal(file=shown, width=80))
    assert [line.rstrip() for line in shown.getvalue().splitlines() if line.startswith("images")] == lines


def test_a_teacher_that_is_trained_from_nothing_takes_those_of_the_data():
    job = prepare(parse_recipe(TINY, "recipe", ["data.mean=[0.3]"]), "cpu")
    assert job.teacher.input.mean == job.student.input.mean == (0.3,)


def test_a_bare_file_takes_those_of_the_data(trained, tmp_path):
    """Nothing else says how it was trained."""
    (tmp_path / "weights.safetensors").write_bytes((trained / "timm/model.safetensors").read_bytes())
    job = prepare(recipe_of(tmp_path / "weights.safetensors", "data.mean=[0.3]", "teacher.num_classes=10"), "cpu")
    assert job.teacher.input.mean == (0.3,)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("{", "config.json cannot be read"),
        ('{"model_type": "bert"}', "does not say which model"),
        (
            '{"architecture": "swin_tiny_patch4_window7_224"}',
            "is a swin_tiny_patch4_window7_224, and teacher.model says",
        ),
    ],
)
def test_a_damaged_or_foreign_description(trained, tmp_path, content, message):
    folder = tmp_path / "model"
    folder.mkdir()
    (folder / "model.safetensors").write_bytes((trained / "timm/model.safetensors").read_bytes())
    (folder / "config.json").write_text(content)
    (tmp_path / "recipe.yaml").write_text(
        TINY.replace("weights: train", f"weights: {folder}").replace("  finetune: {epochs: 1}\n", "")
    )
    assert message in refused("plan", tmp_path / "recipe.yaml")
