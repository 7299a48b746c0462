"""Progress: the numbers of a training on a narrow terminal, and lines where there is no terminal."""

from __future__ import annotations

import io
import logging
import re
from itertools import pairwise

import pytest
import torch
from helpers.models import build, images_for
from rich.console import Console

from compressvit import LORS, LowRank, compress
from compressvit import log as logs
from compressvit.model import weights
from compressvit.model.families.adamixer import SMALL
from compressvit.terminal import wrapped_items


def test_a_long_calibration_reports_its_progress(monkeypatch, caplog):
    monkeypatch.setattr(logs, "_LINE_EVERY", 0.0)
    caplog.set_level(logging.INFO, "compressvit")
    model = build("vit")
    compress(model, [LowRank(budget={"parameters": 0.5})], calibration=images_for(model, 40))
    assert [text.partition(" done in ")[0] for text in caplog.messages] == [
        *lines("measuring layers on batches of calibration images", 3),
        *lines("weighing the ranks of layers", 16),
        *lines("factorising the moments of layers", 16),
        *lines("making layers low rank", 16),
        *lines("fitting layers block by block", 4),
        *lines("factorising the moments of layers", 16),  # for the errors in the ledger
    ]


def lines(description: str, total: int) -> list[str]:
    return [f"{description}: {number} of {total}" for number in range(1, total)]


def test_a_fit_of_one_shared_weight_reports_its_parts(monkeypatch, caplog):
    """S-LORS: one group of three stages, of which the shared weight and each term are fitted `rounds` + 1 times."""
    monkeypatch.setattr(logs, "_LINE_EVERY", 0.0)
    caplog.set_level(logging.INFO, "compressvit")
    step = LORS(of="decoder", targets=["mixing.projection"], share=3, rank=2, rounds=1)
    compress(weights.build("adamixer", SMALL), [step], calibration=torch.randn(8, 3, 32, 32))
    shown = [text.partition(" done in ")[0] for text in caplog.messages]
    found = [text for text in shown if text.startswith("fitting layers that share weights: ")]
    assert list(dict.fromkeys(found)) == [f"fitting layers that share weights: {n} of 8" for n in range(9)]
    assert found.count("fitting layers that share weights: 4 of 8") > 1  # also between the steps of a long part


def test_after_a_minute_there_is_a_line_a_minute(monkeypatch, caplog):
    caplog.set_level(logging.INFO, "compressvit")
    clock = iter(range(0, 10_000, 2))
    monkeypatch.setattr(logs.time, "monotonic", lambda: next(clock))
    with logs.working("waiting", 200) as advance:
        for _ in range(150):
            advance()
    seconds = [int(text.rpartition(" in ")[2].split()[0]) for text in caplog.messages]
    assert [b - a for a, b in pairwise([0, *seconds])] == [6] * 10 + [60] * 4


def test_one_bar_is_shown_at_a_time(monkeypatch, capsys):
    monkeypatch.setenv("FORCE_COLOR", "1")
    for item in logs.progress("ab", "outer", 2):
        list(logs.progress(item, "inner", 1))
    text = capsys.readouterr().err
    assert "outer" in text
    assert "inner" not in text


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
    assert wrapped_items(text, width).splitlines() == lines


def test_the_numbers_below_the_bar_are_broken_between_items():
    console = Console(file=io.StringIO(), force_terminal=True, width=55, _environ={})
    run_log = logs.RunLog(None, console)
    with run_log.progress("distill", 2) as advance:
        advance("loss 3.911  hidden_relation 0.002183  teacher's top-1 12.5%  gradient 0.785")
    run_log.close()
    shown = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", console.file.getvalue())
    assert "\nloss 3.911  hidden_relation 0.002183\nteacher's top-1 12.5%  gradient 0.785\n" in shown
