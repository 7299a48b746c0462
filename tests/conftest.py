"""Fixtures that several files share; torch on one thread, so that tests run side by side do not fight for cores.

What takes long to import is imported where it is used: pytest-xdist's first process reads this file and runs no test.
"""

from __future__ import annotations

import functools
import gc
import importlib
import inspect
import json
import os
from pathlib import Path

import pytest

pytest.register_assert_rewrite("helpers")  # before its import, so that its assertions also tell what they saw

from helpers import process  # noqa: E402

# What the first run of a process imports, which takes seconds. Of so many tests one will be a run, and `--durations` then tells what it
# takes itself.
MANY, OF_RUNS = 500, ("altair", "sklearn.model_selection", "torch.utils.tensorboard", "vl_convert")


@pytest.fixture(autouse=True, scope="session")
def _one_thread():
    import torch

    torch.set_num_threads(1)


@pytest.fixture(autouse=True, scope="session")
def _wide_terminal():
    """So that no line of a table or message is broken."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("COLUMNS", "240")
        yield


@pytest.fixture(autouse=True, scope="session")
def _few_timings():
    """Models are timed in 3 rounds and not in 30: no test looks at how long one takes."""
    from compressvit.model import cost

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(cost, "latencies", functools.partial(cost.latencies, rounds=3))
        yield


@pytest.fixture(autouse=True, scope="session")
def _no_waiting_for_the_disk():
    """No test loses its power; `tests/test_reading.py` counts who would have waited."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(os, "fsync", lambda handle: None)
        yield


@pytest.fixture(autouse=True, scope="session")
def _no_vega():
    """Pages have a word in place of Vega's code, which takes seconds to put together and which hardly a test looks at."""
    import vl_convert

    bundle = vl_convert.javascript_bundle
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(vl_convert, "javascript_bundle", lambda: "vega")
        yield bundle


@pytest.fixture(scope="module")
def vega(_no_vega):
    """Pages have Vega's own code."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("vl_convert.javascript_bundle", _no_vega)
        yield


@pytest.hookimpl(tryfirst=True)  # before `-m` chooses
def pytest_collection_modifyitems(items):
    """Mark as `wide` what `wide_unless` says."""
    for item in items:
        for mark in item.iter_markers("wide_unless"):
            (fast,) = mark.args
            given = item.callspec.params
            if not fast(**{name: given[name] for name in inspect.signature(fast).parameters}):
                item.add_marker(pytest.mark.wide)


def pytest_collection_finish(session):
    """What was imported and collected stays until the end: the garbage collector need not look at it again and again."""
    if not session.config.option.collectonly:
        if any(vars(i.module).get("process") is process for i in session.items):
            process.begin()
        if len(session.items) > MANY:
            for name in OF_RUNS:
                importlib.import_module(name)
    gc.collect()
    gc.freeze()
    gc.set_threshold(20_000, 20, 20)


@pytest.fixture
def drawn_once(monkeypatch):
    """A chart that was drawn before is not drawn again; for tests that make many reports of one run."""
    from helpers.page import drawn

    monkeypatch.setattr("vl_convert.vegalite_to_svg", lambda spec: drawn(json.dumps(spec)))


@pytest.fixture
def undrawn():
    """Pictures of charts are a pixel; for tests that look at none."""
    from helpers.runs import undrawn

    with undrawn():
        yield


@pytest.fixture
def few_shot(monkeypatch):
    """A program of `benchmarks/`, which is on the path for others too."""
    monkeypatch.syspath_prepend(Path(__file__).parents[1] / "benchmarks")
    return importlib.import_module("few_shot_runs")


# --- runs


@pytest.fixture(scope="session")
def recipe(tmp_path_factory):
    """The file of `RECIPE`; the tests of the command line have one of their own."""
    from helpers.runs import RECIPE

    path = tmp_path_factory.mktemp("engine") / "tiny.yaml"
    path.write_text(RECIPE)
    return path


@pytest.fixture(scope="session")
def finished(recipe):
    """A finished run of `recipe` with an override, without its report. Not to be changed: copy it first."""
    from helpers.runs import done

    folder = recipe.parent / "finished"
    done("apply", "--no-report", recipe, "--output", folder, "seed=3")
    return folder


@pytest.fixture(scope="session")
def trained(tmp_path_factory):
    """A recipe with a `lors` step, and the folder of a run whose teacher it can take."""
    from helpers.runs import TINY, done

    folder = tmp_path_factory.mktemp("lors")
    recipe = folder / "lors.yaml"
    recipe.write_text(TINY.replace("multiplex: {share: 2}", "low_rank: {rank: 3}").replace("epochs: 1}", "epochs: 6}"))
    done("apply", "--no-report", recipe, "--output", folder / "run", "calibration.images=32")
    return recipe, folder / "run"
