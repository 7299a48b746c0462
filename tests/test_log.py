"""Progress: the numbers of a training on a narrow terminal, and lines where there is no terminal."""

from __future__ import annotations

import io
import logging
import re

import pytest
from helpers.models import build, images_for
from rich.console import Console

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


@pytest.mark.parametrize(
    ("width", "lines"),
    [
        (80, ["loss 3.911  teacher's top-1 12.5%  gradient 0.785  lr 0.00095"]),
        (40, ["loss 3.911  teacher's top-1 12.5%", "gradient 0.785  lr 0.00095"]),
        (34, ["loss 3.911  teacher's top-1 12.5%", "gradient 0.785  lr 0.00095"]),
        (32, ["loss 3.911", "teacher's top-1 12.5%", "gradient 0.785  lr 0.00095"]),
        (5, ["loss 3.911", "teacher's top-1 12.5%", "gradient 0.785", "lr 0.00095"]),
    ],
)
def test_a_label_stays_with_its_value(width, lines):
    text = "loss 3.911  teacher's top-1 12.5%  gradient 0.785  lr 0.00095"
    assert logs.wrapped_items(text, width).splitlines() == lines


def test_the_numbers_below_the_bar_are_broken_between_items():
    console = Console(file=io.StringIO(), force_terminal=True, width=55, _environ={})
    run_log = logs.RunLog(None, console)
    with run_log.progress("distill", 2) as advance:
        advance("loss 3.911  hidden_relation 0.002183  teacher's top-1 12.5%  gradient 0.785")
    run_log.close()
    shown = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", console.file.getvalue())
    assert "\nloss 3.911  hidden_relation 0.002183\nteacher's top-1 12.5%  gradient 0.785\n" in shown
