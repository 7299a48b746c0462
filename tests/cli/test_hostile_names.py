"""Names with control characters and markup, on the terminal, in the log, on the page and in charts; and a fault that nobody foresaw."""

from __future__ import annotations

import contextlib
import io
import json
import re

import pytest
import rich.console
from helpers.hostile import ESC, NAMES
from helpers.images import class_folders
from helpers.page import Page
from helpers.runs import QUICK, TINY, refused, run
from rich.table import Table
from rich.text import Text

from compressvit.charts.findings import Finding
from compressvit.cli import main
from compressvit.exits import answered
from compressvit.log import RunLog
from compressvit.terminal import Terminal
from compressvit.text import printable

OBEYED = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u202e]")


def raw(*words: object) -> tuple[int, str]:
    """Exit code, and all that a command prints as it stands."""
    out = io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(out):
        code = main([str(word) for word in words])
    return code, out.getvalue()


@pytest.mark.parametrize("name", NAMES.values(), ids=NAMES)
@pytest.mark.parametrize("mine", [False, True], ids=["ours", "the caller's"])
def test_a_console_prints_what_stands_there(name, mine):
    file = io.StringIO()
    like = rich.console.Console(file=file, width=200)
    console = Terminal(like) if mine else Terminal(file=file, width=200)
    table = Table(title=name)
    table.add_column(name)
    table.add_row(name)
    for what in (name, table, Text(name)):
        console.print(what)
    assert file.getvalue().count(printable(name)) >= 4  # rich drops a bell in a `Text` of ours itself
    assert not OBEYED.search(file.getvalue())


def test_a_console_takes_no_text_for_markup_or_emoji():
    """Also where a part of rich asks for it, and in the console of a caller who wants it."""
    file = io.StringIO()
    console = Terminal(rich.console.Console(file=file, width=60, markup=True, emoji=True))
    table = Table(title="[b]:smile:", caption="[b]:smile:")
    table.add_column("[b]:smile:", footer="[b]:smile:")
    table.add_row("[b]:smile:")
    table.show_footer = True
    console.print(table)
    console.print("[b]:smile:")
    console.print("[b]:smile:", markup=True, emoji=True)
    assert file.getvalue().count("[b]:smile:") == 7


@pytest.mark.parametrize("name", NAMES.values(), ids=NAMES)
def test_a_log_holds_what_stands_there(name, tmp_path):
    log = RunLog(tmp_path, rich.console.Console(file=io.StringIO(), width=200))
    log.say(f"class {name} of {name}")
    log.close()
    text = (tmp_path / "run.log").read_text(encoding="utf-8")
    assert text.count(printable(name)) == 2
    assert not OBEYED.search(text)


@pytest.mark.wide_unless(lambda name: name in (NAMES["escape"], "nul\x00"))
@pytest.mark.parametrize("name", [*NAMES.values(), "nul\x00"], ids=[*NAMES, "nul"])
def test_a_chart_of_any_name_is_drawn(name, tmp_path):
    """vl-convert ends the process on some of them."""
    records = [{"class": name, "n": 1.0}, {"class": "b", "n": 2.0}]
    finding = Finding("x", name, name, "bars", records, {"x": "n", "y": "class", "titles": {"n": name}})
    finding.picture(tmp_path / "x.svg")
    assert not OBEYED.search((tmp_path / "x.svg").read_text(encoding="utf-8"))
    finding.write(tmp_path)


def test_paths_with_markup_and_control_characters(tmp_path):
    folder = tmp_path / f"[x] run[red]x{ESC}"
    folder.mkdir()
    recipe = folder / "tiny.yaml"
    recipe.write_text(QUICK)
    out = folder / "run[bold]"
    code, said = raw("apply", "--no-report", recipe, "--output", out)
    assert code == 0, said
    assert not OBEYED.search(said)
    assert printable(str(out)) in " ".join(said.split()).replace(" ", "") or "run[bold]" in said
    for words in (("evaluate", out), ("merge", out), ("compare", out), ("report", out), ("plan", recipe)):
        code, said = raw(*words)
        assert code in (0, 2), said
        assert not OBEYED.search(said)
    assert "unforeseen" not in said


@pytest.mark.wide_unless(lambda name: name == NAMES["escape"])
@pytest.mark.parametrize("name", NAMES.values(), ids=NAMES)
def test_classes_of_any_name_are_trained_and_reported(name, tmp_path):
    name = name.replace("/", "|")
    class_folders(tmp_path / "data", classes=(name, "dog"))
    recipe = tmp_path / "tiny.yaml"
    recipe.write_text(TINY.replace("name: digits", f"name: folder, root: {tmp_path / 'data'}"))
    run_folder = tmp_path / "run"
    code, said = raw("apply", "--no-report", recipe, "--output", run_folder, "data.batch_size=4")
    assert code == 0, said
    assert not OBEYED.search(said)
    assert "warning" not in said
    code, _, err = run("report", run_folder)
    assert (code, err) == (0, "")
    page = (run_folder / "report.html").read_text(encoding="utf-8")
    body = page.partition("<script")[0]
    assert not OBEYED.search(body)
    assert {row["class"] for row in json.loads((run_folder / "predictions.json").read_text())["classes"]} == {
        printable(name),
        "dog",
    }
    assert printable(name) in Page(run_folder / "report.html").text or "predictions" in page


# --- what nobody foresaw


def test_an_unforeseen_fault_is_a_sentence(tmp_path, monkeypatch):
    recipe = tmp_path / "tiny.yaml"
    recipe.write_text(TINY)

    def fails(*arguments, **named):
        return 1 / 0

    monkeypatch.setattr("compressvit.runs.apply.finish", fails)
    code, out, err = run("apply", "--no-report", recipe, "--output", tmp_path / "run")
    assert code == 70
    assert err.startswith("compressvit: unforeseen ZeroDivisionError: division by zero. This is a fault of compressvit")
    assert "Traceback" not in out + err
    assert f"at the end of {tmp_path / 'run' / 'run.log'}" in err
    log = (tmp_path / "run" / "run.log").read_text()
    assert "Traceback (most recent call last)" in log
    assert "return 1 / 0" in log
    monkeypatch.undo()
    assert (
        run("apply", "--no-report", recipe, "--output", tmp_path / "run", "--resume")[0] == 0
    )  # nothing good was lost


def test_the_trace_of_an_unforeseen_fault_is_safe_to_show(tmp_path, monkeypatch, capsys):
    """It is not written through a link, and nothing in it or in its sentence is obeyed."""
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    run_folder = tmp_path / "run"
    run_folder.mkdir()
    (tmp_path / "precious").write_text("mine")
    (run_folder / "run.log").symlink_to(tmp_path / "precious")

    def fails():
        raise ValueError(f"{'x' * 1000}{ESC}\nsecond line")

    assert answered("compressvit", fails, lambda: run_folder) == 70
    said = capsys.readouterr().err
    assert (tmp_path / "precious").read_text() == "mine"
    assert "x" * 300 + ". This is a fault" in said
    assert "second line" not in said
    (trace,) = tmp_path.glob("compressvit-*.log")
    assert str(trace) in said
    assert "second line" in trace.read_text()
    assert printable(ESC) in trace.read_text()
    assert not OBEYED.search(trace.read_text())


def test_an_unforeseen_fault_without_a_run(tmp_path, monkeypatch):
    def fails(*arguments, **named):
        raise KeyError("x")

    monkeypatch.setattr("compressvit.runs.evaluate.evaluate_path", fails)
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    monkeypatch.setattr("tempfile.tempdir", None)
    code, _, err = run("evaluate", "nothing")
    assert code == 70
    file = re.search(r"Its trace is in (\S+);", err)
    assert file is not None
    with open(file.group(1)) as trace:
        assert "KeyError: 'x'" in trace.read()


def test_stopping_is_no_fault(monkeypatch):
    def stops(*arguments, **named):
        raise KeyboardInterrupt

    monkeypatch.setattr("compressvit.runs.evaluate.evaluate_path", stops)
    assert run("evaluate", "nothing") == (
        130,
        "",
        "compressvit: stopped by SIGINT; what was written before is whole",
    )


def test_an_error_is_printed_without_what_a_terminal_obeys(tmp_path):
    code, said = raw("evaluate", tmp_path / f"no{ESC}[/x]")
    assert code == 2
    assert not OBEYED.search(said)
    assert r"no\x1b[31mred\x1b[0m[/x]" in said
    assert "there is no" in refused("evaluate", tmp_path / "caf\udce9")
