"""Progress without a terminal: in a notebook, a script, a pipe."""

from __future__ import annotations

import logging

import pytest
from helpers.models import build, images_for

from compressvit import LowRank, compress
from compressvit import log as logs


def test_a_long_calibration_reports_its_progress(monkeypatch, caplog):
    monkeypatch.setattr(logs, "_LINE_EVERY", 0.0)
    caplog.set_level(logging.INFO, "compressvit")
    model = build("vit")
    compress(model, [LowRank(budget={"parameters": 0.5})], calibration=images_for(model, 40))
    assert [text.partition(" done in ")[0] for text in caplog.messages] == [
        "measuring layers on batches of calibration images: 1 of 3",
        "measuring layers on batches of calibration images: 2 of 3",
        "fitting layers block by block: 1 of 4",
        "fitting layers block by block: 2 of 4",
        "fitting layers block by block: 3 of 4",
    ]


@pytest.mark.parametrize(("every", "lines"), [(0.0, ["compressvit: waiting: 1 done in 0 s"]), (5.0, [])])
def test_without_a_handler_it_is_on_stderr_and_only_if_it_takes_long(monkeypatch, capsys, every, lines):
    monkeypatch.setattr(logs, "_LINE_EVERY", every)
    monkeypatch.setattr(logs.log, "propagate", False)
    assert list(logs.progress("ab", "waiting")) == ["a", "b"]
    assert capsys.readouterr().err.splitlines() == lines


def test_on_a_terminal_it_is_a_bar(monkeypatch, capsys):
    monkeypatch.setattr(logs, "_LINE_EVERY", 0.0)
    monkeypatch.setenv("FORCE_COLOR", "1")  # for rich, a terminal
    assert list(logs.progress("ab", "waiting", 2)) == ["a", "b"]
    text = capsys.readouterr().err
    assert "━" in text
    assert "done in" not in text
