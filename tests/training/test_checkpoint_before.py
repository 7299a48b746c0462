"""The checkpoint before the last one: kept while a phase runs, and used where the last one is damaged."""

from __future__ import annotations

import json
import os
import shutil
import signal

import pytest
from helpers.runs import EPOCH, done, refused, run, student_bytes

from compressvit.training import step

OPTIONS = ["--no-report", "steps.1.distill.epochs=4", "steps.1.distill.log_every=1"]
LAST, BEFORE = "checkpoints/1_distill.pt", "checkpoints/1_distill.before.pt"


def rows(folder):
    """The lines of metrics.jsonl without their times, none left out."""
    lines = map(json.loads, (folder / "metrics.jsonl").read_text().splitlines())
    return [{key: value for key, value in line.items() if key != "time"} for line in lines]


@pytest.fixture(scope="module")
def whole(recipe):
    folder = recipe.parent / "whole"
    done("apply", recipe, "--output", folder, *OPTIONS)
    return folder


@pytest.fixture(scope="module")
def stopped(recipe):
    """A run that a cluster stopped in the third epoch of its distillation."""
    folder, batches, total = recipe.parent / "stopped", [], step.total_of

    def counted(*arguments, **options):
        batches.append(1)
        if len(batches) == EPOCH + 2 * EPOCH + 2:
            os.kill(os.getpid(), signal.SIGUSR1)
            os.kill(os.getpid(), signal.SIGUSR1)  # told again, it is no more urgent
        return total(*arguments, **options)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(step, "total_of", counted)
        code, _, said = run("apply", recipe, "--output", folder, *OPTIONS)
    assert code == 128 + signal.SIGUSR1
    assert "stopped by SIGUSR1" in said
    return folder


def flip(path):
    """Change a byte in the middle of a file."""
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 0xFF
    path.write_bytes(content)


@pytest.mark.parametrize("fault", ["none", "flipped", "cut", "missing"])
def test_it_is_used_where_the_last_one_is_damaged(fault, recipe, whole, stopped, tmp_path):
    folder = tmp_path / "run"
    shutil.copytree(stopped, folder)
    last = folder / LAST
    assert (folder / BEFORE).is_file()
    if fault == "flipped":
        flip(last)
    elif fault == "cut":
        last.write_bytes(last.read_bytes()[:-1000])
    elif fault == "missing":  # killed while one took the other's name
        last.unlink()
    said = " ".join(done("apply", recipe, "--output", folder, *OPTIONS, "--resume").split())
    assert ("1_distill.before.pt, the one before, is used" in said) == (fault in ("flipped", "cut"))
    assert f"resumed at epoch 3, step {2 * EPOCH + 2 * (fault == 'none')} of {4 * EPOCH}" in said
    assert student_bytes(folder) == student_bytes(whole)
    assert rows(folder) == rows(whole)
    assert sorted(path.name for path in (folder / "checkpoints").iterdir()) == ["1_distill.pt", "teacher.pt"]


def test_a_damaged_one_never_takes_the_place_of_the_one_before(recipe, whole, stopped, tmp_path, monkeypatch):
    """Killed between the two renames of the next checkpoint, a run still has a good one."""
    folder = tmp_path / "run"
    shutil.copytree(stopped, folder)
    flip(folder / LAST)
    replace = os.replace

    def killed(source, target):
        replace(source, target)
        if str(target).endswith(("before.pt", "1_distill.pt")):
            raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", killed)
        run("apply", recipe, "--output", folder, *OPTIONS, "--resume")
    done("apply", recipe, "--output", folder, *OPTIONS, "--resume")
    assert student_bytes(folder) == student_bytes(whole)


def test_one_that_was_left_behind_goes_when_its_phase_is_done(recipe, whole, tmp_path):
    folder = tmp_path / "run"
    shutil.copytree(whole, folder)
    shutil.copy(folder / LAST, folder / BEFORE)
    shutil.rmtree(folder / "student")
    (folder / "results.json").unlink()
    done("apply", recipe, "--output", folder, *OPTIONS, "--resume")
    assert not (folder / BEFORE).exists()
    assert student_bytes(folder) == student_bytes(whole)


def test_where_both_are_damaged_the_last_one_is_named(recipe, stopped, tmp_path):
    folder = tmp_path / "run"
    shutil.copytree(stopped, folder)
    flip(folder / LAST)
    flip(folder / BEFORE)
    assert f"{folder / LAST} is damaged" in refused("apply", recipe, "--output", folder, *OPTIONS, "--resume")
    (folder / LAST).unlink()
    assert f"{folder / BEFORE} is damaged" in refused("apply", recipe, "--output", folder, *OPTIONS, "--resume")
