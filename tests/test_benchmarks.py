"""What decides the figures of the benchmarks: how a rate is chosen, and that no table mixes runs of two recipes."""

from __future__ import annotations

import importlib
from pathlib import Path

import pytest


@pytest.fixture
def few_shot(monkeypatch):
    monkeypatch.syspath_prepend(Path(__file__).parents[1] / "benchmarks")
    return importlib.import_module("few_shot_adapters")


@pytest.mark.parametrize(
    ("scores", "following"),
    [
        ({1e-3: 80, 5e-3: 90}, [5e-3 * 4]),
        ({1e-3: 90, 5e-3: 80}, [1e-3 / 4]),
        ({1e-3: 90, 5e-3: 90}, [1e-3 / 4]),
        ({1e-3: 80, 5e-3: 90, 2e-2: 85}, []),
        ({1e-3: 80, 5e-3: 90, 2e-2: 90}, []),
        ({1e-3: 80, 5e-3: 85, 2e-2: 90}, [8e-2]),
    ],
)
def test_rates_go_on_while_the_best_is_at_an_edge(few_shot, scores, following):
    assert few_shot.beyond(scores) == pytest.approx(following)


def test_a_finished_run_of_another_recipe_is_not_taken(few_shot, tmp_path):
    run = few_shot.run
    for name, text in (("results.json", '{"student": {}}'), ("seconds.json", "1.5"), ("recipe.yaml", "seed: 0\n")):
        (tmp_path / name).write_text(text)
    assert run("seed: 0\n", tmp_path, None) == {"student": {}, "seconds": 1.5}
    with pytest.raises(SystemExit, match="holds a finished run of another recipe"):
        run("seed: 1\n", tmp_path, None)


def test_the_modules_have_the_shares_of_the_papers_table_1(few_shot):
    table = importlib.import_module("lors_table1")
    dense, made = map(table.counts, table.decoders())
    assert (dense.decoder, made.decoder, made.mixing) == (135_536_424, 35_348_264, 25_940_480)
    by_stage = [100 * (made.generator + 6 * terms) / dense.generator for terms in made.terms]
    assert [round(share, 1) for share in by_stage] == [19.9, 19.9, 23.2, 23.2, 26.5, 26.5]
    assert round(100 * (made.projection + made.low_rank) / dense.projection, 1) == 19.8
