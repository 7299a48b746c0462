"""A run folder that somebody else made: nothing outside it is read, written or deleted through it, and nothing in it is deleted that a run
does not write."""

from __future__ import annotations

import json
import os
import shutil
import time
from pathlib import Path

import pytest
from helpers.page import Page
from helpers.runs import done, refused, run

from compressvit.errors import UserError
from compressvit.runs.owned import delete, foreign
from compressvit.text import printable

pytestmark = pytest.mark.usefixtures("drawn_once")


@pytest.fixture
def copied(finished, tmp_path):
    """A copy of a finished run."""
    return shutil.copytree(finished, tmp_path / "run")


@pytest.fixture
def outside(tmp_path):
    """What belongs to the user and lies elsewhere."""
    folder = tmp_path / "outside"
    folder.mkdir()
    for name in ("00.png", "compressvit.json", "x.txt"):
        (folder / name).write_text("precious")
    return folder


def precious(outside):
    assert {p.name: p.read_text() for p in outside.iterdir()} == dict.fromkeys(
        ("00.png", "compressvit.json", "x.txt"), "precious"
    )


def replaced_by_link(path, target):
    if path.is_dir():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)
    path.symlink_to(target)


LINKS = [
    "run.log",
    "metrics.jsonl",
    "results.json",
    "student",
    "predictions",
    "tensorboard",
    "checkpoints",
    "diagnostics",
]


@pytest.mark.parametrize("name", LINKS)
def test_a_link_is_not_written_through(name, copied, outside, recipe):
    replaced_by_link(copied / name, outside / "x.txt" if "." in name else outside)
    message = refused("apply", recipe, "--output", copied, "--resume", "seed=3")
    assert f"{copied / name} is a link" in message
    precious(outside)
    message = refused("apply", recipe, "--output", copied, "--overwrite", "seed=3")
    assert f"{copied / name} (a link) is nothing that a run writes" in message
    precious(outside)
    assert (copied / name).is_symlink()


def test_a_scratch_name_is_not_written_through(copied, outside):
    (copied / ".report.html.part").symlink_to(outside / "x.txt")
    done("report", copied)
    precious(outside)


def test_a_merge_is_not_written_through_a_link(copied, outside):
    (copied / "merged").symlink_to(outside)
    (outside / "merge.json").write_text("{}")
    assert f"{copied / 'merged'} is a link" in refused("merge", copied)
    (outside / "merge.json").unlink()
    precious(outside)


@pytest.mark.wide_unless(lambda name: name in ("recipe.yaml", "predictions.json"))
@pytest.mark.parametrize(
    "name", ["recipe.yaml", "run.log", "environment.json", "predictions.json", "predictions/00.png"]
)
def test_a_link_is_not_read_into_a_report(name, copied, tmp_path):
    secret = tmp_path / f"secret{(copied / name).suffix}"
    secret.write_bytes((copied / name).read_bytes())
    (tmp_path / "mark").write_text("SECRET")
    replaced_by_link(copied / name, secret)
    code, _, err = run("report", copied)
    assert code == 0
    if name == "predictions/00.png":
        assert "1 of 16 pictures in predictions cannot be read and are left out; the first is 00.png." in err
    else:
        assert f"{name} cannot be read: it is a link, and links inside a run folder are not followed." in err


def test_pictures_behind_a_linked_folder_are_not_read(copied, tmp_path):
    shutil.move(copied / "predictions", tmp_path / "elsewhere")
    (copied / "predictions").symlink_to(tmp_path / "elsewhere")
    code, _, err = run("report", copied)
    assert code == 0
    assert "16 of 16 pictures" in err
    assert not Page(copied / "report.html").images


def test_a_run_folder_may_be_a_link(copied, tmp_path, recipe):
    (tmp_path / "link").symlink_to(copied)
    assert run("report", tmp_path / "link")[2] == ""
    done("apply", "--no-report", recipe, "--output", tmp_path / "link", "--resume", "seed=3")
    done("apply", "--no-report", recipe, "--output", tmp_path / "link", "--overwrite", "seed=3")
    assert (tmp_path / "link").is_symlink()
    assert (copied / "results.json").is_file()


@pytest.mark.parametrize(
    "name",
    ["notes.txt", "student/README.md", "predictions/mine.png", "checkpoints/old/x.bin", "holiday/1.jpg", "thesis.pdf"],
)
def test_overwrite_deletes_only_what_a_run_writes(name, copied, recipe):
    (copied / name).parent.mkdir(exist_ok=True)
    (copied / name).write_text("mine")
    before = sorted(copied.rglob("*"))
    message = refused("apply", recipe, "--output", copied, "--overwrite", "seed=3")
    assert (
        f"{copied / name} is nothing that a run writes" in message
        or f"{copied / 'holiday'} (a folder) is nothing" in message
    )
    assert sorted(copied.rglob("*")) == before


def test_what_is_not_deleted_is_named_before_any_data_is_opened(copied, recipe):
    (copied / "notes.txt").write_text("mine")
    elsewhere = ["data={name: folder, root: /nowhere/at/all}"]
    message = refused("apply", recipe, "--output", copied, "--overwrite", *elsewhere)
    assert f"{copied / 'notes.txt'} is nothing that a run writes" in message


def test_everything_that_a_run_writes_is_its_own(copied, finished):
    done("report", copied)
    (copied / "merged").mkdir()
    for name in ("config.json", "merge.json", "model.safetensors"):
        (copied / "merged" / name).write_text("")
    (copied / ".results.json.part").write_text("")
    (copied / ".student.0123abcd").mkdir()
    (copied / ".student.0123abcd" / "compressvit.json").write_text("")
    assert foreign(copied) is None
    (copied / "notes.txt").write_text("mine")  # that was not there a moment ago
    before = sorted(copied.rglob("*"))
    with pytest.raises(UserError, match=r"notes\.txt is nothing that a run writes"):
        delete(copied)
    assert sorted(copied.rglob("*")) == before
    (copied / "notes.txt").unlink()
    delete(copied)
    assert list(copied.iterdir()) == []


def test_every_folder_of_an_earlier_version_is_a_runs_own(tmp_path):
    runs = [path for path in (Path(__file__).parents[1] / "old_runs").iterdir() if (path / "resolved.yaml").is_file()]
    assert len(runs) >= 5
    assert [foreign(path) for path in runs] == [None] * len(runs)


@pytest.mark.wide_unless(lambda name: name in ("metrics.jsonl", "resolved.yaml"))
@pytest.mark.parametrize(
    "name", ["metrics.jsonl", "results.json", "resolved.yaml", "run.log", "predictions.json", "recipe.yaml"]
)
def test_a_named_pipe_is_no_file(name, copied):
    (copied / name).unlink()
    os.mkfifo(copied / name)
    began = time.monotonic()
    code, _, err = run("report", copied)
    assert time.monotonic() - began < 10
    if name == "resolved.yaml":
        assert code == 2
    else:
        assert f"{name} cannot be read: it is a named pipe, not a file." in err
    run("compare", copied)
    run("evaluate", copied)


def test_a_result_of_no_parameters(copied, tmp_path):
    results = json.loads((copied / "results.json").read_text())
    results["teacher"]["parameters"] = results["teacher"]["bytes"] = results["teacher"]["latency_ms"] = 0
    (copied / "results.json").write_text(json.dumps(results))
    assert run("report", copied)[0] == 0
    assert "instead of none of the teacher" in Page(copied / "report.html").text
    assert run("compare", copied, "--output", tmp_path / "table")[0] == 0


# Each with a note that names it.
DAMAGE = {
    "student/compressvit.json": "student/compressvit.json cannot be read",
    "student/model.safetensors": "student/model.safetensors cannot be read",
    "teacher/model.safetensors": "teacher/model.safetensors cannot be read",
    "resolved.yaml": "resolved.yaml is damaged",
    "plan.json": "plan.json is damaged",
    "environment.json": "environment.json is damaged",
    "results.json": "results.json is damaged",
    "predictions.json": "predictions.json is damaged",
    "metrics.jsonl": "metrics.jsonl",
    "predictions/05.png": "pictures in predictions cannot be read",
}


@pytest.mark.wide_unless(
    lambda name, how: how == "truncated" and name in ("student/compressvit.json", "resolved.yaml", "predictions.json")
)
@pytest.mark.parametrize("how", ["truncated", "no text", "nested"])
@pytest.mark.parametrize("name", DAMAGE)
def test_whatever_cannot_be_read_is_named(name, how, copied):
    file = copied / name
    whole = file.read_bytes()
    file.write_bytes({"truncated": whole[: len(whole) // 3], "no text": b"\xff\xfe\x00", "nested": b"[" * 10**5}[how])
    code, _, err = run("report", copied)
    assert code == 0
    assert DAMAGE[name] in err or f"{name} cannot be read" in err
    page = Page(copied / "report.html")
    for note in err.split(f"compressvit: {copied}: ")[1:]:
        assert printable(note.strip()) in page.text


@pytest.mark.parametrize("name", ["student", "predictions.json"])
def test_whatever_is_gone_is_named(name, copied):
    shutil.rmtree(copied / name) if (copied / name).is_dir() else (copied / name).unlink()
    assert f"There is no {name}" in run("report", copied)[2]


def test_diagnostics_that_are_gone_or_are_none(copied):
    folder = copied / "diagnostics"
    folder.mkdir()
    row = {"diagnostic": "cka", "phase": "1_distill", "epoch": 1, "findings": ["cka"], "seconds": 1.0}
    (folder / "measured.jsonl").write_text(json.dumps(row) + "\n")
    (folder / "a.json").mkdir()
    (folder / "b.json").symlink_to(folder / "b.json")
    (folder / "c.json").write_text("[" * 10**5)
    err = run("report", copied)[2]
    for fault in (
        "a.json cannot be read: it is a folder",
        "b.json cannot be read: it is a link",
        "c.json cannot be read: it is nested more than 64 deep",
        "there is no diagnostics/cka.json",
    ):
        assert fault in err
