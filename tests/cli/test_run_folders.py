"""`compressvit apply` and `evaluate`: where a run folder may be, and what is refused leaves it untouched."""

from __future__ import annotations

import json
import shutil

import pytest
from helpers.runs import TINY, refused, run

from compressvit.runs.files import read_results


@pytest.fixture(scope="module")
def recipe(tmp_path_factory):
    """The file of `TINY`, in place of the recipe of conftest.py."""
    path = tmp_path_factory.mktemp("cli") / "tiny.yaml"
    path.write_text(TINY)
    return path


@pytest.fixture(scope="module")
def finished(recipe):
    """A finished run of `recipe`."""
    folder = recipe.parent / "finished"
    code, out, err = run("apply", recipe, "--output", folder)
    assert (code, err) == (0, "")
    assert "run folder" in out
    return folder


# --- apply: where the run folder may be


def contents(folder):
    return {p.relative_to(folder): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


def test_a_folder_that_is_not_empty_is_refused_untouched(recipe, tmp_path):
    (tmp_path / "mine.txt").write_text("precious")
    before = contents(tmp_path)
    message = refused("apply", recipe, "--output", tmp_path)
    for word in ("not empty", "--resume", "--overwrite", "--output"):
        assert word in message
    message = refused("apply", recipe, "--output", tmp_path, "--overwrite")
    assert "not a run folder" in message
    assert "no run" in refused("apply", recipe, "--output", tmp_path, "--resume")
    assert contents(tmp_path) == before


def test_a_finished_run_is_refused_untouched(recipe, finished):
    before = contents(finished)
    assert before
    assert "not empty" in refused("apply", recipe, "--output", finished)
    assert "contradict" in refused("apply", recipe, "--output", finished, "--resume", "--overwrite")
    # a fault is found before anything is deleted
    assert "conflict" in refused("apply", recipe, "--output", finished, "--overwrite", "steps.0.multiplex.share=3")
    assert "no file" in refused("apply", recipe, "--output", finished, "--overwrite", "teacher.weights=nowhere.pt")
    assert contents(finished) == before


def test_an_output_that_cannot_be_a_folder(recipe, tmp_path):
    (tmp_path / "file").write_text("precious")
    assert "is a file" in refused("apply", recipe, "--output", tmp_path / "file")
    assert "could not be written" in refused("apply", recipe, "--output", tmp_path / "file" / "run")
    assert (tmp_path / "file").read_text() == "precious"


def test_resume_of_another_recipe_lists_what_differs(recipe, finished):
    before = contents(finished)
    message = refused(
        "apply", recipe, "--output", finished, "--resume", "seed=7", "steps.1.distill.epochs=9", "teacher.args.depth=4"
    )
    for line in (
        "seed: 0 in the run, 7 now",
        "steps.1.distill.epochs: 1 in the run, 9 now",
        "teacher.args.depth: 2 in the run, 4 now",
    ):
        assert line in message
    assert message.count("in the run") == 3
    assert contents(finished) == before


def test_resume_of_a_damaged_run(recipe, tmp_path):
    (tmp_path / "resolved.yaml").write_text("a: [1,")
    assert "damaged" in refused("apply", recipe, "--output", tmp_path, "--resume")


def test_a_device_that_is_not_there(recipe, tmp_path):
    message = refused("apply", recipe, "--output", tmp_path / "run", "--device", "abacus")
    assert "--device abacus" in message
    assert "--device cpu" in message
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (None, ["no file", "teacher.weights=PATH"]),
        (b"not a checkpoint", ["not a file of plain tensors"]),
    ],
)
def test_teacher_weights_that_cannot_be_read(recipe, tmp_path, content, words):
    file = tmp_path / "weights.pt"
    if content is not None:
        file.write_bytes(content)
    message = refused("apply", recipe, "--output", tmp_path / "run", f"teacher.weights={file}")
    for word in words:
        assert word in message
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("how", ["a folder that is missing", "a set that is missing"])
def test_data_that_is_missing(recipe, tmp_path, how):
    data = ["data.name=folder", f"data.root={tmp_path / 'nowhere'}"] if "folder" in how else ["data.name=folder"]
    message = refused("apply", recipe, "--output", tmp_path / "run", *data)
    assert "data.root" in message or str(tmp_path / "nowhere") in message
    assert not (tmp_path / "run").exists()


# --- evaluate


def test_evaluate_a_run_gives_what_the_run_reported(finished):
    results = json.loads((finished / "results.json").read_text())["student"]
    code, out, err = run("evaluate", finished, "--json")
    assert (code, err) == (0, "")
    told = json.loads(out)
    assert told["images"] == 32
    for key in ("parameters", "bytes", "macs", "top1", "top5", "loss"):
        assert told[key] == pytest.approx(results[key]), key


def test_evaluate_prints_a_table(finished):
    code, out, _ = run("evaluate", finished)
    assert code == 0
    results = read_results(finished).student
    for word in (
        "digits",
        f"parameters (unique) │ {results.parameters:,}",
        f"bytes on disk │ {results.bytes / 1e3:,.1f} kB",
        f"MACs per image │ {results.macs / 1e6:.2f} M",
        f"top-1 │ {results.top1:.2f} %",
        f"loss │ {results.loss:.4f}",
        "images │ 32",
        "broken images │ 0",
    ):
        assert word in out
    assert "top1" not in out
    assert "latency" not in out


def test_evaluate_an_artifact_on_its_own(finished, tmp_path):
    alone = tmp_path / "artifact"
    shutil.copytree(finished / "student", alone)
    message = refused("evaluate", alone)
    for word in ("its data is not known", "data.name=digits", "data.root"):
        assert word in message
    code, out, _ = run("evaluate", alone, "data.name=digits", "data.limit_val=32", "--json")
    assert code == 0
    inside = json.loads(run("evaluate", finished / "student", "--json")[1])
    assert inside["against_teacher"].keys() == {"agreement", "cosine"}
    assert {**json.loads(out), "path": ""} == {**inside, "path": "", "against_teacher": {}}


def test_evaluate_the_teacher_of_a_run_on_fewer_images(finished):
    code, out, _ = run("evaluate", finished / "teacher", "data.limit_val=8", "--json")
    assert code == 0
    assert json.loads(out)["images"] == 8


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        (["seed=3"], ["data only", "seed=3"]),
        (["teacher.model=x"], ["data only", "teacher.model=x"]),
        (["data={name: digits}"], ["data only"]),
        (["data.name"], ["no '='"]),
        (["data.nam=digits"], ["override data.nam=digits", "'name'"]),
        (["data.name=folder"], ["data.root"]),
        (["--device", "abacus"], ["--device abacus"]),
    ],
)
def test_evaluate_refuses_other_overrides(finished, overrides, words):
    message = refused("evaluate", finished, *overrides)
    for word in words:
        assert word in message


def test_evaluate_of_nothing(recipe, tmp_path):
    message = refused("evaluate", tmp_path / "nowhere")
    assert "nowhere" in message
    assert "run folder" in message
    assert "compressvit.json" in refused("evaluate", tmp_path)
    assert "compressvit.json" in refused("evaluate", recipe)


def test_evaluate_of_a_run_without_a_student(finished, tmp_path):
    shutil.copy(finished / "resolved.yaml", tmp_path)
    message = refused("evaluate", tmp_path)
    assert "no student yet" in message
    assert "--resume" in message


def test_evaluate_of_a_truncated_artifact(finished, tmp_path):
    run_folder = tmp_path / "run"
    shutil.copytree(finished, run_folder)
    tensors = run_folder / "student" / "model.safetensors"
    tensors.write_bytes(tensors.read_bytes()[:-100])
    assert "not a complete safetensors file" in refused("evaluate", run_folder)
