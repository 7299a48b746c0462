"""What a reader has to know of the figures: what they depend on, and which there are not, and why."""

from __future__ import annotations

import json
import shutil

import pytest
from helpers.runs import done
from helpers.training import VIT

from compressvit.model.families.adamixer import SMALL
from compressvit.recipe.recipe import Recipe
from compressvit.report.record import read_run
from compressvit.report.sections import details, measures
from compressvit.runs.files import RecipePlan
from compressvit.runs.plan import plan_recipe
from compressvit.tasks.base import TASKS

REGIONS = {"backbone": "resnet18", "img_size": 64, "channels": 16, "representation": 32}
CLASSIFIER = {"model": "vit_tiny_patch16_224", "args": VIT | {"in_chans": 3}, "num_classes": 3}
LATENCY = "the latency of a {} R-CNN depends on how many objects it finds: compare models that find about as many"
MASKS = "the teacher gives no masks, so there is no mask AP50 against the teacher's masks"
CASES = {
    "boxes": ({"model": "faster_rcnn", "args": REGIONS}, {}, "coco", [LATENCY.format("Faster")]),
    "masks of both": ({"model": "mask_rcnn", "args": REGIONS}, {}, "coco", [LATENCY.format("Mask")]),
    "masks of the student": (
        {"model": "faster_rcnn", "args": REGIONS},
        {"model": "mask_rcnn", "weights": "random", "args": REGIONS},
        "coco",
        [MASKS, LATENCY.format("Faster"), LATENCY.format("Mask")],
    ),
    "queries": ({"model": "adamixer", "args": SMALL}, {}, "coco", []),
    "classes": (CLASSIFIER, {}, "folder", []),
    "a new head": (
        CLASSIFIER,
        {"head": "new"},
        "folder",
        [
            "the student has a new head, so it is not compared with its teacher: there is no agreement with the teacher and no cosine"
        ],
    ),
    "other outputs": (
        CLASSIFIER,
        {"model": "resnet18", "weights": "random", "args": {"num_classes": 4}},
        "folder",
        [
            "the student has 4 outputs and the teacher 3, so there is no agreement with the teacher and no cosine",
        ],
    ),
}


def planned(teacher: dict, student: dict, data: str) -> RecipePlan:
    content = {"teacher": {"weights": "random"} | teacher, "student": student, "data": {"name": data}}
    return plan_recipe(Recipe.model_validate({**content, "steps": ({"finetune": {}},)}))


@pytest.mark.wide_unless(lambda case: case not in ("queries", "masks of both", "masks of the student"))
@pytest.mark.parametrize("case", CASES)
def test_a_plan_says_so(case):
    *recipe, wanted = CASES[case]
    assert planned(*recipe).figures == wanted


def test_of_every_task_the_figures_against_a_teacher_are_known():
    found = {name: [quality.key for quality in task.against_teacher()] for name, task in TASKS.items()}
    assert found["classification"] == ["agreement", "cosine"]
    assert found["detection"] == ["ap50_of_teacher", "mask_ap50_of_teacher"]
    assert all(key not in TASKS[name].graded for name, keys in found.items() for key in keys)


def test_the_report_and_evaluate_say_so(finished, tmp_path):
    run = read_run(finished)
    run.plan.figures = ["the latency depends on something"]
    assert "Figures: the latency depends on something." in details(run)
    text = "there is no agreement with the teacher and no cosine: `apply` compares a student with its teacher"
    student = run.results.student
    found = f"as the run found it: agreement with the teacher {student.agreement:.2f} %, cosine {student.cosine:.4f}"
    out = done("evaluate", finished)
    assert found in out
    assert text not in out
    told = json.loads(done("evaluate", finished, "--json"))["against_teacher"]
    assert told == {"agreement": student.agreement, "cosine": student.cosine}
    assert text in done("evaluate", finished, "data.eval_batch_size=50"), "other images, for all that is known"
    shutil.copytree(finished / "student", tmp_path / "student")
    assert text in done("evaluate", tmp_path / "student", "data.name=digits")


def test_accuracies_have_intervals_wherever_they_are_shown(finished):
    run = read_run(finished)
    student = run.results.student
    low, high = student.intervals["top1"]
    assert low < student.top1 < high
    shown = f"{student.top1:.2f} % ({low:.1f}–{high:.1f})"
    below, points, above = student.differences["top1"]
    assert points == pytest.approx(run.results.teacher.top1 - student.top1)
    lost = f"op-1, teacher − student: {points:.2f} points (95 % interval {below:.2f} to {above:.2f}, image by image)"
    assert any(cells[0] == "top-1" and cells[2] == shown for cells in measures(run))
    assert any(lost in sentence for sentence in details(run))
    assert shown in done("evaluate", finished)
    log = (finished / "run.log").read_text()
    assert shown in log
    assert lost in log
