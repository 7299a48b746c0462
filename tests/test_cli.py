"""The command line: what the verbs print, their exit codes, and one clear message for every kind of bad input."""

from __future__ import annotations

import contextlib
import io
import json
import os
import shutil
import subprocess
import sys

import pytest
import yaml

from compressvit import __version__
from compressvit.cli import main
from compressvit.recipe import load_recipe, shipped_recipes

TINY = """\
description: A run of a few seconds.
teacher:
  model: vit_tiny_patch16_224
  weights: train
  args: {img_size: 8, patch_size: 4, in_chans: 1, embed_dim: 16, depth: 2, num_heads: 2}
  finetune: {epochs: 1}
data: {name: digits, batch_size: 32, limit_train: 64, limit_val: 32}
steps:
  - multiplex: {share: 2}
  - distill: {epochs: 1}
"""


@pytest.fixture(autouse=True, scope="module")
def _wide_terminal():
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("COLUMNS", "240")
        yield


def run(*words: object) -> tuple[int, str, str]:
    """Exit code, standard output and standard error of `compressvit WORDS`; white space is squeezed."""
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        try:
            code = main([str(word) for word in words])
        except SystemExit as stop:  # argparse
            code = int(stop.code or 0)
    return code, *(" ".join(text.getvalue().split()) for text in (out, err))


def refused(*words: object) -> str:
    """The message of a command that must be refused: exit code 2, one message, no stack trace."""
    code, out, err = run(*words)
    assert code == 2, (out, err)
    assert "Traceback" not in out + err
    assert err.startswith("compressvit: ")
    message = err.removeprefix("compressvit: ")
    assert message not in out  # told once
    return message


@pytest.fixture(scope="module")
def recipe(tmp_path_factory):
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


# --- answers without torch


def test_help_answers_without_the_heavy_imports():
    program = """
import sys
import compressvit
from compressvit.cli import main
for words in ("", "apply", "plan", "validate", "evaluate", "recipes", "schema", "recipes list", "recipes show"):
    try:
        main([*words.split(), "--help"])
    except SystemExit as stop:
        assert stop.code == 0, words
heavy = {"torch", "timm", "numpy", "pydantic", "torchdistill", "torchvision", "yaml"}
print("loaded:", sorted(heavy & set(sys.modules)))
"""
    answer = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=60)
    assert answer.returncode == 0, answer.stderr
    assert answer.stdout.count("usage: compressvit") == 9
    assert "loaded: []" in answer.stdout


def test_help_names_every_verb_and_an_example():
    code, out, _ = run("--help")
    assert code == 0
    for verb in ("apply", "plan", "validate", "evaluate", "recipes", "schema"):
        assert verb in out
    assert "compressvit apply quickstart" in out


def test_version():
    assert run("--version") == (0, f"compressvit {__version__}", "")


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        ([], "required: VERB"),
        (["aply", "quickstart"], "'aply'"),
        (["apply"], "RECIPE"),
        (["plan", "quickstart", "--jason"], "--jason"),
        (["validate", "quickstart", "--json"], "--json"),
        (["schema", "seed=1"], "seed=1"),
        (["validate"], "RECIPE"),
    ],
)
def test_a_command_line_that_cannot_be_read(words, expected):
    code, out, err = run(*words)
    assert (code, out) == (2, "")
    assert expected in err


def test_overrides_may_stand_on_both_sides_of_an_option(recipe):
    both = run("plan", recipe, "teacher.args.depth=4", "--json", "steps.0.multiplex.share=4")
    before = run("plan", recipe, "teacher.args.depth=4", "steps.0.multiplex.share=4", "--json")
    neither = run("plan", recipe, "--json")
    assert both[0] == 0
    assert both == before != neither


# --- recipes, validate, schema


def test_recipes_list_names_and_describes_them_all():
    code, out, _ = run("recipes", "list")
    assert code == 0
    names = list(shipped_recipes())
    assert len(names) >= 9
    for name in names:
        assert name in out.split()
        assert " ".join(load_recipe(name).description.split()[:4]) in out


def test_recipes_show_prints_the_file_as_it_stands(capsys):
    assert main(["recipes", "show", "quickstart"]) == 0
    assert capsys.readouterr().out == shipped_recipes()["quickstart"].read_text(encoding="utf-8")


def test_recipes_show_resolved_prints_defaults_and_overrides(capsys):
    assert main(["recipes", "show", "--resolved", "quickstart", "seed=7"]) == 0
    shown = yaml.safe_load(capsys.readouterr().out)
    expected = yaml.safe_load(load_recipe("quickstart", ["seed=7"]).to_yaml())
    assert shown == expected
    assert shown["seed"] == 7
    assert shown["data"]["num_workers"] == 0


def test_recipes_show_refuses_overrides_that_it_would_not_show():
    assert "--resolved" in refused("recipes", "show", "quickstart", "seed=7")


def test_recipes_show_of_what_is_not_text(tmp_path):
    (tmp_path / "x.yaml").write_bytes(b"\xff\xfe")
    assert "cannot be read as text" in refused("recipes", "show", tmp_path / "x.yaml")


def test_recipes_alone_prints_its_help():
    code, out, _ = run("recipes")
    assert code == 2
    assert "list" in out
    assert "show" in out


def test_validate_reports_every_file_and_fails_when_one_is_faulty(recipe, tmp_path):
    faulty = tmp_path / "faulty.yaml"
    faulty.write_text(TINY.replace("share: 2", "shar: 2"))
    code, out, err = run("validate", recipe, faulty, "nowhere", "quickstart")
    assert code == 2
    assert f"{recipe}: valid" in out
    assert "quickstart: valid" in out
    assert "faulty" not in out
    assert f"{faulty}: 2 errors" in err
    assert "steps[0].multiplex.shar" in err
    assert "there is no recipe 'nowhere'" in err


def test_validate_succeeds_on_all_that_ship():
    names = list(shipped_recipes())
    code, out, err = run("validate", *names)
    assert (code, err) == (0, "")
    assert out.count(": valid") == len(names) >= 9


def test_schema_prints_the_schema(capsys):
    assert main(["schema"]) == 0
    schema = json.loads(capsys.readouterr().out)
    assert schema["properties"].keys() >= {"teacher", "student", "data", "steps"}


# --- plan


def test_plan_as_json(recipe, capsys):
    assert main(["plan", str(recipe), "--json"]) == 0
    plan = json.loads(capsys.readouterr().out)
    for side in ("teacher", "student"):
        for key in ("parameters", "bytes", "macs"):
            assert isinstance(plan[side][key], int)
            assert plan[side][key] > 0
    assert plan["student"]["parameters"] < plan["teacher"]["parameters"]
    assert plan["student"]["macs"] >= plan["teacher"]["macs"]  # sharing saves none
    assert plan["teacher"]["model"] == "vit_tiny_patch16_224"
    assert plan["conflicts"] == []
    assert [step["step"] for step in plan["steps"]] == ["teacher.finetune", "steps[0].multiplex", "steps[1].distill"]
    distill = plan["steps"][2]
    assert distill["layers"] == [[1, 1]]
    assert distill["loss_bytes_total"] == sum(distill["loss_bytes"].values()) > 0


def test_plan_prints_costs_layers_and_what_sharing_does_not_save(recipe):
    code, out, err = run("plan", recipe)
    assert (code, err) == (0, "")
    for words in ("parameters", "bytes on disk", "MACs", "1↔1", "memory of the losses", "not MACs"):
        assert words in out


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        (["steps.0.multiplex.share=3"], ["steps[0].multiplex", "share=3", "does not divide the 2 blocks", "[1, 2]"]),
        (["steps.0.multiplex.share=[1, 1]"], ["steps[0].multiplex", "2 numbers", "1 stage"]),
        (["student.model=resnet18"], ["resnet18 is a ResNet", "VisionTransformer", "SwinTransformer"]),
        (["student.model=beit_base_patch16_224"], ["Beit", "cannot transform"]),
        (["steps.1.distill.layers=[[0, 5]]"], ["steps[1].distill", "block 5 of the teacher", "0 to 1"]),
        (["steps.1.distill.losses.attention_relation.heads=3"], ["heads=3", "does not divide", "1, 2, 4, 8, 16"]),
        (["steps.1.distill.optimizer=adamww"], ["'adamww'", "'adamw'"]),
        (["teacher.finetune.optimizer=sdg"], ["teacher.finetune", "'sdg'", "'sgd'"]),
        (["teacher.num_classes=0"], ["teacher.finetune", "no classifier"]),
        (["teacher.num_classes=0"], ["steps[1].distill", "losses.prediction", "losses.feature.weight=1"]),
        (["steps.1=finetune", "teacher.num_classes=0"], ["steps[1].finetune", "no classifier", "losses.feature"]),
        (["student.args.num_classes=3"], ["prediction", "(32, 3)", "(32, 10)"]),
        (["steps.1.distill.mixup=0.2", "data.batch_size=1"], ["pairs", "batch_size"]),
        (["data.name=images"], ["teacher.finetune", "labels", "images"]),
        (["steps=[{irpe: {}}, {irpe: {}}]"], ["steps[1].irpe", "twice"]),
    ],
)
def test_plan_prints_conflicts_and_fails(recipe, overrides, words, capsys):
    code, out, err = run("plan", recipe, *overrides)
    assert code == 2
    assert "Traceback" not in out + err
    assert "conflict: " in out
    for word in words:
        assert word in out
    assert main(["plan", str(recipe), *overrides, "--json"]) == 2
    conflicts = json.loads(capsys.readouterr().out)["conflicts"]
    assert any(all(word in conflict for word in words) for conflict in conflicts), conflicts


def test_apply_refuses_what_plan_calls_a_conflict_and_touches_nothing(recipe, tmp_path):
    folder = tmp_path / "run"
    message = refused("apply", recipe, "--output", folder, "steps.0.multiplex.share=3", "steps.1.distill.optimizer=x")
    assert "2 conflicts" in message
    assert "does not divide" in message
    assert "optimizer" in message
    assert not folder.exists()


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        (["teacher.model=vit_tiny_patch16_244"], ["no model 'vit_tiny_patch16_244'", "'vit_tiny_patch16_224'"]),
        (["teacher.model=vit_tiny_patch16_224.augreg"], ["weights", "augreg_in21k"]),
        (["teacher.args.colour=1"], ["cannot build", "colour=1"]),
        (["teacher.args.num_heads=3"], ["cannot build", "num_heads=3", "divisible"]),
        (["teacher.args.in_chans=5"], ["5 channels", "1 (grayscale) or 3 (colour)"]),
        (["seed"], ["no '='"]),
        (["steps.5.x=1"], ["list of 2"]),
        (["data.name=digitz"], ["override data.name=digitz", "'digits'"]),
    ],
)
def test_plan_and_apply_refuse_with_one_message(recipe, tmp_path, overrides, words):
    messages = [refused("plan", recipe, *overrides), refused("apply", recipe, *overrides, "--output", tmp_path / "run")]
    for message in messages:
        for word in words:
            assert word in message
    assert not (tmp_path / "run").exists()


def test_an_unknown_recipe_is_refused_by_every_verb_that_takes_one():
    verbs = [["apply"], ["plan"], ["recipes", "show"], ["recipes", "show", "--resolved"]]
    for words in verbs:
        assert "did you mean 'quickstart'?" in refused(*words, "quikstart")


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
    for word in ("digits", "top1", "%", "parameters"):
        assert word in out


def test_evaluate_an_artifact_on_its_own(finished, tmp_path):
    alone = tmp_path / "artifact"
    shutil.copytree(finished / "student", alone)
    message = refused("evaluate", alone)
    for word in ("which data", "data.name=digits", "data.root"):
        assert word in message
    code, out, _ = run("evaluate", alone, "data.name=digits", "data.limit_val=32", "--json")
    assert code == 0
    inside = json.loads(run("evaluate", finished / "student", "--json")[1])
    assert {**json.loads(out), "path": ""} == {**inside, "path": ""}


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


# --- as a program


def test_a_fault_in_a_subprocess_has_no_stack_trace(recipe):
    answer = subprocess.run(
        [sys.executable, "-m", "compressvit.cli", "validate", str(recipe), "seed=1"],
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert answer.returncode == 2
    assert f"{recipe}: valid" in answer.stdout
    assert "there is no recipe 'seed=1'" in answer.stderr
    assert "Traceback" not in answer.stderr


@pytest.mark.parametrize("characters", [10, 100_000])  # less and more than Python keeps back
def test_a_closed_pipe_is_no_fault(characters):
    program = f"""
import sys
from compressvit import cli
cli._schema = lambda arguments: print({characters} * "x") or 0
sys.exit(cli.main(["schema"]))
"""
    reading, writing = os.pipe()
    os.close(reading)
    answer = subprocess.run([sys.executable, "-c", program], stdout=writing, stderr=subprocess.PIPE, timeout=60)
    os.close(writing)
    assert (answer.returncode, answer.stderr) == (0, b"")
