"""A checkpoint whose checksums are right and whose content is not: a sentence, whichever part of it is another."""

from __future__ import annotations

import copy
import os
import signal

import pytest
import torch
from helpers.runs import EPOCH, done, refused, run

from compressvit.files import load_checkpoint, save_checkpoint
from compressvit.training import step

OPTIONS = ["--no-report", "steps.1.distill.keep=best", "steps.1.distill.ema=0.9"]


@pytest.fixture(scope="module")
def stopped(recipe):
    """A run that was stopped between two steps of an epoch of its distillation."""
    folder, batches, total = recipe.parent / "damaged", [], step.total_of

    def counted(*arguments, **options):
        batches.append(1)
        if len(batches) == EPOCH + EPOCH + 2:  # of the teacher, then the second epoch
            os.kill(os.getpid(), signal.SIGTERM)
        return total(*arguments, **options)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(step, "total_of", counted)
        assert run("apply", recipe, "--output", folder, *OPTIONS)[0] == 128 + signal.SIGTERM
    return folder


def resumed(recipe, stopped):
    return ["apply", recipe, "--output", stopped, "--resume", *OPTIONS]


KEYS = [
    "done", "model", "frozen", "steps", "epoch", "start", "optimizer", "scaler", "batch_index", "random_state", "meters", "best", "average",
    "n_averaged", "average_rises", "skipped",
]  # fmt: skip
INSIDE = [
    ("model", "cls_token", None),
    ("optimizer", "state", {0: {"exp_avg": "x"}}),
    ("optimizer", "param_groups", []),
    ("random_state", "torch", torch.zeros(3)),
    ("random_state", "python", [3, [1], None]),
    ("random_state", "numpy", None),
    ("meters", "sums", {"loss": "x"}),
    ("best", "score", "x"),
    ("best", "model", {"cls_token": 1}),
    ("average", "cls_token", torch.zeros(2, 2)),
    (None, "batch_index", 10**9),
    (None, "steps", -1),
]


@pytest.mark.wide_unless(lambda key, inner: key == "average" or inner == "score")
@pytest.mark.parametrize(("key", "inner", "value"), [*((None, key, "odd") for key in KEYS if key != "frozen"), *INSIDE])
def test_a_part_that_is_another_is_a_sentence(key, inner, value, recipe, stopped):
    file = stopped / "checkpoints" / "1_distill.pt"
    whole = file.read_bytes()
    content = load_checkpoint(file)
    assert set(content) == set(KEYS)
    file.with_name("1_distill.before.pt").unlink(missing_ok=True)  # it would be used
    (content if key is None else content[key])[inner] = copy.deepcopy(value)
    save_checkpoint(file, content)
    try:
        message = refused(*resumed(recipe, stopped))
    finally:
        file.write_bytes(whole)
    assert f"{file} is damaged ({key or inner}" in message or f"{file} is damaged (" in message
    assert "remove it to begin its phase again" in message


def test_whole_it_is_resumed(recipe, stopped):
    done(*resumed(recipe, stopped))
