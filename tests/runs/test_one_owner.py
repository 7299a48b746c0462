"""A run folder has one owner at a time, and a killed run leaves nothing that stops the next one."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch
from filelock import FileLock
from helpers.models import build, images_for
from helpers.runs import done, refused
from rich.console import Console

import compressvit
from compressvit.artifacts import artifact
from compressvit.errors import UserError
from compressvit.files import load_checkpoint, save_checkpoint
from compressvit.runs.folder import RunFolder
from compressvit.runs.owned import delete

SHORT = ["teacher.finetune.max_steps=1", "steps.1.distill.max_steps=1"]


def test_two_runs_do_not_share_a_folder(recipe, tmp_path):
    (tmp_path / "run").mkdir()
    with FileLock(tmp_path / "run" / ".lock"):
        for more in ([], ["--overwrite"]):
            message = refused("apply", recipe, "--output", tmp_path / "run", *SHORT, *more)
            assert "another run is writing into" in message
            assert "--output" in message
    assert [entry.name for entry in (tmp_path / "run").iterdir()] == [".lock"]
    done("apply", "--no-report", recipe, "--output", tmp_path / "run", *SHORT)  # the lock of a killed run is nobody's
    assert not (tmp_path / "run" / ".lock").exists()
    with FileLock(tmp_path / "run" / ".lock"):
        message = refused("apply", recipe, "--output", tmp_path / "run", *SHORT, "--resume")
        assert "another run is writing into" in message


def test_a_merge_waits_for_nobody_and_disturbs_nobody(recipe, tmp_path):
    run = tmp_path / "run"
    text = recipe.read_text()
    (tmp_path / "lora.yaml").write_text(text[: text.index("steps:")] + "steps: [lora, finetune: {max_steps: 1}]\n")
    done("apply", "--no-report", tmp_path / "lora.yaml", "--output", run, SHORT[0])
    with FileLock(run / ".lock"):
        assert "another run is writing into" in refused("merge", run)
        assert not (run / "merged").exists()
        done("merge", run, "--output", tmp_path / "elsewhere")
    done("merge", run)
    assert not (run / ".lock").exists()


def test_the_owner_keeps_its_lock_to_the_end(tmp_path):
    folder = tmp_path / "run"
    with RunFolder(folder).owned():
        with pytest.raises(UserError, match="another run is writing into"), RunFolder(folder).owned():
            pass
        (folder / "results.json").touch()
        for scratch in (True, False):
            delete(folder, scratch=scratch)
            assert (folder / ".lock").is_file()
            with pytest.raises(UserError, match="another run is writing into"), RunFolder(folder).owned():
                pass
        assert not (folder / "results.json").exists()
    assert not folder.exists()


def test_a_folder_that_was_only_looked_at_is_not_left_over(tmp_path):
    with pytest.raises(ZeroDivisionError), RunFolder(tmp_path / "a" / "run").owned():
        1 / 0  # noqa: B018
    assert not (tmp_path / "a" / "run").exists()


def test_what_works_in_one_process_refuses_several(monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(UserError, match=r"2 processes \(WORLD_SIZE=2\), and compressvit.distill works in one"):
        compressvit.distill(None, None, [])


@pytest.fixture(scope="module")
def whole(recipe, tmp_path_factory):
    """A run that nobody killed."""
    folder = tmp_path_factory.mktemp("owner") / "whole"
    done("apply", "--no-report", recipe, "--output", folder, *SHORT)
    return folder


@pytest.mark.wide_unless(lambda left: not left)
@pytest.mark.parametrize("left", [["resolved.yaml"], ["resolved.yaml", "recipe.yaml"], [".recipe.yaml.part"], []])
def test_a_run_killed_at_its_start_can_be_started_again(recipe, whole, tmp_path, left):
    """Whatever it had written by then: with its recipe there it is resumed, and without it the folder is as good as empty."""
    run = tmp_path / "run"
    run.mkdir()
    (run / ".lock").touch()
    for name in left:
        (run / name).write_bytes((whole / name).read_bytes() if (whole / name).exists() else b"half")
    more = ["--resume"] if "resolved.yaml" in left else []
    done("apply", "--no-report", recipe, "--output", run, *SHORT, *more)
    kept = {entry.name for entry in run.iterdir()}
    assert kept == {entry.name for entry in whole.iterdir()}
    assert (run / "student/model.safetensors").read_bytes() == (whole / "student/model.safetensors").read_bytes()


def test_scratch_of_a_killed_run_is_removed(recipe, whole, tmp_path):
    run = shutil.copytree(whole, tmp_path / "run")
    (run / ".student.0a1b2c3d").mkdir()
    (run / ".student.0a1b2c3d" / "model.safetensors").write_bytes(b"half")
    (run / ".student.0a1b2c3d" / ".tmpA1b2C3").write_bytes(b"what safetensors writes to")
    (run / ".tmpD4e5F6").write_bytes(b"half an adapter")
    (run / "checkpoints" / ".0_low_rank.1a2b3c4d").mkdir()
    (run / "checkpoints" / ".0_low_rank.1a2b3c4d" / "model.safetensors").write_bytes(b"half")
    (run / "checkpoints" / ".teacher.pt.part").write_bytes(b"half")
    (run / ".results.json.part").write_text("{")
    (run / ".merge.x_y2z3k1").mkdir()
    (run / ".merge.x_y2z3k1" / "config.json").write_text("{")
    (run / ".notes").write_text("the user's own")
    (run / ".student.9a1b2c3d").mkdir()
    (run / ".student.9a1b2c3d" / "thesis.txt").write_text("the user's own, too")
    done("apply", "--no-report", recipe, "--output", run, *SHORT, "--resume")
    assert {entry.name for entry in run.iterdir() if entry.name.startswith(".")} == {".notes", ".student.9a1b2c3d"}
    assert (run / ".student.9a1b2c3d" / "thesis.txt").is_file()
    assert not [entry.name for entry in (run / "checkpoints").iterdir() if entry.name.startswith(".")]


def test_a_folder_in_which_no_run_had_begun_is_begun_by_resume(recipe, whole, tmp_path):
    """As whoever starts a job again after a kill asks for it, whenever that was; a folder that is not there may be a wrong name."""
    run = tmp_path / "run"
    assert "there is no run in" in refused("apply", recipe, "--output", run, *SHORT, "--resume")
    run.mkdir()
    (run / ".lock").touch()
    (run / ".resolved.yaml.part").write_text("half")
    done("apply", "--no-report", recipe, "--output", run, *SHORT, "--resume")
    assert {entry.name for entry in run.iterdir()} == {entry.name for entry in whole.iterdir()}
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "thesis.txt").touch()
    assert "there is no run in" in refused("apply", recipe, "--output", tmp_path / "other", *SHORT, "--resume")


def test_a_good_student_is_not_replaced_by_one_that_fails(recipe, whole, tmp_path):
    """Resuming a run from a checkpoint with values that are not finite: the student of before stays."""
    run = shutil.copytree(whole, tmp_path / "run")
    (run / "results.json").unlink()  # so that it is not finished
    before = (run / "student/model.safetensors").read_bytes()
    file = run / "checkpoints/1_distill.pt"
    content = load_checkpoint(file)
    for tensor in content["model"].values():
        tensor.fill_(float("nan"))
    save_checkpoint(file, content)
    message = refused("apply", recipe, "--output", run, *SHORT, "--resume")
    assert "not finite" in message
    assert (run / "student/model.safetensors").read_bytes() == before
    assert not [entry for entry in run.iterdir() if entry.name.startswith(".")]


def test_distill_does_not_replace_a_good_student_by_one_that_fails(tmp_path):
    def student():
        torch.manual_seed(0)
        return compressvit.compress(build("vit"), [compressvit.Multiplex(share=2)])

    options = {"epochs": 1, "device": "cpu", "layers": (), "console": Console(quiet=True), "output": tmp_path / "run"}
    batches = [images_for(build("vit"))]
    made = compressvit.distill(student(), build("vit"), batches, **options).student
    before = (tmp_path / "run/student/model.safetensors").read_bytes()
    assert compressvit.load(tmp_path / "run/student").state_dict().keys() == made.state_dict().keys()
    file = tmp_path / "run/checkpoints/distill.pt"
    content = load_checkpoint(file)
    for tensor in content["model"].values():
        tensor.fill_(float("nan"))
    save_checkpoint(file, content)
    with pytest.raises(UserError, match="not finite"):
        compressvit.distill(student(), build("vit"), batches, **options, resume=True)
    assert (tmp_path / "run/student/model.safetensors").read_bytes() == before


def test_a_lock_that_cannot_be_removed_stays_and_stops_nobody(tmp_path, monkeypatch):
    """As on Windows, where an open file cannot be removed."""

    def unlink(path, missing_ok=False):
        raise PermissionError(13, "it is used by another process", str(path))

    with monkeypatch.context() as patch:
        patch.setattr(Path, "unlink", unlink)
        with RunFolder(tmp_path / "run").owned():
            pass
    with RunFolder(tmp_path / "run").owned():
        assert (tmp_path / "run/.lock").exists()


def test_an_artifact_that_fails_its_check_replaces_none(tmp_path):
    model = build("vit")
    artifact.save(model, tmp_path / "model")
    before = (tmp_path / "model/model.safetensors").read_bytes()

    def check(folder):
        assert (folder / "model.safetensors").is_file()
        raise UserError("no")

    model.cls_token.data += 1
    with pytest.raises(UserError, match="no"):
        artifact.save(model, tmp_path / "model", check=check)
    assert (tmp_path / "model/model.safetensors").read_bytes() == before
    assert [entry.name for entry in tmp_path.iterdir()] == ["model"]


def test_a_model_that_is_not_finite_is_not_evaluated(tmp_path):
    model = build("vit")
    model.blocks[1].mlp.fc1.weight.data[0, 0] = float("nan")
    artifact.save(model, tmp_path / "model")
    message = refused("evaluate", tmp_path / "model", "data.name=digits")
    assert "blocks.1.mlp.fc1.weight has values that are not finite (1 such tensors)" in message
