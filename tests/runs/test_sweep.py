"""The verb `sweep`: names, what is refused before anything runs, what is passed over and resumed, and which run is the best."""

from __future__ import annotations

import json
import shutil
import signal
import types
from pathlib import Path

import pytest
from helpers.images import class_folders
from helpers.runs import QUICK, TINY, done, refused, run, student_bytes

from compressvit.errors import UserError
from compressvit.recipe.recipe import Recipe, parse_recipe
from compressvit.report import sweep as report_sweep
from compressvit.report.sweep import best_of
from compressvit.runs import sweep as runs_sweep
from compressvit.runs.sweep import _values
from compressvit.runs.sweep_names import _distinct, _in_a_name, _short_keys, names_here
from compressvit.tasks.qualities import qualities
from compressvit.training.stopping import Interrupted


@pytest.fixture(scope="module")
def recipe(tmp_path_factory):
    file = tmp_path_factory.mktemp("sweep") / "quick.yaml"
    file.write_text(QUICK)
    return file


@pytest.fixture(scope="module")
def swept(recipe):
    """A sweep of three runs, and what it printed as JSON. Not to be changed: copy it first."""
    folder = recipe.parent / "swept"
    words = ("steps.0.multiplex.share=2", "seed=0,1,2")
    return folder, json.loads(done("sweep", recipe, *words, "--output", folder, "--no-report", "--json"))


def test_every_combination_is_a_run_and_the_best_is_told(swept, recipe, tmp_path):
    folder, told = swept
    assert [one["name"] for one in told["runs"]] == ["seed-0", "seed-1", "seed-2"]
    assert {path.name for path in folder.iterdir()} == {
        *(one["name"] for one in told["runs"]),
        *(f"compare.{end}" for end in ("md", "csv", "json", "png")),
        "sweep.json",
    }
    assert json.loads((folder / "sweep.json").read_text()) == told
    assert told["failed"] == {}
    assert told["rows"] == json.loads((folder / "compare.json").read_text())
    assert len(told["rows"]) == 1  # the seeds of one recipe
    assert told["best"] == []  # with one there is no best
    assert [one["text"] for one in told["no_best"]] == ["there is no best: the runs differ in their seeds alone"]
    done("apply", recipe, "seed=1", "--output", tmp_path / "alone", "--no-report")
    assert student_bytes(folder / "seed-1") == student_bytes(tmp_path / "alone")
    assert student_bytes(folder / "seed-0") != student_bytes(folder / "seed-1")


def test_a_sweep_goes_on_where_it_stopped_and_takes_more(swept, recipe, tmp_path, monkeypatch):
    folder = shutil.copytree(swept[0], tmp_path / "swept")
    words = ("sweep", recipe, "seed=0,1", "data.limit_val=32,16", "--output", folder, "--no-report")
    assert "is not empty. Give --resume to go on" in refused(*words)
    before = student_bytes(folder / "seed-1")
    (folder / "seed-1" / "results.json").unlink()
    out = done(
        "sweep", recipe, "steps.0.multiplex.share=2", "seed=0,1,2", "--output", folder, "--no-report", "--resume"
    )
    assert out.count("passed over, finished before: ") == 2
    assert "[3/3] seed-1" in out
    assert student_bytes(folder / "seed-1") == before
    assert (folder / "seed-1" / "results.json").is_file()
    # another sweep in the same folder: the runs that are there are of other recipes
    message = refused("sweep", recipe, "data.limit_val=8", "seed=0,3", "--output", folder, "--no-report", "--resume")
    assert (
        "1 of 2 runs of the sweep cannot be done, and none was begun: seed-0: --resume: the recipe is not the one"
        in message
    )
    assert not (folder / "seed-3").exists()


@pytest.mark.parametrize(
    ("first", "more"),
    [
        (("steps.0.multiplex.share=1,2", "seed=0"), ("steps.0.multiplex.share=1,2", "seed=0,1")),
        (("data.name=folder", "data.root=a/x,b/y"), ("data.name=folder", "data.root=a/x,b/y,c/x")),
    ],
)
def test_a_run_that_is_there_is_found_by_its_recipe_when_more_varies(recipe, tmp_path, monkeypatch, first, more):
    """Its name has the keys that varied when it began; by the names alone it would be trained again."""
    small = types.SimpleNamespace(student=types.SimpleNamespace(parameters=1, macs=1))
    monkeypatch.setattr(runs_sweep, "planned", lambda *_: small)
    words = ("--output", tmp_path / "swept", "--dry-run", "--json")
    for one in json.loads(done("sweep", recipe, *first, *words))["runs"]:
        Path(one["folder"]).mkdir(parents=True)
        resolved = parse_recipe(recipe.read_text(), "recipe", one["overrides"]).to_yaml()
        (Path(one["folder"]) / "resolved.yaml").write_text(resolved)
    before = {path.name for path in (tmp_path / "swept").iterdir()}
    runs = json.loads(done("sweep", recipe, *more, *words, "--resume"))["runs"]
    assert {one["name"] for one in runs if one["state"] == "interrupted"} == before
    assert len({one["name"] for one in runs}) == len(runs) > len(before) == 2


def test_a_name_that_another_run_has_is_not_taken_again(tmp_path):
    recipes = [parse_recipe(QUICK, "recipe", [f"seed={seed}"]) for seed in (0, 1)]
    (tmp_path / "b").mkdir()
    (tmp_path / "b" / "resolved.yaml").write_text(recipes[0].to_yaml())
    first, second = names_here(tmp_path, ["a", "b"], recipes)
    assert first == "b"
    assert second.startswith("b_")
    (tmp_path / "b" / "resolved.yaml").write_bytes(b"\xff")
    assert names_here(tmp_path, ["a", "b"], [None, recipes[1]]) == ["a", "b"]


def test_what_cannot_be_done_in_one_run_is_told_before_any_begins(recipe, tmp_path):
    words = ("sweep", recipe, "--output", tmp_path / "none")
    message = refused(*words, "steps.0.multiplex.share=2,3", "seed=0,x,1")
    assert message.startswith(
        "4 of 6 runs of the sweep cannot be done, and none was begun: share-2_seed-x, share-3_seed-x: "
    )
    assert "override seed=x seed: should be a valid integer" in message
    assert "share-3_seed-0, share-3_seed-1: " in message
    assert "multiplex.share=3 does not divide the 2 blocks" in message
    message = refused(*words, "teacher.weights=random,/nowhere/w.pth")
    assert "weights-w.pth: teacher.weights: there is no file /nowhere/w.pth" in message
    assert not (tmp_path / "none").exists()


def test_a_dry_run_writes_nothing(recipe, tmp_path):
    told = json.loads(done("sweep", recipe, "seed=0,1", "--output", tmp_path / "none", "--dry-run", "--json"))
    assert [one["state"] for one in told["runs"]] == ["new", "new"]
    assert told["runs"][0]["parameters"] == told["runs"][1]["parameters"] > 1000
    assert not (tmp_path / "none").exists()


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("seed=0",), "nothing varies in this sweep: give a key several values, e.g. seed=0,1,2"),
        (("seed",), "'seed' is no key=value,value,…"),
        (("seed=0,1", "seed=2"), "seed is given twice; write its values in one: seed=0,1,2"),
        (("seed=0,,1",), "'seed=0,,1' has an empty value"),
        (("seed=0,0",), "'seed=0,0' has the value 0 twice"),
        (("seed=0,1", "--jobs", "0"), "--jobs 0: give how many runs at once"),
    ],
)
def test_words_that_are_no_sweep_are_refused(recipe, words, message):
    assert message in refused("sweep", recipe, *words)


def test_values_end_at_commas_outside_of_brackets_and_quotes():
    assert _values("1, 2,3") == ["1", "2", "3"]
    assert _values("[2,2],[3,{a: 1, b: 2}],'a,b',\"c,d\"") == ["[2,2]", "[3,{a: 1, b: 2}]", "'a,b'", '"c,d"']


def test_names_of_runs_can_be_read_and_are_distinct():
    keys = ["steps.0.multiplex.share", "steps[1].lors.share", "steps.1.lors.rank", "seed"]
    assert list(_short_keys(keys).values()) == ["multiplex.share", "lors.share", "rank", "seed"]
    assert [_in_a_name(text) for text in ("1e-3", "/data/my set/", "[2, 2]", "../..", "é", "")] == [
        "1e-3",
        "my-set",
        "2-2",
        "none",
        "none",
        "none",
    ]
    names = _distinct(["a", "b", "a"], [{"k": "/x/a"}, {"k": "b"}, {"k": "/y/a"}])
    assert names[1] == "b"
    assert len(set(names)) == 3
    assert all(name.startswith("a_") for name in (names[0], names[2]))


def test_a_run_that_fails_does_not_end_the_others(recipe, tmp_path, monkeypatch):
    right = runs_sweep.apply

    def wrong(recipe, folder, **settings):
        if folder.name == "seed-0":
            raise UserError("it diverged")
        return right(recipe, folder, **settings)

    monkeypatch.setattr(runs_sweep, "apply", wrong)
    folder = tmp_path / "swept"
    code, out, _ = run("sweep", recipe, "seed=0,1", "--output", folder, "--no-report")
    assert code == 2
    assert out.endswith(f"not finished: {folder / 'seed-0'}: it diverged")
    assert (folder / "seed-1" / "results.json").is_file()
    assert json.loads((folder / "sweep.json").read_text())["failed"] == {"seed-0": "it diverged"}


def test_a_signal_ends_the_sweep(recipe, tmp_path, monkeypatch):
    def stopped(recipe, folder, **settings):
        raise Interrupted(signal.SIGINT, folder, "kept")

    monkeypatch.setattr(runs_sweep, "apply", stopped)
    code, _, err = run("sweep", recipe, "seed=0,1", "--output", tmp_path / "swept")
    assert code == 130
    assert err == (
        "compressvit: stopped by SIGINT; 0 of 2 runs are finished, and those that had begun keep their checkpoints. Continue with the same "
        "command and --resume"
    )


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    file = tmp_path_factory.mktemp("tiny") / "tiny.yaml"
    file.write_text(TINY)
    return file


@pytest.mark.wide
def test_the_best_is_chosen_on_validation_where_there_is_a_test(tiny, tmp_path):
    root = class_folders(tmp_path / "images", splits=("train",), each=20)
    data = (
        "data.name=folder",
        f"data.root={root}",
        "data.val_fraction=0.3",
        "data.test_fraction=0.3",
        "data.limit_val=null",
    )
    words = ("steps.0.multiplex.share=1,2", "seed=0,1", "steps.1.distill.epochs=2", *data)
    told = json.loads(done("sweep", tiny, *words, "--output", tmp_path / "swept", "--no-report", "--json"))
    (best,) = told["best"]
    assert best["key"] == "top1"
    assert "held out for validation, so that the test chose nothing" in best["text"]
    means = {}
    for row in told["rows"]:
        rows = [
            [json.loads(line) for line in (Path(one) / "metrics.jsonl").read_text().splitlines()] for one in row["runs"]
        ]
        last = [[r["top1"] for r in one if r["kind"] == "evaluate" and r["phase"] == "1_distill"][-1] for one in rows]
        means[row["label"]] = sum(last) / 2
    assert best["value"] == pytest.approx(max(means.values()))
    assert means[best["label"]] == max(means.values())


def test_the_best_has_the_best_mean_of_the_deciding_figure_and_then_fewer_bytes(monkeypatch):
    top1 = qualities()["top1"]
    values = {"a0": 90.0, "a1": 80.0, "b0": 88.0, "c0": 88.0}
    sizes = {"a0": 1, "a1": 1, "b0": 8, "c0": 4}  # as rounded to fewer bits
    monkeypatch.setattr(
        report_sweep,
        "_judged",
        lambda run: report_sweep._Chosen(top1, values[run.name], "on 9 images", sizes[run.name]),
    )
    rows = [
        {"task": "t", "label": "a", "runs": ["a0", "a1"]},
        {"task": "t", "label": "b", "runs": ["b0"]},
        {"task": "t", "label": "c", "runs": ["c0"]},
    ]
    (best,), none = best_of(rows)
    assert none == []
    assert (best["label"], best["value"]) == ("c", 88.0)
    assert best["text"] == "best by top-1: c, 88.00 %, on 9 images"
    values["a1"] = 90.0
    assert best_of(rows)[0][0]["text"] == "best by top-1: a, 90.00 % (mean of 2 seeds), on 9 images"
    assert best_of(rows[1:2]) == ([], [{"task": "t", "text": "there is no best: only one run is finished"}])


def test_it_is_told_why_there_is_no_best(monkeypatch):
    top1, cosine = (qualities()[key] for key in ("top1", "cosine"))
    judged = {
        "a": report_sweep._Chosen(top1, 90.0, "on 9 images"),
        "b": report_sweep._Chosen(top1, 91.0, "on 8 images"),
        "c": report_sweep._Chosen(cosine, 0.9, "on 9 images"),
        "d": None,
    }
    monkeypatch.setattr(report_sweep, "_judged", lambda run: judged[run.name])

    def why(*labels: str) -> str:
        best, (none,) = best_of([{"task": "t", "label": label, "runs": [label]} for label in labels])
        assert best == []
        return none["text"].removeprefix("there is no best: ")

    assert why("a", "b") == "the students are judged on different images: a on 9 images; b on 8 images"
    assert why("a", "c") == "the students are judged by different figures: a by top-1; c by cosine"
    assert why("a", "d") == "d: no figure of what the last step left was measured on images held out"


def test_what_follows_the_last_phase_is_judged_too(tmp_path):
    """`quantise` after a training changes the student: the figure of the training is not its own."""
    recipe = parse_recipe(TINY + "  - quantise: {bits: 4}\n", "recipe")
    assert [step.name for step in recipe.steps][-2:] == ["distill", "quantise"]
    rows = [("1_distill", 1, 90.0), ("2_quantise", None, 70.0)]
    write_run(tmp_path, recipe, rows)
    judged = report_sweep._judged(tmp_path)
    assert judged is not None
    assert (judged.value, judged.images) == (
        70.0,
        "on 8 images held out for validation, so that the test chose nothing",
    )
    write_run(tmp_path, recipe, rows[:1])
    assert report_sweep._judged(tmp_path) is None


def write_run(folder: Path, recipe: Recipe, rows: list[tuple[str, int | None, float]]) -> None:
    """What a sweep reads of a run with a test: its recipe, evaluations (step, epoch and top-1) and results."""
    (folder / "resolved.yaml").write_text(recipe.to_yaml())
    lines = [
        {"time": 0.0, "phase": step, "kind": "evaluate", "step": 1, "epoch": epoch, "top1": top1, "images": 8}
        for step, epoch, top1 in rows
    ]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    figures = {"images": 8, "top1": 99.0, "parameters": 1, "macs": 1, "bytes": 1, "latency_ms": 1.0}
    results = {"teacher": figures, "student": figures, "reported_on": "test", "phases": {"1_distill": {}}}
    (folder / "results.json").write_text(json.dumps(results))


def test_a_run_without_a_training_is_evaluated_on_validation_where_there_is_a_test(recipe, tmp_path):
    root = class_folders(tmp_path / "images", splits=("train",), each=10)
    data = ("data.name=folder", f"data.root={root}", "data.val_fraction=0.3", "data.test_fraction=0.3")
    folder = tmp_path / "run"
    done("apply", recipe, "--output", folder, *data, "data.limit_val=null", "--no-report")
    (row,) = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    assert (row["phase"], row["kind"], row["step"]) == ("0_multiplex", "evaluate", 0)
    judged = report_sweep._judged(folder)
    assert judged is not None
    assert judged.value == row["top1"]
    assert judged.images == f"on {row['images']} images held out for validation, so that the test chose nothing"
    (folder / "results.json").unlink()
    done("apply", folder, "--resume", "--no-report")
    assert len((folder / "metrics.jsonl").read_text().splitlines()) == 1
