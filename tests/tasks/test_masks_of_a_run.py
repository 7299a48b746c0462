"""Mask R-CNN through plan, apply, evaluate and report, on pictures with masks."""

from __future__ import annotations

import json
from contextlib import nullcontext

import pytest
import torch
import yaml
from helpers.runs import done, refused, run
from PIL import Image, ImageDraw

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


def scenes(root, split: str, count: int, segmented=True) -> None:
    """Dark pictures with a red or green ellipse each, and its outline as a diamond."""
    (root / split).mkdir(parents=True)
    images, annotations = [], []
    for number in range(1, count + 1):
        picture, kind, x, y = Image.new("RGB", (48, 32)), number % 2, 2 * number, number
        ImageDraw.Draw(picture).ellipse((x, y, x + 20, y + 16), fill=((255, 0, 0), (0, 255, 0))[kind])
        picture.save(root / split / f"{number}.png")
        images.append({"id": number, "file_name": f"{number}.png", "width": 48, "height": 32})
        diamond = [x + 10, y, x + 20, y + 8, x + 10, y + 16, x, y + 8]
        entry = {"id": number, "image_id": number, "category_id": kind + 1, "bbox": [x, y, 20, 16], "iscrowd": 0}
        annotations.append({**entry, **({"segmentation": [diamond]} if segmented else {})})
    kinds = [{"id": 1, "name": "red"}, {"id": 2, "name": "green"}]
    content = {"images": images, "annotations": annotations, "categories": kinds}
    (root / f"{split}.json").write_text(json.dumps(content))


def written(folder, **parts):
    recipe = {**RECIPE, "data": {**RECIPE["data"], "root": str(folder / "scenes")}, **parts}
    (folder / "recipe.yaml").write_text(yaml.safe_dump(recipe, sort_keys=False))
    return folder / "recipe.yaml"


@pytest.fixture(scope="module")
def applied(tmp_path_factory):
    folder = tmp_path_factory.mktemp("masks")
    scenes(folder / "scenes", "train", 8)
    scenes(folder / "scenes", "val", 4)
    done("apply", written(folder), "--output", folder / "run")
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
    assert 'class="gallery"' in page  # of pictures that are no larger than the model's 32 pixels
    examples = json.loads((applied / "run" / "predictions.json").read_text())["examples"]
    assert all(len(example["masks"]["true"]) == 1 for example in examples)


def test_a_model_learns_from_batches_with_masks_and_is_judged_by_them(tmp_path):
    """What a run does with data and model, without the run."""
    for split in ("train", "val"):
        scenes(tmp_path / "scenes", split, 4)
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
    for split in ("train", "val"):
        scenes(tmp_path / "scenes", split, 2, segmented=False)
    text = "the teacher is a mask_rcnn, which learns masks, and no object to train on has a segmentation"
    assert text in refused("apply", written(tmp_path), "--output", tmp_path / "run")
    assert not (tmp_path / "run").exists()
    code, out, _ = run("plan", tmp_path / "recipe.yaml")
    assert (code, text in out) == (2, True)


@pytest.mark.parametrize(("weight", "refused"), [(0, False), (1.0, True)])
def test_data_without_masks_is_enough_for_what_learns_from_the_teacher_alone(tmp_path, weight, refused):
    for split in ("train", "val"):
        scenes(tmp_path / "scenes", split, 2, segmented=False)
    losses = {"prediction": {"weight": 1.0}, "labels": {"weight": weight}}
    teacher = {"model": "mask_rcnn", "weights": "random", "args": ARGS}
    recipe = written(tmp_path, teacher=teacher, steps=[{"distill": {"epochs": 1, "losses": losses}}])
    job = prepare(load_recipe(recipe), "cpu")
    with pytest.raises(UserError, match="the student is a mask_rcnn, which learns") if refused else nullcontext():
        refuse_missing_masks(job)
