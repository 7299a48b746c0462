"""`diagnostics:` in recipes: what is recorded and when, that a run ends with the same bits, and that a stopped one loses nothing."""

from __future__ import annotations

import json
import random
import shutil
import signal
from pathlib import Path
from typing import ClassVar

import numpy as np
import pytest
import torch
from helpers.images import GRAY
from helpers.runs import EPOCH, done, run, student_bytes, undrawn
from helpers.training import CPU
from PIL import Image
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

import compressvit.runs.run
from compressvit.artifacts import artifact
from compressvit.charts.findings import Finding, merged, read
from compressvit.data.opening import open_data
from compressvit.data.spec import Data
from compressvit.diagnostics.base import DIAGNOSTICS, Measured, diagnostic
from compressvit.diagnostics.gradients import GradientRow, Gradients
from compressvit.errors import UserError
from compressvit.rows import EvaluationRow, append_row, read_metrics, read_rows
from compressvit.runs.recorder import MeasuredRow, Recorder, evaluation_images, undisturbed
from compressvit.training import step

WATCHED = "diagnostics=[gradients: {every: 3}]"
HARD = [
    "teacher.finetune.mixup=0.2",
    "data.augment.random_erasing=0.25",
    "steps.1.distill={epochs: 3, mixup: 0.5, drop_path: 0.2, ema: 0.9, accumulate: 2, log_every: 1}",
]
MOMENTS = [("teacher", 0), ("teacher", 1), ("1_distill", 0), ("1_distill", 1), ("1_distill", 3)]


class Rude(Measured):
    """Says what it sees, and leaves everything about it in disorder."""

    name = "rude"
    calls: ClassVar[list] = []
    fault: ClassVar[Exception | None] = None

    def measure(self, context):
        images = torch.cat(list(context.images(5)))
        self.calls.append((context.phase, context.epoch, context.student.model.training, tuple(images.shape)))
        if self.fault:
            raise self.fault
        random.random(), np.random.rand(), torch.rand(3)
        context.student.model.train()
        context.student.model(images).sum().backward()
        weight = sum(p.double().abs().sum().item() for p in context.student.model.parameters())
        teacher = None
        if context.teacher is not None:
            own = context.teacher.converter(context.student.input)
            teacher = context.teacher.model(own(images)).abs().mean().item()
        options = {"x": "side", "y": "size"}
        return [
            Finding("rude", "Rude", "None.", "bars", [{"side": "student", "size": weight, "teacher": teacher}], options)
        ]


class Ruder(Recorder):
    """Measures `Rude` besides what the recipe asks for."""

    def __init__(self, *arguments):
        super().__init__(*arguments)
        self._measured.append(Rude(epochs=(0, 1, "last")))


@pytest.fixture
def rude(monkeypatch):
    """Every run measures `Rude`."""
    monkeypatch.setattr(compressvit.runs.run, "Recorder", Ruder)
    monkeypatch.setattr(Rude, "calls", [])
    monkeypatch.setattr(Rude, "fault", None)
    return Rude


@pytest.fixture(scope="module")
def plain(recipe):
    """A run without any diagnostic."""
    folder = recipe.parent / "without_diagnostics"
    done("apply", "--no-report", recipe, "--output", folder, *HARD)
    return folder


@pytest.fixture(scope="module")
def whole(recipe):
    """A run that nobody stopped, watched and measured. Not to be changed: copy it first."""
    folder = recipe.parent / "watched_and_measured"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(compressvit.runs.run, "Recorder", Ruder)
        patch.setattr(Rude, "calls", [])
        done("apply", "--no-report", recipe, "--output", folder, WATCHED, *HARD)
        assert Rude.calls[0] == ("teacher", 0, False, (5, 1, 8, 8))
    return folder


def records(folder: Path) -> list:
    return read(folder / "diagnostics" / "rude.json").records


def steps_watched(folder: Path) -> list:
    return [(row.phase, row.step) for row in read_rows(folder / "diagnostics" / "gradients.jsonl", GradientRow)]


# --------------------------------------------------------------------------------------------------------------------- runs


def test_a_run_records_and_ends_with_the_same_bits(plain, whole):
    assert student_bytes(whole) == student_bytes(plain)
    assert not (plain / "diagnostics").exists()
    seen = records(whole)
    assert [(r["phase"], r["epoch"]) for r in seen] == MOMENTS
    assert [r["when"] for r in seen][-1] == "1_distill, epoch 3"
    assert len({r["size"] for r in seen}) == 5  # weights that training has moved
    assert [r["teacher"] is None for r in seen] == [True, True, False, False, False]
    measured = read_rows(whole / "diagnostics" / "measured.jsonl", MeasuredRow)
    assert [(m.phase, m.epoch) for m in measured] == MOMENTS
    assert all(m.findings == ["rude"] and m.seconds >= 0 for m in measured)
    assert steps_watched(whole) == [*(("teacher", s) for s in (1, 3)), *(("1_distill", s) for s in (1, 3, 6))]


def test_findings_are_files_and_pictures_in_tensorboard(whole):
    names = ("rude", "gradients", "gradients_groups", "gradients_shared")
    board = EventAccumulator(str(whole / "tensorboard"))
    board.Reload()
    for name in names:
        for suffix in ("json", "csv", "png", "svg"):
            assert (whole / "diagnostics" / f"{name}.{suffix}").stat().st_size > 100
    assert {f"diagnostics/{name}" for name in names} == set(board.Tags()["images"])
    shown = board.Images("diagnostics/rude")[-1]
    file = whole / "diagnostics" / "rude.png"
    assert shown.encoded_image_string == file.read_bytes()
    assert (shown.width, shown.height) == Image.open(file).size
    assert read(whole / "diagnostics" / "rude.json").options["facet"] == "when"
    plan = json.loads((whole / "plan.json").read_text())
    assert plan["diagnostics"] == {"gradients": "every 3 optimiser steps"}


@pytest.mark.wide_unless(lambda batch: batch == EPOCH + 1)
@pytest.mark.parametrize(
    "batch", [2, EPOCH + 1, 3 * EPOCH]
)  # amid the teacher's epoch, between two batches of a step, between two epochs
def test_a_stopped_run_keeps_what_it_recorded(whole, recipe, tmp_path, monkeypatch, rude, batch):
    folder, seen, total = tmp_path / "run", [], step.total_of

    def counted(*args):
        seen.append(1)
        if len(seen) == batch:
            signal.raise_signal(signal.SIGTERM)
        return total(*args)

    with undrawn():
        with monkeypatch.context() as patch:
            patch.setattr(step, "total_of", counted)
            assert run("apply", "--no-report", recipe, "--output", folder, WATCHED, *HARD)[0] == 128 + signal.SIGTERM
        assert (folder / "diagnostics" / "gradients.png").is_file()  # of what there is
        done("apply", "--no-report", folder, "--resume")
    assert student_bytes(folder) == student_bytes(whole)
    assert records(folder) == records(whole)
    assert (folder / "diagnostics" / "gradients.jsonl").read_text() == (
        whole / "diagnostics" / "gradients.jsonl"
    ).read_text()


class Crash(BaseException):
    """The end of the process; a fault of a diagnostic alone would be told, and training would go on."""


@pytest.mark.wide
@pytest.mark.parametrize("call", range(1, 6))
def test_a_crash_amid_a_measurement_loses_none(whole, recipe, tmp_path, monkeypatch, rude, call):
    folder, measure = tmp_path / "run", Rude.measure

    def crash(self, context):
        if len(Rude.calls) == call - 1:
            raise Crash
        return measure(self, context)

    with monkeypatch.context() as patch:
        patch.setattr(Rude, "measure", crash)
        with pytest.raises(Crash):
            done("apply", "--no-report", recipe, "--output", folder, WATCHED, *HARD)
    done("apply", "--no-report", folder, "--resume")
    assert student_bytes(folder) == student_bytes(whole)
    assert records(folder) == records(whole)
    assert sorted(steps_watched(folder)) == sorted(steps_watched(whole))


@pytest.mark.wide_unless(lambda fault: isinstance(fault, UserError))
@pytest.mark.parametrize(
    ("fault", "told"),
    [
        (UserError("the features of blocks.1 are not finite"), "the features of blocks.1 are not finite"),
        (np.linalg.LinAlgError("singular matrix"), "LinAlgError: singular matrix"),
    ],
)
def test_what_cannot_be_measured_is_told_and_the_run_goes_on(plain, recipe, tmp_path, rude, monkeypatch, fault, told):
    monkeypatch.setattr(rude, "fault", fault)
    folder = tmp_path / "run"
    done("apply", "--no-report", recipe, "--output", folder, *HARD)
    assert student_bytes(folder) == student_bytes(plain)
    log = (folder / "run.log").read_text()
    assert f"1_distill, epoch 0: rude was not measured: {told}" in log
    assert ("Traceback" in log) != isinstance(fault, UserError)
    assert not (folder / "diagnostics").exists()


def test_a_chart_that_cannot_be_drawn_costs_no_training(plain, recipe, tmp_path, monkeypatch):
    def broken(self, *paths):
        raise ValueError("Invalid value for domain")

    monkeypatch.setattr(Finding, "picture", broken)
    folder = tmp_path / "run"
    done("apply", "--no-report", recipe, "--output", folder, WATCHED, *HARD)
    assert student_bytes(folder) == student_bytes(plain)
    assert "1_distill: the recordings were not drawn: ValueError: Invalid" in (folder / "run.log").read_text()


@pytest.mark.wide
def test_a_row_that_was_cut_short_is_measured_again(whole, recipe, tmp_path, rude):
    """By a kill while it was written; what is written next must not be glued to it."""
    folder = tmp_path / "run"
    shutil.copytree(whole, folder)
    files = [folder / "diagnostics" / "measured.jsonl", folder / "metrics.jsonl"]
    for file in files:
        file.write_bytes(file.read_bytes()[:-20])
    (folder / "results.json").unlink()
    done("apply", "--no-report", folder, "--resume")
    assert [call[:2] for call in Rude.calls] == [("1_distill", 3)]
    assert [(m.phase, m.epoch) for m in read_rows(files[0], MeasuredRow)] == MOMENTS
    append_row(files[1], EvaluationRow(phase="1_distill", step=99))
    assert read_metrics(files[1])[-1] == EvaluationRow(phase="1_distill", step=99)

    files[0].write_text("[]\n[]\n")
    (folder / "results.json").unlink()
    done("apply", "--no-report", folder, "--resume")
    assert "earlier measurements cannot be read, so they are repeated" in (folder / "run.log").read_text()


@pytest.mark.wide_unless(lambda words: words is not HARD)
@pytest.mark.parametrize(
    "words", [HARD, ["seed=1", "steps.1.distill={epochs: 3, keep: best, lr: 0.1, warmup_epochs: 0}"]]
)
def test_the_last_measurement_sees_the_weights_that_the_student_has(recipe, tmp_path, rude, monkeypatch, words):
    """The average's, where there is one; those of the best evaluation with `keep: best`."""
    seen = []
    monkeypatch.setattr(
        Rude,
        "measure",
        lambda self, c: seen.append({n: p.clone() for n, p in c.student.model.named_parameters()}) or [],
    )
    done("apply", "--no-report", recipe, "--output", tmp_path / "run", *words)
    assert words == HARD or "kept the weights of" in (tmp_path / "run" / "run.log").read_text()
    kept = dict(artifact.load(tmp_path / "run" / "student").named_parameters())
    assert all(torch.equal(kept[name], seen[-1][name]) for name in kept)
    assert not all(torch.equal(kept[name], seen[-2][name]) for name in kept)


# -------------------------------------------------------------------------------------------------------------------- pieces


def test_images_are_spread_over_the_set_and_come_without_labels():
    data = Data(name="digits", eval_batch_size=4)
    datasets = open_data(data)
    torch.manual_seed(0)
    before = torch.get_rng_state()
    batches = [images for images, _ in evaluation_images(datasets, data, GRAY, CPU, 10)]
    assert torch.equal(torch.get_rng_state(), before)
    assert [len(b) for b in batches] == [4, 4, 2]
    everything = torch.cat([images for images, _ in evaluation_images(datasets, data, GRAY, CPU, 10**6)])
    assert len(everything) == len(datasets.validation) == 360
    in_order = [
        torch.cat(seen)[torch.randperm(count, generator=torch.Generator().manual_seed(0)).argsort()]
        for seen, count in ((batches, 10), ([everything], 360))
    ]
    assert torch.equal(in_order[0], in_order[1][::36])
    assert not torch.equal(torch.cat(batches), in_order[0]), "a set may be in the order of its classes"


def test_undisturbed_restores_what_a_diagnostic_changed():
    model = torch.nn.Sequential(torch.nn.Linear(2, 2), torch.nn.Dropout()).train()
    model[1].eval()
    model[0].weight.grad = torch.ones(2, 2)
    states = [random.getstate(), np.random.get_state()[2], torch.get_rng_state()]

    def disturb():
        with undisturbed(model, None):
            model.train()
            model[0].weight.grad.zero_()
            model[0].bias.grad = torch.ones(2)
            random.random(), np.random.rand(), torch.rand(1)
            raise Crash

    with pytest.raises(Crash):
        disturb()
    assert (model.training, model[0].training, model[1].training) == (True, True, False)
    assert torch.equal(model[0].weight.grad, torch.ones(2, 2))
    assert model[0].bias.grad is None
    assert random.getstate() == states[0]
    assert np.random.get_state()[2] == states[1]
    assert torch.equal(torch.get_rng_state(), states[2])


def test_the_later_of_two_measurements_of_one_epoch_counts():
    def finding(epoch, value, **options):
        return Finding("x", "X", "", "bars", [{"phase": "p", "epoch": epoch, "v": value}], options)

    both = merged(finding(0, 1.0), finding(2, 2.0))
    assert [r["v"] for r in both.records] == [1.0, 2.0]
    assert both.options == {"facet": "when"}
    assert [r["v"] for r in merged(both, finding(2, 3.0)).records] == [1.0, 3.0]
    assert merged(finding(0, 1.0), finding(0, 2.0)).options == {}
    assert merged(finding(0, 1.0), finding(2, 2.0, colour="epoch")).options == {"colour": "epoch"}


def test_epochs_and_teachers_decide_what_is_due():
    spec = Rude()
    assert [spec.due(e, last) for e, last in ((0, False), (1, False), (4, True))] == [True, False, True]
    assert Rude(epochs=(0, 5)).due(5, False)
    assert not Rude(epochs=(0, 5)).due(3, True)


def test_a_second_diagnostic_of_one_name_is_refused():
    with pytest.raises(TypeError, match=r"two diagnostics are called 'gradients': compressvit\.diagnostics\.gradients"):
        diagnostic("gradients")(Rude)
    assert DIAGNOSTICS["gradients"] is Gradients
