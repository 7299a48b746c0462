"""What a finished run says when it is resumed, and what its results hold."""

from __future__ import annotations

import json
import re
import shutil

import pytest
import torch
from helpers.runs import done, refused, student_bytes
from rich.console import Console

import compressvit
from compressvit.artifacts import artifact
from compressvit.report.compare import compare
from compressvit.runs.files import Figures, read_results


@pytest.fixture
def folder(finished, tmp_path):
    """A copy of the finished run, which has no report."""
    return shutil.copytree(finished, tmp_path / "run")


def contents(folder):
    return {p.relative_to(folder): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


def test_a_finished_run_is_not_run_again(folder):
    done("report", folder)
    before = contents(folder)
    out = done("apply", folder, "--resume")
    assert re.match(r".*/run was finished on \d{4}-\d\d-\d\d at \d\d:\d\d; nothing to do; its figures: student: ", out)
    results = read_results(folder)
    for costs in (results.student, results.teacher):
        assert f"{costs.parameters:,} parameters, top-1 {costs.top1:.2f}%" in out
    assert len(out) < 400, "one line"
    assert contents(folder) == before


def test_a_recipe_that_was_changed_in_the_folder_is_not_passed_over(folder):
    before = (folder / "recipe.yaml").read_text()
    (folder / "recipe.yaml").write_text(before + "\nseed: 5\n")
    message = refused("apply", folder, "--resume", "--no-report")
    assert (
        f"--resume: {folder / 'recipe.yaml'} was changed after the run began, which goes on with resolved.yaml"
        in message
    )
    assert (folder / "recipe.yaml").read_text() == before + "\nseed: 5\n"
    (folder / "recipe.yaml").unlink()
    assert "recipe.yaml: missing or damaged, and made again" in done("apply", folder, "--resume", "--no-report")
    assert "nothing to do" in done("apply", folder, "--resume", "--no-report")


def test_python_gets_what_the_run_gave(folder):
    console = Console(quiet=True)
    again = compressvit.apply(folder / "resolved.yaml", folder, resume=True, console=console)
    assert again.results == read_results(folder)
    assert (again.folder, again.merged) == (folder, None)
    images = torch.randn(2, *again.student.patch_embed.proj.weight.shape[1:2], *again.student.patch_embed.img_size)
    for model, name in ((again.student, "student"), (again.teacher, "teacher")):
        assert not model.training
        assert torch.equal(model(images), artifact.load(folder / name)(images))


def test_a_missing_report_is_written_and_nothing_else(folder):
    before = contents(folder)
    assert "nothing to do" in done("apply", folder, "--resume", "--no-report")
    assert contents(folder) == before
    assert "only its report is written" in done("apply", folder, "--resume")
    after = contents(folder)
    assert {path.name for path in after.keys() - before.keys()} == {"report.html"}
    assert {path: after[path] for path in before} == before


@pytest.mark.wide_unless(lambda lost: lost != "results.json")
@pytest.mark.parametrize("lost", ["results.json", "student/model.safetensors"])
def test_a_damaged_result_is_made_again(finished, folder, lost):
    (folder / lost).write_bytes(b"{")
    assert "nothing to do" not in done("apply", "--no-report", folder, "--resume")
    assert student_bytes(folder) == student_bytes(finished)
    assert "nothing to do" in done("apply", "--no-report", folder, "--resume")


def test_no_adapter_is_counted_where_nothing_is_frozen(finished, tmp_path):
    student = json.loads((finished / "results.json").read_text())["student"]
    assert "trained_adapter" not in student
    (row,) = compare([finished], console=Console(quiet=True))
    assert row["trained_adapter"] == student["parameters"] - student["trained_head"]
    of_an_earlier_version = Figures(**student, trained_adapter=12)
    assert of_an_earlier_version.trained_body == 12
    assert Figures(parameters=9, bytes=1, macs=1).trained_body is None
