"""The task `segmentation`: mIoU and its intervals, the loss, imitation of pixels, and what the report shows."""

from __future__ import annotations

import itertools
import json

import pytest
import torch
from PIL import Image
from sklearn.metrics import accuracy_score, jaccard_score

from compressvit.errors import UserError
from compressvit.model.weights import build
from compressvit.tasks import overlap, painting
from compressvit.tasks.base import find_task, task_of
from compressvit.tasks.overlap import IGNORED, Overlap, on_picture
from compressvit.tasks.qualities import differences, intervals

TASK = find_task("segmentation")


class Model(torch.nn.Module):
    task, num_classes = "segmentation", 3


def logits_of(classes) -> torch.Tensor:
    """Logits (1, 3, H, W) that are sure of these classes."""
    return torch.nn.functional.one_hot(torch.tensor(classes)[None], 3).permute(0, 3, 1, 2).float() * 9


def measured(found, truth, expected=None):
    metrics = TASK.metrics(Model(), None if expected is None else Model(), True)
    for i, said in enumerate(found):
        metrics.add(logits_of(said), [torch.tensor(truth[i])], None if expected is None else logits_of(expected[i]))
    return metrics.result()


def test_mean_iou_by_hand():
    """Class 0 has 1 of 4 pixels that are or were said to be, class 1 has 2 of 6, class 2 none. What is ignored is wrong, and not judged."""
    result = measured([[[0, 1, 1, 1], [1, 1, 1, 1]]], [[[0, 0, 1, 1], [2, 0, 0, IGNORED]]])
    assert result["miou"] == pytest.approx(100 * (1 / 4 + 2 / 6 + 0) / 3)
    assert result["pixel_accuracy"] == pytest.approx(100 * 3 / 7)
    absent = measured([[[0, 1], [1, 1]]], [[[0, 1], [1, 1]]])
    assert absent["miou"] == 100  # of two classes; the third neither is nor was found


def test_pixels_are_summed_over_pictures_before_they_are_divided():
    result = measured([[[0, 0]], [[1, 1]]], [[[0, 1]], [[1, 1]]])
    assert result["miou"] == pytest.approx(100 * (1 / 2 + 2 / 3) / 2)


def test_a_set_of_ignored_pixels_has_no_figures():
    result = measured([[[0, 1]]], [[[IGNORED, IGNORED]]])
    assert result["miou"] is None
    assert result["pixel_accuracy"] is None
    assert result["miou_low"] is None


def random_pair(seed, images=40):
    """Masks of so many pictures, and what is said of them, of which a part is right that differs from picture to picture."""
    generator = torch.Generator().manual_seed(seed)
    true = torch.randint(3, (images, 8, 8), generator=generator)
    right = torch.rand(images, 8, 8, generator=generator) < torch.rand(images, 1, 1, generator=generator)
    return true, torch.where(right, true, torch.randint(3, true.shape, generator=generator))


def accumulated(true, said):
    found = Overlap(3)
    for mask, answer in zip(true, said, strict=True):
        found.add(answer, mask)
    return found


def test_figures_are_those_of_scikit_learn():
    true, said = random_pair(3)
    true[:, 0] = IGNORED
    result, counted = accumulated(true, said).result(), true != IGNORED
    a, b = true[counted].numpy(), said[counted].numpy()
    assert result["miou"] == pytest.approx(100 * jaccard_score(a, b, average="macro"))
    assert result["pixel_accuracy"] == pytest.approx(100 * accuracy_score(a, b))


def test_intervals_are_those_of_a_bootstrap_over_images(monkeypatch):
    """As by drawing pictures and judging them anew, pixel by pixel, with other draws."""
    true, said = random_pair(0)
    result = accumulated(true, said).result()
    generator, figures = torch.Generator().manual_seed(7), []
    for _ in range(400):
        chosen = torch.randint(len(true), (len(true),), generator=generator)
        a, b = true[chosen], said[chosen]
        figures.append(100 * sum(((a == k) & (b == k)).sum() / ((a == k) | (b == k)).sum() for k in range(3)) / 3)
    low, high = torch.stack(figures).quantile(torch.tensor([0.025, 0.975])).tolist()
    assert result["miou_low"] == pytest.approx(low, abs=1.5)  # measured 0.4
    assert result["miou_high"] == pytest.approx(high, abs=1.5)  # measured 0.6
    assert result["miou_low"] < result["miou"] < result["miou_high"]
    assert intervals({**result, "images": 40})["miou"] == (result["miou_low"], result["miou_high"])
    assert accumulated(true, said).result() == result  # the same draws every time
    monkeypatch.setattr(overlap, "_MOST_DRAWN", 7 * 40)  # seven samples at a time
    assert accumulated(true, said).result() == pytest.approx(result)


def test_a_difference_is_judged_image_by_image():
    """A student that is its teacher but for a pixel is behind it by little, however wide the intervals of both are."""
    true, said = random_pair(1)
    worse = said.clone()
    worse[0] = (true[0] + 1) % 3
    result = accumulated(true, worse).result(accumulated(true, said))
    low, behind, high = differences({**result, "images": 40})["miou"]
    assert behind == pytest.approx(result["teacher_miou"] - result["miou"])
    assert 0 <= low <= behind <= high
    assert high - low < (result["miou_high"] - result["miou_low"]) / 2  # measured 0.25 of it
    same = accumulated(true, said).result(accumulated(true, said))
    assert differences({**same, "images": 40})["miou"] == (0, 0, 0)


def test_classes_of_a_large_picture_are_found_some_at_a_time(monkeypatch):
    logits = torch.randn(5, 4, 6, generator=torch.Generator().manual_seed(0))
    whole = on_picture(logits, (13, 9))
    assert whole.shape == (13, 9)
    monkeypatch.setattr(overlap, "_MOST_VALUES", 2 * 13 * 9)
    assert torch.equal(on_picture(logits, (13, 9)), whole)
    assert torch.equal(on_picture(logits, (4, 6)), logits.argmax(0))


def test_figures_are_of_the_picture_on_disk():
    """Half of a picture is found from two pixels."""
    metrics = TASK.metrics(Model(), None, True)
    metrics.add(logits_of([[0, 1]]), [torch.tensor([[0, 0, 0, 1, 1, 1]] * 5)], None)
    assert metrics.result()["miou"] == 100


def test_agreement_counts_pixels_of_the_teachers_class_ignored_ones_too():
    result = measured([[[0, 1, 1, 2]]], [[[IGNORED, 1, 0, 2]]], [[[0, 1, 2, 1]]])
    assert result["pixel_agreement"] == 50
    assert result["teacher_pixel_accuracy"] == pytest.approx(100 / 3)
    unlabelled = TASK.metrics(Model(), Model(), False)
    unlabelled.add(logits_of([[0, 1]]), torch.tensor([-1]), logits_of([[0, 2]]))
    assert unlabelled.result() == {"pixel_agreement": 50}


def test_data_of_more_classes_than_the_model_is_refused():
    with pytest.raises(UserError, match=r"the data has class 3, but the model has only 3 classes \(0 to 2\)"):
        measured([[[0]]], [[[3]]])


def test_the_loss_is_a_mean_over_pixels_that_are_not_ignored():
    outputs = torch.randn(2, 3, 4, 5, generator=torch.Generator().manual_seed(0), requires_grad=True)
    masks = torch.randint(3, (2, 4, 5), generator=torch.Generator().manual_seed(1))
    masks[0, :3], masks[1, 0] = IGNORED, IGNORED
    counted = masks != IGNORED
    by_pixel = outputs.log_softmax(1).gather(1, masks.clamp(max=2)[:, None])[:, 0]
    expected = -by_pixel[counted].sum() / counted.sum()
    for targets in (list(masks.byte()), masks):
        assert torch.allclose(TASK.loss(outputs, targets), expected)
    TASK.loss(outputs, masks).backward()
    assert outputs.grad[0, :, :3].abs().sum() == 0
    assert TASK.loss(outputs, torch.full_like(masks, IGNORED)) == 0  # not NaN
    with pytest.raises(UserError, match="masks are 4×4 and the outputs 4×5"):
        TASK.loss(outputs, masks[:, :, :4])


def test_imitation_is_the_divergence_of_pixels():
    outputs, expected = torch.randn(2, 2, 3, 4, 5, generator=torch.Generator().manual_seed(0)).unbind()
    (part,) = TASK.imitation(outputs, expected, 2.0).values()
    p, q = ((logits / 2).softmax(1) for logits in (expected, outputs))
    assert torch.allclose(part, (p * (p / q).log()).sum(1).mean())
    assert TASK.imitation(expected, expected, 1.0)["pixels"] == 0
    larger = torch.nn.functional.interpolate(expected, (8, 10), mode="nearest")
    assert TASK.imitation(outputs, larger, 1.0)["pixels"] > 0  # a teacher of larger images


@pytest.mark.parametrize(
    ("targets", "text"),
    [
        ([torch.zeros(4, 4, dtype=torch.uint8)], "gives 1 masks for 2 images"),
        (torch.tensor([0, 1]), "gives a Tensor that holds no masks"),
        ([{"boxes": 1}] * 2, "gives a list that holds no masks"),
        (torch.rand(2, 4, 4), "gives a Tensor that holds no masks"),
        (
            torch.full((2, 4, 4), 7),
            "a mask has the value 7, which is no class: there are 3, 0 to 2, and 255 is ignored",
        ),
        (torch.full((2, 4, 4), -1), "a mask has the value -1, which is no class"),
    ],
)
def test_targets_of_a_callers_loader_are_checked(targets, text):
    with pytest.raises(UserError, match=text):
        TASK.check_batch(targets, 2, 3, "the loader")


def test_masks_of_a_callers_loader_are_taken():
    TASK.check_batch([torch.tensor([[0, 2, IGNORED]])] * 2, 2, 3, "the loader")
    TASK.check_batch(torch.tensor([-1, -1]), 2, 3, "the loader")


def test_a_segmenter_is_of_this_task_whatever_the_data_says():
    model = build("segmenter", backbone="resnet18", img_size=32, num_classes=3)
    assert task_of(model) is TASK
    assert task_of(model, "classification") is TASK
    assert not TASK.fits(build("vit_tiny_patch16_224"))


def shown(compared=True):
    """Two pictures, of which student and teacher see the second differently."""
    answers = TASK.answers(Model(), ["sky"], True)
    ours = torch.cat([logits_of([[0, 0], [1, 1]]), logits_of([[2, 2], [2, 1]])])
    theirs = torch.cat([logits_of([[0, 0], [1, 1]]), logits_of([[0, 2], [2, 1]])])
    truth = [torch.tensor([[0, 0], [IGNORED, 1]]), torch.tensor([[0, 0], [0, 0]])]
    return answers, answers.add(ours, truth, theirs if compared else None)


def test_the_images_worth_showing_are_those_with_pixels_apart():
    answers, worth = shown()
    assert worth.tolist() == [0.0, 0.25]
    assert answers.measure == "pixels_apart"
    said = answers.describe(0)
    assert (said["true"], said["student"]) == ("sky 67 %, 1 33 %", "sky 50 %, 1 50 %")
    alone, worth = shown(compared=False)
    assert worth.tolist() == [0.0, 1.0]
    assert alone.measure == "pixels_wrong"
    assert "teacher" not in alone.describe(0)


def test_classes_have_an_iou_of_their_own():
    answers, _ = shown()
    tables = answers.tables()
    assert tables["class_figure"] == "IoU"
    # Of 6 pixels of class 0 the teacher finds 3 and the student 2; both find the one pixel of class 1, and one that is none.
    assert tables["classes"] == [
        {"class": "sky", "images": 2, "teacher": 50.0, "student": 33.33},
        {"class": "1", "images": 1, "teacher": 50.0, "student": 50.0},
    ]
    alone, _ = shown(compared=False)
    assert [set(row) for row in alone.tables()["classes"]] == [{"class", "images", "student"}] * 2
    unlabelled = TASK.answers(Model(), None, False)
    assert unlabelled.tables()["classes"] is None


def test_masks_are_painted_beside_the_picture():
    answers, _ = shown()
    description = json.loads(json.dumps(answers.describe(1)))
    drawn = answers.draw(Image.new("RGB", (80, 80), (100, 100, 100)), description)
    assert drawn.size == (2 * 160 + 2, 2 * 160 + 2)

    def over(number):
        return tuple(round(0.6 * part + 40) for part in painting.colour_of(number))

    def near(pixel, expected):
        return all(abs(a - b) <= 1 for a, b in zip(pixel, expected, strict=True))

    assert drawn.getpixel((10, 10)) == (100, 100, 100)  # the picture as it is
    assert near(drawn.getpixel((162 + 40, 40)), over(0))  # what is annotated
    assert near(drawn.getpixel((40, 162 + 40)), over(0))  # the teacher
    assert near(drawn.getpixel((162 + 40, 162 + 40)), over(2))  # the student
    alone, _ = shown(compared=False)
    three = alone.draw(Image.new("RGB", (80, 80)), alone.describe(0))
    assert three.getpixel((162 + 40, 162 + 40)) == (255, 255, 255)  # no fourth part
    assert three.getpixel((162 + 40, 120)) == (0, 0, 0)  # what is ignored


def test_neighbouring_classes_have_different_colours():
    colours = [painting.colour_of(number) for number in range(150)]
    assert len(set(colours)) == 150
    for a, b in itertools.pairwise(colours):
        assert sum(abs(x - y) for x, y in zip(a, b, strict=True)) > 100
