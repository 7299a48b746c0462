"""Everything a recipe can measure, in one run: it changes nothing, and what is found can be read, drawn and reported."""

from __future__ import annotations

import html
import json
import math
import os
import signal

import pytest
import yaml
from helpers.runs import done, refused, run, student_bytes, undrawn

from compressvit.charts.findings import read
from compressvit.diagnostics.base import DIAGNOSTICS, Measured
from compressvit.training import step

EVERYTHING = "diagnostics=[cka: {images: 12, batch_size: 4}, drift: {images: 8}, spectra, similarity: {images: 8}, embedding: {images: 16}]"
FOUND = {"cka", "cka_layers", "drift", "effective_rank", "spectrum", "similarity", "embedding"}


@pytest.fixture(scope="module")
def measured(recipe):
    """The run of `finished`, measured."""
    folder = recipe.parent / "measured"
    with undrawn():
        done("apply", "--no-report", recipe, "--output", folder, "seed=3", EVERYTHING)
    return folder


def test_every_measured_diagnostic_is_in_this_test():
    wanted = yaml.safe_load(EVERYTHING.partition("=")[2])
    named = {next(iter(entry)) if isinstance(entry, dict) else entry for entry in wanted}
    assert named == {name for name, spec in DIAGNOSTICS.items() if issubclass(spec, Measured)}


def test_measuring_everything_changes_nothing(measured, finished):
    assert student_bytes(measured) == student_bytes(finished)


def test_what_was_found(measured):
    findings = {path.stem: read(path) for path in (measured / "diagnostics").glob("*.json")}
    assert set(findings) == FOUND
    for name, finding in findings.items():
        numbers = [v for record in finding.records for v in record.values() if isinstance(v, float)]
        assert numbers, name
        assert all(map(math.isfinite, numbers)), name
        assert finding.draw() is not None
        assert len(finding.caption) > 80
    moments = {(record["phase"], record["epoch"]) for record in findings["cka"].records}
    assert moments == {("1_distill", 0), ("1_distill", 2)}  # the teacher's own training has no teacher
    for name in ("effective_rank", "embedding"):
        seen = {(record["phase"], record["model"]) for record in findings[name].records}
        assert seen == {("teacher", "teacher"), ("1_distill", "teacher"), ("1_distill", "student")}, name
    labels = {record["class"] for record in findings["embedding"].records}
    assert len(labels) > 3
    assert labels <= {str(digit) for digit in range(10)}
    done("report", measured)
    page = html.unescape((measured / "report.html").read_text(encoding="utf-8"))
    assert all(finding.title in page for finding in findings.values())


def test_layers_are_paired_when_the_phase_begins(recipe, tmp_path):
    words = ("steps.1.distill.layers=auto", "calibration.images=16")
    plan = done("plan", recipe, *words)
    assert "auto: the most similar by CKA, measured when the phase begins; by depth until then" in plan
    out = done("apply", "--no-report", recipe, "--output", tmp_path / "run", *words)
    assert "(auto: the most similar by CKA)" in out
    measured = done("plan", recipe, *words, "--measure", f"teacher.weights={tmp_path / 'run' / 'teacher'}")
    assert "layer pairs (student↔teacher): 1↔" in measured


@pytest.mark.wide
def test_a_student_of_another_architecture_is_resumed_without_pairs(recipe, tmp_path, monkeypatch):
    words = ("steps.1.distill.layers=auto", "calibration.images=16", "student={model: test_resnet, weights: random}")
    words = (*words, "steps=[distill: {epochs: 2, layers: auto}]", "--output", tmp_path / "run")
    total = step.total_of

    def stopped(*arguments):
        if (tmp_path / "run" / "checkpoints" / "0_distill.pt").is_file():
            os.kill(os.getpid(), signal.SIGTERM)
        return total(*arguments)

    with monkeypatch.context() as patch:
        patch.setattr(step, "total_of", stopped)
        assert run("apply", "--no-report", recipe, *words)[0] == 128 + signal.SIGTERM
    assert json.loads((tmp_path / "run" / "checkpoints" / "0_distill.layers.json").read_text()) == []
    assert "auto: as when the phase began" in done("apply", "--no-report", recipe, *words, "--resume")


def test_faults_of_diagnostics_have_near_names(recipe):
    assert "did you mean 'drift'" in refused("plan", recipe, "diagnostics=[drfit]")
    assert "did you mean 'kernel'" in refused("plan", recipe, "diagnostics=[cka: {kernl: rbf}]")
    assert "should be greater than or equal to 4" in refused("plan", recipe, "diagnostics=[cka: {batch_size: 2}]")
