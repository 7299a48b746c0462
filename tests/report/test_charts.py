"""The charts of a page: which steps, cycles and classes they show, and how they are drawn."""

from __future__ import annotations

import re

from compressvit.charts.findings import Finding
from compressvit.report.page import Page as Builder
from compressvit.report.record import read_run
from compressvit.report.training import POINTS, curves, phases
from compressvit.rows import TrainRow


def test_many_steps_are_averaged():
    lines = [TrainRow(phase="p", step=s, loss=float(s % 2)) for s in range(1, 10 * POINTS + 1)]
    loss = curves("p", phases(lines)["p"])[0]
    assert len(loss.records) == POINTS
    assert {record["value"] for record in loss.records} == {0.5}
    assert loss.records[-1]["step"] == 10 * POINTS


def test_cycles_of_a_prune_follow_one_another():
    lines = [TrainRow(phase=f"1_prune_cycle{c}", step=s, loss=1.0 + c) for c in range(2) for s in (1, 2, 3)]
    loss = curves("1_prune", phases(lines)["1_prune"])[0]
    assert [(r["step"], r["value"]) for r in loss.records] == [(1, 1), (2, 1), (3, 1), (4, 2), (5, 2), (6, 2)]


def test_an_axis_is_logarithmic_only_where_values_span_it():
    def scale(*values):
        lines = [TrainRow(phase="p", step=s, loss=v) for s, v in enumerate(values, 1)]
        return curves("p", lines)[0].options.get("scales")

    assert scale(0.01, 1.0, 2.0) == {"value": "log"}
    assert scale(0.5, 1.0) is None
    assert scale(-1.0, 100.0) is None


def test_many_classes_show_those_that_changed_most(finished):
    from compressvit.report.sections import CLASSES, class_chart

    predictions = read_run(finished).predictions
    row = predictions.classes[0]
    # half of them lose, half gain; the later, the more
    predictions.classes = [
        row.model_copy(update={"name": f"c{i}", "teacher": 50.0, "student": 50.0 + (-1) ** i * i / 10})
        for i in range(100)
    ]
    chart = class_chart(predictions)
    names = list(dict.fromkeys(record["class"] for record in chart.records))
    most = range(100 - CLASSES, 100)
    assert names == [f"c{i}" for i in (*sorted((i for i in most if i % 2), reverse=True), *most[::2])]
    assert "the 40 of 100 that changed most" in chart.caption

    predictions.compared = False
    chart = class_chart(predictions)
    assert {record["class"] for record in chart.records} == {f"c{i}" for i in range(21, 100, 2)}
    assert "the 40 of 100 with the lowest accuracy" in chart.caption


def test_identifiers_of_drawings_do_not_meet():
    builder = Builder()
    records = [{"a": "p", "b": "q", "v": 0.5}]
    finding = Finding("h", "H", "…", "heatmap", records, {"x": "a", "y": "b", "colour": "v"})
    svgs = [builder.figure(finding)["svg"] for _ in range(2)]
    ids = [set(re.findall(r' id="([^"]+)"', svg)) for svg in svgs]
    assert ids[0]
    assert not ids[0] & ids[1]
    for svg, own in zip(svgs, ids, strict=True):
        assert set(re.findall(r"url\(#([^)]+)\)", svg)) <= own
