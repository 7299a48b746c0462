"""A finished run: what is in its folder, that the plan kept its word, and what the logs hold."""

from __future__ import annotations

import json

import numpy as np
import pytest
import timm
import torch
import yaml
from helpers.runs import EPOCH, RECIPE, done, metrics
from helpers.training import largest_difference, values
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from compressvit.artifacts import artifact
from compressvit.files import load_checkpoint
from compressvit.model import stored, ties
from compressvit.recipe.recipe import load_recipe


def test_a_run_folder_holds_everything(finished, recipe):
    expected = {
        "recipe.yaml",
        "resolved.yaml",
        "environment.json",
        "plan.json",
        "checkpoints/teacher.pt",
        "checkpoints/1_distill.pt",
        "teacher/compressvit.json",
        "teacher/model.safetensors",
        "student/compressvit.json",
        "student/model.safetensors",
        "metrics.jsonl",
        "run.log",
        "results.json",
    }
    files = {str(p.relative_to(finished)) for p in finished.rglob("*") if p.is_file()}
    boards = {name for name in files if name.startswith("tensorboard/events.out.tfevents.")}
    assert expected <= files
    assert len(boards) == 1
    assert {name for name in files - expected - boards if name.split("/")[-1].startswith(".")} == set()  # no scratch

    assert (finished / "recipe.yaml").read_text() == RECIPE
    assert load_recipe(finished / "resolved.yaml") == load_recipe(recipe, ["seed=3"])
    environment = json.loads((finished / "environment.json").read_text())
    assert environment["versions"]["torch"].startswith(torch.__version__.split("+")[0])
    assert environment["versions"]["timm"] == timm.__version__
    assert environment["command"][0] == "compressvit"


def test_resolved_recipes_are_plain_yaml(finished):
    content = yaml.safe_load((finished / "resolved.yaml").read_text())
    assert content["seed"] == 3
    assert content["steps"][1]["distill"]["losses"]["labels"]["weight"] == 0.25


def test_the_plan_kept_its_word(finished):
    plan = json.loads((finished / "plan.json").read_text())
    results = json.loads((finished / "results.json").read_text())
    for side in ("teacher", "student"):
        model = artifact.load(finished / side)
        assert plan[side]["parameters"] == results[side]["parameters"] == ties.count_parameters(model)
        assert plan[side]["macs"] == results[side]["macs"]
        assert plan[side]["bytes"] == (finished / side / stored.TENSORS).stat().st_size
    assert results["student"]["bytes"] == plan["student"]["bytes"]
    assert results["read_back_difference"] == 0
    assert results["student"]["latency_ms"] > 0


def test_metrics_hold_every_weighted_term_and_the_rest(finished):
    steps = metrics(finished, phase="1_distill", kind="train")
    assert [line["step"] for line in steps] == list(range(1, 2 * EPOCH + 1))
    for line in steps:
        terms = [line[name] for name in ("prediction", "attention_relation", "hidden_relation", "labels")]
        assert sum(terms) == pytest.approx(line["loss"], rel=1e-5)
        assert line["gradient_norm"] > 0
        assert 0 <= line["lr"] <= 1e-3
        assert 0 <= line["attention_relation_kl"] < line["attention_relation"]
        for name in ("top1", "top5", "teacher_top1"):
            assert 0 <= line[name] <= 100
    epochs = metrics(finished, phase="1_distill", kind="epoch")
    assert [line["epoch"] for line in epochs] == [1, 2]
    for key in ("loss", "prediction", "top1", "teacher_top1"):  # an epoch's line is the mean of its batches
        for epoch, line in enumerate(epochs):
            assert line[key] == pytest.approx(np.mean([s[key] for s in steps if s["epoch"] == epoch]), rel=1e-5)
    for phase, count in (("teacher", 1), ("0_multiplex", 1), ("1_distill", 2)):
        lines = metrics(finished, phase=phase, kind="evaluate")
        assert len(lines) == count
        assert all(line["images"] == 16 and 0 <= line["top1"] <= 100 for line in lines)
    assert "agreement" in metrics(finished, phase="0_multiplex")[0]


def test_the_weight_of_a_term_is_in_what_is_logged(finished, recipe, tmp_path):
    half = "steps.1.distill.losses.hidden_relation.weight=0.25"
    done("apply", "--no-report", recipe, "--output", tmp_path / "run", "seed=3", half)
    first = [metrics(f, phase="1_distill", kind="train", step=1)[0] for f in (finished, tmp_path / "run")]
    assert first[1]["hidden_relation"] == pytest.approx(first[0]["hidden_relation"] / 2, rel=1e-5)
    assert first[1]["prediction"] == first[0]["prediction"]


def test_tensorboard_holds_what_metrics_hold(finished):
    board = EventAccumulator(str(finished / "tensorboard"))
    board.Reload()
    expected: dict[str, list] = {}
    for line in metrics(finished):
        for name in line.keys() - {"time", "phase", "kind", "step"}:
            phase = {"0_multiplex": "distill", "1_distill": "distill"}.get(line["phase"], line["phase"])
            tag = f"{phase}/{line['kind']}/{name}"
            expected.setdefault(tag, []).append((line["step"], pytest.approx(line[name], rel=1e-5)))
    assert "distill/train/hidden_relation" in expected
    assert {tag for tag in board.Tags()["scalars"] if not tag.startswith("final/")} == set(expected)
    for tag, points in expected.items():
        assert [(event.step, event.value) for event in board.Scalars(tag)] == points, tag


def test_the_log_tells_what_happened(finished):
    text = (finished / "run.log").read_text()
    for words in ("teacher 1/1", "before training", "1_distill 2/2", "layer pairs 1↔1", "latency", "run folder"):
        assert words in text


def test_the_student_is_the_checkpoint_and_holds_no_teacher(finished):
    saved = load_checkpoint(finished / "checkpoints" / "1_distill.pt")
    student = artifact.load(finished / "student")
    assert saved["done"]
    assert saved.keys() == {"done", "model", "frozen", "steps", "epoch", "start", "kept_epoch"}
    assert saved["steps"] == 2 * EPOCH
    assert largest_difference(saved["model"], values(student)) == 0
    assert saved["model"].keys() == ties.unique_state(student).keys()
