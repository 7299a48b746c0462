"""Latencies are told with their spread: a third digit would be noise."""

from __future__ import annotations

import json

import pytest
from helpers.runs import TINY, done

from compressvit.model.cost import Latencies
from compressvit.runs.files import Figures, Results
from compressvit.runs.tables import ratio_text, results_rows

COSTS = {"parameters": 10, "bytes": 40, "macs": 100}


def test_the_ratio_is_taken_within_a_round():
    """The second model always takes twice as long; a load on the machine that comes and goes does not change that."""
    loads = [1.0, 8.0, 2.0, 1.0, 30.0]
    times = Latencies([[load, 2 * load] for load in loads])
    assert times.medians == [2.0, 4.0]
    assert times.ratio(1) == (2.0, 2.0, 2.0)
    spread = Latencies([[1.0, ratio] for ratio in (1.0, 2.0, 3.0, 4.0, 50.0)])
    assert spread.ratio(1) == (2.0, 3.0, 4.0)
    assert spread.ratio(0, 1)[1] == pytest.approx(1 / 3)
    assert ratio_text(spread.ratio(1)) == "3.00 (2.00–4.00)"


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


def test_a_run_and_its_merge(tmp_path):
    """A merge of low rank makes the model larger, and says so."""
    (tmp_path / "recipe.yaml").write_text(TINY.replace("multiplex: {share: 2}", "low_rank: {rank: 2}"))
    done("apply", "--no-report", tmp_path / "recipe.yaml", "--output", tmp_path / "run")
    results = json.loads((tmp_path / "run/results.json").read_text())
    low, middle, high = results["student"]["latency_ratio"]
    assert 0 < low <= middle <= high
    out = done("merge", tmp_path / "run")
    merged = json.loads((tmp_path / "run/merged/merge.json").read_text())
    assert set(merged["latency_ratio"]) == {"unmerged", "merged"}
    larger = merged["parameters"]["merged"] / merged["parameters"]["unmerged"]
    assert f"has {larger:.1f} times the parameters of the unmerged one" in out
    assert larger > 1.5
