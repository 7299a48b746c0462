"""Runs of all kinds of recipes that are killed at random moments end as those that nobody killed."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
from helpers.kills import CASES
from helpers.run_contents import difference

HARNESS = Path(__file__).parent / "helpers" / "kills.py"
KILLS = int(os.environ.get("COMPRESSVIT_KILLS", "200"))
SHARES = 8  # of the cases, each in a process and a test of its own


@pytest.mark.slow
@pytest.mark.timeout(3600)
@pytest.mark.parametrize("share", range(SHARES))
def test_killed_runs_end_as_the_others(share, tmp_path):
    names = list(CASES)[share::SHARES]
    seed = int(os.environ.get("COMPRESSVIT_SEED", "0"))
    words = ["--kills", -(-KILLS // SHARES), "--seed", seed, "--keep", tmp_path, "--only", *names]
    answer = subprocess.run([sys.executable, HARNESS, *map(str, words)], capture_output=True, text=True, check=False)
    assert answer.returncode == 0, answer.stdout[-5000:] + answer.stderr[-2000:]
    assert "faults 0" in answer.stdout


def test_whoever_compares_sees_what_differs():
    whole = {"run": "a folder", "run/a.json": {"x": [1, 2], "y": "z"}, "run/b": b"12"}
    assert difference(whole, {**whole}) is None
    others = {
        "run/b is missing": {key: value for key, value in whole.items() if key != "run/b"},
        "run/.scratch is there too much": {**whole, "run/.scratch": b""},
        "run/b differs (2 bytes, 3)": {**whole, "run/b": b"123"},
        "run/a.json x[1] differs (2 entries, 2): [2] [3]": {**whole, "run/a.json": {"x": [1, 3], "y": "z"}},
        "run/a.json y is 'w', not 'z'": {**whole, "run/a.json": {"x": [1, 2], "y": "w"}},
    }
    for words, other in others.items():
        assert difference(whole, other) == words
