"""One way through a run: every station is passed once, and models are built and data opened once."""

from __future__ import annotations

import sys
from collections import Counter

import pytest
from helpers.runs import TINY, done

from compressvit.data.input import input_config
from compressvit.data.opening import open_data
from compressvit.runs.finish import finish
from compressvit.runs.job import prepare
from compressvit.runs.models import build_student, teacher_architecture
from compressvit.runs.plan import plan_job

STATIONS = (prepare, plan_job, finish, open_data, teacher_architecture, build_student, input_config)


@pytest.fixture
def passed():
    """How often each station was entered, whoever called it by whatever name."""
    codes, seen = {station.__code__: station.__name__ for station in STATIONS}, Counter()

    def count(frame, event, _):
        if event == "call" and frame.f_code in codes:
            seen[codes[frame.f_code]] += 1

    sys.setprofile(count)
    yield seen
    sys.setprofile(None)


def test_a_run_passes_every_station_once(tmp_path, passed):
    recipe = tmp_path / "tiny.yaml"
    recipe.write_text(TINY)
    done("apply", "--no-report", recipe, "--output", tmp_path / "run")
    assert passed == {
        "prepare": 1,
        "plan_job": 1,
        "finish": 1,
        "open_data": 1,
        "teacher_architecture": 1,
        "build_student": 2,  # its structure, and with values
        "input_config": 2,  # the teacher's and the student's
    }


def test_a_plan_opens_no_data(tmp_path, passed):
    recipe = tmp_path / "tiny.yaml"
    recipe.write_text(TINY)
    done("plan", recipe)
    assert passed == {"prepare": 1, "plan_job": 1, "teacher_architecture": 1, "build_student": 1, "input_config": 2}
