"""`compressvit frontier`: one row a budget, better with more, nothing trained; and the plots it and `apply` write."""

from __future__ import annotations

import csv
import json

import pytest
from helpers.latency import table_of
from helpers.models import build
from helpers.runs import done, refused, run
from PIL import Image

import compressvit
from compressvit.charts.findings import read
from compressvit.charts.plots import frontier_finding, ranks_finding
from compressvit.model import cost
from compressvit.model.backbone import input_size
from compressvit.runs.frontier import _costs, _quality
from compressvit.runs.methods import METHODS, budgeted
from compressvit.tasks.qualities import qualities
from compressvit.terminal import Terminal, print_table
from compressvit.transforms.shrink import spec


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


@pytest.mark.wide
def test_forms_of_all_kinds_are_swept(trained, tmp_path):
    recipe, run = trained
    step = "steps=[{shrink: {budget: {macs: 0.5}, multiple: 4}}]"
    done("frontier", recipe, *values_of(run), step, "--budgets", 0.8, 0.5, "--output", tmp_path / "out")
    rows = json.loads((tmp_path / "out" / "frontier.json").read_text())
    assert [row["budget"] for row in rows] == [None, 0.8, 0.5]
    assert all(row["parameters"] <= row["budget"] * rows[0]["parameters"] for row in rows[1:])
    assert rows[1]["cosine"] > rows[2]["cosine"]


@pytest.mark.wide
def test_budgets_of_latency_are_spent_by_shrink_and_modules_are_measured_once(trained, tmp_path, monkeypatch):
    recipe, run = trained
    batches = []

    def measure(model, found, *, batch, **options):
        batches.append(batch)
        return table_of(model, found, batch=batch)

    monkeypatch.setattr(spec, "measure", measure)
    monkeypatch.setattr(spec, "ratio", lambda *models, **options: (0.5, 0.6, 0.7))
    step = "steps=[{shrink: {budget: {latency: 0.5}, batch: 3, metric: weights, multiple: 4, methods: [neurons]}}]"
    words = ["--unit", "latency", "--budgets", 0.85, 0.75, 0.01, "--output", tmp_path / "out"]
    out = done("frontier", recipe, *values_of(run), step, *words)
    rows = json.loads((tmp_path / "out" / "frontier.json").read_text())
    assert [row["budget"] for row in rows] == [None, 0.85, 0.75]
    assert rows[0]["parameters"] > rows[1]["parameters"] > rows[2]["parameters"]
    assert batches == [3]
    for text in ("budget 0.01: shrink: a budget of", "latency: batch 3 on cpu", "budgets: of the teacher's latency"):
        assert text in out
    plot = frontier_finding(rows, "latency", "cosine", "cosine", "a model")
    assert {record["share"] for record in plot.records} == {row["latency"] for row in rows[1:]}


SIDE_BY_SIDE = [name for name, method in METHODS.items() if "parameters" in method.units]


@pytest.mark.wide_unless(lambda names: names is not SIDE_BY_SIDE)
@pytest.mark.parametrize("names", [SIDE_BY_SIDE[:2], SIDE_BY_SIDE], ids=["two", "all"])
def test_methods_side_by_side(trained, tmp_path, names):
    recipe, run = trained
    words = ["--methods", *names, "--budgets", 0.5, "--output", tmp_path / "out"]
    out = done("frontier", recipe, *values_of(run), "steps=[{shrink: {budget: {macs: 0.5}, multiple: 4}}]", *words)
    rows = json.loads((tmp_path / "out" / "frontier.json").read_text())
    assert [row["method"] for row in rows] == [None, *names]
    whole = rows[0]
    for row in rows[1:]:
        assert row["parameters"] <= 0.5 * whole["parameters"]
        assert row["memory"] < whole["memory"]
        assert row["latency_low"] <= row["latency"] <= row["latency_high"]
    assert rows[1]["cosine"] > rows[2]["cosine"]  # shrink chooses for every block, narrow has one share for all
    for text in ("memory: the weights, and the most", "in turns, medians of up to 30 rounds", *names):
        assert text in out
    plot = json.loads(json.dumps(frontier_finding(rows, "parameters", "cosine", "cosine", "a model").records))
    assert {record["method"] for record in plot} == set(names)


def test_bits_are_a_method_for_budgets_of_bytes():
    model = build("vit")
    step = METHODS["quantise"].step(model, "bytes", 0.3)
    student = compressvit.compress(model, [step.model_copy(update={"metric": "weights"})])
    before, after = (cost.cost(each, input_size(model)) for each in (model, student))
    assert 0.25 * before.bytes < after.bytes <= 0.3 * before.bytes
    assert after.parameters == before.parameters
    steps = [compressvit.Shrink(budget={"macs": 0.5}), step]
    assert (budgeted(steps, "parameters"), budgeted(steps, "bytes")) == (0, 1)


def test_narrow_meets_a_budget_or_says_why_not():
    model = build("vit")
    whole = cost.cost(model, input_size(model))
    step = METHODS["narrow"].step(model, "macs", 0.7)
    student = compressvit.compress(model, [step.model_copy(update={"metric": "weights"})])
    spent = cost.cost(student, input_size(student)).macs
    assert 0.5 < spent / whole.macs <= 0.7
    with pytest.raises(compressvit.UserError, match=r"narrow: a budget of 12 parameters cannot be met \(with 1/64"):
        METHODS["narrow"].step(model, "parameters", 12)


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
        (
            ["--unit", "latency"],
            "--unit latency: low_rank cannot be made for a budget of latency; of the methods only shrink can",
        ),
        (
            ["steps=[{shrink: {budget: {macs: 0.5}}}]", "--unit", "latency", "--methods", "shrink", "narrow", "lors"],
            "narrow and lors cannot be made for a budget of latency; of the methods only shrink can (--methods shrink), or give another "
            "unit: parameters, bytes, macs",
        ),
        (
            ["steps=[distill, {lors: {rank: 2}}]"],
            "on a `shrink`, `low_rank`, `lors` or `quantise` step before the first phase",
        ),
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


ROW = {"parameters": 98_765_432, "bytes": 395_061_728, "macs": 17_568_000_000, "memory": 412_345_678, "images": 500}
LATENCY = {"latency_ms": 1234.5, "latency": 0.7234, "latency_low": 0.7, "latency_high": 0.75}
OF_CLASSES = {"top1": 86.834, "agreement": 99.3, "cosine": 0.98765}
OF_FEATURES = {"cosine": 0.98765, "cosine_patches": 0.97654, "recall_10": 87.65, "knn": 91.234, "indexed": 5000}


@pytest.mark.parametrize("scores", [OF_CLASSES, OF_FEATURES], ids=["classes", "features"])
def test_the_tables_of_large_models_fit_80_columns(scores, capsys):
    scores = {**dict.fromkeys(qualities()), **scores}
    sizes = [(None, None), *((method, budget) for method in ("shrink", "low_rank") for budget in (0.75, 0.5))]
    rows = [{"method": method, "budget": budget, **ROW, **LATENCY, **scores} for method, budget in sizes]
    for table in (_costs(rows, "parameters"), _quality(rows)):
        print_table(table, Terminal(width=80))
    out = capsys.readouterr().out
    assert "…" not in out
    assert "┃" in out  # tables, no lists
    wanted = [
        "(budgets: of the teacher's parameters)",
        "98.77 M",
        "395.1 MB",
        "17.57 G",
        "412.3 MB",
        "0.72 (0.70–0.75)",
    ]
    wanted += ["1234.50 ms", "shrink", "low_rank", "0.75", "0.9877"]
    wanted += ["87.7 (84.5–90.3)", "91.23 (88.4–93.4)"] if scores["knn"] else ["86.83", "99.30"]
    for text in wanted:
        assert text in out
