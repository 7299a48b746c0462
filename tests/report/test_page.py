"""`compressvit report`: what is on the page of a run, of a run that died, and of several; and that nothing on it is loaded or run."""

from __future__ import annotations

import base64
import hashlib
import io
import json
import re
import shutil
import subprocess
import sys

import pytest
from helpers.page import Page
from helpers.runs import QUICK, RECIPE, done, run
from PIL import Image

from compressvit import cli
from compressvit.charts.findings import Finding
from compressvit.report import write as writing

SECTIONS = ["verdict", "asked", "training", "ledger", "predictions", "reproduce"]
CURVES = ["teacher_loss", "teacher_accuracy", "teacher_gradient", "teacher_lr"]
CURVES += ["1_distill_loss", "1_distill_accuracy", "1_distill_gradient", "1_distill_lr"]


@pytest.fixture(scope="module")
def ended(finished, tmp_path_factory):
    """The finished run, to which `apply` has added its report."""
    folder = shutil.copytree(finished, tmp_path_factory.mktemp("page") / "finished")
    done("apply", folder, "--resume")
    return folder


@pytest.fixture(scope="module")
def page(ended):
    """The page that `apply` left."""
    return Page(ended / "report.html")


@pytest.fixture
def copied(finished, tmp_path, drawn_once):
    """A copy of the finished run, without its report."""
    return shutil.copytree(finished, tmp_path / "run")


def reported(folder, *words):
    """The page of `compressvit report FOLDER`."""
    file = done("report", folder, *words)
    return Page(type(folder)(file))


# --- what is there


def test_apply_leaves_a_page_with_every_section_and_figure(page, ended):
    assert page.sections == SECTIONS
    assert page.figure_names == [*CURVES, "classes"]
    assert all(len(figure["caption"]) > 30 for figure in page.figures), "how to read it"
    assert all(figure["svg"] for figure in page.figures), "drawn for readers without scripts"
    assert not page.open, "every element is closed"
    assert [a[1:] for a in (v for _, n, v in page.attributes if n == "href")] == SECTIONS
    assert ended.name in page.text


def test_the_verdict_and_the_table_are_those_of_results_json(page, ended):
    results = json.loads((ended / "results.json").read_text())
    teacher, student = results["teacher"], results["student"]
    share = 100 * student["parameters"] / teacher["parameters"]
    assert f"With {share:.1f} % of the teacher's parameters" in page.text
    assert (
        f"gets {student['top1']:.2f} % of 16 held-out images right (the teacher {teacher['top1']:.2f} %)" in page.text
    )
    rows = {row[0]: row[1:] for row in page.tables[0]}
    assert rows["parameters (unique)"][:2] == [f"{teacher['parameters']:,}", f"{student['parameters']:,}"]
    assert rows["cosine of the outputs"] == ["", f"{student['cosine']:.4f}", ""]


def test_recipe_commands_environment_and_hash(page, ended):
    environment = json.loads((ended / "environment.json").read_text())
    assert "hidden_relation: {weight: 0.5}" in page.text, "as given"
    assert "evaluate_every: 1" in page.text, "resolved"
    assert f"compressvit apply {ended / 'resolved.yaml'} --output NEW_FOLDER" in page.text
    assert f"compressvit evaluate {ended}" in page.text
    assert environment["versions"]["timm"] in page.text
    assert hashlib.sha256((ended / "student" / "model.safetensors").read_bytes()).hexdigest() in page.text


def test_the_ledger_is_whole(page, ended):
    ledger = json.loads((ended / "results.json").read_text())["ledger"]
    table = next(table for table in page.tables if table[0][:2] == ["module", "change"])
    assert [row[:4] for row in table[1:]] == [
        [e["path"], e["change"], f"{e['before']:,}", f"{e['after']:,}"] for e in ledger
    ]


def test_the_sizes_that_were_tried(copied):
    row = {"figures": {"top1_drop": 0.5, "cosine": 0.98}, "kept": True, "chosen": True}
    kept = {"step": "shrink", "asked": "cosine ≥ 0.97", "unit": "macs", "where": "300 images held out"}
    kept["tried"] = [
        {**row, "size": 0.61, "spent": 6.1e6},
        {"size": 0.3, "spent": 3e6, "figures": {"cosine": 0.9}, "kept": False, "chosen": False},
    ]
    timed = {"step": "shrink", "asked": "latency ≤ 0.50", "unit": "latency", "where": "cpu, 2 threads"}
    own = {"figures": {"latency": 0.515}, "intervals": {"latency": (0.49, 0.56)}}
    timed["tried"] = [{**row, **own, "size": 0.47, "spent": 4.7}]
    results = json.loads((copied / "results.json").read_text())
    (copied / "results.json").write_text(json.dumps({**results, "sizes": [kept, timed]}))
    page = reported(copied)
    assert page.tables[1] == [
        ["size", "MACs", "top1 drop", "cosine", "kept", ""],
        ["0.61", "6.10 M", "0.5000", "0.9800", "✓", "chosen"],
        ["0.3", "3.00 M", "", "0.9000", "✗", ""],
    ]
    assert page.tables[2][1] == ["0.47", "4.70 ms", "0.52 (0.49–0.56)", "✓", "chosen"]
    assert "shrink: cosine ≥ 0.97, on 300 images held out. Sizes are parts of the teacher's MACs." in page.text
    assert "Sizes are parts of the teacher's latency, as the table of its modules predicts it." in page.text


def test_curves_are_those_of_metrics_jsonl(page, ended):
    lines = [json.loads(line) for line in (ended / "metrics.jsonl").read_text().splitlines()]
    spec = next(figure["spec"] for figure in page.figures if figure["name"] == "1_distill_loss")
    drawn = {(r["series"], r["step"]): r["value"] for r in spec["data"]["values"]}
    told = [line for line in lines if line["phase"] == "1_distill" and line["kind"] == "train"]
    assert {series for series, _ in drawn} == {
        "loss", "prediction", "attention_relation", "hidden_relation", "labels"
    }  # fmt: skip
    for line in told:
        assert drawn["loss", line["step"]] == pytest.approx(line["loss"], rel=1e-4)
    spec = next(figure["spec"] for figure in page.figures if figure["name"] == "1_distill_accuracy")
    held_out = {r["step"]: r["value"] for r in spec["data"]["values"] if r["series"] == "held-out images"}
    start = json.loads((ended / "results.json").read_text())["phases"]["1_distill"]["start"]["top1"]
    assert held_out[0] == pytest.approx(start, rel=1e-4), "before training"
    assert len(held_out) == 3


def test_images_are_small_and_inside(page, ended):
    examples = json.loads((ended / "predictions.json").read_text())["examples"]
    assert len(page.images) == len(examples) == 16, "all held-out images"
    for image, example in zip(page.images, examples, strict=True):
        kind, data = image["src"].split(",")
        assert kind == "data:image/png;base64"
        assert Image.open(io.BytesIO(base64.b64decode(data))).size == (8, 8)
        assert image["alt"] == f"held-out image of class {example['true']}"
    first = examples[0]
    assert f"teacher {first['teacher']['class']} {100 * first['teacher']['probability']:.0f} %" in page.text


def test_a_page_without_images_has_none_and_says_so(copied, page):
    assert page.images
    assert "without pictures" not in page.text
    without = reported(copied, "--no-images")
    assert without.sections == SECTIONS
    assert without.images == []
    assert "data:image" not in without.source
    assert "img-src 'none'" in without.source
    examples = len(json.loads((copied / "predictions.json").read_text())["examples"])
    assert f"The run kept {examples} held-out images, which are not on this page" in without.text
    assert "It was asked for without pictures of the data, and has none." in without.text
    assert without.figure_names == page.figure_names


def test_any_diagnostic_is_drawn(copied):
    options = {"x": "step", "y": "norm", "colour": "layer"}
    records = [{"step": s, "norm": s + i, "layer": f"blocks.{i}"} for s in range(3) for i in range(2)]
    Finding("x_new", "Something new", "Read it so.", "lines", records, options).write(copied / "diagnostics")
    Finding("x_none", "Nothing found", "There might have been.", "bars", [], {}).write(copied / "diagnostics")
    page = reported(copied)
    assert page.sections == [*SECTIONS[:-1], "diagnostics", SECTIONS[-1]]
    assert page.figure_names[-2:] == ["x_new", None]
    assert page.figures[-2]["caption"] == "Read it so."
    assert page.figures[-2]["spec"]["data"]["values"] == records
    assert "Nothing found No chart." in page.text


def test_no_report(recipe, tmp_path):
    (tmp_path / "tiny.yaml").write_text(QUICK)
    done("apply", tmp_path / "tiny.yaml", "--output", tmp_path / "run", "--no-report")
    assert (tmp_path / "run" / "results.json").is_file()
    assert not (tmp_path / "run" / "report.html").exists()


def test_a_fault_in_the_report_does_not_lose_the_run(tmp_path, monkeypatch):
    def fail(*_, **__):
        raise ZeroDivisionError("something\nunheard of")

    monkeypatch.setattr(writing, "report", fail)
    (tmp_path / "tiny.yaml").write_text(QUICK)
    out = done("apply", tmp_path / "tiny.yaml", "--output", tmp_path / "run")
    assert "warning: the report could not be written; the run is complete" in out
    assert "ZeroDivisionError: something" in out
    assert "Traceback" in (tmp_path / "run" / "run.log").read_text(), "perhaps a fault of ours"
    assert (tmp_path / "run" / "results.json").is_file()


@pytest.mark.wide  # it imports for some seconds
def test_it_needs_neither_torch_nor_timm(finished, tmp_path):
    code = f"""
import sys
import vl_convert
from compressvit.cli import main
vl_convert.javascript_bundle = lambda: ""  # which takes seconds
assert main(["report", {str(finished)!r}, "--output", {str(tmp_path / "r.html")!r}]) == 0
assert "altair" in sys.modules
assert not {{"torch", "timm", "torchvision"}} & set(sys.modules), sorted(sys.modules)
"""
    subprocess.run([sys.executable, "-c", code], check=True, capture_output=True)
    assert Page(tmp_path / "r.html").sections == SECTIONS


# --- what is not


def test_nothing_is_loaded(page):
    closed(page)


@pytest.mark.wide  # Vega's own code takes seconds
def test_nothing_is_loaded_by_vega_either(copied, vega):
    page = reported(copied)
    assert len(page.scripts[0]) > 500_000
    closed(page)


def closed(page):
    """Check that the page loads nothing, and that its policy allows no code but its own."""
    assert page.loads() == []
    policy = next(v for tag, name, v in page.attributes if (tag, name) == ("meta", "content") and "default-src" in v)
    assert policy.startswith("default-src 'none'; script-src 'sha256-")
    assert "http" not in policy
    for script in page.scripts:
        assert base64.b64encode(hashlib.sha256(script.encode()).digest()).decode() in policy
    assert len(page.scripts) == 2, "Vega once, and ours"
    assert all("$schema" not in figure["spec"] for figure in page.figures)
    assert len(page.source) < 2_000_000


TRIED = {"size": 0.5, "spent": 1e6, "figures": {"<b>": 1.0}, "kept": True, "chosen": True}
EVIL = """</script><script>alert(1)</script><img src=x onerror="alert(2)">{{ 7*7 }}&amp;'"]]>"""


def test_everything_from_files_is_escaped(copied):
    changes = {
        "results.json": lambda c: (
            c["ledger"][0].update(path=EVIL, change=EVIL, step=EVIL),
            c.update(sizes=[{"step": EVIL, "asked": EVIL, "unit": "macs", "where": EVIL, "tried": [TRIED]}]),
        ),
        "environment.json": lambda c: c.update(command=["compressvit", EVIL], platform=EVIL),
        "predictions.json": lambda c: (
            c["classes"][0].update({"class": EVIL}),
            c.update(confusions=[{"true": EVIL, "answer": EVIL, "teacher": 1, "student": 2}], confusions_in_all=7),
            c["examples"][0].update(true=EVIL, student={"class": EVIL, "probability": 1.0}),
        ),
    }
    for name, change in changes.items():
        content = json.loads((copied / name).read_text())
        change(content)
        (copied / name).write_text(json.dumps(content))
    (copied / "recipe.yaml").write_text(f"# {EVIL}\n")
    (copied / "resolved.yaml").write_text(json.dumps({"description": EVIL, "data": {"name": EVIL}}))
    (copied / "metrics.jsonl").write_text(json.dumps({"phase": EVIL, "kind": "train", "step": 1, "loss": 1.0, EVIL: 1}))
    bars = {"chart": "bars", "records": [{"a": 1, "b": EVIL}], "options": {"x": "a", "y": "b"}}
    (copied / "diagnostics").mkdir()
    (copied / "diagnostics" / "evil.json").write_text(
        json.dumps({"name": EVIL, "title": EVIL, "caption": EVIL, **bars})
    )
    page = reported(copied)
    assert not page.open
    assert len(page.scripts) == 2
    assert {name for _, name, _ in page.attributes if name.startswith("on")} == set()
    assert len(page.images) == 16
    assert all(image["src"].startswith("data:image/png") for image in page.images)
    assert page.loads() == []
    assert page.text.count("{{ 7*7 }}&amp;") > 12, "shown as it is"
    assert "the largest changes first; 1 of 7." in page.text
    assert "diagnostics" in page.sections


def test_a_picture_outside_of_the_run_is_not_taken(copied):
    Image.new("RGB", (4, 4), "red").save(copied.parent / "secret.png")
    content = json.loads((copied / "predictions.json").read_text())
    content["examples"] = [{**content["examples"][0], "file": "../../secret.png"}, *content["examples"][1:]]
    (copied / "predictions.json").write_text(json.dumps(content))
    assert len(reported(copied).images) == 15


# --- runs that died, and several


@pytest.fixture(scope="module")
def died(tmp_path_factory):
    """A run whose loss was not finite in its second phase."""
    folder = tmp_path_factory.mktemp("died")
    (folder / "died.yaml").write_text(RECIPE)
    code, _, err = run("apply", folder / "died.yaml", "--output", folder / "run", "steps.1.distill.lr=1e18")
    assert code == 2, err
    return folder / "run"


def test_a_run_that_died_yields_what_there_is(died, drawn_once):
    page = reported(died)
    assert page.sections == ["verdict", "asked", "training", "reproduce"]
    assert re.search(r"This run has not finished: its last log line is step \d+ of phase 1_distill", page.text)
    assert "The last lines of run.log:" in page.text
    assert "ERROR 1_distill: the loss is nan at step" in page.text, "the reason"
    assert "━" not in page.text, "no tables from the log"
    rows = {row[0]: row[1:] for row in page.tables[0]}
    assert all(rows["parameters (unique)"]), "as planned"
    assert "As planned, not measured." in page.text
    assert f"compressvit apply {died} --resume" in page.text


def test_several_runs(finished, died, trained, tmp_path, drawn_once):
    out = tmp_path / "all.html"
    done("report", finished, died, trained[1], "--output", out)
    page = Page(out)
    assert page.sections == ["comparison", "run-1", "run-2", "run-3"]
    assert f"Left out, without results: {died}." in page.text
    heads = {table[0][0] for table in page.tables}
    assert "student" in heads, "compare's table"
    assert page.text.count("SHA-256") == 2
    assert page.loads() == []


def test_the_plot_of_several_runs_is_one_for_every_task(finished, tmp_path, drawn_once):
    for number, top1 in enumerate((50.0, 75.0)):
        folder = shutil.copytree(finished, tmp_path / "runs" / f"r{number}")
        text = (folder / "resolved.yaml").read_text()
        assert "mlp_conv: 3" in text
        (folder / "resolved.yaml").write_text(text.replace("mlp_conv: 3", f"mlp_conv: {3 + 2 * number}"))
        results = json.loads((folder / "results.json").read_text())
        results["student"].update(top1=top1, parameters=1000 + number)
        (folder / "results.json").write_text(json.dumps(results))
    page = reported(tmp_path / "runs")  # a folder of runs says where the page goes
    assert (tmp_path / "runs" / "report.html").is_file()
    assert page.figure_names == ["compare_0"]
    records = page.figures[0]["spec"]["data"]["values"]
    assert [(r["size"], r["quality"], r["front"]) for r in records] == [(1000, 50.0, True), (1001, 75.0, True)]


# --- details


def test_help_names_the_verb(capsys):
    with pytest.raises(SystemExit):
        cli.main(["report", "--help"])
    assert "self-contained" in capsys.readouterr().out


def test_what_the_command_line_changed_stands_below_the_recipe(copied):
    told = json.loads((copied / "environment.json").read_text())
    told["command"] = ["compressvit", "apply", "RECIPE", "seed=3", "data.root=a<b", "--output", "x=y/run"]
    (copied / "environment.json").write_text(json.dumps(told))
    done("report", copied)
    page = (copied / "report.html").read_text(encoding="utf-8")
    assert "Overridden on the command line: <code>seed=3</code> <code>data.root=a&lt;b</code> </p>" in page
