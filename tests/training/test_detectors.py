"""Distilling a detector: its predictions by hand and by their laws, the maps of its pyramid, and a phase in which all terms are learned."""

from __future__ import annotations

import copy
import math
import os
import signal

import pytest
import torch
from helpers.runs import metrics, run, student_bytes
from helpers.scenes import with_scenes
from rich.console import Console
from torch import nn

import compressvit
from compressvit.errors import UserError
from compressvit.model.backbone import family_of
from compressvit.model.detectors.prediction import SetPrediction, divergence
from compressvit.model.detectors.regions import Numbers, imitation
from compressvit.model.families.adamixer import SMALL
from compressvit.model.weights import build
from compressvit.recipe.recipe import load_recipe
from compressvit.runs.plan import plan_recipe
from compressvit.tasks.base import find_task
from compressvit.training import step
from compressvit.training.terms import Batch, build_terms
from compressvit.training.terms.section import losses_section

TASK = find_task("detection")
SWIN = {"embed_dim": 24, "depths": (1, 1, 1, 1), "num_heads": (2, 2, 2, 2), "window_size": 2, "drop_path_rate": 0.0}
REGIONS = {
    "backbone": "swin_tiny_patch4_window7_224",
    "backbone_args": SWIN,
    "img_size": 64,
    "num_classes": 3,
    "channels": 16,
    "representation": 32,
}
DETECTORS = {"adamixer": SMALL, "faster_rcnn": REGIONS, "mask_rcnn": {**REGIONS, "outline": 8}}


def detector(name: str, **args) -> nn.Module:
    torch.manual_seed(0)
    return build(name, **DETECTORS[name] | args)


def learned(student: nn.Module, teacher: nn.Module, count: int = 2, **losses) -> tuple[torch.Tensor, dict]:
    """The value of one term of `losses` and what it logs, of a student in training mode on random images."""
    weights = {"prediction": {"weight": 0.0}} | losses
    features = family_of(student).features
    (term,) = build_terms(
        losses_section()(**weights, attention_relation={"weight": 0}, hidden_relation={"weight": 0}),
        [],
        classes=student.num_classes,
        task=TASK,
        features=features,
    )
    images = torch.randn(count, 3, *student.img_size, generator=torch.Generator().manual_seed(1))
    outputs = student.train()(images)
    with torch.no_grad():
        expected = teacher.eval()(images)
    maps = [{features: {"output": model.maps(images)}} for model in (student, teacher)]
    return term.function(Batch(outputs, expected, maps[0], maps[1], None))


# ------------------------------------------------------------------------------------------------------------------ by hand


def test_divergence_is_that_of_independent_probabilities():
    p, q = 0.8, 0.4
    logit = lambda share: torch.tensor(math.log(share / (1 - share)))  # noqa: E731
    expected = p * math.log(p / q) + (1 - p) * math.log((1 - p) / (1 - q))
    assert divergence(logit(q), logit(p)).item() == pytest.approx(expected, abs=1e-6)
    halved = [torch.tensor(math.log(s / (1 - s)) / 2).sigmoid().item() for s in (p, q)]
    expected = sum(
        a * math.log(a / b) for a, b in zip((halved[0], 1 - halved[0]), (halved[1], 1 - halved[1]), strict=True)
    )
    assert divergence(logit(q), logit(p), 2.0).item() == pytest.approx(expected, abs=1e-6)


def test_queries_by_hand():
    """One image, two queries, of which the teacher is sure by 0.9 and 0.3, one class: 1.2 objects."""
    logit = lambda share: math.log(share / (1 - share))  # noqa: E731
    theirs = SetPrediction(
        torch.tensor([logit(0.9), logit(0.3)]).view(1, 1, 2, 1),
        torch.tensor([[0.0, 0.0, 0.5, 0.5], [0.5, 0.5, 1.0, 1.0]]).view(1, 1, 2, 4),
    )
    ours = SetPrediction(
        torch.tensor([logit(0.6), logit(0.3)]).view(1, 1, 2, 1),
        torch.tensor([[0.0, 0.0, 0.5, 0.25], [0.5, 0.5, 1.0, 0.5 + 0.25]]).view(1, 1, 2, 4),
    )
    parts = ours.imitation(theirs)
    apart = 0.9 * math.log(0.9 / 0.6) + 0.1 * math.log(0.1 / 0.4)
    assert parts["classes"].item() == pytest.approx(2 * apart / 1.2, abs=1e-6)
    assert parts["l1"].item() == pytest.approx(5 * (0.9 + 0.3) * 0.25 / 1.2, abs=1e-6)
    assert parts["giou"].item() == pytest.approx(2 * (0.9 + 0.3) * 0.5 / 1.2, abs=1e-5)  # half of the union is shared


def test_stages_are_summed_and_each_has_its_own_objects():
    torch.manual_seed(0)
    logits, boxes = torch.randn(2, 3, 4, 5), torch.rand(2, 3, 4, 2).repeat(1, 1, 1, 2)
    boxes[..., 2:] += 0.3
    theirs, ours = SetPrediction(logits, boxes), SetPrediction(logits + 1, boxes + 0.1)
    whole = ours.imitation(theirs)
    alone = [
        SetPrediction(*(v[i : i + 1] for v in ours)).imitation(SetPrediction(*(v[i : i + 1] for v in theirs)))
        for i in (0, 1)
    ]
    for name, value in whole.items():
        assert value.item() == pytest.approx(alone[0][name].item() + alone[1][name].item(), rel=1e-5)


def test_regions_by_hand():
    """Two anchors of 0.8 and 0.4 (1.2 objects), one proposal of background 0.5, class 0.5 (0.5 objects, counted as 1)."""
    logit = lambda share: math.log(share / (1 - share))  # noqa: E731
    theirs = Numbers(torch.tensor([logit(0.8), logit(0.4)]), torch.zeros(2, 4), torch.zeros(1, 2), torch.zeros(1, 8))
    ours = Numbers(
        torch.tensor([logit(0.4), logit(0.4)]),
        torch.tensor([[2.0, 0.0, 0.0, 0.0], [0.0, 0.0, 0.0, 0.5]]),
        torch.tensor([[math.log(3.0), 0.0]]),
        torch.tensor([[9.0, 9.0, 9.0, 9.0, 3.0, 0.0, 0.0, 0.0]]),  # background has no box
    )
    parts = imitation(ours, theirs)
    apart = 0.8 * math.log(0.8 / 0.4) + 0.2 * math.log(0.2 / 0.6)
    assert parts["loss_objectness"].item() == pytest.approx(apart / 2, abs=1e-6)
    assert parts["loss_rpn_box_reg"].item() == pytest.approx((0.8 * 1.5 + 0.4 * 0.125) / 1.2, abs=1e-6)
    assert parts["loss_classifier"].item() == pytest.approx(
        0.5 * math.log(0.5 / 0.75) + 0.5 * math.log(0.5 / 0.25), abs=1e-6
    )
    assert parts["loss_box_reg"].item() == pytest.approx(0.5 * 2.5, abs=1e-6)


def test_anchors_without_an_object_do_not_dilute_those_with_one():
    """One object on 10 anchors, and 200,000 anchors of 0.25 %, which would be 500 objects."""
    torch.manual_seed(0)
    heads = torch.zeros(1, 2), torch.zeros(1, 8)

    def parts(empty: int) -> dict[str, float]:
        logits = torch.cat([torch.full((10,), 4.0), torch.full((empty,), -6.0)])
        theirs = Numbers(logits, torch.zeros(10 + empty, 4), *heads)
        wrong = torch.cat([torch.ones(10), torch.zeros(empty)])
        ours = Numbers(logits - 4 * wrong, torch.full((10 + empty, 4), 0.5), *heads)
        return {name: value.item() for name, value in imitation(ours, theirs).items()}

    few, many = parts(246), parts(200_000)
    assert many == pytest.approx(few, rel=1e-5)
    assert many["loss_objectness"] > 0.01
    assert many["loss_rpn_box_reg"] == pytest.approx(4 * 0.5 * 0.5**2, rel=1e-5)


def test_an_object_that_the_student_alone_sees_counts():
    theirs = Numbers(torch.linspace(-5, -7, 1000), torch.zeros(1000, 4), torch.zeros(1, 2), torch.zeros(1, 8))
    ours = theirs._replace(objectness=theirs.objectness.index_fill(0, torch.tensor([700]), 4.0))
    assert imitation(ours, theirs)["loss_objectness"] > 0.01


# --------------------------------------------------------------------------------------------------------------------- laws


@pytest.mark.wide_unless(lambda name: name in ("adamixer", "faster_rcnn"))
@pytest.mark.parametrize("name", DETECTORS)
@pytest.mark.parametrize("losses", [{"prediction": {"weight": 1.0}}, {"feature": {"weight": 1.0}}], ids=str)
def test_a_student_that_is_its_teacher_has_nothing_to_learn(name, losses):
    teacher = detector(name)
    student = copy.deepcopy(teacher)
    value, _ = learned(student, teacher, **losses)
    assert abs(value.item()) <= 1e-5  # measured 2.9e-7, of the GIoU of equal boxes
    with torch.no_grad():
        for parameter in student.parameters():
            parameter.add_(0.05 * torch.randn_like(parameter))
    value, parts = learned(student, teacher, **losses)
    assert value > 1e-3
    if "prediction" in losses:
        assert value.item() == pytest.approx(sum(part.item() for part in parts.values()), rel=1e-5)
        assert all(name.startswith("prediction_") and part > 0 for name, part in parts.items())


@pytest.mark.wide_unless(lambda name: name in ("adamixer", "faster_rcnn"))
@pytest.mark.parametrize("name", DETECTORS)
def test_only_the_student_gets_a_gradient(name):
    teacher, student = detector(name), detector(name)
    with torch.no_grad():
        for parameter in student.parameters():
            parameter.add_(0.05 * torch.randn_like(parameter))
    value, _ = learned(student, teacher, prediction={"weight": 1.0})
    value.backward()
    assert all(parameter.grad is None for parameter in teacher.parameters())
    without = {path for path, parameter in student.named_parameters() if parameter.grad is None}
    assert without <= {"backbone.norm.weight", "backbone.norm.bias"}  # which the maps of a Swin do not pass


def test_numbers_of_a_teacher_get_no_gradient():
    ours, theirs = (
        Numbers(*(torch.randn(shape).requires_grad_() for shape in ((3,), (3, 4), (2, 3), (2, 12)))) for _ in range(2)
    )
    sum(imitation(ours, theirs).values()).backward()
    assert all(values.grad is not None for values in ours)
    assert all(values.grad is None for values in theirs)


def test_gradients_are_those_of_differences():
    torch.manual_seed(0)
    boxes = torch.rand(1, 1, 3, 2, dtype=torch.float64).repeat(1, 1, 1, 2)
    boxes[..., 2:] += 0.3
    theirs = SetPrediction(torch.randn(1, 1, 3, 2, dtype=torch.float64), boxes)
    regions = Numbers(*(torch.randn(shape, dtype=torch.float64) for shape in ((3,), (3, 4), (2, 3), (2, 12))))
    at = tuple((value + 0.1).requires_grad_() for value in regions)
    assert torch.autograd.gradcheck(lambda *values: tuple(imitation(Numbers(*values), regions, 2.0).values()), at)
    # `SetPrediction` computes in float32: the slope along one direction
    logits = (theirs.logits + 0.3).float()
    step = torch.randn_like(logits)
    logits.requires_grad_()
    theirs = SetPrediction(*(value.float() for value in theirs))
    loss = lambda at: theirs._replace(logits=at).imitation(theirs)["classes"]  # noqa: E731
    (slope,) = torch.autograd.grad(loss(logits), logits)
    with torch.no_grad():
        found = (loss(logits + 1e-2 * step) - loss(logits - 1e-2 * step)) / 2e-2
    assert (slope * step).sum().item() == pytest.approx(found.item(), rel=1e-3)


# ----------------------------------------------------------------------------------------------------------------- refusals


def test_what_cannot_be_compared_is_refused():
    images = torch.randn(1, 3, 64, 64)
    two, three, regions = (
        detector("adamixer", stages=2, img_size=64),
        detector("adamixer", img_size=64),
        detector("faster_rcnn"),
    )
    ask = lambda student, teacher: TASK.imitation(student.train()(images), teacher.eval()(images), 1.0)  # noqa: E731
    with pytest.raises(UserError, match="the student has 2 stages, 6 queries and 5 classes, the teacher 3 stages"):
        ask(two, three)
    with pytest.raises(UserError, match="two detectors of one kind"):
        ask(two, regions)
    with pytest.raises(UserError, match="two detectors of one kind"):
        ask(regions, two)
    with pytest.raises(UserError, match="compares anchors and proposals one by one"):
        ask(detector("faster_rcnn", num_classes=4), regions)
    with pytest.raises(NotImplementedError):  # a plan does not know what there will be
        TASK.imitation((images,), (images,), 1.0)


# ------------------------------------------------------------------------------------------------------------------- a run

RECIPE = {
    "teacher": {
        "model": "adamixer",
        "weights": "train",
        "args": {**SMALL, "stages": 2, "num_classes": 2},
        "finetune": {"epochs": 1, "backbone_lr": 0.5},
    },
    "data": {"name": "coco", "batch_size": 4, "augment": {"hflip": 0.5}, "limit_val": 4},
    "calibration": {"images": 4},
    "steps": [
        {"adaptive_lors": {"rank": 2, "terms": 1}},
        {"lors": {"of": "decoder", "targets": ["mixing.projection"], "share": 2, "rank": 2}},
        {
            "distill": {
                "epochs": 2,
                "accumulate": 2,
                "backbone_lr": 0.0,
                "log_every": 1,
                "losses": {"labels": {"weight": 0.5}},
            }
        },
    ],
}
BATCHES = 3 + 2 * 3  # of the teacher's epoch, and of two of the distillation, of which two and then one make a step


@pytest.fixture(scope="module")
def recipe(tmp_path_factory):
    return with_scenes(tmp_path_factory.mktemp("detector"), RECIPE, 12, 4)


def applied(recipe, folder, stop_at: int, *words: str) -> list[int]:
    """Run a recipe and stop it at a batch, if there is one of that number; returns the batches that it came to."""
    seen: list[int] = []
    with pytest.MonkeyPatch.context() as patch:
        total = step.total_of

        def counted(*args):
            seen.append(len(seen) + 1)
            if len(seen) == stop_at:
                os.kill(os.getpid(), signal.SIGTERM)
            return total(*args)

        patch.setattr(step, "total_of", counted)
        code = run("apply", "--no-report", recipe, "--output", folder, *words)[0]
    assert code == (128 + signal.SIGTERM if len(seen) >= stop_at else 0)
    return seen


@pytest.fixture(scope="module")
def uninterrupted(recipe):
    assert len(applied(recipe, recipe.parent / "whole", 99)) == BATCHES
    return recipe.parent / "whole"


@pytest.mark.wide
@pytest.mark.parametrize(
    ("stop_at", "seen"),
    [
        (2, 2),  # amid the teacher's training
        (4, 5),  # amid a step, which is finished
        (6, 6),  # at the end of an epoch
        (BATCHES, BATCHES),
    ],
)
def test_a_stopped_run_goes_on_to_the_same_bits(uninterrupted, recipe, tmp_path, stop_at, seen):
    folder = tmp_path / "run"
    assert len(applied(recipe, folder, stop_at)) == seen
    assert not (folder / "student").exists()
    assert len(applied(recipe, folder, 99, "--resume")) == BATCHES - seen
    assert student_bytes(folder) == student_bytes(uninterrupted)


@pytest.mark.wide
def test_a_run_learns_every_term(uninterrupted):
    for row in metrics(uninterrupted, phase="2_distill", kind="train"):
        assert {"prediction", "prediction_classes", "prediction_l1", "prediction_giou"} <= set(row)
        parts = [row[name] for name in ("prediction", "attention_relation", "hidden_relation", "labels")]
        assert row["loss"] == pytest.approx(sum(parts), rel=1e-5)


@pytest.mark.wide_unless(lambda phase: phase.startswith("finetune"))
@pytest.mark.parametrize("phase", ["finetune: {epochs: 1}", "distill: {epochs: 1, losses: {feature: {weight: 1.0}}}"])
def test_a_plan_refuses_pooled_features_of_a_detector(recipe, phase):
    plan = plan_recipe(load_recipe(recipe, [f"steps=[{phase}]", "diagnostics=[embedding]"]))
    assert plan.conflicts
    assert all("t-SNE needs pooled features, which adamixer does not give" in conflict for conflict in plan.conflicts)


# ------------------------------------------------------------------------------------------------------------- from Python


def boxes_of(count: int) -> list[dict[str, torch.Tensor]]:
    """One object in each image."""
    box = {"boxes": torch.tensor([[0.1, 0.2, 0.6, 0.7]]), "labels": torch.tensor([1]), "crowd": torch.tensor([False])}
    return [box | {"size": torch.tensor([32, 32])} for _ in range(count)]


def test_a_loader_of_ones_own_gives_images_alone_or_with_boxes():
    images = torch.randn(2, 3, 32, 32)
    student, teacher = (detector("adamixer", stages=2) for _ in range(2))
    for batch, losses in ((images, {}), ((images, boxes_of(2)), {"labels": {"weight": 1.0}})):
        done = compressvit.distill(
            student, teacher, [batch], validation=[batch], epochs=1, lr=1e-4, losses=losses, console=Console(quiet=True)
        )
        assert done.figures["ap50_of_teacher"] is None or done.figures["ap50_of_teacher"] >= 0
        assert ("ap" in done.figures) == bool(losses)


@pytest.mark.parametrize(
    ("targets", "words"),
    [
        (
            torch.tensor([0, 1]),
            "gives a Tensor as targets of a detector, which takes a list with a mapping for each image",
        ),
        ([{"boxes": torch.zeros(0, 4)}] * 2, "gives mappings without labels, crowd, size"),
        (boxes_of(1), "gives 1 for 2 images"),
    ],
)
def test_targets_that_are_no_boxes_are_refused(targets, words):
    student, teacher = (detector("adamixer", stages=2) for _ in range(2))
    with pytest.raises(UserError, match=words):
        compressvit.distill(
            student, teacher, [(torch.randn(2, 3, 32, 32), targets)], epochs=1, console=Console(quiet=True)
        )
