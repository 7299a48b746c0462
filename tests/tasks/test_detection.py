"""The task `detection`: COCO's average precision, agreement of two detectors, what the report shows, and a run from end to end."""

from __future__ import annotations

import json

import pytest
import torch
import yaml
from helpers.recipes import build_teacher
from helpers.runs import done
from helpers.scenes import with_scenes
from PIL import Image
from torchvision.models.detection.roi_heads import paste_masks_in_image

from compressvit.artifacts import artifact
from compressvit.errors import UserError
from compressvit.model.detectors.prediction import Detections
from compressvit.model.families.adamixer import SMALL
from compressvit.model.weights import build
from compressvit.recipe.recipe import parse_recipe
from compressvit.runs.models import load_teacher
from compressvit.tasks.base import find_task, task_of
from compressvit.tasks.precision import MASKS, on_picture, packed
from compressvit.transforms.record import compression_of

TASK = find_task("detection")


def found(boxes, scores, labels) -> Detections:
    return Detections(torch.tensor(boxes).reshape(-1, 4), torch.tensor(scores), torch.tensor(labels, dtype=torch.long))


def truth(boxes, labels, crowd=None, size=(100, 200)) -> dict:
    return {
        "boxes": torch.tensor(boxes, dtype=torch.float32).reshape(-1, 4),
        "labels": torch.tensor(labels, dtype=torch.long),
        "crowd": torch.tensor(crowd or [False] * len(labels), dtype=torch.bool),
        "size": torch.tensor(size),
    }


class Model(torch.nn.Module):
    task, num_classes = "detection", 3


def measured(detections, targets, expected=None):
    metrics = TASK.metrics(Model(), Model() if expected else None, True)
    metrics.add(detections, targets, expected)
    return metrics.result()


A, B = [0.1, 0.1, 0.4, 0.4], [0.5, 0.5, 0.9, 0.8]


def test_perfect_detections_have_100_percent():
    result = measured([found([A, B], [0.9, 0.8], [0, 2])], [truth([A, B], [0, 2])])
    assert result == pytest.approx({"ap": 100, "ap50": 100, "ap75": 100})


def test_average_precision_by_hand():
    """Class 0 is found after a wrong box of higher score: precision 1/2 at every recall. Class 2 is found at IoU 0.6 alone."""
    shifted = [0.1, 0.1, 0.4, 0.28]  # of A: IoU 0.6
    result = measured([found([B, A, shifted], [0.9, 0.8, 0.7], [0, 0, 2])], [truth([A, A], [0, 2])])
    assert result["ap50"] == pytest.approx((50 + 100) / 2)
    assert result["ap75"] == pytest.approx((50 + 0) / 2)
    assert result["ap"] == pytest.approx(
        (50 + 100 * 2 / 10) / 2
    )  # 0.50 and 0.55 of ten; 0.60 is just missed by rounding


def test_crowds_count_neither_as_right_nor_as_wrong():
    crowd = truth([A, [0.5, 0.0, 1.0, 1.0]], [0, 0], crowd=[False, True])
    inside = [0.6, 0.2, 0.7, 0.4]
    assert measured([found([A, inside], [0.8, 0.9], [0, 0])], [crowd])["ap"] == pytest.approx(100)
    alone = measured([found([A, inside], [0.8, 0.9], [0, 0])], [truth([A], [0])])["ap"]
    assert alone == pytest.approx(50)


def test_nothing_to_find_has_no_precision():
    assert measured([found([A], [0.9], [0])], [truth([], [])])["ap"] is None
    assert measured([found([], [], [])], [truth([A], [0])])["ap"] == 0


def test_agreement_is_precision_against_what_the_teacher_is_sure_of():
    theirs = found([A, B], [0.9, 0.1], [0, 1])
    result = measured([found([A], [0.5], [0])], [truth([B], [1])], [theirs])
    assert result["ap50_of_teacher"] == pytest.approx(100)
    assert result["teacher_ap50"] == pytest.approx(100)  # its unsure box is right
    assert result["ap"] == 0


# ---------------------------------------------------------------------------------------------------------------- masks


class Outliner(Model):
    masks = True


def outlined(boxes, scores, labels, masks) -> Detections:
    """Each mask is four numbers, of the quarters of its box."""
    quarters = torch.tensor(masks).reshape(-1, 2, 2).float()
    return found(boxes, scores, labels)._replace(masks=quarters.repeat_interleave(14, 1).repeat_interleave(14, 2))


def masked(boxes, labels, masks, crowd=None, size=(100, 200)) -> dict:
    """Of each object one number for each quarter of its box, or None of one without a mask."""
    drawn = []
    for (x0, y0, x1, y1), quarters in zip(boxes, masks, strict=True):
        mask = torch.zeros(size)
        for k, inside in enumerate(quarters or (0, 0, 0, 0)):
            left, top = x0 + (k % 2) * (x1 - x0) / 2, y0 + (k // 2) * (y1 - y0) / 2
            a, b = round(top * size[0]), round((top + (y1 - y0) / 2) * size[0])
            c, d = round(left * size[1]), round((left + (x1 - x0) / 2) * size[1])
            mask[a:b, c:d] = inside
        drawn.append(packed(mask[None])[0] if quarters else None)
    return {**truth(boxes, labels, crowd, size), "runs": drawn}


WHOLE, LEFT, NONE = (1, 1, 1, 1), (1, 0, 1, 0), None


def measured_masks(detections, targets, expected=None, teacher=Outliner):
    metrics = TASK.metrics(Outliner(), teacher() if expected else None, True)
    metrics.add(detections, targets, expected)
    return metrics.result()


def test_masks_are_judged_beside_their_boxes():
    """A box is right whose mask covers half of it, where the object fills it: IoU about ½ is none of 0.55 and more."""
    right = measured_masks(
        [outlined([A, B], [0.9, 0.8], [0, 2], [WHOLE, LEFT])], [masked([A, B], [0, 2], [WHOLE, LEFT])]
    )
    assert right["ap"] == pytest.approx(100)
    assert right["mask_ap"] > 80  # edges are rounded to pixels; measured 90
    wrong = measured_masks(
        [outlined([A, B], [0.9, 0.8], [0, 2], [WHOLE, WHOLE])], [masked([A, B], [0, 2], [WHOLE, LEFT])]
    )
    assert wrong["ap"] == pytest.approx(100)
    assert wrong["mask_ap50"] == pytest.approx(50)
    assert wrong["mask_ap75"] == pytest.approx(50)


def test_masks_are_judged_as_pycocotools_judges_files(tmp_path):
    """The same numbers as by pycocotools from files as COCO has them, polygons and results."""
    from pycocotools.coco import COCO
    from pycocotools.cocoeval import COCOeval

    generator = torch.Generator().manual_seed(0)
    images, annotations, results, targets, detections = [], [], [], [], []
    for image in range(1, 6):
        corner, sides = torch.rand(4, 2, generator=generator) * 0.5, torch.rand(4, 2, generator=generator) * 0.4 + 0.1
        boxes = torch.cat([corner, corner + sides], 1)
        labels = torch.randint(3, (4,), generator=generator)
        masks = (torch.rand(4, 4, generator=generator) < 0.8).int()
        target = masked(boxes.tolist(), labels.tolist(), [row.tolist() for row in masks])
        shown = outlined((boxes + 0.01).tolist(), [0.9, 0.8, 0.7, 0.6], labels.tolist(), masks.float().tolist())
        targets, detections = [*targets, target], [*detections, shown]
        images.append({"id": image, "height": 100, "width": 200})
        for k in range(4):
            entry = {"image_id": image, "category_id": int(labels[k]) + 1}
            mask = {**target["runs"][k], "counts": target["runs"][k]["counts"].decode()}
            annotations.append(
                {
                    **entry,
                    "id": len(annotations) + 1,
                    "segmentation": mask,
                    "area": 1,
                    "iscrowd": 0,
                    "bbox": [0, 0, 1, 1],
                }
            )
            runs = on_picture(shown, (100, 200))[k]
            results.append(
                {**entry, "segmentation": {**runs, "counts": runs["counts"].decode()}, "score": float(shown.scores[k])}
            )
    content = {"images": images, "annotations": annotations, "categories": [{"id": i} for i in (1, 2, 3)], "info": {}}
    for name, part in (("truth", content), ("found", results)):
        (tmp_path / f"{name}.json").write_text(json.dumps(part))
    coco = COCO(str(tmp_path / "truth.json"))
    judged = COCOeval(coco, coco.loadRes(str(tmp_path / "found.json")), "segm")
    judged.evaluate()
    judged.accumulate()
    judged.summarize()
    ours = measured_masks(detections, targets)
    assert 20 < ours["mask_ap"] < 95
    assert [ours[key] for key in MASKS] == pytest.approx([100 * value for value in judged.stats[:3]])


def test_masks_are_put_on_the_picture_as_torchvision_puts_them():
    generator = torch.Generator().manual_seed(0)
    centre, sides = (
        torch.rand(40, 2, generator=generator),
        torch.rand(40, 2, generator=generator) ** 3 + 1e-3,
    )
    boxes = torch.cat([centre - sides / 2, centre + sides / 2], 1)
    masks = torch.rand(40, 28, 28, generator=generator)
    shown = Detections(boxes, torch.linspace(1, 0, 40), torch.zeros(40, dtype=torch.long), masks)
    pixels = boxes.double() * torch.tensor([200.0, 100, 200, 100])
    expected = paste_masks_in_image(masks[:, None].double(), pixels, (100, 200))[:, 0] > 0.5
    assert expected.flatten(1).any(1).sum() > 20
    for ours, theirs in zip(on_picture(shown, (100, 200)), packed(expected), strict=True):
        assert ours == theirs


def test_an_object_without_a_mask_is_judged_by_its_box_alone():
    detections = [outlined([A, B], [0.8, 0.9], [0, 0], [WHOLE, WHOLE])]
    result = measured_masks(detections, [masked([A, B], [0, 0], [WHOLE, NONE])])
    assert result["ap"] == pytest.approx(100)
    assert result["mask_ap50"] == pytest.approx(100)  # what lies in the other's box is not wrong
    none = measured_masks(detections, [truth([A, B], [0, 0])])
    assert none["ap"] == pytest.approx(100)
    assert none["mask_ap"] is None


def test_masks_of_a_callers_loader_are_judged():
    target = truth([A], [0], size=(100, 200))
    mask = torch.zeros(1, 50, 50, dtype=torch.bool)
    mask[0, 5:20, 5:20] = True  # A, in an image of 50×50
    result = measured_masks([outlined([A], [0.8], [0], [WHOLE])], [{**target, "masks": mask}])
    assert result["mask_ap75"] == pytest.approx(100)


def test_figures_of_masks_are_those_of_models_with_masks():
    detections, targets = [outlined([A], [0.8], [0], [WHOLE])], [masked([A], [0], [WHOLE])]
    assert not any("mask" in key for key in measured([found([A], [0.8], [0])], targets))
    both = measured_masks(detections, targets, detections)
    assert both["teacher_mask_ap50"] == both["mask_ap50_of_teacher"] == pytest.approx(100)
    of_boxes = measured_masks(detections, targets, [found([A], [0.8], [0])], Model)
    assert {key for key in of_boxes if "mask" in key} == set(MASKS)
    beside = TASK.metrics(Model(), Outliner(), True)
    beside.add([found([A], [0.8], [0])], targets, detections)
    assert beside.result()["teacher_mask_ap50"] == pytest.approx(100)


def test_no_detections_have_no_masks():
    nothing = outlined([], [], [], [])
    assert measured_masks([nothing], [masked([A], [0], [WHOLE])])["mask_ap"] == 0
    assert measured_masks([nothing], [masked([], [], [])])["mask_ap"] is None


def test_crowds_are_left_out_of_the_loss_of_masks():
    seen = {}

    class Outputs:
        def losses(self, targets):
            seen.update(targets[0])
            return {"masks": targets[0]["masks"].sum().float()}

    target = {**truth([A, B], [1, 2], crowd=[False, True]), "masks": torch.ones(2, 4, 4, dtype=torch.bool)}
    assert TASK.loss(Outputs(), [target]) == 16
    assert set(seen) == {"boxes", "labels", "masks"}


def test_masks_are_drawn():
    """Filled in the colour of each model, mixed where both are, with the edge of what is annotated."""
    answers = TASK.answers(Outliner(), ["cup"], True)
    ours, theirs = outlined([A], [0.9], [0], [LEFT]), outlined([A], [0.9], [0], [WHOLE])
    answers.add([ours], [masked([B], [0], [WHOLE])], [theirs])
    description = json.loads(json.dumps(answers.describe(0)))
    assert {who: len(masks) for who, masks in description["masks"].items()} == {"true": 1, "teacher": 1, "student": 1}
    drawn = answers.draw(Image.new("RGB", (320, 320)), description)
    left, right = drawn.getpixel((54, 80)), drawn.getpixel((106, 80))
    assert right == tuple(2 * part // 5 for part in (255, 190, 0))  # the teacher's alone
    assert left != right
    assert left[2] > 0
    assert drawn.getpixel((224, 208)) == (0, 0, 0)  # within what is annotated
    assert drawn.getpixel((224, 160)) == (255, 255, 255)  # on its edge
    boxes = TASK.answers(Model(), ["cup"], True)
    boxes.add([found([A], [0.9], [0])], [truth([B], [0])], [found([A], [0.9], [0])])
    assert "masks" not in boxes.describe(0)


def test_a_detector_is_of_this_task_whatever_the_data_says():
    model = build(
        "adamixer", backbone="resnet18", img_size=32, num_classes=3, queries=4, dim=16, channels=16, hidden=16, stages=1
    )
    assert task_of(model) is TASK
    assert task_of(model, "classification") is TASK
    assert not find_task("classification").fits(model)
    assert not TASK.fits(build("vit_tiny_patch16_224"))


def test_crowds_are_left_out_of_the_loss():
    class Outputs:
        def losses(self, targets):
            return {
                "boxes": torch.tensor(float(len(targets[0]["boxes"]))),
                "labels": targets[0]["labels"].sum().float(),
            }

    loss = TASK.loss(Outputs(), [truth([A, B], [1, 2], crowd=[False, True])])
    assert loss == 1 + 1


def test_the_images_worth_showing_are_those_on_which_the_two_differ():
    answers = TASK.answers(Model(), ["cup", "dog"], True)
    ours = [found([A, A], [0.9, 0.2], [0, 1]), found([A], [0.9], [0])]
    theirs = [found([A], [0.8], [0]), found([A, B], [0.8, 0.8], [1, 0])]
    worth = answers.add(ours, [truth([A], [0]), truth([A, A], [0, 0])], theirs)
    assert worth.tolist() == [0.0, 1.0]
    shown = answers.describe(1)
    assert (shown["true"], shown["student"], shown["teacher"]) == ("cup ×2", "cup", "dog, cup")
    assert shown["boxes"]["student"][0] == pytest.approx(A)
    assert {who: len(drawn) for who, drawn in shown["boxes"].items()} == {"true": 2, "student": 1, "teacher": 2}
    drawn = answers.draw(Image.new("RGB", (320, 320)), shown)
    assert drawn.getpixel((160, 160)) == (255, 190, 0)  # the corner of the teacher's second box
    assert drawn.getpixel((16, 16)) == (0, 0, 0)
    lines = [drawn.getpixel((32 + inwards, 80)) for inwards in range(5)]  # of all three boxes in one place
    assert lines == [(255, 255, 255), (0, 200, 255), (255, 190, 0), (255, 190, 0), (0, 0, 0)]
    assert answers.draw(Image.new("RGB", (32, 40)), shown).size == (256, 320)  # small ones are enlarged before


# -------------------------------------------------------------------------------------------------------- from end to end

RECIPE = {
    "teacher": {
        "model": "adamixer",
        "weights": "train",
        "args": {**SMALL, "stages": 2, "num_classes": 2},
        "finetune": {"epochs": 1, "lr": 2e-3, "clip_grad": 1.0, "backbone_lr": 0.5},
    },
    "data": {"name": "coco", "batch_size": 8, "augment": {"hflip": 0.5}},
    "calibration": {"images": 16},
    "steps": [
        {"adaptive_lors": {"rank": 2, "terms": 1}},
        {"lors": {"of": "decoder", "targets": ["mixing.projection"], "share": 2, "rank": 2}},
        {"distill": {"epochs": 1, "lr": 1e-3, "losses": {"prediction": {"weight": 0}, "labels": {"weight": 1.0}}}},
    ],
}


@pytest.fixture(scope="module")
def applied(tmp_path_factory):
    folder = tmp_path_factory.mktemp("detection")
    done("apply", with_scenes(folder, RECIPE, 16, 8), "--output", folder / "run")
    return folder


def test_a_run_measures_precision(applied):
    results = json.loads((applied / "run" / "results.json").read_text())
    for who in ("teacher", "student"):
        assert 0 <= results[who]["ap"] <= results[who]["ap50"] <= 100
    assert results["student"]["parameters"] < results["teacher"]["parameters"]
    assert "ap50_of_teacher" in results["student"]


def test_its_student_is_loaded_without_the_data(applied):
    student = artifact.load(applied / "run" / "student")
    images = torch.randn(2, 3, 32, 32)
    assert student(images).logits.shape == (2, 2, 6, 2)
    generators = [stage.mixing.generator for stage in student.decoder.stages]
    assert generators[0].weight is generators[1].weight


def test_it_is_evaluated_as_at_the_end_of_its_run(applied):
    results = json.loads((applied / "run" / "results.json").read_text())
    out = done("evaluate", applied / "run")
    for key, name in (("ap", "average precision"), ("ap50", "average precision at IoU 0.5")):
        assert f"{name} │ {results['student'][key]:.2f} %" in out


def test_the_report_shows_boxes(applied):
    done("report", applied / "run")
    page = (applied / "run" / "report.html").read_text()
    assert "average precision at IoU 0.5" in page
    predictions = json.loads((applied / "run" / "predictions.json").read_text())
    assert all(image["boxes"]["true"] for image in predictions["examples"])


def test_a_merged_detector_is_an_artifact_of_plain_layers(applied):
    """timm alone cannot build it."""
    out = done("merge", applied / "run", "--dense", "--output", applied / "merged")
    assert "model alone" in out
    assert "timm alone has no such model" in out
    student, merged = artifact.load(applied / "run" / "student"), artifact.load(applied / "merged")
    assert not compression_of(merged).plans
    images = torch.randn(2, 3, 32, 32)
    for ours, theirs in zip(merged(images), student(images), strict=True):
        assert torch.allclose(ours, theirs, atol=1e-5)  # measured 9.5e-7


def test_backbone_of_a_classifier_is_refused():
    recipe = parse_recipe(
        yaml.safe_dump(
            {
                "teacher": {"model": "vit_tiny_patch16_224", "weights": "train", "backbone": "pretrained"},
                "data": {"name": "digits"},
                "steps": [{"finetune": {"epochs": 1}}],
            }
        )
    )
    with pytest.raises(UserError, match=r"teacher.backbone=pretrained: vit_tiny_patch16_224 is no detector"):
        load_teacher(recipe, build_teacher(recipe, classes=10))
