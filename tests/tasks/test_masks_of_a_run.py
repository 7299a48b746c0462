"""Mask R-CNN through plan, apply, evaluate and report, on pictures with masks."""

from __future__ import annotations

import json
from contextlib import nullcontext

import pytest
import torch
from helpers.runs import done, refused, run
from helpers.scenes import with_scenes

from compressvit.artifacts import artifact
from compressvit.data.input import Side
from compressvit.data.loaders import eval_loader, train_loader
from compressvit.data.opening import open_data
from compressvit.data.spec import Data
from compressvit.errors import UserError
from compressvit.model.weights import build
from compressvit.recipe.recipe import load_recipe
from compressvit.runs.job import prepare, refuse_missing_masks
from compressvit.tasks.base import find_task
from compressvit.tasks.precision import MASKS
from compressvit.training.evaluate import evaluate

ARGS = {
    "backbone": "swin_tiny_patch4_window7_224",
    "backbone_args": {"embed_dim": 8, "depths": [2, 2, 2, 2], "num_heads": [1, 1, 2, 2], "window_size": 2},
    "img_size": 32,
    "num_classes": 2,
    "channels": 8,
    "representation": 16,
    "outline": 8,
}
RECIPE = {
    "teacher": {"model": "mask_rcnn", "weights": "train", "args": ARGS, "finetune": {"epochs": 1, "lr": 2e-3}},
    "data": {"name": "coco", "batch_size": 4, "augment": {"hflip": 0.5}},
    "steps": [
        {"multiplex": {"share": 2}},
        {"distill": {"epochs": 1, "lr": 1e-3, "losses": {"prediction": {"weight": 0}, "labels": {"weight": 1.0}}}},
    ],
}


@pytest.fixture(scope="module")
def applied(tmp_path_factory):
    folder = tmp_path_factory.mktemp("masks")
    done("apply", with_scenes(folder, RECIPE, 8, 4, outlined=True), "--output", folder / "run")
    return folder


@pytest.mark.slow
def test_a_run_measures_masks(applied):
    results = json.loads((applied / "run" / "results.json").read_text())
    for who in ("teacher", "student"):
        assert 0 <= results[who]["mask_ap"] <= results[who]["mask_ap50"] <= 100
    assert results["student"]["parameters"] < results["teacher"]["parameters"]
    assert "mask_ap50_of_teacher" in results["student"]
    rows = [json.loads(line) for line in (applied / "run" / "metrics.jsonl").read_text().splitlines()]
    assert any("mask_ap" in row for row in rows)


@pytest.mark.slow
def test_its_student_is_loaded_without_the_data(applied):
    student = artifact.load(applied / "run" / "student").eval()
    (found,) = student(torch.randn(1, 3, 32, 32)).detections(5)
    assert found.masks.shape == (len(found.scores), 28, 28)


@pytest.mark.slow
def test_plan_and_evaluate_and_report_show_masks(applied, capsys):
    text = done("plan", applied / "recipe.yaml")
    assert "steps[0].multiplex" in text
    assert "heads" in text
    assert "average precision of masks" in done("evaluate", applied / "run")
    done("report", applied / "run")
    page = (applied / "run" / "report.html").read_text()
    assert "average precision of masks at IoU 0.5" in page
    assert 'class="gallery large"' in page  # the model's 32 pixels are enlarged before anything is drawn on them
    examples = json.loads((applied / "run" / "predictions.json").read_text())["examples"]
    assert all(len(example["masks"]["true"]) == 1 for example in examples)


def test_a_model_learns_from_batches_with_masks_and_is_judged_by_them(tmp_path):
    """What a run does with data and model, without the run."""
    with_scenes(tmp_path, RECIPE, 4, 4, outlined=True)
    data, task, device = (
        Data(name="coco", root=str(tmp_path / "scenes"), batch_size=4),
        find_task("detection"),
        torch.device("cpu"),
    )
    datasets, side = open_data(data), Side.of(build("mask_rcnn", ARGS), data)
    ((images, targets),) = train_loader(datasets, data, side.input, device)
    loss = task.loss(side.model.train()(images), targets)
    loss.backward()
    assert side.model.heads.mask_predictor.mask_fcn_logits.weight.grad.abs().sum() > 0
    side.model.eval()
    batches = list(eval_loader(datasets, data, side.input, device))
    result = evaluate(side, batches, device, teacher=side)
    assert {"mask_ap", "teacher_mask_ap", "mask_ap50_of_teacher"} < result.keys()
    assert result["mask_ap"] is not None
    others = Side.of(build("faster_rcnn", {k: v for k, v in ARGS.items() if k != "outline"}), data)
    assert not others.input.masks
    side.model.eval()
    result = evaluate(others, eval_loader(datasets, data, others.input, device), device, teacher=side)
    assert {key for key in result if "mask" in key} <= {f"teacher_{key}" for key in MASKS}


def test_data_without_masks_is_refused(tmp_path):
    text = "the teacher is a mask_rcnn, which learns masks, and no object to train on has a segmentation"
    assert text in refused("apply", with_scenes(tmp_path, RECIPE, 2, 2), "--output", tmp_path / "run")
    assert not (tmp_path / "run").exists()
    code, out, _ = run("plan", tmp_path / "recipe.yaml")
    assert (code, text in out) == (2, True)


@pytest.mark.parametrize(("weight", "refused"), [(0, False), (1.0, True)])
def test_data_without_masks_is_enough_for_what_learns_from_the_teacher_alone(tmp_path, weight, refused):
    losses = {"prediction": {"weight": 1.0}, "labels": {"weight": weight}}
    teacher = {"model": "mask_rcnn", "weights": "random", "args": ARGS}
    recipe = RECIPE | {"teacher": teacher, "steps": [{"distill": {"epochs": 1, "losses": losses}}]}
    job = prepare(load_recipe(with_scenes(tmp_path, recipe, 2, 2)), "cpu")
    with pytest.raises(UserError, match="the student is a mask_rcnn, which learns") if refused else nullcontext():
        refuse_missing_masks(job)
