"""The programs of `compressvit tool` that read what runs recorded: their examples, their tables and files, and what they refuse."""

from __future__ import annotations

import contextlib
import csv
import io
import json
import re
import shlex
import shutil
from pathlib import Path
from types import SimpleNamespace

import pytest
from helpers import process
from helpers.runs import EPOCH, RECIPE, done, undrawn
from helpers.runs import refused as refused_verb
from helpers.tools import ran, refused, tool
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from compressvit.cli import main
from compressvit.diagnostics.allocation import allocation_finding
from compressvit.diagnostics.gradient_findings import layers_finding
from compressvit.programs.allocation import allocation_summary, run_histories
from compressvit.programs.curves import read_curves
from compressvit.programs.recorded import Run, labelled
from compressvit.programs.tools import described
from compressvit.recipe.parts import Part
from compressvit.rows import TrainRow, WidthsRow, append_row
from compressvit.training.phases import PhaseSpec
from compressvit.training.phases.finetune import Finetune

ROOT = Path(__file__).parents[2]
ROW = '{"phase": "a", "epoch": 0, "step": 1, "norms": {}, "shared": {}}\n'
COSTS = {"parameters": 2, "bytes": 8, "macs": 2, "latency_ms": 1.0}
RESULTS = {"teacher": COSTS, "student": COSTS}
PRUNE = "steps=[adapters: {width: 6}, prune: {epochs: 1, target: {neurons: 0.25}, scope: SCOPE}]"


def rows(path: Path) -> list[dict[str, str]]:
    with path.open(encoding="utf-8") as file:
        return list(csv.DictReader(file))


@pytest.fixture(scope="module")
def runs(tmp_path_factory) -> Path:
    """A folder of small runs, named as in the examples of --help."""
    folder = tmp_path_factory.mktemp("tools") / "runs"
    folder.mkdir()
    (folder / "tiny.yaml").write_text(RECIPE)

    def apply(name: str, *words: str) -> None:
        with undrawn():
            done("apply", folder / "tiny.yaml", "--output", folder / name, "--no-report", *words)

    watched = "diagnostics=[gradients: {every: 2}]"
    apply("multiplexing", watched)
    taught = f"teacher.weights={folder / 'multiplexing' / 'teacher'}"
    apply(
        "unshared", watched, taught, "teacher.finetune=null", "teacher.num_classes=10", "steps=[finetune: {epochs: 1}]"
    )
    shutil.copytree(folder / "multiplexing", folder / "distilled")
    shutil.copytree(folder / "multiplexing", folder / "quickstart")
    shutil.copytree(folder / "unshared", folder / "finetuned")
    for scope in ("global", "local"):
        apply(scope, taught, "teacher.finetune=null", "teacher.num_classes=10", PRUNE.replace("SCOPE", scope))
    return folder


# ------------------------------------------------------------------------------------------------------------------ examples


TOOLS = sorted(described())


def example(name: str) -> list[list[str]]:
    """The commands of the example that --help ends with."""
    out = io.StringIO()
    with contextlib.redirect_stdout(out), pytest.raises(SystemExit) as stop:
        tool(name).main(["--help"])
    assert stop.value.code == 0
    text = re.sub(r"\\\n\s*", "", out.getvalue().split("example:\n")[1])
    return [shlex.split(line) for line in text.strip().splitlines()]


@pytest.mark.wide_unless(lambda name: name in ("cka", "curves"))
@pytest.mark.parametrize("name", TOOLS)
def test_the_example_of_help_runs(runs, name, tmp_path, monkeypatch, capsys):
    """Its last line, on runs that the others could have left."""
    shutil.copytree(runs, tmp_path / "runs")
    monkeypatch.chdir(tmp_path)
    *made, shown = example(name)
    assert shown[:3] == ["compressvit", "tool", name]
    assert {tuple(words[:2]) for words in made} == {("compressvit", "apply")}
    assert {words[words.index("--output") + 1] for words in made} == {w for w in shown if w.startswith("runs/")}
    pictures = [Path(word) for word in re.findall(r"\S+\.png", ran(capsys, name, *shown[3:]))]
    assert pictures
    for picture in pictures:
        for suffix in (".png", ".svg", ".csv", ".json"):
            assert picture.with_suffix(suffix).stat().st_size > (80 if suffix == ".csv" else 100)
        assert rows(picture.with_suffix(".csv"))
    board = EventAccumulator(str(pictures[0].parent / "tensorboard"))
    board.Reload()
    assert {f"diagnostics/{picture.stem}" for picture in pictures} == set(board.Tags()["images"])


@pytest.mark.usefixtures("undrawn")
def test_a_program_is_a_verb_too(runs, capsys):
    printed = done("tool")
    for name, text in described().items():
        assert f"{name} {text}" in printed
    assert done("tool", "curves", runs / "multiplexing") == ran(capsys, "curves", runs / "multiplexing")
    with contextlib.redirect_stdout(io.StringIO()) as out, pytest.raises(SystemExit):
        main(["tool", "curves", "--help"])
    assert "usage: compressvit tool curves" in out.getvalue()
    assert refused_verb("tool", "curvs").startswith("there is no tool 'curvs'; did you mean 'curves'?")
    assert refused_verb("tool", "curves", runs / "none", "--show", "x").startswith("there is no ")


def test_every_program_is_a_file_of_tools_that_is_only_a_call():
    files = {path.stem: path.read_text() for path in (ROOT / "tools").glob("*.py")}
    assert set(files) == set(TOOLS)
    for name, text in files.items():
        assert f"from compressvit.programs.tools.{name} import main" in text
        assert len(text.splitlines()) < 12


def test_a_program_is_a_file_that_python_runs(tmp_path):
    told = process.python(ROOT / "tools" / "curves.py", tmp_path)
    assert told.code == 2
    assert told.err == (
        f"compressvit: {tmp_path} is empty: no run has begun in it; give a folder that `compressvit apply` wrote, or one with such "
        "folders in it\n"
    )


@pytest.mark.wide_unless(lambda name: name == "allocation")
@pytest.mark.parametrize("name", TOOLS)
def test_the_compressvit_lines_of_examples_are_recipes(name):
    """`plan` takes their words; what they train takes minutes."""
    made = example(name)[:-1]
    for words in made:
        assert words[:2] == ["compressvit", "apply"]
        kept = [w for w, before in zip(words[2:], words[1:], strict=False) if "--output" not in (w, before)]
        done("plan", *(word for word in kept if not word.startswith("teacher.weights=")))
    assert made


# ----------------------------------------------------------------------------------------------------------------- gradients


@pytest.mark.usefixtures("undrawn")
def test_gradients_of_one_run_are_of_all_its_phases(runs, tmp_path, capsys):
    out = ran(capsys, "gradients", runs / "multiplexing", "--output", tmp_path)
    assert "1_distill" in out
    assert "teacher" in out
    assert {row["when"] for row in rows(tmp_path / "gradients.csv")} == {"teacher", "1_distill"}
    assert {row["layer"] for row in rows(tmp_path / "gradients_shared.csv")} == {"blocks.0", "blocks.1"}
    only = ran(capsys, "gradients", runs / "multiplexing", "--phase", "teacher", "--output", tmp_path / "t")
    assert "1_distill" not in only
    assert not (tmp_path / "t" / "gradients_shared.csv").exists()


@pytest.mark.usefixtures("undrawn")
def test_gradients_of_several_runs_lie_in_one_picture(runs, tmp_path, capsys):
    ran(capsys, "gradients", runs / "multiplexing", runs / "unshared", "--output", tmp_path)
    found = rows(tmp_path / "gradients_layers.csv")
    assert {(row["run"], row["phase"]) for row in found} == {("multiplexing", "1_distill"), ("unshared", "0_finetune")}
    assert all(float(r["low"]) <= float(r["norm"]) <= float(r["high"]) for r in found)
    by_layer = [r for r in found if r["layer"] == "blocks.1" and r["run"] == "unshared"]
    recorded = [
        json.loads(line) for line in (runs / "unshared" / "diagnostics" / "gradients.jsonl").read_text().splitlines()
    ]
    assert len(by_layer) == 1
    norms = sorted(sum(v**2 for v in row["norms"]["blocks.1"].values()) ** 0.5 for row in recorded)
    assert norms[0] <= float(by_layer[0]["norm"]) <= norms[-1]
    assert (tmp_path / "gradients_layers.png").is_file()


def test_half_of_few_norms_does_not_reach_beyond_them():
    rows_of_one = [{**json.loads(ROW), "step": s, "norms": {"a": {"MLP": n}}} for s, n in enumerate((1.0, 2.0), 1)]
    (found,) = layers_finding(rows_of_one).records
    assert (found["low"], found["norm"], found["high"]) == (1.25, 1.5, 1.75)


@pytest.mark.usefixtures("undrawn")
def test_a_run_may_be_where_one_stands(runs, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(runs / "multiplexing")
    assert [run.label for run in labelled([Path()])] == ["multiplexing"]
    ran(capsys, "curves", ".", "--output", tmp_path)


# ---------------------------------------------------------------------------------------------------------------- allocation


@pytest.mark.usefixtures("undrawn")
def test_allocation_compares_local_with_global(runs, tmp_path, capsys):
    out = ran(capsys, "allocation", runs / "global", runs / "local", "--output", tmp_path)
    assert "removal 2" in out
    final = rows(tmp_path / "allocation_final.csv")
    told = {
        r: json.loads((runs / r / "results.json").read_text())["phases"]["1_prune"]["widths"]
        for r in ("global", "local")
    }
    for run, widths in told.items():
        assert {row["layer"]: int(row["neurons"]) for row in final if row["run"] == run} == widths[-1]
    assert len(set(told["local"][-1].values())) == 1
    assert {row["scope"] for row in rows(tmp_path / "allocation.csv")} == {"global", "local"}


@pytest.mark.usefixtures("undrawn")
def test_allocation_of_a_run_that_is_not_finished(runs, tmp_path, capsys):
    shutil.copytree(runs / "global", tmp_path / "run")
    (tmp_path / "run" / "results.json").unlink()
    ran(capsys, "allocation", tmp_path / "run", "--output", tmp_path / "a")
    ran(capsys, "allocation", runs / "global", "--output", tmp_path / "b")
    neurons = [[row["neurons"] for row in rows(tmp_path / side / "allocation.csv")] for side in "ab"]
    assert neurons[0] == neurons[1]


class Shave(PhaseSpec):
    """A phase that removes neurons, and is not `prune`."""

    name = "shave"

    @property
    def removal_scope(self):
        return "odd ones"


def test_allocation_is_of_any_phase_that_removes_neurons(tmp_path):
    recipe = SimpleNamespace(parts=lambda: [Part((), Finetune(), 0, 0), Part((), Shave(), 1, 1)])
    run = SimpleNamespace(path=tmp_path, recipe=recipe)
    widths = [{"blocks.0": 4, "blocks.1": 4}, {"blocks.0": 1, "blocks.1": 4}]
    for step in (1, 0):
        append_row(tmp_path / "metrics.jsonl", WidthsRow(phase="1_shave", step=step, **widths[step]))
    append_row(tmp_path / "metrics.jsonl", TrainRow(phase="1_shave", step=2, loss=1.0))
    assert run_histories(run) == {"1_shave": ("odd ones", widths)}
    (tmp_path / "results.json").write_text(json.dumps({**RESULTS, "phases": {"1_shave": {"widths": widths[:1]}}}))
    assert run_histories(run) == {"1_shave": ("odd ones", widths[:1])}


def test_an_even_share_is_told_beside_what_is_left():
    history = [{"a": 8, "b": 4}, {"a": 6}]
    found = {(r["layer"], r["removals"]): r["even"] for r in allocation_finding({"x": ("global", history)}).records}
    assert found == {("a", 0): 8, ("b", 0): 4, ("a", 1): 4, ("b", 1): 2}
    table = allocation_summary({"x": ("global", history), "y": ("local", history[:1])})
    assert table[1] == {"run": "x", "scope": "global", "adapter": "b", "start": 4, "removal 1": 0}
    assert table[2]["removal 1"] is None


# -------------------------------------------------------------------------------------------------------------------- curves


@pytest.mark.usefixtures("undrawn")
def test_curves_have_the_names_of_tensorboard(runs, tmp_path, capsys):
    ran(capsys, "curves", runs / "distilled", runs / "finetuned", "--output", tmp_path)
    found = rows(tmp_path / "curves.csv")
    assert {r["curve"] for r in found} == {
        f"{phase}/{what}" for phase in ("distill", "finetune", "teacher") for what in ("epoch/loss", "evaluate/top1")
    }
    accuracy = [r for r in found if r["curve"] == "distill/evaluate/top1"]
    assert [int(r["step"]) for r in accuracy] == [0, EPOCH, 2 * EPOCH]
    ran(capsys, "curves", runs / "distilled", "--show", "distill/train/gradient_norm", "--output", tmp_path / "one")
    assert {r["curve"] for r in rows(tmp_path / "one" / "curves.csv")} == {"distill/train/gradient_norm"}


def test_a_step_that_was_done_twice_counts_once(runs, tmp_path):
    shutil.copytree(runs / "distilled", tmp_path / "run")
    path = tmp_path / "run" / "metrics.jsonl"
    path.write_text(path.read_text() * 2)
    (curve,) = read_curves([Run(tmp_path / "run", "x")], ["distill/epoch/loss"]).values()
    assert [step for step, _ in curve] == [EPOCH, 2 * EPOCH]


def test_runs_are_called_by_what_tells_them_apart():
    assert [r.label for r in labelled([Path("a/x"), Path("a/y")])] == ["x", "y"]
    assert [r.label for r in labelled([Path("a/x"), Path("b/x")])] == ["a/x", "b/x"]
    assert [r.label for r in labelled([Path("x")])] == ["x"]


# ------------------------------------------------------------------------------------------------------------------ refusals


def spoilt(runs: Path, folder: Path, file: str, content: str | None) -> Path:
    """A copy of a run in which a file holds something else, or is not there."""
    shutil.copytree(runs / "multiplexing", folder)
    (folder / file).unlink()
    if content is not None:
        (folder / file).write_text(content)
    return folder


@pytest.mark.parametrize("name", ["gradients", "allocation", "curves"])
def test_what_is_no_run_is_told(name, runs, tmp_path, capsys):
    (tmp_path / "empty").mkdir()
    assert "is empty: no run has begun in it" in refused(capsys, name, tmp_path / "empty")
    assert "there is no" in refused(capsys, name, tmp_path / "nowhere")
    assert "is a model, not a run folder" in refused(capsys, name, runs / "multiplexing" / "student")
    assert "is a file, not a run folder" in refused(capsys, name, runs / "tiny.yaml")
    assert not (runs / "multiplexing" / "student" / "tools").exists()


@pytest.mark.parametrize(
    ("name", "file", "content", "words"),
    [
        (
            "gradients",
            "diagnostics/gradients.jsonl",
            None,
            "a run records them if its recipe has `diagnostics: [gradients]`",
        ),
        ("gradients", "diagnostics/gradients.jsonl", "", "has no gradients"),
        ("gradients", "diagnostics/gradients.jsonl", '{"step": 1}\n', "written by another version of compressvit"),
        ("gradients", "diagnostics/gradients.jsonl", "{\n{}\n", "damaged: line 1 is not JSON"),
        ("curves", "metrics.jsonl", None, "has no metrics yet"),
        ("gradients", "diagnostics/gradients.jsonl", ROW.replace("{}", "[]", 1), "line 1 has another norms"),
        (
            "gradients",
            "diagnostics/gradients.jsonl",
            ROW.replace("{}", '{"a": {"MLP": null}}', 1),
            "another norms.a.MLP",
        ),
        ("curves", "metrics.jsonl", '{"loss": 1}\n', "written by another version of compressvit"),
        ("curves", "metrics.jsonl", '{"phase": 3, "kind": "epoch", "step": 1}\n', "line 1 has another phase"),
        (
            "curves",
            "metrics.jsonl",
            '{"phase": "a", "kind": "epoch", "step": 1, "loss": null}\n',
            "line 1 has another loss",
        ),
        ("curves", "resolved.yaml", "stepps: []\n", "damaged, or was written by another version of compressvit"),
        ("allocation", "resolved.yaml", "stepps: []\n", "damaged, or was written by another version of compressvit"),
        ("allocation", "run.log", None, "has no `prune` step; only pruning removes neurons"),
    ],
)
def test_what_a_run_does_not_have_is_told(name, file, content, words, runs, tmp_path, capsys):
    message = refused(capsys, name, spoilt(runs, tmp_path / "run", file, content))
    assert words in message
    assert str(tmp_path / "run") in message


def test_words_that_are_not_there_have_near_names(runs, capsys):
    assert "it has those of teacher, 1_distill" in refused(
        capsys, "gradients", runs / "multiplexing", "--phase", "distill"
    )
    message = refused(capsys, "curves", runs / "multiplexing", "--show", "distil/epoch/loss")
    assert "did you mean 'distill/epoch/loss'?" in message


def test_a_damaged_result_is_told(runs, tmp_path, capsys):
    shutil.copytree(runs / "local", tmp_path / "run")
    (tmp_path / "run" / "results.json").write_text('{"phases": {}}')
    assert "results.json is not what `apply` writes: it has no 'teacher'" in refused(
        capsys, "allocation", tmp_path / "run"
    )
