"""Latencies are told with their spread: a third digit would be noise."""

from __future__ import annotations

import copy
import json
import math

import pytest
import torch
from helpers.models import build
from helpers.runs import TINY, done, refused

from compressvit.model.backbone import input_size
from compressvit.model.cost import Latencies, latencies
from compressvit.recipe.recipe import parse_recipe
from compressvit.report.compare import Row, cells, latency_text
from compressvit.runs.files import Figures, Results
from compressvit.runs.tables import latency_spread, ratio_text, results_rows

COSTS = {"parameters": 10, "bytes": 40, "macs": 100}


def test_the_ratio_is_taken_within_a_round():
    """The second model always takes twice as long; a load on the machine that comes and goes does not change that."""
    loads = [1.0, 8.0, 2.0, 1.0, 30.0]
    times = Latencies([[load, 2 * load] for load in loads])
    assert times.medians == [2.0, 4.0]
    assert times.ratio(1) == (2.0, 2.0, 2.0)
    spread = Latencies([[1.0, ratio] for ratio in (1.0, 2.0, 3.0, 4.0, 50.0)])
    assert spread.ratio(1) == (1.0, 3.0, 50.0)
    assert spread.ratio(0, 1)[1] == pytest.approx(1 / 3)
    assert ratio_text(spread.ratio(1)) == "3.00 (1.00–50.00)"


@pytest.mark.parametrize(("rounds", "outside"), [(1, 0), (8, 0), (11, 0), (12, 1), (30, 7)])
def test_the_interval_contains_the_median_as_often_as_promised(rounds, outside):
    """Outside are so many ratios at each end, and one more would be too many: the share of fair coins of which so few are heads."""
    ratios = [float(i) for i in range(1, rounds + 1)]
    low, middle, high = Latencies([[1.0, ratio] for ratio in reversed(ratios)]).ratio(1)
    assert (low, middle, high) == (1 + outside, (rounds + 1) / 2, rounds - outside)

    def missed(few):  # both ends
        return 2 * sum(math.comb(rounds, heads) for heads in range(few + 1)) / 2**rounds

    assert missed(outside) <= 0.01 or rounds < 8
    assert missed(outside + 1) > 0.01


@pytest.mark.slow
def test_two_models_that_compute_the_same_take_the_same_time():
    """Each interval misses 1.00 in one of a hundred on any machine, however it is loaded; three of ten would be one in ten thousand."""
    model = build("vit").eval()
    missed = 0
    for _ in range(10):
        times = latencies([model, copy.deepcopy(model)], [input_size(model)] * 2, device=torch.device("cpu"))
        low, _, high = times.ratio(1)
        missed += not low <= 1 <= high
    assert missed < 3


@pytest.mark.parametrize(
    ("ratios", "cell", "interval"),
    [
        ([(0.6, 0.7, 0.8)], "0.70 (0.60–0.80)", [0.6, 0.8]),
        ([(0.6, 0.7, 0.8), (0.75, 0.8, 0.9)], "0.75 (0.60–0.90)", [0.6, 0.9]),
        ([(0.6, 0.7, 0.8), None], "0.70", None),  # one of an earlier version
    ],
)
def test_the_comparison_has_the_spread(ratios, cell, interval):
    own = {**COSTS, "latency_ms": 1.4}
    results = [Results(teacher={**COSTS, "latency_ms": 2.0}, student={**own, "latency_ratio": r}) for r in ratios]
    row = Row(parse_recipe(TINY), [], results, [0] * len(results)).as_dict()
    assert row["latency_interval"] == interval
    heads, rows = cells([row])
    assert rows[0][heads.index("latency / teacher")] == cell


def test_quartiles_of_earlier_versions_are_called_so():
    student = {**COSTS, "latency_ms": 3.0, "latency_ratio": (1, 1.4, 2)}
    teacher = {**COSTS, "latency_ms": 2.0}
    old, new = (Results(teacher=teacher, student={**student, **own}) for own in ({}, {"latency_confidence": 0.99}))
    assert latency_spread(old) == "the quartiles of the rounds"
    assert latency_spread(new) == "the 99 % interval of the median ratio"
    for results, told in (([old], True), ([new, old], True), ([new], False)):
        row = Row(parse_recipe(TINY), [], results, [0] * len(results)).as_dict()
        assert ("runs of earlier versions are from quartile to quartile" in latency_text([row])) is told


def latency_row(**student):
    rows = results_rows(Figures(**COSTS, latency_ms=2.0), Figures(**COSTS, **student))
    return next((row for row in rows if row[0] == "latency"), None)


def test_the_table_has_the_spread():
    assert latency_row(latency_ms=3.0, latency_ratio=(1.4, 1.512, 1.6)) == (
        "latency",
        "2.00 ms",
        "3.00 ms",
        "1.51 (1.40–1.60)",
    )
    assert latency_row(latency_ms=3.0) == ("latency", "2.00 ms", "3.00 ms", "1.50")  # of an earlier version
    assert latency_row() is None


def test_every_reader_takes_the_ratio_of_the_rounds():
    results = Results(
        teacher={**COSTS, "latency_ms": 2.0}, student={**COSTS, "latency_ms": 3.0, "latency_ratio": (1, 1.4, 2)}
    )
    assert results.slowdown == 1.4
    assert Results(teacher={**COSTS, "latency_ms": 2.0}, student={**COSTS, "latency_ms": 3.0}).slowdown == 1.5
    assert Results(teacher=COSTS, student=COSTS).slowdown is None


@pytest.mark.wide
def test_a_run_and_its_merge(tmp_path):
    """A merge of low rank makes the model larger, and says so."""
    (tmp_path / "recipe.yaml").write_text(TINY.replace("multiplex: {share: 2}", "low_rank: {rank: 2}"))
    done("apply", "--no-report", tmp_path / "recipe.yaml", "--output", tmp_path / "run")
    results = json.loads((tmp_path / "run/results.json").read_text())
    low, middle, high = results["student"]["latency_ratio"]
    assert results["student"]["latency_confidence"] == 0.99
    assert 0 < low <= middle <= high
    message = refused("merge", tmp_path / "run")
    assert "that undoes its compression. Give --dense for that all the same" in message
    assert not (tmp_path / "run" / "merged").exists()
    out = done("merge", tmp_path / "run", "--dense")
    merged = json.loads((tmp_path / "run/merged/merge.json").read_text())
    assert set(merged["latency_ratio"]) == {"unmerged", "merged"}
    larger = merged["parameters"]["merged"] / merged["parameters"]["unmerged"]
    assert f"has {larger:.1f} times the parameters of the unmerged one" in out
    assert larger > 1.5
