"""A task that nothing else in the package knows: the label as a number, which the model's one output estimates."""

from __future__ import annotations

import json
import math

import pytest
import torch
from helpers.runs import TINY, done, refused, run

from compressvit.tasks.base import TASKS, Metrics, Task, find_task, task, task_of
from compressvit.tasks.qualities import qualities, ranking
from compressvit.tasks.quality import Curve, Quality

RMSE = Quality(
    "rmse",
    "error",
    "root mean squared error",
    "root mean squared error",
    "",
    3,
    lower_is_better=True,
    curve=Curve("rmse", "Error over time", "In units of the label."),
)


class Errors(Metrics):
    def __init__(self, beside_teacher):
        self.beside_teacher = beside_teacher
        self.squares, self.teachers, self.count = 0.0, 0.0, 0

    def add(self, outputs, targets, expected):
        self.count += len(targets)
        self.squares += (outputs[:, 0] - targets).square().sum().item()
        if expected is not None:
            self.teachers += (expected[:, 0] - targets).square().sum().item()

    def result(self):
        found = {"rmse": math.sqrt(self.squares / self.count)}
        return found | ({"teacher_rmse": math.sqrt(self.teachers / self.count)} if self.beside_teacher else {})


class Value(Task):
    qualities = (RMSE,)
    ranking = ("rmse",)
    graded = ("rmse",)

    def fits(self, model):
        return getattr(model, "num_classes", 0) == 1

    def head_size(self, classes):
        return 1

    def loss(self, outputs, targets, smoothing=0.0):
        return (outputs[:, 0].float() - targets).square().mean()

    def batch_figures(self, outputs, expected, targets, labels):
        return {"rmse": self.loss(outputs, targets).sqrt().double()}

    def metrics(self, model, teacher, labelled):
        return Errors(teacher is not None)


@pytest.fixture(scope="module")
def value():
    len(TASKS)  # found, so that what is added can be taken out
    task("value")(Value)
    yield TASKS["value"]
    del TASKS._entries["value"]


@pytest.fixture(scope="module")
def applied(value, tmp_path_factory):
    """A run of a recipe that names the task, with a teacher trained for it too."""
    folder = tmp_path_factory.mktemp("value")
    (folder / "recipe.yaml").write_text(
        TINY.replace("name: digits", "name: digits, task: value").replace(
            "distill: {epochs: 1}", "finetune: {epochs: 3, lr: 0.01, keep: best, log_every: 1}"
        )
    )
    done("apply", folder / "recipe.yaml", "--output", folder / "run", "--device", "cpu")
    return folder


def test_training_evaluation_and_the_best_epoch_go_by_it(applied):
    results = json.loads((applied / "run" / "results.json").read_text())
    assert results["student"]["rmse"] > 0
    assert results["teacher"]["rmse"] > 0
    assert "top1" not in results["student"]
    rows = [json.loads(line) for line in (applied / "run" / "metrics.jsonl").read_text().splitlines()]
    phase = results["phases"]["1_finetune"]
    errors = {row["epoch"]: row["rmse"] for row in rows if (row["phase"], row["kind"]) == ("1_finetune", "evaluate")}
    errors[0] = phase["start"]["rmse"]
    assert len(errors) == 4
    assert phase["kept_epoch"] == min(errors, key=errors.__getitem__)
    assert results["student"]["rmse"] == pytest.approx(min(errors.values()))
    assert max(errors.values()) > min(errors.values())
    assert all(row["rmse"] ** 2 == pytest.approx(row["loss"], rel=1e-4) for row in rows if row["kind"] == "train")


def test_the_student_has_the_outputs_that_the_task_asks_for(applied):
    assert json.loads((applied / "run" / "student" / "compressvit.json").read_text())["num_classes"] == 1


def test_evaluate_compare_and_the_report_show_it(applied):
    error = json.loads((applied / "run" / "results.json").read_text())["student"]["rmse"]
    assert json.loads(done("evaluate", applied / "run", "--json"))["rmse"] == pytest.approx(error)
    assert f"{error:.3f}" in done("compare", applied / "run", "--output", applied / "compared")
    done("report", applied / "run", "--output", applied / "page.html")
    page = (applied / "page.html").read_text()
    assert f"the student has a root mean squared error of {error:.3f} on 32 held-out images" in page
    assert "Error over time" in page
    assert ">root mean squared error<" in page


def test_a_model_of_another_shape_is_refused(applied):
    code, text, _ = run("plan", applied / "recipe.yaml", "teacher.num_classes=10")
    assert code == 2
    assert "data.task=value: the student's outputs cannot be read as those of that task" in text
    assert "classification" in text


def test_mixing_classes_is_refused(applied):
    code, text, _ = run("plan", applied / "recipe.yaml", "steps.1.finetune.mixup=0.8")
    assert code == 2
    assert "mixup and cutmix mix classes, and the task 'value' has none to mix" in text


def test_a_task_that_nobody_offers_is_refused(applied):
    text = refused("plan", applied / "recipe.yaml", "data.task=valeu")
    assert "there is no task 'valeu'; did you mean 'value'?" in text


def test_a_word_counts_where_the_model_can_do_it(value):
    models = {outputs: torch.nn.Linear(2, 2) for outputs in (0, 1, 5)}
    for outputs, model in models.items():
        model.num_classes = outputs
    assert task_of(models[1], "value") is value
    assert task_of(models[1]) is find_task("classification")
    assert task_of(models[5], "value") is find_task("classification")
    assert task_of(models[0], "classification") is find_task("features")


def test_figures_of_all_tasks_are_in_order(value):
    of_objects = [f"{what}{key}" for what in ("", "mask_") for key in ("ap", "ap50", "ap75")]
    of_teacher = ["ap50_of_teacher", "mask_ap50_of_teacher"]
    of_search = ["recall_10", "recall_1", "recall_self", "knn"]
    of_pixels = ["miou", "pixel_accuracy", "pixel_agreement"]
    of_images = ["top1", "top5", "agreement", "cosine"]
    known = [*of_images, *of_objects, *of_teacher, "cosine_patches", *of_search, *of_pixels, "rmse"]
    assert list(qualities()) == known
    assert ranking() == (
        "top1",
        "agreement",
        "cosine",
        "ap",
        "ap50",
        "mask_ap",
        "ap50_of_teacher",
        "recall_10",
        "knn",
        *of_pixels,
        "rmse",
    )
