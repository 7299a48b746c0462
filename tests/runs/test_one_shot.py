"""`plan --measure`: what a recipe's transforms make of the teacher, before any training."""

from __future__ import annotations

import json

import pytest
from helpers.images import sixteen_bit_digits
from helpers.runs import done, refused


def test_it_says_what_apply_says_before_training(trained):
    recipe, run = trained
    words = [recipe, f"teacher.weights={run / 'teacher'}", "calibration.images=32", "--measure"]
    measured = json.loads(done("plan", *words, "--json"))["measured"]
    results = json.loads((run / "results.json").read_text())
    start = results["phases"]["1_distill"]["start"]
    assert measured["before_training"]["top1"] == pytest.approx(start["top1"])
    assert results["phases"]["1_distill"]["kept_epoch"] == 6
    assert [e["path"] for e in measured["ledger"]] == [e["path"] for e in results["ledger"]]
    for ours, theirs in zip(measured["ledger"], results["ledger"], strict=True):
        assert ours["output_error"] == pytest.approx(theirs["output_error"], abs=1e-4)
        assert ours["weight_error"] > 0
    low, middle, high = measured["latency_ratio"]
    assert 0 < low <= middle <= high
    out = done("plan", *words)
    assert "of the teacher's" in out
    assert "in turns, medians of up to 30 rounds; in brackets the 99 % interval" in out
    for word in ("error of", " weight ┃", "before training", "top-1"):
        assert word in out
    assert "error of" not in done("plan", *words[:-1])


def test_notes_of_the_images_that_were_read(trained, tmp_path):
    recipe, run = trained
    root = sixteen_bit_digits(tmp_path)
    words = [recipe, f"teacher.weights={run / 'teacher'}", "calibration.images=32"]
    words += ["data.name=folder", f"data.root={root}", "data.classes=plain"]
    out = done("plan", *words, "--measure")
    assert "data: 20 images to train on, 10 held out" in out
    assert out.endswith("1 broken image files were skipped data: 29 images of 16 bits scaled to 8 (value / 257)")
    measured = json.loads(done("plan", *words, "--measure", "--json"))["measured"]
    assert measured["broken_images"] == 1
    assert [(note["what"], note["count"]) for note in measured["data_notes"]] == [("sixteen_bits", 29)]


@pytest.mark.wide
def test_notes_of_the_images_that_a_frontier_read(trained, tmp_path):
    recipe, run = trained
    words = [recipe, f"teacher.weights={run / 'teacher'}", "calibration.images=32"]
    words += ["data.name=folder", f"data.root={sixteen_bit_digits(tmp_path)}", "data.classes=plain"]
    out = done("frontier", *words, "--budgets", 0.7, "--output", tmp_path / "out")
    assert "data: 20 images to train on, 10 held out data: 10 classes" in out
    assert "images of 16 bits scaled to 8 (value / 257)" in out
    assert "1 broken image files were skipped" in out


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ([], "plan --measure trains nothing, so the teacher needs weights"),
        (
            ["teacher.weights=random", "teacher.finetune=null"],
            "with its teacher, which teacher.weights=random leaves untrained; give it pretrained",
        ),
        (["steps=[distill]", "teacher.weights=RUN"], "plan --measure needs transforms before the first phase"),
        (["teacher.weights=nowhere.safetensors"], "nowhere.safetensors"),
    ],
)
def test_what_cannot_be_measured(trained, words, message):
    words = [word.replace("RUN", str(trained[1] / "teacher")) for word in words]
    assert message in refused("plan", trained[0], *words, "--measure")
