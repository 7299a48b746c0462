"""Taps on layers, and torchdistill's losses named in a recipe."""

from __future__ import annotations

import copy
import json

import pytest
import torch
from helpers.images import side
from helpers.runs import done, metrics, refused
from helpers.training import fit, random_batches, tiny_vit
from torch import nn
from torchdistill.losses.registry import MIDDLE_LEVEL_LOSS_DICT

from compressvit.errors import UserError
from compressvit.model.taps import Taps
from compressvit.training.phases.distill import Distill
from compressvit.training.terms import Batch, build_terms
from compressvit.training.terms.section import losses_section
from compressvit.training.terms.torchdistill import TorchdistillTerm


def test_taps_read_inputs_and_outputs_and_forget_them():
    model = tiny_vit()
    taps = Taps(model, [("blocks.0", "output"), ("blocks.1", "input"), ("blocks.1", "output"), ("head", "input")])
    images = torch.randn(2, 1, 8, 8)
    model(images)
    seen = taps.pop()
    assert seen.keys() == {"blocks.0", "blocks.1", "head"}
    assert torch.equal(seen["blocks.0"]["output"], seen["blocks.1"]["input"])
    assert seen["blocks.1"]["output"].shape == (2, 5, 16)
    assert seen["head"]["input"].shape == (2, 16)
    assert not any(io for ios in taps.pop().values() for io in ios.values() if io is not None)
    taps.close()
    model(images)
    assert not any(m._forward_hooks for m in model.modules())


@pytest.mark.parametrize(
    ("tap", "words"),
    [
        (("blocks.0.atn", "output"), ["'blocks.0.atn'", "no module of VisionTransformer", "'blocks.0.attn'"]),
        (("blocks.0", "outputs"), ["'blocks.0'", "'outputs'", "'output'"]),
    ],
)
def test_a_tap_that_is_not_there(tap, words):
    with pytest.raises(UserError) as caught:
        Taps(tiny_vit(), [tap])
    for word in words:
        assert word in str(caught.value)


PATHS = {"student_output_path": "blocks.1", "teacher_output_path": "blocks.1"}
HEADS = {
    "student_module_path": "head",
    "student_module_io": "output",
    "teacher_module_path": "head",
    "teacher_module_io": "output",
}
AT_PAIRS = {"last": {w: {"path": "blocks.1", "io": "output"} for w in ("student", "teacher")}}
TORCHDISTILL = {
    "SPKDLoss": {**PATHS, "reduction": "batchmean"},
    "ATLoss": {"at_pairs": AT_PAIRS, "mode": "code"},
    "KDLoss": {**HEADS, "temperature": 2.0, "alpha": 0.5},
    "PKTLoss": {**HEADS, "student_module_io": "input", "teacher_module_io": "input"},
}


def only(**terms):
    """Losses with nothing but the given terms."""
    off = {name: {"weight": 0} for name in ("prediction", "attention_relation", "hidden_relation")}
    return losses_section()(**{**off, **terms})


@pytest.mark.parametrize("name", TORCHDISTILL)
def test_a_torchdistill_loss_by_name(name, tmp_path):
    spec = only(torchdistill=(TorchdistillTerm(loss=name, weight=0.5, kwargs=TORCHDISTILL[name]),))
    (term,) = build_terms(spec, [], classes=4)
    assert term.name == f"torchdistill/{name}"
    teacher, student = tiny_vit(seed=1).eval(), tiny_vit(seed=2)
    gaps = []
    for model in (copy.deepcopy(teacher), student):
        taps = [Taps(m, side) for m, side in ((model, term.student_taps), (teacher, term.teacher_taps))]
        images, targets = random_batches(1, 6)[0]
        logits = [m(images) for m in (model, teacher)]
        loss, _ = term.function(Batch(*logits, *(t.pop() for t in taps), targets))
        gaps.append(loss.item())
        for tap in taps:
            tap.close()
    assert gaps[1] > gaps[0]
    if name != "KDLoss":  # half of which is the cross-entropy with the labels
        assert gaps[0] == pytest.approx(0, abs=1e-6)
    heard = fit(
        student, Distill(epochs=1, log_every=1), random_batches(2, 6), tmp_path, terms=[term], teacher=side(teacher)
    )
    lines = heard.of("train")
    assert len(lines) == 2
    assert all(line[term.name] == line["loss"] and line["gradient_norm"] > 0 for line in lines)
    assert lines[0]["loss"] == pytest.approx(gaps[1] / 2, rel=1e-4)


@pytest.mark.parametrize(
    ("name", "kwargs", "words"),
    [
        ("SPKDLos", {}, ["no mid-level loss 'SPKDLos'", "did you mean 'SPKDLoss'?"]),
        ("SPKDLoss", PATHS, ["SPKDLoss does not take", "reduction"]),
        ("KDLoss", {**HEADS, "temperature": 1}, ["KDLoss does not take"]),
    ],
)
def test_a_torchdistill_loss_that_cannot_be_built(name, kwargs, words):
    with pytest.raises(UserError) as caught:
        build_terms(only(torchdistill=(TorchdistillTerm(loss=name, kwargs=kwargs),)), [], classes=4)
    for word in words:
        assert word in str(caught.value)


def test_a_torchdistill_loss_of_one_side_names_its_tap():
    for kwargs, student, teacher in (
        ({"module_path": "head"}, (("head", "output"),), ()),
        ({"module_path": "norm", "io_type": "input"}, (("norm", "input"),), ()),
        ({"module_path": "head", "is_from_teacher": True}, (), (("head", "output"),)),
    ):
        spec = only(torchdistill=(TorchdistillTerm(loss="RegularizationLoss", kwargs=kwargs),))
        (term,) = build_terms(spec, [], classes=4)
        assert (term.student_taps, term.teacher_taps) == (student, teacher)


def test_a_torchdistill_loss_with_weights_of_its_own_is_refused(monkeypatch):
    monkeypatch.setitem(MIDDLE_LEVEL_LOSS_DICT, "ProjectingLoss", lambda: nn.Linear(2, 2))
    with pytest.raises(UserError, match="ProjectingLoss has trainable weights"):
        build_terms(only(torchdistill=(TorchdistillTerm(loss="ProjectingLoss"),)), [], classes=4)


@pytest.mark.parametrize(
    ("name", "kwargs", "words"),
    [
        ("SPKDLoss", {**TORCHDISTILL["SPKDLoss"], "student_output_path": "blocks.7"}, ["'blocks.7'", "'blocks.1'"]),
        ("KDLoss", {**TORCHDISTILL["KDLoss"], "student_module_io": "outputs"}, ["'outputs'", "'output'"]),
        (
            "KDLoss",
            {**TORCHDISTILL["KDLoss"], "teacher_module_path": "norm"},
            ["KDLoss failed", "(8, 10)", "(8, 5, 16)"],
        ),
        ("SPKDLoss", {**TORCHDISTILL["SPKDLoss"], "student_output_path": 3}, ["SPKDLoss failed", "KeyError"]),
    ],
)
def test_a_torchdistill_loss_that_does_not_fit_is_a_conflict_of_the_plan(recipe, tmp_path, name, kwargs, words):
    term = json.dumps([{"loss": name, "kwargs": kwargs}])
    message = refused("apply", recipe, "--output", tmp_path / "run", f"steps.1.distill.losses.torchdistill={term}")
    assert "steps[1].distill" in message
    for word in words:
        assert word in message
    assert not (tmp_path / "run").exists()


def test_torchdistill_losses_in_a_recipe(recipe, tmp_path):
    terms = json.dumps([{"loss": name, "kwargs": TORCHDISTILL[name]} for name in ("SPKDLoss", "ATLoss")])
    overrides = [f"steps.1.distill.losses.torchdistill={terms}", "steps.1.distill.epochs=1"]
    out = done("apply", "--no-report", recipe, "--output", tmp_path / "run", *overrides)
    assert "torchdistill/SPKDLoss" in out
    for line in metrics(tmp_path / "run", phase="1_distill", kind="train"):
        assert line["torchdistill/SPKDLoss"] > 0
        assert line["torchdistill/ATLoss"] > 0
