"""The rows of `metrics.jsonl`: each is read as what it was written as."""

from __future__ import annotations

import pytest

from compressvit.errors import UserError
from compressvit.rows import (
    EpochRow,
    EvaluationRow,
    MetricsRow,
    TrainRow,
    WidthsRow,
    append_row,
    metrics_row,
    read_metrics,
)

ROWS = [
    EvaluationRow(time=1.5, phase="0_multiplex", step=0, images=360, top1=68.06),
    TrainRow(time=2.5, phase="1_distill", step=4, epoch=0, loss=0.25, lr=1e-3),
    EpochRow(time=3.5, phase="1_distill", step=8, epoch=1, loss=0.125),
    WidthsRow(time=4.5, phase="2_prune", step=1, **{"blocks.0": 3, "blocks.1": 0}),
    MetricsRow(time=5.5, phase="2_prune", kind="of a later version", step=1, size=2),
]


def test_rows_are_read_as_they_were_written(tmp_path):
    path = tmp_path / "metrics.jsonl"
    for row in ROWS:
        append_row(path, row)
    found = read_metrics(path)
    assert found == ROWS
    assert [type(row) for row in found] == [type(row) for row in ROWS]
    assert found[0].values == {"images": 360, "top1": 68.06}
    assert found[3].widths == {"blocks.0": 3, "blocks.1": 0}
    first = '{"time": 1.5, "phase": "0_multiplex", "kind": "evaluate", "step": 0, "images": 360, "top1": 68.06}'
    assert path.read_text().splitlines()[0] == first


def test_a_step_that_was_taken_again_counts_once(tmp_path):
    path = tmp_path / "metrics.jsonl"
    for loss in (3.0, 2.0):
        for step in (1, 2):
            append_row(path, metrics_row("train", {"phase": "1_distill", "step": step, "loss": loss - step}))
    assert [(row.step, row.value("loss")) for row in read_metrics(path)] == [(1, 1.0), (2, 0.0)]


@pytest.mark.parametrize(
    ("line", "words"),
    [
        ('{"phase": "a", "kind": "train"}', "line 1 has no 'step'"),
        ('{"phase": "a", "kind": "train", "step": 1.5}', "line 1 has another step"),
        ('{"phase": "a", "kind": "train", "step": 1, "loss": "low"}', "line 1 has another loss"),
        ('{"phase": "a", "kind": "train", "step": 1, "loss": true}', "line 1 has another loss"),
        ("[]", "line 1 has another form"),
        ("{", "line 1 is not JSON"),
    ],
)
def test_a_row_of_another_form_is_refused(line, words, tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_text(f"{line}\n{line}\n")
    with pytest.raises(UserError, match=words):
        read_metrics(path)
