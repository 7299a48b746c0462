"""A segmenter through plan, apply, evaluate, merge, report and compare, on pictures with masks of classes."""

from __future__ import annotations

import json
import os
import signal

import pytest
import torch
import yaml
from helpers.masked_scenes import with_masks
from helpers.runs import done, metrics, refused, run, student_bytes
from PIL import Image
from rich.console import Console

import compressvit
from compressvit.artifacts import artifact
from compressvit.errors import UserError
from compressvit.model.weights import build
from compressvit.recipe.recipe import load_recipe
from compressvit.recipe.shipped import shipped_recipes
from compressvit.training import step
from compressvit.transforms.record import compression_of

INSIDE = {"embed_dim": 16, "depth": 2, "num_heads": 2, "patch_size": 8}
RECIPE = {
    "teacher": {
        "model": "segmenter",
        "weights": "train",
        "args": {"backbone": "vit_tiny_patch16_224", "backbone_args": INSIDE, "img_size": 32},
        "finetune": {"epochs": 12, "lr": 2e-2, "keep": "best", "evaluate_every": 4},
    },
    "data": {"name": "segmentation", "num_classes": 3, "batch_size": 8, "augment": {"hflip": 0.5, "scale": [0.5, 1.0]}},
    "steps": [
        {"repadapter": {"width": 8, "scale": 1.0}},
        {"distill": {"epochs": 2, "lr": 1e-2, "losses": {"labels": {"weight": 1.0}, "feature": {"weight": 0.1}}}},
    ],
}


@pytest.fixture(scope="module")
def applied(tmp_path_factory):
    folder = tmp_path_factory.mktemp("segmentation")
    done("apply", with_masks(folder, RECIPE, 16, 6), "--output", folder / "run")
    return folder


def results(folder):
    return json.loads((folder / "run" / "results.json").read_text())


def test_a_run_measures_mean_iou_with_its_interval(applied):
    found = results(applied)
    for who in ("teacher", "student"):
        low, high = found[who]["intervals"]["miou"]
        assert 0 <= low <= found[who]["miou"] <= high <= 100
    low, behind, high = found["student"]["differences"]["miou"]
    assert behind == pytest.approx(found["teacher"]["miou"] - found["student"]["miou"])
    assert low <= behind <= high
    assert 0 < found["student"]["pixel_agreement"] <= 100


def test_the_best_epoch_is_that_of_most_miou(applied):
    rows = [row["miou"] for row in metrics(applied / "run") if row.get("phase") == "teacher" and "miou" in row]
    assert len(rows) == 3
    assert results(applied)["teacher"]["miou"] == pytest.approx(max(rows))


def test_parts_of_the_loss_are_logged(applied):
    rows = [row for row in metrics(applied / "run") if "prediction_pixels" in row]
    assert rows
    assert all(row["labels"] > 0 and row["feature"] >= 0 for row in rows)


def test_it_is_evaluated_as_at_the_end_of_its_run(applied):
    out = done("evaluate", applied / "run")
    low, high = results(applied)["student"]["intervals"]["miou"]
    assert f"mean intersection over union │ {results(applied)['student']['miou']:.2f} % ({low:.1f}–{high:.1f})" in out
    assert "in brackets 95 % intervals over the 6 held-out images" in out
    assert "shares of images" not in out


def test_its_student_is_loaded_without_the_data(applied):
    student = compressvit.load(applied / "run" / "student")
    assert student(torch.randn(2, 3, 32, 32)).shape == (2, 3, 32, 32)


def test_it_is_merged_to_plain_layers(applied):
    out = done("merge", applied / "run", "--output", applied / "merged")
    assert "model alone" in out
    student, merged = artifact.load(applied / "run" / "student"), artifact.load(applied / "merged")
    assert not compression_of(merged).plans
    images = torch.randn(2, 3, 32, 32)
    difference = (merged(images) - student(images)).abs().max() / student(images).abs().max()
    assert difference < 1e-5  # measured 2.6e-7


def test_the_report_shows_masks(applied):
    done("report", applied / "run")
    page = (applied / "run" / "report.html").read_text()
    assert "mean intersection over union" in page
    assert "IoU by class" in page
    assert "what is annotated, what the teacher says, and what the student says" in page
    examples = json.loads((applied / "run" / "predictions.json").read_text())["examples"]
    assert all(list(example["masks"]) == ["true", "teacher", "student"] for example in examples)
    with Image.open(applied / "run" / examples[0]["file"]) as drawn:
        assert drawn.size == (322, 322)  # four parts of the model's 32 pixels, five times as large


def test_plan_and_compare_know_it(applied):
    assert "backbone, stage 0" in done("plan", applied / "recipe.yaml")
    out = done("compare", applied / "run", applied / "run")
    assert "mIoU" in out


def test_a_run_that_stopped_goes_on_to_the_same_student(applied, tmp_path):
    """Stopped in the last phase, amid its second epoch."""
    recipe, seen = applied / "recipe.yaml", []
    with pytest.MonkeyPatch.context() as patch:
        total = step.total_of

        def counted(*args):
            seen.append(args)
            if len(seen) == 12 * 2 + 3:
                os.kill(os.getpid(), signal.SIGTERM)
            return total(*args)

        patch.setattr(step, "total_of", counted)
        assert run("apply", "--no-report", recipe, "--output", tmp_path / "run")[0] == 128 + signal.SIGTERM
    assert not (tmp_path / "run" / "student").exists()
    done("apply", "--no-report", recipe, "--output", tmp_path / "run", "--resume")
    assert student_bytes(tmp_path / "run") == student_bytes(applied / "run")


@pytest.mark.wide
def test_a_teacher_is_imitated_on_pictures_without_masks(applied, tmp_path):
    recipe = {
        "teacher": {"model": "segmenter", "weights": str(applied / "run" / "teacher")},
        "data": {"name": "images", "root": str(applied / "ade" / "images"), "val_fraction": 0.2, "batch_size": 8},
        "steps": [{"multiplex": {"share": 2}}, {"distill": {"epochs": 1, "losses": {"prediction": {"weight": 1.0}}}}],
    }
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    done("apply", "--no-report", tmp_path / "recipe.yaml", "--output", tmp_path / "run")
    found = results(tmp_path)["student"]
    assert 0 < found["pixel_agreement"] <= 100
    assert "miou" not in found
    examples = json.loads((tmp_path / "run" / "predictions.json").read_text())["examples"]
    assert list(examples[0]["masks"]) == ["teacher", "student"]


@pytest.mark.wide
@pytest.mark.parametrize(
    "steps",
    [
        [{"shrink": {"budget": {"parameters": 0.7}}}, {"finetune": {"epochs": 1}}],
        [{"low_rank": {"budget": {"parameters": 0.8}}}, {"lora": {"rank": 2}}, {"finetune": {"epochs": 1}}, "merge"],
    ],
    ids=["shrink", "low_rank"],
)
def test_a_trained_segmenter_is_compressed(applied, tmp_path, steps):
    teacher = {"model": "segmenter", "weights": str(applied / "run" / "teacher")}
    data = {**RECIPE["data"], "root": str(applied / "ade")}
    recipe = {"teacher": teacher, "data": data, "steps": steps, "calibration": {"images": 8}}
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    done("apply", "--no-report", tmp_path / "recipe.yaml", "--output", tmp_path / "run")
    found = results(tmp_path)
    assert found["student"]["parameters"] < found["teacher"]["parameters"]
    assert found["student"]["miou"] > 0.9 * found["teacher"]["miou"]  # measured 1.0 of its 77.6


@pytest.mark.parametrize("name", ["repadapter_segmentation", "segmentation_dinov2_s"])
def test_recipes_are_plain(name):
    assert name in shipped_recipes()
    recipe = load_recipe(name)
    assert recipe.data.name == "segmentation"
    assert recipe.teacher.model == "segmenter"


def test_another_model_is_refused(tmp_path):
    teacher = {"model": "vit_tiny_patch16_224", "weights": "random"}
    message = refused("plan", with_masks(tmp_path, {**RECIPE, "teacher": teacher}, 1, 1))
    assert "its images have the ground truth of the task 'segmentation'" in message
    assert "take a model for 'segmentation' (segmenter)" in message


def test_a_value_that_is_no_class_ends_a_run_before_it_begins(tmp_path):
    recipe = with_masks(tmp_path, RECIPE, 2, 2)
    Image.new("L", (48, 32), 9).save(tmp_path / "ade" / "annotations" / "validation" / "2.png")
    message = refused("apply", recipe, "--output", tmp_path / "run")
    assert (
        "mask annotations/validation/2.png has the value 9, which is no class: there are 3, of values 0 to 2" in message
    )
    assert not (tmp_path / "run").exists()


def test_a_loader_of_ones_own_gives_images_alone_or_with_masks():
    def segmenter():
        torch.manual_seed(0)
        return build("segmenter", RECIPE["teacher"]["args"], num_classes=3)

    images, masks = torch.randn(2, 3, 32, 32), torch.randint(3, (2, 32, 32))
    for batch, losses in ((images, {}), ((images, masks), {"labels": {"weight": 1.0}})):
        found = compressvit.distill(
            segmenter(),
            segmenter(),
            [batch],
            validation=[batch],
            epochs=1,
            lr=1e-4,
            losses=losses,
            console=Console(quiet=True),
        )
        assert found.figures["pixel_agreement"] > 50
        assert ("miou" in found.figures) == bool(losses)
    with pytest.raises(
        UserError, match="a mask has the value 3, which is no class: there are 3, 0 to 2, and 255 is ignored"
    ):
        compressvit.distill(
            segmenter(), segmenter(), [(images, masks + 1)], epochs=1, losses=losses, console=Console(quiet=True)
        )


def test_a_head_of_too_few_classes_is_refused(tmp_path):
    teacher = {**RECIPE["teacher"], "num_classes": 2}
    code, out, _ = run("plan", with_masks(tmp_path, {**RECIPE, "teacher": teacher}, 2, 2))
    assert code == 2
    assert "the data has 3 classes, and the teacher's head has only 2" in " ".join(out.split())
