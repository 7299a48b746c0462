"""The command line: what the verbs print, their exit codes, and one clear message for every kind of bad input."""

from __future__ import annotations

import functools
import json
import os
import subprocess
import sys

import pytest
import yaml
from helpers import process
from helpers.runs import TINY, refused, run

from compressvit import __version__
from compressvit.cli import main
from compressvit.recipe.recipe import load_recipe
from compressvit.recipe.shipped import shipped_recipes

WIDE = functools.partial(pytest.param, marks=pytest.mark.wide)


@pytest.fixture(scope="module")
def recipe(tmp_path_factory):
    """The file of `TINY`, in place of the recipe of conftest.py."""
    path = tmp_path_factory.mktemp("cli") / "tiny.yaml"
    path.write_text(TINY)
    return path


# --- answers without torch


def test_help_answers_without_the_heavy_imports():
    program = """
import sys
import compressvit
from compressvit.cli import main
for words in ("", "shrink", "apply", "plan", "validate", "evaluate", "recipes", "schema", "recipes list", "recipes show"):
    try:
        main([*words.split(), "--help"])
    except SystemExit as stop:
        assert stop.code == 0, words
heavy = {"torch", "timm", "numpy", "pydantic", "torchdistill", "torchvision", "yaml"}
print("loaded:", sorted(heavy & set(sys.modules)))
"""
    answer = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=60)
    assert answer.returncode == 0, answer.stderr
    assert answer.stdout.count("usage: compressvit") == 10
    assert "loaded: []" in answer.stdout


def test_help_names_every_verb_and_an_example():
    code, out, _ = run("--help")
    assert code == 0
    for verb in ("shrink", "apply", "plan", "validate", "evaluate", "recipes", "schema"):
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


def test_validate_tells_what_is_not_there(tmp_path):
    (tmp_path / "pictures").mkdir()
    (tmp_path / "best.pth").touch()
    text = f"""
teacher: {{model: vit_tiny_patch16_224, weights: {tmp_path / "bset.pth"}}}
data: {{name: folder, root: {tmp_path / "picture"}}}
steps: [{{low_rank: {{rank: 2}}}}]
"""
    (tmp_path / "r.yaml").write_text(text)
    code, out, _ = run("validate", tmp_path / "r.yaml")
    assert code == 0
    assert f"teacher.weights: there is no {tmp_path / 'bset.pth'}; did you mean 'best.pth'? Until it is there," in out
    assert f"data.root: there is no {tmp_path / 'picture'}; did you mean 'pictures'?" in out
    assert "there is no" not in run("validate", "mini_swin_b", "quickstart")[1]


def test_validate_looks_models_up_in_timm_as_plan_does(recipe, tmp_path):
    names = {"teacher": "vit_tiny_patch16_244", "student": "vit_tiny_patch16_224.no_such_tag"}
    for whose, name in names.items():
        faulty = tmp_path / f"{whose}.yaml"
        faulty.write_text(load_recipe(recipe, [f"{whose}.model={name}"]).to_yaml())
        code, out, err = run("validate", faulty, recipe)
        assert (code, out) == (2, f"{recipe}: valid")
        planned = run("plan", faulty)[2].removeprefix("compressvit: ")
        assert err == f"{faulty}: {whose}.model: {planned}"
    assert (
        "has no model 'vit_tiny_patch16_244'; did you mean 'vit_tiny_patch16_224'?"
        in run("validate", tmp_path / "teacher.yaml")[2]
    )


@pytest.mark.parametrize("whose", ["teacher", "student"])
def test_validate_looks_up_the_backbone_of_a_detector(whose, tmp_path):
    faulty = tmp_path / "faulty.yaml"
    faulty.write_text(load_recipe("adamixer_lors", [f"{whose}.args.backbone=resnet5O"]).to_yaml())
    code, out, err = run("validate", faulty)
    assert (code, out) == (2, "")
    assert err.startswith(f"{faulty}: {whose}.args.backbone: timm ")
    assert "has no model 'resnet5O'; did you mean 'resnet50'?" in err


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
        WIDE(["steps.0.multiplex.share=[1, 1]"], ["steps[0].multiplex", "2 numbers", "1 stage"]),
        WIDE(["student.model=resnet18"], ["resnet18 is a ResNet", "VisionTransformer", "SwinTransformer"]),
        WIDE(["student.model=xcit_nano_12_p16_224"], ["Xcit", "multiplex needs"]),
        (["steps.1.distill.layers=[[0, 5]]"], ["steps[1].distill", "block 5 of the teacher", "0 to 1"]),
        (["steps.1.distill.losses.attention_relation.heads=3"], ["heads=3", "does not divide", "1, 2, 4, 8, 16"]),
        (["steps.1.distill.optimizer=adamww"], ["'adamww'", "'adamw'"]),
        (["teacher.finetune.optimizer=sdg"], ["teacher.finetune", "'sdg'", "'sgd'"]),
        (["teacher.num_classes=0"], ["teacher.finetune", "no classifier"]),
        (["teacher.num_classes=0"], ["steps[1].distill", "losses.prediction", "losses.feature.weight=1"]),
        WIDE(["steps.1=finetune", "teacher.num_classes=0"], ["steps[1].finetune", "no classifier", "losses.feature"]),
        WIDE(["student.args.num_classes=3"], ["losses.prediction compares classes", "has 3 and the teacher 10"]),
        (["steps.1.distill.mixup=0.2", "data.batch_size=1"], ["pairs", "batch_size"]),
        WIDE(["data.name=images"], ["teacher.finetune", "labels", "images"]),
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


@pytest.mark.parametrize(
    ("overrides", "begins", "contains"),
    [
        (
            ["teacher.model=resnet18"],
            "steps[0].multiplex: multiplex needs blocks that it knows, and resnet18 is a ResNet, of which",
            "Besides, timm cannot build resnet18",
        ),
        (
            ["teacher.model=convnext_tiny"],
            "steps[0].multiplex: multiplex needs attention",
            "Besides, timm cannot build convnext_tiny",
        ),
        (["teacher.model=resnet18", "steps=[distill]"], "timm cannot build resnet18", "'img_size'"),
        (["teacher.model=swin_tiny_patch4_window7_224"], "timm cannot build swin_tiny", "did you mean 'depths'?"),
    ],
)
def test_a_model_that_no_step_supports_is_refused_before_its_arguments(recipe, overrides, begins, contains):
    message = refused("plan", recipe, *overrides)
    assert message.startswith(begins)
    assert contains in message


def test_an_unknown_recipe_is_refused_by_every_verb_that_takes_one():
    verbs = [["apply"], ["plan"], ["recipes", "show"], ["recipes", "show", "--resolved"]]
    for words in verbs:
        assert "did you mean 'quickstart'?" in refused(*words, "quikstart")


# --- as a program


def test_a_fault_in_a_subprocess_has_no_stack_trace(recipe):
    answer = process.python("-m", "compressvit.cli", "validate", recipe, "seed=1")
    assert answer.code == 2
    assert f"{recipe}: valid" in answer.out
    assert "there is no recipe 'seed=1'" in answer.err
    assert "Traceback" not in answer.err


@pytest.mark.parametrize("characters", [10, 100_000])  # less and more than Python keeps back
def test_a_closed_pipe_is_no_fault(characters):
    program = f"""
import sys
from compressvit.cli import main, recipes
said = []
recipes._schema = lambda arguments: said.append(1) or print({characters} * "x") or 0
code = main(["schema"])
assert said, "another function is called"
sys.exit(code)
"""
    reading, writing = os.pipe()
    os.close(reading)
    answer = subprocess.run([sys.executable, "-c", program], stdout=writing, stderr=subprocess.PIPE, timeout=60)
    os.close(writing)
    assert (answer.returncode, answer.stderr) == (0, b"")
