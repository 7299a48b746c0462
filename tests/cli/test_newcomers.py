"""What people try in their first ten minutes: keys they do not know, notations they guess, runs they stop and go on with."""

from __future__ import annotations

import shutil

import pytest
import timm
from helpers.models import build
from helpers.runs import done, metrics, refused, run, student_bytes

from compressvit import LORS, Multiplex
from compressvit.errors import UserError
from compressvit.recipe.recipe import load_recipe
from compressvit.transforms.applying import compress


def test_schema_of_a_key_is_for_people():
    out = done("schema", "multiplex")
    for words in ("share required", "Blocks in a share group", "mlp_conv 0", 'init "mean"'):
        assert words in out
    assert "prediction" in done("schema", "distill.losses")
    assert "temperature" in done("schema", "distill.losses.prediction")
    assert "batch_size" in done("schema", "data")
    assert done("schema", "merge") == "merge has no options"
    assert "did you mean 'multiplex'?" in refused("schema", "multiplx")
    assert "'distill.nothing'" in refused("schema", "distill.nothing")


def test_both_notations_of_a_place_in_a_list_are_understood():
    recipes = [
        load_recipe("quickstart", [f"{key}=3"]) for key in ("steps.0.multiplex.share", "steps[0].multiplex.share")
    ]
    assert recipes[0] == recipes[1]
    assert recipes[0].steps[0].multiplex.share == 3


def test_a_step_at_the_top_of_a_recipe_is_told_where_it_belongs():
    message = refused("plan", "quickstart", "multiplex.share=3")
    assert "multiplex is a step, so it belongs in the list `steps` (steps.0.multiplex on the command line)" in message
    message = refused("plan", "quickstart", "teacher.epochs=3")
    assert (
        "teacher.epochs: unknown key (known: model, weights, backbone, args, adapter, num_classes, finetune)" in message
    )


def test_only_the_recipe_is_required():
    code, _, err = run("plan")
    assert code == 2
    assert err.endswith("the following arguments are required: RECIPE")


def test_a_run_goes_on_by_its_folder_alone(recipe, finished, tmp_path):
    folder = tmp_path / "run"
    shutil.copytree(finished, folder)
    shutil.rmtree(folder / "student")
    done("apply", "--no-report", folder, "--resume")
    assert student_bytes(folder) == student_bytes(finished)
    assert "is a run folder, not a recipe; --resume goes on with the run in it" in refused("apply", folder)


def test_the_log_holds_what_the_console_showed(finished):
    text = (finished / "run.log").read_text()
    for words in ("steps[0].multiplex", "Ledger", "before training", "student / teacher", "read back from disk"):
        assert words in text


def test_classes_that_do_not_fit_are_told_beside_the_result(recipe, tmp_path):
    out = done("apply", recipe, "--output", tmp_path / "run", "teacher.num_classes=12", "steps=[multiplex: {share: 2}]")
    assert out.count("the data has 10 classes and the teacher's head 12") == 2  # in the plan, and below the table
    assert "warning: the data has 10 classes" in (tmp_path / "run" / "run.log").read_text()


def test_what_is_never_trained_is_told():
    note = "no step trains the student after steps[1].multiplex"
    assert note in done("plan", "quickstart", "steps=[distill, {multiplex: {share: 2}}]")
    assert "no step trains" not in done("plan", "quickstart")


@pytest.mark.parametrize(
    ("model", "transforms", "words"),
    [
        ("vit_tiny_patch16_224", [Multiplex(share=2)], r"takes a model, not a str; .*timm\.create_model"),
        (None, Multiplex(share=2), r"takes a list of transforms, e\.g\. \[Multiplex"),
        (
            None,
            [{"multiplex": {"share": 2}}],
            r"takes a list of transforms.*; multiplex is compressvit\.Multiplex in Python$",
        ),
        (None, ["low_rank"], r"not \['low_rank'\]; low_rank is compressvit\.LowRank in Python$"),
        (None, "repadapter", r"; repadapter is compressvit\.RepAdapter in Python$"),
        (None, ["nothing"], r"not \['nothing'\]$"),
    ],
)
def test_compress_says_what_it_takes(model, transforms, words):
    with pytest.raises(UserError, match=words):
        compress(model or build("vit"), transforms)


@pytest.mark.wide
def test_a_recipe_measures_errors_on_its_own_images(recipe, tmp_path):
    steps = "steps=[{low_rank: {budget: {parameters: 0.7}}}]"
    out = done("apply", recipe, "--output", tmp_path / "run", steps, "calibration.images=24")
    assert "low rank" in out
    assert "error of ┃ error of ┃" in out
    assert "weight ┃ output ┃" in out
    out = done("apply", recipe, "--output", tmp_path / "again", steps, "calibration.images=24")
    assert student_bytes(tmp_path / "run") == student_bytes(tmp_path / "again")
    assert metrics(tmp_path / "run")
    student = done("evaluate", tmp_path / "run")
    assert "top-1 │" in student


def test_lors_from_python_as_the_readme_has_it():
    model = timm.create_model("vit_tiny_patch16_224", img_size=32, patch_size=8, embed_dim=48, depth=2, num_classes=10)
    assert compress(model, [LORS(rank=8, share=2, metric="weights")]) is not model


def test_resuming_a_run_that_is_not_there_speaks_of_run_folders(tmp_path):
    message = refused("apply", tmp_path / "nothing", "--resume")
    assert f"--resume: there is no run folder {tmp_path / 'nothing'}" in message
    assert "recipes list" not in message
