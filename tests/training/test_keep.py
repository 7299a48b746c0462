"""`keep: best`: a phase that does not end below where it began."""

from __future__ import annotations

import os
import signal

import pytest
import torch
from helpers.training import fit, largest_difference, random_batches, tiny_vit, values

from compressvit.errors import UserError
from compressvit.files import load_checkpoint
from compressvit.training.loop import Interrupted
from compressvit.training.phases.finetune import Finetune

SPEC = {"epochs": 3, "lr": 1e-2, "log_every": 1}


class Judge:
    """An evaluation that gives marks by a list and remembers the weights it saw."""

    def __init__(self, marks, name="top1"):
        self.marks, self.name, self.seen = iter(marks), name, []

    def __call__(self, model):
        self.seen.append(values(model))
        return {self.name: next(self.marks)}


def saved(folder):
    return load_checkpoint(folder / "phase.pt")


@pytest.mark.wide_unless(lambda marks, options: bool(options) == (marks[0] == marks[2]))
@pytest.mark.parametrize("options", [{}, {"ema": 0.5}], ids=["plain", "ema"])
@pytest.mark.parametrize(
    ("marks", "kept"),
    [([50, 40, 30, 20], 0), ([50, 60, 70, 20], 2), ([50, 60, 50, 70], 3), ([50, 40, 50, 30], 2)],
    ids=["start", "middle", "last", "a tie goes to the later"],
)
def test_the_best_evaluation_is_what_remains(marks, kept, options, tmp_path):
    judge, model = Judge(marks), tiny_vit()
    fit(model, Finetune(keep="best", **SPEC, **options), random_batches(2, 6), tmp_path, evaluate=judge)
    assert len(judge.seen) == 4
    assert largest_difference(values(model), judge.seen[kept]) == 0
    assert largest_difference(judge.seen[0], judge.seen[3]) > 1e-3
    assert saved(tmp_path)["kept_epoch"] == kept
    assert saved(tmp_path)["start"] == {"top1": 50}


def test_a_rate_that_destroys_the_model_costs_nothing(tmp_path):
    def loss(model):
        images, targets = random_batches(1, 6)[0]
        return {"top1": -torch.nn.functional.cross_entropy(model.eval()(images), targets).item()}

    model = tiny_vit()
    before = values(model)
    spec = {**SPEC, "optimizer": "momentum", "lr": 1e2}
    fit(model, Finetune(keep="best", **spec), random_batches(2, 6, seed=1), tmp_path, evaluate=loss)
    assert largest_difference(values(model), before) == 0
    spoilt = tiny_vit()
    fit(spoilt, Finetune(**spec), random_batches(2, 6, seed=1), tmp_path / "last", evaluate=loss)
    assert loss(spoilt)["top1"] < loss(model)["top1"]


def test_the_last_is_kept_by_default(tmp_path):
    judge, model = Judge([60, 50, 40]), tiny_vit()
    fit(model, Finetune(**SPEC), random_batches(2, 6), tmp_path, evaluate=judge)
    assert len(judge.seen) == 3, "nobody asked about the start"
    assert largest_difference(values(model), judge.seen[-1]) == 0
    assert saved(tmp_path)["kept_epoch"] == 3


@pytest.mark.wide_unless(lambda stop_at: stop_at == 1)
@pytest.mark.parametrize("stop_at", [1, 2])
def test_a_resumed_phase_remembers_its_best(stop_at, tmp_path):
    marks = [50, 70, 60, 40]
    spec = Finetune(keep="best", **SPEC)
    whole = tiny_vit()
    fit(whole, spec, random_batches(2, 6), tmp_path / "whole", evaluate=Judge(marks))

    judge = Judge(marks)

    def stopping(model):
        if len(judge.seen) == stop_at:
            os.kill(os.getpid(), signal.SIGTERM)
        return judge(model)

    with pytest.raises(Interrupted):
        fit(tiny_vit(), spec, random_batches(2, 6), tmp_path / "parts", evaluate=stopping)
    resumed = tiny_vit(seed=1)
    fit(resumed, spec, random_batches(2, 6), tmp_path / "parts", evaluate=judge)
    assert len(judge.seen) == 4, "the start is judged once"
    assert largest_difference(values(resumed), values(whole)) == 0
    assert saved(tmp_path / "parts")["kept_epoch"] == 1


def test_it_needs_something_to_compare(tmp_path):
    with pytest.raises(UserError, match="keep=best has nothing to compare"):
        fit(
            tiny_vit(), Finetune(keep="best", **SPEC), random_batches(1, 6), tmp_path, evaluate=lambda m: {"top1": None}
        )


def test_without_labels_the_cosine_decides(tmp_path):
    judge, model = Judge([0.9, 0.95, 0.8, 0.7], "cosine"), tiny_vit()
    fit(model, Finetune(keep="best", **SPEC), random_batches(2, 6), tmp_path, evaluate=judge)
    assert saved(tmp_path)["kept_epoch"] == 1
