"""The chart of ranks that a run draws."""

from __future__ import annotations

import json

import pytest
from rich.console import Console

import compressvit

SMALL = {"depths": [1, 1, 2, 1], "dims": [8, 16, 16, 32], "patch_size": 4, "conv_mlp": True, "in_chans": 1}


@pytest.mark.usefixtures("undrawn")
def test_convolutions_that_stay_dense_are_drawn(tmp_path):
    recipe = {
        "teacher": {"model": "convnext_tiny", "weights": "random", "args": SMALL},
        "data": {"name": "digits", "limit_train": 32, "limit_val": 16},
        "steps": [{"low_rank": {"budget": {"parameters": 0.9}, "metric": "weights"}}],
    }
    compressvit.apply(recipe, tmp_path, console=Console(quiet=True))
    rows = json.loads((tmp_path / "diagnostics/ranks.json").read_text())["records"]
    dense = {row["layer"]: row["full"] for row in rows if row["kept"] == "dense"}
    assert dense
    assert len(dense) < len(rows) == 10
    assert all(full == SMALL["dims"][int(path.split(".")[1])] for path, full in dense.items())
