"""What recipes may ask of diagnostics: words, options, and what the plan refuses."""

from __future__ import annotations

import dataclasses
import shutil

import jsonschema
import pytest
import yaml
from helpers.recipes import GOOD, only_row
from helpers.runs import EPOCH, RECIPE, done, metrics, run, undrawn

from compressvit.charts.findings import read
from compressvit.diagnostics.gradients import GradientRow, Gradients
from compressvit.diagnostics.spectra import Spectra
from compressvit.recipe.recipe import load_recipe, parse_recipe
from compressvit.recipe.schema import json_schema
from compressvit.rows import read_rows
from compressvit.runs.plan import plan_recipe

WATCHED = "diagnostics=[gradients: {every: 3}]"


def test_words_and_options_are_read_and_written_out():
    recipe = parse_recipe(GOOD + "diagnostics: [gradients]\n")
    assert [entry.spec for entry in recipe.diagnostics] == [Gradients()]
    assert parse_recipe(GOOD + "diagnostics:\n  - gradients:\n") == recipe
    assert parse_recipe(recipe.to_yaml()) == recipe
    changed = parse_recipe(GOOD + "diagnostics: [gradients]\n", overrides=["diagnostics.0.gradients.every=4"])
    assert changed.diagnostics[0].spec.every == 4
    schema = jsonschema.Draft202012Validator(json_schema())
    good = GOOD.replace("1e-3", "0.001")
    for text in (good + "diagnostics: [gradients, gradients: {every: 2}]\n", recipe.to_yaml()):
        schema.validate(yaml.safe_load(text))
    with pytest.raises(jsonschema.ValidationError, match="evry"):
        schema.validate(yaml.safe_load(good + "diagnostics: [gradients: {evry: 2}]\n"))


FAULTS = {
    "[gradient]": ("diagnostics[0].gradient", "unknown key; did you mean 'gradients'?"),
    "[gradients: {evry: 2}]": ("diagnostics[0].gradients.evry", "unknown key; did you mean 'every'?"),
    "[gradients: {every: 0}]": ("diagnostics[0].gradients.every", "should be greater than or equal to 1, not 0"),
    "[gradients, gradients]": ("diagnostics", "gradients is listed twice; its findings would overwrite each other"),
    "[{}]": ("diagnostics[0]", "an entry names one diagnostic; this one is empty"),
    "gradients": ("diagnostics", 'should be a valid array, not "gradients"'),
    "[multiplex: {share: 2}]": (
        "diagnostics[0].multiplex",
        "unknown key; multiplex is a step, so it belongs in the list `steps`",
    ),
}


@pytest.mark.parametrize(("value", "expected"), FAULTS.items())
def test_faults_have_lines_and_near_names(value, expected):
    place, path, sentence = only_row(GOOD + f"diagnostics: {value}\n")
    assert place == "line 14"
    assert path == expected[0]
    assert sentence.startswith(expected[1])


def test_a_diagnostic_in_another_place_is_pointed_to_its_list():
    words = "unknown key; gradients is a diagnostic, so it belongs in the list `diagnostics`"
    assert words in only_row(GOOD + "gradients: {every: 2}\n")[2]
    assert words in only_row(GOOD.replace("steps:\n", "steps:\n  - gradients\n"))[2]


def test_the_plan_refuses_a_compiled_phase_and_notes_epochs_that_never_come(monkeypatch):
    text = GOOD + "diagnostics: [gradients]\n"
    plan = plan_recipe(parse_recipe(text, overrides=["steps.1.distill.compile=true"]))
    (conflict,) = plan.conflicts
    assert conflict.startswith("steps[1].distill: gradients reads the graph of the backward pass")
    assert "set compile=false, or leave gradients out of diagnostics" in conflict
    assert plan_recipe(parse_recipe(text)).diagnostics == {"gradients": "every 10 optimiser steps"}
    (phase,) = parse_recipe(text).phases().values()
    assert Spectra(epochs=(0, 2)).note(phase) is None
    assert Spectra(epochs=(0, 3, "last", 5)).note(phase) == "spectra is not measured at epoch 3, 5: the phase has 2"
    assert Spectra().summary() == "at epoch last of every phase"


@pytest.mark.wide_unless(lambda asked: "student" in asked or "drift" in asked)
@pytest.mark.parametrize(
    ("asked", "words"),
    [
        (
            "cka: {student_taps: [blokcs.0]}",
            "steps[1].distill: tap 'blokcs.0' is no module of VisionTransformer; did you mean 'blocks.0'",
        ),
        ("cka: {teacher_taps: [blocks.77]}", "steps[1].distill: tap 'blocks.77' is no module"),
        (
            "drift: {layers: [[0, 77]]}",
            "steps[1].distill: drift.layers: the pair [0, 77] names block 77 of the teacher, which has ",
        ),
    ],
)
def test_the_plan_refuses_what_can_never_be_measured(asked, words):
    (conflict,) = plan_recipe(parse_recipe(GOOD + f"diagnostics: [{asked}]\n")).conflicts
    assert conflict.startswith(words)


@pytest.mark.parametrize(
    ("asked", "words"),
    [
        ("similarity: {aligned: true}", "aligned compares weights, whose neurons have no order: set metric: weights"),
        ("cka: {images: 3}", "greater than or equal to 4"),
    ],
)
def test_options_that_contradict_are_faults_of_the_recipe(asked, words):
    assert words in only_row(GOOD + f"diagnostics: [{asked}]\n")[2]


def test_a_run_that_is_older_than_a_key_can_be_resumed(finished, tmp_path):
    folder = tmp_path / "run"
    shutil.copytree(finished, folder)
    resolved = yaml.safe_load((folder / "resolved.yaml").read_text())
    del resolved["diagnostics"]
    (folder / "resolved.yaml").write_text(yaml.safe_dump(resolved))
    (folder / "tiny.yaml").write_text(RECIPE)
    done("apply", "--no-report", folder / "tiny.yaml", "--output", folder, "--resume", "seed=3")
    code, _, err = run("apply", "--no-report", folder / "tiny.yaml", "--output", folder, "--resume", "seed=3", WATCHED)
    assert code == 2
    assert "diagnostics.0.gradients.every: absent in the run, 3 now" in err
    assert load_recipe(finished / "resolved.yaml").diagnostics == ()


def test_pruning_watches_every_cycle(tmp_path):
    text = (
        RECIPE.split("steps:")[0] + "steps:\n  - adapters: {width: 4}\n  - prune: {target: {neurons: 0.5}, epochs: 1}\n"
    )
    (tmp_path / "prune.yaml").write_text(text + "diagnostics: [gradients: {every: 3}]\n")
    with undrawn():
        done("apply", "--no-report", tmp_path / "prune.yaml", "--output", tmp_path / "run")
    rows = read_rows(tmp_path / "run" / "diagnostics" / "gradients.jsonl", GradientRow)
    watched = [(row.phase, row.step) for row in rows[2:]]
    assert watched == [(f"1_prune_cycle{c}", s) for c in (0, 1) for s in (1, EPOCH)]
    assert {kind for row in rows[2:] for kinds in row.norms.values() for kind in kinds} == {"transforms", "head"}
    assert metrics(tmp_path / "run", kind="widths")
    assert dataclasses.asdict(read(tmp_path / "run" / "diagnostics" / "allocation.json"))["options"]["ramp"] is True
