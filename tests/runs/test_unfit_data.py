"""What a plan can know without data or weights is refused by `plan` and `apply` in the same words."""

from __future__ import annotations

import pytest
import yaml
from helpers.images import class_folders
from helpers.runs import refused, run
from helpers.scenes import scenes
from helpers.training import VIT

from compressvit.data.data_set import SETS
from compressvit.tasks.base import find_task

SWIN = {"embed_dim": 24, "depths": [1, 1, 1, 1], "num_heads": [2, 2, 2, 2], "window_size": 2}
ARGS = {"backbone": "swin_tiny_patch4_window7_224", "backbone_args": SWIN, "img_size": 32, "channels": 16}
MODELS = {
    "classifier": {"model": "vit_tiny_patch16_224", "args": VIT | {"in_chans": 3}},
    "detector": {"model": "faster_rcnn", "args": ARGS},
}
TEACHER = {"weights": "train", "finetune": {"epochs": 1}}


def both(folder, teacher: dict, *words: str, data: str = "coco", student: dict | None = None) -> str:
    """What `apply` refuses a recipe with, after `plan` was seen to refuse it with the same words."""
    content = {"teacher": teacher, "data": {"name": data, "root": str(folder)}, "steps": [{"finetune": {"epochs": 1}}]}
    recipe = folder / "recipe.yaml"
    recipe.write_text(yaml.safe_dump(content | ({"student": student} if student else {})))
    message = refused("apply", recipe, "--output", folder / "run", *words)
    code, out, err = run("plan", recipe, *words)
    assert code == 2
    assert (message.partition("1 conflict ")[2] or message) in out + err
    assert not (folder / "run").exists()
    return message


@pytest.fixture(scope="module")
def pictures(tmp_path_factory):
    folder = tmp_path_factory.mktemp("pictures")
    scenes(folder, "train", 2)
    scenes(folder, "val", 2)
    return folder


def test_a_set_has_the_ground_truth_of_its_own_task():
    truths = {entry.name: entry.truth for entry in SETS.values()}
    assert (truths["digits"], truths["coco"], truths["images"]) == ("classification", "detection", None)
    assert all(find_task(word).reads(find_task(word)) for word in truths.values() if word)


def test_a_classifier_cannot_learn_boxes(pictures):
    words = ["data.crop_mode=squash", "data.crop_pct=1"]
    message = both(pictures, MODELS["classifier"] | TEACHER, *words)
    assert (
        "data.name=coco: its images have the ground truth of the task 'detection', and the teacher, vit_tiny" in message
    )
    assert (
        "take a model for 'detection' (adamixer, faster_rcnn, mask_rcnn), or data for 'classification' (digits,"
        in message
    )
    code, _, err = run("plan", pictures / "recipe.yaml", *words, f"data.root={pictures / 'not here'}")
    assert (code, message in err) == (2, True)


def test_a_detector_cannot_learn_classes(tmp_path):
    message = both(class_folders(tmp_path), MODELS["detector"] | TEACHER, data="folder")
    assert "and the teacher, faster_rcnn, is a model for 'detection'; take a model for 'classification'" in message
    assert "or data for 'detection' (coco)" in message
    assert both(tmp_path, MODELS["detector"] | TEACHER, "data.task=detection", data="folder") == message


def test_a_student_is_named_where_it_alone_is_for_another_task(pictures):
    student = MODELS["classifier"] | {"weights": "random"}
    assert "and the student, vit_tiny_patch16_224," in both(pictures, MODELS["detector"] | TEACHER, student=student)


def test_there_are_no_pretrained_detectors(pictures):
    message = both(pictures, MODELS["detector"] | {"weights": "pretrained"}, "teacher.num_classes=2")
    assert (
        "teacher.weights: pretrained: timm has no pretrained weights for faster_rcnn. Supply weights as a file"
        in message
    )
    assert "Or begin with its backbone's: teacher.weights=train teacher.backbone=pretrained." in message


def test_a_classifier_has_no_backbone_of_its_own(tmp_path):
    teacher = MODELS["classifier"] | TEACHER | {"backbone": "pretrained"}
    message = both(class_folders(tmp_path), teacher, data="folder")
    assert "teacher.backbone=pretrained: vit_tiny_patch16_224 is no detector" in message


@pytest.mark.wide_unless(lambda weights: weights["weights"] == "FILE")
@pytest.mark.parametrize(
    ("weights", "advice"),
    [
        ({"weights": "train"}, "leave teacher.num_classes out: the teacher then has as many"),
        ({"weights": "random"}, "leave teacher.num_classes out: the teacher then has as many"),
        ({"weights": "FILE"}, "set teacher.num_classes=2 and train the head with teacher.finetune"),
    ],
)
def test_a_head_of_too_few_classes(pictures, weights, advice):
    words = ["teacher.num_classes=1"]
    message = both(pictures, MODELS["detector"] | weights, *words)
    assert f"the data has 2 classes, and the teacher's head has only 1; {advice}" in message


def test_a_trained_head_of_too_many_classes_is_told_how_to_get_fewer(pictures):
    for weights, text in (("train", "the others are never right; leave teacher.num_classes out"), ("x", "accuracy is")):
        content = {
            "teacher": MODELS["detector"] | {"weights": weights},
            "data": {"name": "coco", "root": str(pictures)},
        }
        (pictures / "r.yaml").write_text(yaml.safe_dump(content | {"steps": [{"finetune": {}}]}))
        code, out, _ = run("plan", pictures / "r.yaml", "teacher.num_classes=3")
        assert code == 0
        assert f"the data has 2 classes and the teacher's head 3: {text}" in out


MORE = "the data has 2 classes, and as teacher.num_classes is not given, timm builds"
SMALL = {"depth": 1, "embed_dim": 24, "num_heads": 2}
GENERIC = "For your own classes give the teacher a new head: teacher.finetune={}"


@pytest.mark.parametrize(
    ("teacher", "told"),
    [
        (
            {"weights": "x"},
            f"{MORE} vit_tiny_patch16_224 with 1000; set it to the number of classes of the file's classifier",
        ),
        ({"weights": "x", "num_classes": 0}, None),
        ({"weights": "x", "num_classes": 2}, None),
        ({"weights": "x", "num_classes": 3}, GENERIC),
        ({"weights": "x", "args": SMALL | {"num_classes": 3}}, GENERIC),
        ({"weights": "x", "finetune": {"epochs": 1}}, None),
        ({"weights": "train"}, None),
        ({"weights": "pretrained"}, GENERIC),
        ({"weights": "pretrained", "finetune": {"epochs": 1}}, None),
        (
            {"model": "vit_small_patch14_dinov2", "weights": "x", "args": SMALL | {"img_size": 28}},
            f"{MORE} vit_small_patch14_dinov2 without a classifier; if the file has one, give the number of its classes",
        ),
        ({"model": "vit_small_patch14_dinov2", "weights": "pretrained", "args": SMALL | {"img_size": 28}}, None),
    ],
)
def test_what_a_number_of_classes_asks_for_depends_on_where_weights_come_from(teacher, told, tmp_path):
    content = {
        "teacher": {"model": "vit_tiny_patch16_224", "args": SMALL} | teacher,
        "data": {"name": "folder", "root": str(class_folders(tmp_path, classes=("a", "b")))},
        "steps": [{"lora": {"rank": 2}}],
    }
    (tmp_path / "r.yaml").write_text(yaml.safe_dump(content))
    code, out, err = run("plan", tmp_path / "r.yaml")
    assert code == 0, err
    assert ("the data has 2 classes" in out) == (told is not None)
    assert told is None or told in out
    assert ("2 classes" in run("validate", tmp_path / "r.yaml")[1]) == (told == GENERIC)


def test_a_head_that_is_too_small_because_nothing_says_how_large_the_files_is(tmp_path):
    root = class_folders(tmp_path)
    message = both(root, MODELS["classifier"] | {"weights": "x"}, "data.num_classes=2000", data="folder")
    assert "head has only 1000; that is timm's number, as teacher.num_classes is not given" in message
    assert "set teacher.num_classes=2000 if the file's classifier has as many, or train a new one" in message


def test_a_teacher_is_not_trained_without_a_classifier(tmp_path):
    root = class_folders(tmp_path)
    (tmp_path / "r.yaml").write_text(
        yaml.safe_dump(
            {
                "teacher": MODELS["classifier"] | TEACHER | {"num_classes": 0},
                "data": {"name": "folder", "root": str(root)},
                "steps": [{"low_rank": {"rank": 2}}],
            }
        )
    )
    code, out, _ = run("plan", tmp_path / "r.yaml")
    assert code == 2
    assert "conflict: teacher.finetune: it learns from labels, but teacher.num_classes=0 is no classifier; leave" in out


def test_data_that_are_here_and_amiss_are_refused_and_others_told(pictures):
    teacher = MODELS["detector"] | TEACHER
    assert "there are no annotations of that split in" in both(pictures, teacher, "data.val_split=foo")
    code, out, _ = run("plan", pictures / "recipe.yaml", f"data.root={pictures / 'not here'}")
    assert code == 0
    assert "note: data not found here, so not counted: data.root=" in out
