"""`compressvit frontier`: one row a budget, better with more, nothing trained; and the plots it and `apply` write."""

from __future__ import annotations

import csv
import json

import pytest
from helpers.runs import done, refused, run
from PIL import Image

from compressvit.charts.findings import read
from compressvit.charts.plots import frontier_finding, ranks_finding
from compressvit.runs.frontier import _table
from compressvit.terminal import Terminal


def values_of(run):
    return [f"teacher.weights={run / 'teacher'}", "calibration.images=32"]  # its `finetune` is not asked for


@pytest.mark.wide_unless(lambda unit: unit == "macs")
@pytest.mark.parametrize("unit", ["parameters", "macs"])
def test_a_sweep_from_good_to_small(trained, tmp_path, unit):
    recipe, run = trained
    words = ["--budgets", 0.9, 0.5, 0.7, 0.0001, "--unit", unit, "--output", tmp_path / "out"]
    out = done("frontier", recipe, *values_of(run), *words)
    assert "budget 0.0001: low_rank: a budget of" in out
    assert "cannot be met" in out
    rows = json.loads((tmp_path / "out" / "frontier.json").read_text())
    assert [row["budget"] for row in rows] == [None, 0.9, 0.7, 0.5]
    for row in rows[1:]:
        assert row[unit] <= row["budget"] * rows[0][unit]
    assert rows[1]["cosine"] > rows[2]["cosine"] > rows[3]["cosine"]
    assert rows[0]["cosine"] == pytest.approx(1, abs=1e-5)
    with (tmp_path / "out" / "frontier.csv").open() as file:
        assert [float(row["cosine"]) for row in csv.DictReader(file)] == [row["cosine"] for row in rows]
    assert Image.open(tmp_path / "out" / "frontier.png").size[0] > 800


def test_forms_of_all_kinds_are_swept(trained, tmp_path):
    recipe, run = trained
    step = "steps=[{shrink: {budget: {macs: 0.5}, multiple: 4}}]"
    done("frontier", recipe, *values_of(run), step, "--budgets", 0.8, 0.5, "--output", tmp_path / "out")
    rows = json.loads((tmp_path / "out" / "frontier.json").read_text())
    assert [row["budget"] for row in rows] == [None, 0.8, 0.5]
    assert all(row["parameters"] <= row["budget"] * rows[0]["parameters"] for row in rows[1:])
    assert rows[1]["cosine"] > rows[2]["cosine"]


def test_the_run_draws_its_ranks(trained):
    assert Image.open(trained[1] / "ranks.png").size[0] > 800
    finding = read(trained[1] / "diagnostics" / "ranks.json")
    assert len(finding.records) > 6
    assert {record["rank"] for record in finding.records} == {3}


def test_a_layer_that_stays_dense_has_a_bar_of_its_full_rank(tmp_path):
    finding = ranks_finding({"a": 3, "b": None}, {"a": 8, "b": 8})
    assert [(record["rank"], record["kept"]) for record in finding.records] == [(3, ""), (8, "dense")]
    finding.picture(tmp_path / "ranks.svg")
    assert ">dense<" in (tmp_path / "ranks.svg").read_text()


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ([], "trains nothing, so the teacher needs weights: run the recipe once"),
        (["--budgets", "-1"], "a budget is above 0"),
        (["steps=[{multiplex: {share: 2}}, distill]"], "the steps of this recipe are multiplex, distill"),
        (["teacher.weights=RUN", "steps.0.low_rank.init=scratch"], "which low_rank.init=scratch does not use"),
        (["teacher.weights=RUN", "teacher.num_classes=7"], "classifier of 10 classes and the model one of 7"),
        (["steps=[distill, {lors: {rank: 2}}]"], "on a `shrink`, `low_rank` or `lors` step before the first phase"),
    ],
)
def test_what_cannot_be_swept(trained, words, message):
    words = [word.replace("RUN", str(trained[1] / "teacher")) for word in words]
    assert message in refused("frontier", trained[0], *words)


def test_no_budget_can_be_met(trained, tmp_path):
    recipe, run = trained
    out = tmp_path / "out"
    message = refused("frontier", recipe, *values_of(run), "--budgets", 0.0001, "--output", out)
    assert "none of the budgets can be met" in message
    assert not out.exists()


def test_a_plot_of_a_model_without_classes(tmp_path):
    rows = [{"parameters": 10, "cosine": 1.0}, {"parameters": 7, "cosine": 0.9}, {"parameters": 5, "cosine": 0.8}]
    finding = frontier_finding(rows, "parameters", "cosine", "cosine", "a model")
    finding.picture(tmp_path / "plot.svg")
    svg = (tmp_path / "plot.svg").read_text()
    assert svg.count('aria-roledescription="point"') == 2
    assert all(f">{text}</text>" in svg for text in ("0.8", "0.9", "teacher", "cosine", "a model: before any training"))


def test_a_student_of_another_input_is_measured_on_its_own(trained, tmp_path):
    recipe, run = trained
    student = "student={weights: random, args: {img_size: 16}}"
    done("frontier", recipe, *values_of(run), student, "--budgets", 0.7, "--output", tmp_path / "out")
    rows = json.loads((tmp_path / "out" / "frontier.json").read_text())
    assert rows[1]["macs"] > rows[0]["macs"]  # 16 tokens for 4, at 0.7 of the parameters
    assert rows[0]["agreement"] == 100


def test_an_override_behind_the_budgets_is_told_its_place(trained):
    code, _, err = run("frontier", trained[0], "--budgets", 0.5, "seed=3")
    assert code == 2
    assert "'seed=3' is not a number; key=value goes before --budgets" in err


def test_the_table_of_a_large_model_fits_80_columns(capsys):
    row = {"parameters": 98_765_432, "bytes": 395_061_728, "macs": 17_568_000_000}
    rows = [{"budget": budget, **row, "top1": 86.834, "agreement": 99.3, "cosine": 0.98765} for budget in (None, 0.5)]
    Terminal(width=80).print(_table(rows, "parameters"))
    out = capsys.readouterr().out
    assert "…" not in out
    for text in ("(share: of the teacher's parameters)", "parameters ┃", "17.57 G", "86.83 │", "99.30 │", "0.9877 │"):
        assert text in out
