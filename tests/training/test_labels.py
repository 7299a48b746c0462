"""Runs without a classifier or without labels, and heads whose size the labels must fit."""

from __future__ import annotations

import json

import numpy as np
import pytest
import timm
import torch
from helpers.runs import done, metrics, refused
from helpers.training import VIT, fit, random_batches, tiny_vit
from PIL import Image

from compressvit.artifacts import artifact
from compressvit.model import ties
from compressvit.training.phases.finetune import Finetune
from compressvit.training.terms import Term

# --- backbones without a classifier, and images without labels


@pytest.fixture(scope="module")
def unlabeled(tmp_path_factory):
    """Overrides for a headless backbone on a folder of images, and where the run goes."""
    root = tmp_path_factory.mktemp("unlabeled")
    generator = np.random.default_rng(0)
    (root / "images").mkdir()
    for i in range(40):
        ramp = np.add.outer(np.arange(8) * generator.integers(0, 30), np.arange(8) * generator.integers(0, 30))
        Image.fromarray((ramp % 256).astype(np.uint8)).save(root / "images" / f"{i:02}.png")
    torch.manual_seed(0)
    backbone = timm.create_model("vit_tiny_patch16_224", **VIT, num_classes=0, global_pool="avg")
    with torch.no_grad():  # fresh blocks do next to nothing, so that sharing them would cost nothing
        for parameter in backbone.parameters():
            parameter.add_(0.3 * torch.randn_like(parameter))
    artifact.save(backbone, root / "backbone")
    return [
        f"teacher.weights={root / 'backbone'}",
        "teacher.finetune=null",
        "teacher.num_classes=0",
        "teacher.args.global_pool=avg",
        f"data={{name: images, root: {root / 'images'}, batch_size: 8, val_fraction: 0.2}}",
    ]


FEATURES = (
    "steps.1.distill={epochs: 8, lr: 3e-3, log_every: 1, losses: {prediction: {weight: 0}, feature: {weight: 1}}}"
)


def test_a_headless_backbone_is_distilled_by_its_features(recipe, unlabeled, tmp_path):
    out = done(
        "apply", "--no-report", recipe, "--output", tmp_path / "run", *unlabeled, FEATURES, "steps.1.distill.mixup=0.1"
    )
    assert "cosine of the outputs" in out
    before = metrics(tmp_path / "run", phase="0_multiplex", kind="evaluate")[0]
    after = metrics(tmp_path / "run", phase="1_distill", kind="evaluate")[-1]
    assert before["images"] == after["images"] == 8
    assert before["cosine"] < after["cosine"] <= 1
    assert 1 - after["cosine"] < 0.7 * (1 - before["cosine"])
    lines = metrics(tmp_path / "run", phase="1_distill")
    assert lines[0]["feature"] > lines[-2]["feature"]
    assert not any("top1" in line or "teacher_top1" in line or "agreement" in line for line in lines)
    student = json.loads((tmp_path / "run" / "results.json").read_text())["student"]
    assert student["top1"] is None
    assert student["cosine"] == pytest.approx(after["cosine"], abs=1e-5)


def test_features_have_no_accuracy(tmp_path):
    # a label could be read as an index into them
    model = tiny_vit(num_classes=0)
    term = Term("square", 1.0, lambda batch: (batch.student_logits.square().mean(), {}))
    heard = fit(model, Finetune(epochs=1, log_every=1), random_batches(1, 4), tmp_path, terms=[term])
    assert heard.of("train")[0].keys() >= {"square", "lr"}
    assert not {"top1", "top5"} & heard.of("train")[0].keys()


def test_the_prediction_of_a_headless_backbone_is_refused(recipe, unlabeled, tmp_path):
    message = refused("apply", recipe, "--output", tmp_path / "run", *unlabeled, "steps.1=distill")
    for words in ("losses.prediction", "no classifier", "losses.prediction.weight=0", "losses.feature.weight=1"):
        assert words in message
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("step", "name"),
    [
        ("steps.1=finetune", "steps[1].finetune"),
        ("steps.1.distill.losses={labels: {weight: 1}}", "steps[1].distill"),
    ],
)
def test_learning_from_labels_that_are_not_there_is_refused(recipe, unlabeled, tmp_path, step, name):
    with_head = [o for o in unlabeled if "num_classes" not in o and "finetune" not in o]
    overrides = [*with_head, "teacher.finetune=null", "teacher.num_classes=4", step]
    message = refused("apply", recipe, "--output", tmp_path / "run", *overrides)
    for words in (name, "labels", "none"):
        assert words in message
    assert not (tmp_path / "run").exists()


def test_a_teacher_cannot_be_trained_without_labels(recipe, unlabeled, tmp_path):
    data = next(o for o in unlabeled if o.startswith("data="))
    message = refused("apply", recipe, "--output", tmp_path / "run", data, "teacher.num_classes=4")
    assert "teacher.finetune" in message
    assert "labels" in message
    assert not (tmp_path / "run").exists()


# --- labels and classes


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        (["teacher.num_classes=5"], ["10 classes", "teacher's head", "only 5", "leave teacher.num_classes out"]),
        (
            ["student.args={num_classes: 3}", "student.weights=random", "steps=[finetune]"],
            ["10 classes", "student's head", "only 3", "student.args.num_classes"],
        ),
    ],
)
def test_labels_beyond_the_head_are_refused_before_anything_is_trained(recipe, tmp_path, overrides, words):
    message = refused("apply", recipe, "--output", tmp_path / "run", *overrides)
    for word in words:
        assert word in message
    assert not (tmp_path / "run").exists()


@pytest.fixture(scope="module")
def three_classes(tmp_path_factory):
    """A folder data set whose number of classes only its folders tell."""
    root = tmp_path_factory.mktemp("classes")
    generator = np.random.default_rng(0)
    for split, count in (("train", 8), ("val", 2)):
        for label in ("ant", "bee", "cat"):
            (root / split / label).mkdir(parents=True)
            for i in range(count):
                pixels = generator.integers(0, 256, (8, 8), dtype=np.uint8)
                Image.fromarray(pixels).save(root / split / label / f"{i}.png")
    return f"data={{name: folder, root: {root}, batch_size: 8}}"


def test_a_head_is_sized_by_the_opened_data_and_the_figures_follow(recipe, three_classes, tmp_path):
    folder = tmp_path / "run"
    done("apply", "--no-report", recipe, "--output", folder, three_classes, "steps.1.distill.epochs=1")
    plan, results = (json.loads((folder / name).read_text()) for name in ("plan.json", "results.json"))
    for side in ("teacher", "student"):
        model = artifact.load(folder / side)
        assert model.num_classes == 3
        assert results[side]["parameters"] == plan[side]["parameters"] == ties.count_parameters(model)
