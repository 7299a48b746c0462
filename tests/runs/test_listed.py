"""`files.json`: what of a finished run is missing or damaged is told, and made again where that needs no training."""

from __future__ import annotations

import hashlib
import json
import shutil

import pytest
from helpers.runs import done, refused

from compressvit.runs.listed import NAME, other_files, remove_remade


@pytest.fixture
def folder(finished, tmp_path):
    """A copy of the finished run."""
    return shutil.copytree(finished, tmp_path / "run")


def resumed(folder) -> str:
    return done("apply", "--no-report", folder, "--resume")


def flipped(path) -> None:
    """One bit is another."""
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(bytes(content))


def test_all_files_that_a_run_wrote_are_listed(folder):
    listed = json.loads((folder / NAME).read_text())["sha256"]
    files = {path.relative_to(folder).as_posix(): path for path in folder.rglob("*") if path.is_file()}
    logs = {name for name in files if name.startswith(("tensorboard/", "run.log", NAME))}
    assert (
        listed.keys() == files.keys() - logs > {"student/model.safetensors", "checkpoints/teacher.pt", "metrics.jsonl"}
    )
    for name, digest in listed.items():
        assert digest == hashlib.sha256(files[name].read_bytes()).hexdigest()
    assert other_files(folder) == []


@pytest.mark.parametrize(
    "content", ['{"sha256": {"../../x": "0"}}', '{"sha256": {"plan.json": 0}}', "[" * 100_000, "{}", "\0"]
)
def test_a_list_that_is_none_is_told(folder, content):
    (folder / NAME).write_text(content)
    out = resumed(folder)
    assert f"{folder / NAME} cannot be read, so damage to other files is not noticed" in out
    assert "nothing to do" in out
    (folder / NAME).unlink()
    assert "cannot be read" not in resumed(folder)
    assert other_files(folder) == []


@pytest.mark.wide_unless(
    lambda name, lost: (name, lost) in (("predictions.json", False), ("student/compressvit.json", False))
)
@pytest.mark.parametrize("lost", [False, True])
@pytest.mark.parametrize(
    "name",
    ["predictions.json", "predictions/00.png", "plan.json", "student/compressvit.json", "teacher/model.safetensors"],
)
def test_a_damaged_file_is_made_again(finished, folder, name, lost):
    (folder / name).unlink() if lost else flipped(folder / name)
    assert other_files(folder) == [name]
    out = resumed(folder)
    assert "nothing to do" not in out
    assert f"{name}: missing or damaged, and made again" in out
    if name == "plan.json":  # but for the path of the recipe, which is now that of the folder
        found = [json.loads((path / name).read_text()) | {"recipe": ""} for path in (folder, finished)]
        assert found[0] == found[1]
    else:
        assert (folder / name).read_bytes() == (finished / name).read_bytes()
    assert "nothing to do" in resumed(folder)


def test_what_only_training_makes_is_told_and_left(folder):
    flipped(folder / "metrics.jsonl")
    before = (folder / "metrics.jsonl").read_bytes()
    for _ in range(2):
        out = resumed(folder)
        assert "metrics.jsonl: missing or damaged, and left as they are: only training makes them" in out
        assert "nothing to do" in out
    assert (folder / "metrics.jsonl").read_bytes() == before


def test_nothing_is_made_again_from_checkpoints_that_are_gone(folder):
    shutil.rmtree(folder / "checkpoints")
    flipped(folder / "predictions.json")
    out = resumed(folder)
    assert "predictions.json: missing or damaged, and left as they are" in out
    assert "nothing to do" in out
    assert not (folder / "checkpoints").exists()


def test_a_run_without_a_list_gets_one(folder):
    before = json.loads((folder / NAME).read_text())
    (folder / NAME).unlink()
    assert "nothing to do" in resumed(folder)
    assert json.loads((folder / NAME).read_text()) == before


@pytest.mark.parametrize("name", ["../precious", "student/../../precious", "/etc/passwd", "notes.txt"])
def test_a_list_that_somebody_made_removes_nothing_else(folder, name):
    for path in (folder.parent / "precious", folder / "notes.txt"):
        path.write_text("precious")
    (folder / NAME).write_text(json.dumps({"sha256": {name: "0"}}))
    assert other_files(folder) == []
    assert remove_remade(folder, []) == []
    for content in ("[", "[]", "{}", '{"sha256": 1}', '{"sha256": {"results.json": 1}}'):
        (folder / NAME).write_text(content)
        assert other_files(folder) in ([], ["results.json"])
    assert (folder.parent / "precious").read_text() == (folder / "notes.txt").read_text() == "precious"


@pytest.fixture
def unfinished(folder):
    """The run without what it made after its teacher, and without its list."""
    shutil.rmtree(folder / "student")
    for name in (NAME, "results.json"):
        (folder / name).unlink()
    return folder


@pytest.mark.parametrize("damaged", ["model.safetensors", "compressvit.json", "all"])
def test_a_damaged_teacher_of_an_unfinished_run_is_written_again(finished, unfinished, damaged):
    if damaged == "all":
        for file in (unfinished / "teacher").iterdir():
            file.write_bytes(b"")
    else:
        flipped(unfinished / "teacher" / damaged)
    out = resumed(unfinished)
    assert "teacher is damaged, and is written again from its checkpoint" in out
    for name in ("teacher/model.safetensors", "teacher/compressvit.json", "student/model.safetensors", "metrics.jsonl"):
        assert (unfinished / name).read_bytes() == (finished / name).read_bytes(), name


def test_a_damaged_teacher_without_its_checkpoint_is_refused(unfinished):
    flipped(unfinished / "teacher" / "model.safetensors")
    before = (unfinished / "teacher" / "model.safetensors").read_bytes()
    (unfinished / "checkpoints" / "teacher.pt").unlink()
    message = refused("apply", "--no-report", unfinished, "--resume")
    assert f"There is no {unfinished / 'checkpoints' / 'teacher.pt'} from which it could be written again" in message
    assert (unfinished / "teacher" / "model.safetensors").read_bytes() == before
