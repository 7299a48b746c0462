"""A step asks the device for no number: what is logged waits, and an update with a value that is not finite is left out without asking."""

from __future__ import annotations

import math
import shutil

import pytest
import timm.optim
import torch
from helpers.images import side
from helpers.training import CPU, Heard, fit, largest_difference, random_batches, tiny_vit, values

from compressvit.errors import UserError
from compressvit.files import load_checkpoint
from compressvit.tasks.base import TASKS, task_of
from compressvit.training import optimisation as opt
from compressvit.training.batch import to_device
from compressvit.training.loop import Phase, Trainer
from compressvit.training.pairs import match_layers
from compressvit.training.phases.distill import Distill
from compressvit.training.phases.finetune import Finetune
from compressvit.training.stopping import Interrupted, StopRequest
from compressvit.training.terms import Term, labels_term

META = torch.device("meta")
STEADY = {"lr": 1e-2, "weight_decay": 0.1, "schedule": "constant"}

# --- no number is asked for


def with_unlabelled(batches):
    return [(images, torch.where(torch.arange(len(targets)) == 0, -1, targets)) for images, targets in batches]


def trainer_on_meta(spec, tmp_path, told):
    """A phase on the meta device, where whoever asks for a value gets an error; `told` hears of every step."""
    student, teacher = tiny_vit().to(META), tiny_vit(seed=1).to(META)
    terms = spec.terms(student, match_layers(student, teacher, "matched")[0])
    assert len(terms) == 5
    phase, batches = Phase("phase", 1, 0, tmp_path / "phase.pt"), with_unlabelled(random_batches(5, 6))
    trainer = Trainer(
        *(side(student), spec, phase, terms, batches, 6, CPU, Heard(), lambda model: {}, task_of(student)),
        *(side(teacher), None, None, (), lambda model, epoch, last: None),
    )
    trainer.device, trainer.finite = META, trainer.finite.to(META)  # autocast knows no meta device
    trainer.stop, trainer.advance = StopRequest(), lambda *text: told.append(text)
    trainer.connect()
    return trainer


MORE = {"adamw": {}, "sgd": {"mixup": 0.8, "smoothing": 0.1}, "lion": {"accumulate": 2, "ema": 0.9}}


@pytest.mark.wide_unless(lambda more, optimizer: optimizer == "lion" and more == MORE[optimizer])
@pytest.mark.parametrize("more", MORE.values())
@pytest.mark.parametrize("optimizer", MORE)
def test_a_step_that_is_not_logged_asks_for_no_value(tmp_path, more, optimizer):
    losses = {"feature": {"weight": 1}, "labels": {"weight": 1}}
    spec = Distill(epochs=2, log_every=100, optimizer=optimizer, losses=losses, **more)
    told = []
    trainer = trainer_on_meta(spec, tmp_path, told)
    trainer.train_epoch()
    assert told == [()] * (3 if "accumulate" in more else 5)
    with pytest.raises(RuntimeError, match="meta"):
        trainer.read()


def test_a_step_that_is_logged_asks(tmp_path):
    trainer = trainer_on_meta(
        Distill(log_every=2, losses={"feature": {"weight": 1}, "labels": {"weight": 1}}), tmp_path, []
    )
    with pytest.raises(RuntimeError, match="meta"):
        trainer.train_epoch()
    assert trainer.steps == 2


def test_what_the_labels_of_a_batch_decide_is_known_before_it_is_on_the_device():
    task = TASKS["classification"]
    mixing = opt.build_mixing(Finetune(mixup=0.8), task, 4)
    images = torch.zeros(6, 1, 8, 8)
    for given, mixed, count, largest, shape in (
        ([0, 3, 1, 1, 2, 0], False, 6, 3, (6,)),
        ([0, -1, 1, -1, 2, 0], False, 4, 2, (6,)),
        ([0, 3, 1, 1, 2, 0], True, 6, 3, (6, 4)),
        ([0, -1, 1, -1, -1, 2], True, 2, 1, (2, 4)),
        ([-1, -1, 3, -1, -1, -1], True, 1, 3, (1,)),
        ([-1] * 6, True, 0, -1, (6,)),
    ):
        moved, targets, labels, _ = to_device(images, torch.tensor(given), META, task, mixing if mixed else None)
        assert (labels.count, labels.largest) == (count, largest)
        assert targets.shape == shape
        assert len(moved) == shape[0]
        assert (moved.device, targets.device) == (META, META)


def test_the_batches_of_a_loader_are_left_as_they_are(tmp_path):
    batches, before = random_batches(2, 6), random_batches(2, 6)
    fit(tiny_vit(), Finetune(epochs=2, mixup=0.8), batches, tmp_path)
    unlabelled = [(images, torch.full_like(targets, -1)) for images, targets in batches]
    fit(tiny_vit(), Finetune(epochs=2, mixup=0.8), unlabelled, tmp_path / "without")
    assert all(torch.equal(one[0], other[0]) for one, other in zip(batches, before, strict=True))


# --- what is not finite


def spoiling(number, spoilt):
    """The labels' term, whose loss or gradient is not finite at one of its calls, counted from 1."""
    calls = []

    def term(batch):
        calls.append(1)
        loss, _ = labels_term(1.0, 0.0).function(batch)
        if len(calls) == number:
            # a constant has no slope, and the root an infinite one at 0
            loss = loss + math.inf if spoilt == "loss" else loss + (0 * batch.student_logits.sum()).sqrt()
        return loss, {"calls": torch.tensor(float(len(calls)))}

    return Term("spoilable", 1.0, term), calls


@pytest.mark.wide_unless(lambda spoilt, optimizer: (spoilt, optimizer) in (("loss", "sgd"), ("gradient", "adamw")))
@pytest.mark.parametrize("optimizer", ["adamw", "lion", "sgd"])
@pytest.mark.parametrize("spoilt", ["loss", "gradient"])
def test_the_weights_are_those_before_the_step_that_was_not_finite(tmp_path, spoilt, optimizer):
    """Steps 1 to 6 are good and step 7 is not; it is found out at step 10, and by then nothing has moved."""
    spec = Finetune(epochs=2, log_every=5, optimizer=optimizer, **STEADY)
    expected = tiny_vit()
    fit(expected, spec.model_copy(update={"max_steps": 6}), random_batches(20, 4), tmp_path / "expected")
    term, calls = spoiling(7, spoilt)
    model = tiny_vit()
    with pytest.raises(UserError, match=f"{spoilt}.*at step 7 .*spoilable.*calls 7.*no checkpoint had been") as caught:
        fit(model, spec, random_batches(20, 4), tmp_path / "spoilt", terms=[term])
    assert ("the loss is inf" in str(caught.value)) == (spoilt == "loss")
    assert len(calls) == 10
    assert largest_difference(values(model), values(expected)) == 0
    assert largest_difference(values(model), values(tiny_vit())) > 1e-3


def with_batch_norm():
    torch.manual_seed(0)
    model = torch.nn.Sequential(
        torch.nn.Conv2d(1, 8, 4, stride=4), torch.nn.BatchNorm2d(8), torch.nn.Flatten(), torch.nn.Linear(32, 4)
    )
    model.num_classes = 4
    return model


@pytest.mark.parametrize(("accumulate", "number"), [(1, 7), (2, 8)])  # a batch of its own step, the second of one
@pytest.mark.parametrize("spoilt", ["images", "loss"])
def test_the_statistics_of_batch_norm_are_those_before_the_step_that_was_not_finite(
    tmp_path, spoilt, accumulate, number
):
    spec = Finetune(epochs=1, log_every=100, accumulate=accumulate, **STEADY)
    expected, batches = with_batch_norm(), random_batches(12, 4)
    fit(expected, spec.model_copy(update={"max_steps": 6 // accumulate}), batches, tmp_path / "expected")
    assert expected[1].num_batches_tracked == 6
    terms = [spoiling(number, "loss")[0]] if spoilt == "loss" else None
    if spoilt == "images":
        images, targets = batches[number - 1]
        batches[number - 1] = (images * math.nan, targets)
    model = with_batch_norm()
    with pytest.raises(UserError, match=f"loss is (nan|inf) at step {6 // accumulate + 1} "):
        fit(model, spec, batches, tmp_path / "spoilt", terms=terms)
    after, before = model.state_dict(), expected.state_dict()
    assert after.keys() == before.keys() >= {"1.running_mean", "1.num_batches_tracked"}
    assert all(torch.equal(after[name], before[name]) for name in before)


def test_a_batch_amid_a_step_spoils_the_whole_step(tmp_path):
    spec = Finetune(epochs=1, log_every=100, accumulate=3, **STEADY)
    expected = tiny_vit()
    fit(expected, spec.model_copy(update={"max_steps": 2}), random_batches(12, 4), tmp_path / "expected")
    term, _ = spoiling(8, "loss")
    model = tiny_vit()
    with pytest.raises(UserError, match=r"loss is inf at step 3 \(spoilable inf, calls 8\)"):
        fit(model, spec, random_batches(12, 4), tmp_path / "spoilt", terms=[term])
    assert largest_difference(values(model), values(expected)) == 0


def test_an_epoch_that_was_not_finite_writes_no_checkpoint(tmp_path):
    """However seldom the log is written, the end of an epoch looks before it writes."""
    spec = Finetune(epochs=3, log_every=1000, ema=0.5, **STEADY)
    term, _ = spoiling(6, "gradient")
    with pytest.raises(UserError, match=r"at step 6 .*last good checkpoint is kept"):
        fit(tiny_vit(), spec, random_batches(4, 4), tmp_path, terms=[term])
    saved = load_checkpoint(tmp_path / "phase.pt")
    assert (saved["epoch"], saved["steps"]) == (1, 4)
    assert all(tensor.isfinite().all() for tensor in saved["model"].values())


def test_half_precision_skips_a_gradient_that_is_not_finite_and_goes_on(tmp_path):
    spec = Finetune(epochs=1, log_every=3, precision="fp16", **STEADY)
    term, _ = spoiling(2, "gradient")
    model = tiny_vit()
    heard = fit(model, spec, random_batches(6, 4), tmp_path, terms=[term])
    assert [line["step"] for line in heard.of("train")] == [3, 6]
    assert all(value.isfinite().all() for value in values(model).values())
    assert largest_difference(values(model), values(tiny_vit())) > 1e-3
    term, _ = spoiling(2, "loss")
    with pytest.raises(UserError, match="the loss is inf at step 2"):
        fit(tiny_vit(), spec, random_batches(6, 4), tmp_path / "loss", terms=[term])


def test_a_stopped_run_looks_before_it_writes(tmp_path, monkeypatch):
    term, calls = spoiling(2, "loss")
    monkeypatch.setattr(
        StopRequest, "signum", property(lambda self: 15 if len(calls) == 3 else None, lambda *_: None), raising=False
    )
    with pytest.raises(UserError, match="at step 2 "):
        fit(tiny_vit(), Finetune(log_every=1000), random_batches(4, 4), tmp_path, terms=[term])
    assert len(calls) == 3
    assert not (tmp_path / "phase.pt").exists()


@pytest.mark.parametrize("kind", [torch.optim.AdamW, torch.optim.SGD, timm.optim.Lion])
def test_an_update_is_left_out_by_the_device(kind):
    """A fused optimiser, as CUDA has them, leaves it out by itself; of others the parameters are put back."""
    torch.manual_seed(0)
    parameter = torch.nn.Parameter(torch.randn(5))
    fused = {} if kind is timm.optim.Lion else {"fused": True}
    optimizer, scaler = kind([parameter], lr=0.1, weight_decay=0.1, **fused), torch.amp.GradScaler("cpu", enabled=False)
    ends = []
    for allowed, gradient in ((True, 1.0), (False, 1.0), (False, math.nan), (True, 1.0)):
        before = parameter.detach().clone()
        parameter.grad = torch.full((5,), gradient)
        opt.step_if(torch.tensor(allowed), optimizer, scaler, [parameter])
        assert torch.equal(before, parameter.detach()) == (not allowed)
        ends.append(parameter.detach().clone())
    assert ends[-1].isfinite().all() or kind is timm.optim.Lion  # whose own moments are spoilt


# --- what is left out, and where to look


@pytest.mark.parametrize(("precision", "optimizer"), [("fp32", "adamw"), ("fp32", "lion"), ("fp16", "adamw")])
@pytest.mark.parametrize("spoilt", ["loss", "gradient"])
def test_a_step_that_is_not_finite_is_left_out(tmp_path, spoilt, precision, optimizer):
    """Weights, moments and means are those of a training that has no such step; a scaler would itself skip a gradient."""
    if (spoilt, precision) == ("gradient", "fp16"):
        return
    spec = Finetune(epochs=1, log_every=1, optimizer=optimizer, precision=precision, skip_nonfinite=1, **STEADY)
    batches = random_batches(6, 4)
    expected, model = tiny_vit(), tiny_vit()
    without = fit(expected, spec, batches[:2] + batches[3:], tmp_path / "without")
    term, _ = spoiling(3, spoilt)
    heard = fit(model, spec, batches, tmp_path / "with", terms=[term])
    assert largest_difference(values(model), values(expected)) == 0
    assert [line["loss"] for line in heard.of("train") if line["step"] > 3] == [
        line["loss"] for line in without.of("train") if line["step"] > 2
    ]
    assert heard.of("epoch")[0]["loss"] == pytest.approx(without.of("epoch")[0]["loss"], rel=1e-12)


def test_only_so_many_steps_are_left_out(tmp_path):
    spec = Finetune(epochs=1, log_every=100, accumulate=2, skip_nonfinite=2, **STEADY)
    expected = tiny_vit()
    batches = random_batches(12, 4)
    fit(expected, spec.model_copy(update={"max_steps": 1}), batches, tmp_path / "expected")
    calls = []

    def term(batch):
        calls.append(1)
        loss, more = labels_term(1.0, 0.0).function(batch)
        return loss + (math.inf if len(calls) > 2 else 0), more

    model = tiny_vit()
    with pytest.raises(UserError, match=r"the loss is inf at step 4 .* Try a smaller lr, a longer warm-up"):
        fit(model, spec, batches, tmp_path / "spoilt", terms=[Term("spoilt", 1.0, term)])
    assert largest_difference(values(model), values(expected)) == 0


def test_a_resumed_phase_knows_how_many_steps_were_left_out(tmp_path, monkeypatch):
    spec = Finetune(epochs=2, log_every=100, ema=0.5, skip_nonfinite=2, **STEADY)
    batches = random_batches(4, 4)
    batches[1] = (batches[1][0] * math.nan, batches[1][1])  # once an epoch
    whole, parts = tiny_vit(), tiny_vit()
    fit(whole, spec, batches, tmp_path / "whole")
    with monkeypatch.context() as patch:
        counted = []
        signal = property(lambda self: 15 if len(counted) == 3 else None, lambda *_: None)
        patch.setattr(StopRequest, "signum", signal, raising=False)
        with pytest.raises(Interrupted):
            fit(parts, spec, batches, tmp_path / "parts", measure=lambda *_: None, watches=[_Counts(counted)])
    assert load_checkpoint(tmp_path / "parts" / "phase.pt")["skipped"] == 1
    shutil.copytree(tmp_path / "parts", tmp_path / "fewer")
    again = tiny_vit()
    fit(again, spec, batches, tmp_path / "parts")
    assert largest_difference(values(again), values(whole)) == 0
    with pytest.raises(UserError, match="the loss is nan at step 6"):
        fit(tiny_vit(), spec.model_copy(update={"skip_nonfinite": 1}), batches, tmp_path / "fewer")  # one was before


class _Counts:
    """A watch that notes every step."""

    def __init__(self, steps):
        self.steps = steps

    def before(self, steps):
        pass

    def after(self, step, epoch, scale):
        self.steps.append(step)


def broken_teacher(kind):
    teacher = tiny_vit(seed=1)
    with torch.no_grad():
        if kind == "weight":
            teacher.blocks[1].mlp.fc1.weight[0, 0] = math.nan
        else:
            teacher.head.weight.fill_(3e38)
    return teacher.eval()


@pytest.mark.parametrize(
    ("kind", "words"),
    [
        ("weight", r"blocks\.1\.mlp\.fc1\.weight of the teacher is not finite: look at the file of its weights first$"),
        ("outputs", "The teacher's weights are finite, and its outputs for the first batch are not: look at the file"),
    ],
)
def test_a_teacher_that_is_not_finite_is_named_first(tmp_path, kind, words):
    spec = Distill(epochs=1, log_every=1, losses={"prediction": {"weight": 1}})
    student, teacher = tiny_vit(), broken_teacher(kind)
    terms = spec.terms(student, [])
    with pytest.raises(UserError, match=f"at step 1 .*{words}"):
        fit(student, spec, random_batches(2, 4), tmp_path, terms=terms, teacher=side(teacher))


def test_a_model_or_an_image_that_is_not_finite_is_named_first(tmp_path):
    model = tiny_vit()
    with torch.no_grad():
        model.norm.bias[0] = math.inf
    spec, batches = Finetune(epochs=1, log_every=1), random_batches(2, 4)
    with pytest.raises(UserError, match=r"norm\.bias of the model that is trained is not finite: look at the file"):
        fit(model, spec, batches, tmp_path / "model")
    batches[0][0][0, 0, 0, 0] = math.nan
    with pytest.raises(UserError, match="An image of the first batch has values that are not finite: look at the data"):
        fit(tiny_vit(), spec, batches, tmp_path / "images")
