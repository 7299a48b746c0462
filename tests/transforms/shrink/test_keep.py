"""A loss as the budget of `shrink`: the smallest student that keeps it."""

from __future__ import annotations

import logging

import pytest
import torch
from helpers.latency import table_of
from helpers.models import build, images_for

from compressvit.artifacts import artifact
from compressvit.errors import UserError
from compressvit.fitting.choices import Choices
from compressvit.fitting.reference import Reference
from compressvit.model import cost, surgery
from compressvit.model.backbone import input_size
from compressvit.transforms import Shrink
from compressvit.transforms.applying import compress, plan_transforms, transform_
from compressvit.transforms.record import compression_of
from compressvit.transforms.shrink import spec
from compressvit.transforms.shrink.budget import ShrinkBudget
from compressvit.transforms.shrink.keep import LARGEST, ShrinkKeep, Trial, smallest


def step(**settings):
    cheap = {"keep": {"cosine": 0.9}, "methods": ("neurons",), "multiple": 4, "metric": "weights", "tries": 4}
    return Shrink(**{**cheap, **settings})


class Judge:
    """Judges a student by its parameters alone: it has the cosine of their share of the teacher's."""

    images = "images of a test"

    def __init__(self, teacher, scale=1.0):
        self.whole, self.scale = parameters(teacher), scale
        self.asked: list[float] = []

    def refuse(self, figures):
        assert figures == ["cosine"]

    def figures(self, student, wanted):
        self.asked.append(parameters(student) / self.whole)
        return {"cosine": self.scale * self.asked[-1]}


def parameters(model):
    return sum(p.numel() for p in model.parameters())


def kept(teacher, judge, path=None, **settings):
    reference = Reference(surgery.deep_copy(teacher), images_for(teacher, 9), choices=Choices(path), judge=judge)
    student = surgery.deep_copy(teacher)
    transform_(student, [step(**settings)], reference)
    (plan,) = compression_of(student).plans
    return student, plan.kept


def test_the_student_keeps_what_is_asked_and_a_slightly_smaller_one_did_not():
    teacher = build("vit")
    judge = Judge(teacher)
    student, found = kept(teacher, judge, keep={"cosine": 0.8}, tries=5)
    assert parameters(student) / judge.whole >= 0.8
    assert [trial.kept for trial in found.trials] == [trial.figures["cosine"] >= 0.8 for trial in found.trials]
    smaller = max(trial.size for trial in found.trials if not trial.kept)
    larger = min(trial.size for trial in found.trials if trial.kept)
    assert smaller < larger <= smaller + (LARGEST - 0.4) / 2**5
    assert [trial.spent for trial in found.trials] == [share * judge.whole for share in judge.asked]
    assert min(trial.spent for trial in found.trials if trial.kept) == parameters(student)
    assert (found.wanted, found.unit, found.images) == ({"cosine": 0.8}, "parameters", judge.images)
    assert [row.spent for row in found.sizes().tried if row.chosen] == [parameters(student)]


def test_the_student_is_the_one_that_was_judged(tmp_path):
    """Its outputs on the images that decided have the figure in the plan; the file has the plan, and is read without a judge."""
    teacher, images = build("vit"), images_for(build("vit"), 24)
    student = compress(teacher, [step(metric="outputs", methods=("neurons", "head_dim"), unit="macs", tries=2)], images)
    (plan,) = compression_of(student).plans
    last = min((trial for trial in plan.kept.trials if trial.kept), key=lambda trial: trial.size)
    with torch.no_grad():
        cosines = torch.cosine_similarity(student.eval()(images), teacher(images))
    assert cosines[3::4].mean().item() == pytest.approx(last.figures["cosine"], abs=1e-5)
    shares = [cost.macs(model, input_size(model)) for model in (student, teacher)]
    assert (last.spent, shares[0] <= last.size * shares[1]) == (shares[0], True)
    again = artifact.load(artifact.save(student, tmp_path / "student"))
    assert compression_of(again).plans == [plan]


def test_an_interrupted_search_goes_on(tmp_path):
    teacher, path = build("vit"), tmp_path / "choices.json"
    whole = Judge(teacher)
    student, found = kept(teacher, whole, keep={"cosine": 0.8}, tries=3)

    class Stopped(Judge):
        def figures(self, student, wanted):
            if len(self.asked) == 2:
                raise KeyboardInterrupt
            return super().figures(student, wanted)

    with pytest.raises(KeyboardInterrupt):
        kept(teacher, Stopped(teacher), path, keep={"cosine": 0.8}, tries=3)
    rest = Judge(teacher)
    again, known = kept(teacher, rest, path, keep={"cosine": 0.8}, tries=3)
    assert known == found
    assert rest.asked == whole.asked[2:]
    assert all(torch.equal(a, b) for a, b in zip(student.parameters(), again.parameters(), strict=True))


@pytest.mark.wide
def test_another_question_is_not_answered_by_what_is_known(tmp_path):
    teacher, path = build("vit"), tmp_path / "choices.json"
    kept(teacher, Judge(teacher), path, keep={"cosine": 0.8}, tries=3)
    other = Judge(teacher)
    kept(teacher, other, path, keep={"cosine": 0.7}, tries=3)
    assert len(other.asked) == 3


@pytest.mark.wide
def test_latency_may_be_the_unit(monkeypatch):
    monkeypatch.setattr(spec, "measure", lambda model, found, **options: table_of(model, found))
    monkeypatch.setattr(spec, "ratio", lambda *models, **options: (0.9, 0.95, 1.0))  # no limit that would be corrected
    teacher = build("vit")
    _, found = kept(teacher, Judge(teacher), unit="latency")
    assert found.unit == "latency"
    assert all(trial.spent > 0 for trial in found.trials)


def test_what_cannot_be_kept_is_refused_with_what_the_largest_student_has(caplog):
    teacher = build("vit")
    judge = Judge(teacher, scale=0.5)
    with (
        caplog.at_level(logging.INFO, logger="compressvit"),
        pytest.raises(
            UserError,
            match=r"cosine ≥ 0.9 cannot be kept: the largest .* 0.97 of the teacher's parameters, has cosine 0.4",
        ),
    ):
        kept(teacher, judge)
    assert len(judge.asked) == 5
    assert "size 1 of 4: " in caplog.text


def test_what_calibration_images_cannot_say_is_refused_before_they_are_read():
    teacher = build("vit")

    def images():
        raise AssertionError("images were read")

    with pytest.raises(UserError, match="top1_drop needs images with labels"):
        compress(teacher, [step(keep={"top1_drop": 1.0})], images)
    with pytest.raises(UserError, match="none of the calibration images is held out"):
        compress(teacher, [step()], images_for(teacher, 3))
    for metric in ("weights", "outputs"):
        with pytest.raises(
            UserError, match=r"^shrink: keep judges students on images, and none were given: .* a budget$"
        ):
            compress(teacher, [step(metric=metric)])


@pytest.mark.parametrize(
    ("settings", "text"),
    [
        ({}, "needs a budget or keep"),
        ({"budget": {"macs": 0.5}, "keep": {"cosine": 0.9}}, "not both"),
        ({"budget": {"macs": 0.5}, "unit": "macs"}, "unit is for keep"),
        ({"budget": {"macs": 0.5}, "tries": 3}, "tries is for keep"),
        ({"budget": {"macs": 0.5}, "batch": 8}, "batch is for latency"),
        ({"keep": {"cosine": 0.9}, "batch": 8}, "batch is for latency"),
        ({"keep": {}}, "at least one of cosine, top1_drop"),
        ({"keep": {"cosine": 1.0}}, "less than 1"),
        ({"keep": {"cosin": 0.9}}, "did you mean 'cosine'"),
        ({"keep": {"cosine": 0.9}, "tries": 0}, "at least 1|greater than or equal to 1"),
    ],
    ids=str,
)
def test_options_that_make_no_sense(settings, text):
    with pytest.raises(UserError, match=text):
        Shrink(**settings)


def test_what_is_for_latency_or_keep_may_be_given_with_it_and_goes_with_it():
    for own in (step(unit="latency", batch=8), Shrink(budget=ShrinkBudget(latency=0.5, macs=0.9), batch=8)):
        other = own.with_budget("macs", 0.5)
        assert Shrink.model_validate(other.model_dump(mode="json")) == other  # as a resolved recipe is read
        assert (other.tries, other.batch) == (6, 1)


def test_a_plan_without_values_has_half_and_says_so():
    teacher = build("vit")
    (plan,) = plan_transforms(teacher, [step(methods=("neurons", "head_dim"))])
    assert plan.kept is None
    assert any("the student has 0.5 of the teacher's parameters in this plan" in text for text in step().provisional)


def test_all_figures_hold_and_the_search_ends_at_the_smallest_size():
    keep = ShrinkKeep(cosine=0.9, top1_drop=1.0)
    assert keep.holds({"cosine": 0.9, "top1_drop": 1.0})
    assert not keep.holds({"cosine": 0.95, "top1_drop": 1.1})
    assert not keep.holds({"cosine": 0.89, "top1_drop": -2.0})
    best, trials = smallest(keep, "macs", 0.2, 20, lambda size: Trial(size=size, spent=size, figures={}, kept=True))
    assert best.size == pytest.approx(0.2, abs=1e-3)
    assert len(trials) < 20  # sizes are rounded
