"""`compressvit report` on folders that are empty, half written, damaged, of another version, or not ours: one clear message each."""

from __future__ import annotations

import json
import shutil

import pytest
from helpers.page import Page
from helpers.runs import refused, run

pytestmark = pytest.mark.usefixtures("drawn_once")


@pytest.fixture
def copied(finished, tmp_path):
    """A copy of a finished run, without the checksums by which every change is told."""
    folder = shutil.copytree(finished, tmp_path / "run")
    (folder / "files.json").unlink()
    return folder


def noted(folder):
    """The notes of a report that could be written in spite of something; each is on the page and on standard error."""
    code, out, err = run("report", folder)
    assert code == 0, err
    assert out == str(folder / "report.html")
    assert "Traceback" not in err
    page = Page(folder / "report.html")
    notes = [note.strip() for note in err.split(f"compressvit: {folder}: ")[1:]]
    for note in notes:
        assert note in page.text
    return notes, page


# --- what is refused


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (
            lambda p: None,
            "there is no {p}; give a folder that `compressvit apply` wrote, or one with such folders in it",
        ),
        (lambda p: p.mkdir(), "{p} is empty: no run has begun in it; give a folder"),
        (lambda p: p.write_text("x"), "{p} is a file, not a run folder; give a folder"),
        (
            lambda p: (p / "holiday").mkdir(parents=True),
            "{p} is not a run folder: it has no resolved.yaml; give a folder",
        ),
        (
            lambda p: (p.mkdir(), (p / "recipe.yaml").write_text("seed: 0")),
            "{p} is a run that stopped before its first step: it has a recipe.yaml and no resolved.yaml",
        ),
    ],
    ids=["missing", "empty", "file", "foreign", "recipe only"],
)
def test_what_is_no_run_folder(make, message, tmp_path):
    path = tmp_path / "given"
    make(path)
    assert refused("report", path).startswith(message.format(p=path))
    assert not list(tmp_path.rglob("report.html"))


def test_a_model_is_no_run(finished):
    assert refused("report", finished / "student") == (
        f"{finished / 'student'} is a model, not a run folder; give the run folder that contains it"
    )
    assert not (finished / "student" / "report.html").exists()


def test_several_folders_need_a_place(finished, trained):
    assert refused("report", finished, trained[1]).startswith(
        "the report of several folders needs a file name: add --output"
    )


def test_the_output_is_a_file(finished, tmp_path):
    assert refused("report", finished, "--output", tmp_path).startswith(f"--output {tmp_path} is a folder; name a file")
    (tmp_path / "file").write_text("x")
    assert "could not be written" in refused("report", finished, "--output", tmp_path / "file" / "report.html")


# --- what is left out


def cut(text):
    return text[: len(text) // 2]


@pytest.mark.wide_unless(lambda name, damage: damage is cut and name in ("plan.json", "predictions.json"))
@pytest.mark.parametrize("name", ["results.json", "plan.json", "environment.json", "predictions.json"])
@pytest.mark.parametrize(
    "damage", [cut, lambda text: "[]", lambda text: "", lambda text: "{}"], ids=["cut", "list", "empty", "{}"]
)
def test_a_damaged_file_is_left_out(copied, name, damage):
    (copied / name).write_text(damage((copied / name).read_text()))
    notes, page = noted(copied)
    assert len(notes) == 1
    assert notes[0].startswith(f"{name} is damaged, or was written by another version, and is left out (")
    gone = {"results.json": "ledger", "predictions.json": "predictions"}.get(name)
    assert page.sections == [
        s for s in ("verdict", "asked", "training", "ledger", "predictions", "reproduce") if s != gone
    ]


@pytest.mark.wide_unless(lambda name: name in ("plan.json", "metrics.jsonl"))
@pytest.mark.parametrize("name", ["recipe.yaml", "run.log", "environment.json", "plan.json", "metrics.jsonl"])
def test_a_missing_file_is_named(copied, name):
    (copied / name).unlink()
    notes, _ = noted(copied)
    assert notes == [f"There is no {name}."]


def test_a_field_of_another_version(copied):
    results = json.loads((copied / "results.json").read_text())
    results["student"]["parameters"] = "many"
    (copied / "results.json").write_text(json.dumps(results))
    notes, page = noted(copied)
    assert "student.parameters: input should be a valid integer" in notes[0]
    assert "This run has finished, but its results cannot be read; the rest is shown below." in page.text


def test_a_newer_form_of_predictions(copied):
    content = json.loads((copied / "predictions.json").read_text())
    (copied / "predictions.json").write_text(json.dumps({**content, "format": 2}))
    notes, _ = noted(copied)
    assert notes == [
        "predictions.json is damaged, or was written by another version, and is left out (format: input should be 1)."
    ]


def test_confusions_of_the_student_alone(copied):
    content = json.loads((copied / "predictions.json").read_text())
    content["confusions"] = [{"true": "1", "answer": "7", "student": 3}]
    (copied / "predictions.json").write_text(json.dumps(content))
    notes, page = noted(copied)
    assert notes == []
    assert content["compared"]
    assert "None" not in page.text


def test_another_version_is_named(copied):
    content = json.loads((copied / "environment.json").read_text())
    (copied / "environment.json").write_text(json.dumps({**content, "compressvit": "9.9"}))
    notes, _ = noted(copied)
    assert len(notes) == 1
    assert notes[0].startswith("The run was made by compressvit 9.9, and this page by ")


def test_the_last_line_of_the_metrics_was_cut_off(copied):
    file = copied / "metrics.jsonl"
    text = file.read_text()
    file.write_text(text[:-25])
    notes, page = noted(copied)
    assert notes == ["The last line of metrics.jsonl was cut off and is left out."]
    assert "1_distill_loss" in page.figure_names


def test_damaged_lines_of_the_metrics(copied):
    file = copied / "metrics.jsonl"
    lines = file.read_text().splitlines()
    lines[2], lines[4] = "\x00\x00", '{"phase": 3}'
    file.write_text("\n".join(lines) + "\n")
    notes, page = noted(copied)
    assert notes == [f"2 of {len(lines)} lines of metrics.jsonl are damaged and left out; the first is line 3."]
    assert "teacher_loss" in page.figure_names


def test_metrics_that_are_no_text(copied):
    (copied / "metrics.jsonl").write_bytes(b"\xff\xfe\x00")
    notes, page = noted(copied)
    assert notes[0].startswith("metrics.jsonl cannot be read: 'utf-8' codec")
    assert "training" not in page.sections


@pytest.mark.wide_unless(lambda text: text in ("42", "- a\n- b"))
@pytest.mark.parametrize("text", ["steps: [", "42", "- a\n- b", ""])
def test_a_resolved_recipe_that_is_none(copied, text):
    (copied / "resolved.yaml").write_text(text)
    assert noted(copied)[0] == ["resolved.yaml is damaged: it is not a recipe."]


def test_a_recipe_whose_sections_are_none(copied):
    (copied / "resolved.yaml").write_text("teacher: 3\ndata: [x]\nseed: {a: b}")
    assert noted(copied)[0] == ["resolved.yaml is damaged: it has no steps."]


BARS = {"name": "x", "title": "X", "caption": "", "chart": "bars", "records": [{"a": 1, "b": "c"}]}
GOOD = {**BARS, "options": {"x": "a", "y": "b"}}
FAULTY = {
    "cut off": ('{"name": "x", "tit', "is damaged, or was written by another version of compressvit"),
    "no options": (BARS, "The chart of x cannot be drawn, and is left out: bars() missing 2 required"),
    "unknown chart": ({**GOOD, "chart": "pie"}, "was written by another version of compressvit: its chart is 'pie'"),
    "unknown option": (
        {**GOOD, "options": {**GOOD["options"], "z": 1}},
        "The chart of x cannot be drawn, and is left out: bars() got an unexpected keyword argument 'z'.",
    ),
    "unknown field": ({**GOOD, "records": [{"a": 1}]}, "The chart of x cannot be drawn, and is left out: 'b'."),
    "no records": ({**GOOD, "records": [3]}, "The chart of x cannot be drawn, and is left out: "),
}


@pytest.mark.wide_unless(lambda content: content in (FAULTY["cut off"][0], FAULTY["unknown field"][0]))
@pytest.mark.parametrize(("content", "message"), FAULTY.values(), ids=FAULTY)
def test_a_diagnostic_that_cannot_be_drawn(copied, content, message):
    (copied / "diagnostics").mkdir()
    (copied / "diagnostics" / "x.json").write_text(content if isinstance(content, str) else json.dumps(content))
    notes, page = noted(copied)
    assert len(notes) == 1
    assert message in notes[0]
    assert "diagnostics" not in page.sections


def test_a_lost_picture_is_a_smaller_gallery(copied):
    (copied / "predictions" / "03.png").unlink()
    notes, page = noted(copied)
    assert notes == ["1 of 16 pictures in predictions cannot be read and are left out; the first is 03.png."]
    assert len(page.images) == 15


@pytest.mark.parametrize("name", ["results.json", "resolved.yaml"])
def test_figures_that_somebody_changed(finished, trained, name, tmp_path):
    folder = shutil.copytree(finished, tmp_path / "run")
    assert noted(folder)[0] == []
    (folder / name).write_text((folder / name).read_text() + "\n")
    changed = f"{name} differs from what the run wrote, by the checksums in files.json"
    assert noted(folder)[0] == [f"{changed}. The page shows what is there now."]
    code, out, err = run("compare", folder, trained[1], "--output", tmp_path / "table")
    assert (code, err) == (0, "")
    assert f"{folder}: {changed}; the table has what is there now" in out
    (folder / "files.json").unlink()  # as in runs of earlier versions
    assert noted(folder)[0] == []


def test_damaged_runs_among_others(copied, finished, trained, tmp_path):
    (copied / "results.json").write_text("{")
    out = tmp_path / "all.html"
    code, _, err = run("report", copied, finished, trained[1], "--output", out)
    assert code == 0
    assert f"{copied}: results.json is damaged" in err
    page = Page(out)
    assert page.sections == ["comparison", "run-1", "run-2", "run-3"]
    assert f"Left out, without results: {copied}." in page.text


def test_a_recipe_that_this_version_does_not_know_among_others(copied, trained, tmp_path):
    text = (copied / "resolved.yaml").read_text()
    (copied / "resolved.yaml").write_text(text + "\nnews: 1\n")
    code, _, err = run("report", copied, trained[1], "--output", tmp_path / "all.html")
    assert (code, err) == (0, "")
    assert "There is no comparison: " in Page(tmp_path / "all.html").text
    assert "news: unknown key" in Page(tmp_path / "all.html").text
