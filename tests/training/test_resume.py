"""A run that is stopped, crashes, or meets a full disk loses nothing: it goes on to the same bits."""

from __future__ import annotations

import errno
import functools
import json
import math
import os
import shutil
import signal
import subprocess
import sys
import time

import pytest
import torch
from helpers.runs import EPOCH, done, metrics, refused, run, student_bytes

import compressvit.runs.evaluate
import compressvit.runs.run
from compressvit.files import load_checkpoint
from compressvit.model.stored import TENSORS
from compressvit.recipe.recipe import load_recipe
from compressvit.training import step

LONG = [
    "teacher.finetune.drop_path=0.3",
    "teacher.finetune.mixup=0.2",
    "data.augment.random_erasing=0.25",
    "steps.1.distill={epochs: 3, warmup_epochs: 1, mixup: 0.5, drop_path: 0.2, ema: 0.9, accumulate: 2, log_every: 1}",
    "steps.1.distill.losses.labels.weight=0.5",
]
WORKERS = {
    0: [*LONG, "data.augment.scale=[0.5, 1.0]"],
    2: [*LONG, "data.augment.scale=[0.5, 1.0]", "data.num_workers=2"],
}
# Batches: the teacher's only epoch, then 3 epochs, of which every two (and the third alone) make a step.
BATCHES = EPOCH + 3 * EPOCH
# Evaluations: the teacher's, before training, three epochs; and what the end needs.
EVALUATIONS = 5


def at_call(monkeypatch, module, name, number, act):
    """Call `act` after the given call of `module.name`; returns the list of calls so far."""
    original, calls = getattr(module, name), []

    def counted(*args, **kwargs):
        result = original(*args, **kwargs)
        calls.append(1)
        return act(result) if len(calls) == number else result

    monkeypatch.setattr(module, name, counted)
    return calls


def kill(signum):
    def act(result):
        os.kill(os.getpid(), signum)
        return result

    return act


@pytest.fixture(scope="module")
def uninterrupted(recipe):
    """Runs that nobody stopped, by their number of loader processes."""

    @functools.cache
    def of(workers):
        folder = recipe.parent / f"uninterrupted-{workers}"
        with pytest.MonkeyPatch.context() as patch:
            batches = at_call(patch, step, "total_of", 0, None)
            evaluations = at_call(patch, compressvit.runs.evaluate, "evaluate", 0, None)
            done("apply", "--no-report", recipe, "--output", folder, *WORKERS[workers])
        assert len(batches) == BATCHES
        assert len(evaluations) > EVALUATIONS
        return folder

    return of


@pytest.mark.wide
def test_loader_processes_do_not_change_the_result(uninterrupted, finished):
    assert student_bytes(uninterrupted(0)) == student_bytes(uninterrupted(2)) != student_bytes(finished)


@pytest.mark.wide_unless(lambda what, number, workers: (what, number, workers) == ("batch", 2, 0))
@pytest.mark.parametrize(
    ("what", "number", "signum", "workers"),
    [
        ("batch", 2, signal.SIGINT, 0),  # amid the teacher's training
        ("batch", EPOCH, signal.SIGTERM, 0),  # the teacher's last step
        ("batch", EPOCH + 2, signal.SIGTERM, 0),  # the end of a step
        ("batch", EPOCH + 1, signal.SIGINT, 0),  # between two batches of a step
        ("batch", EPOCH + 1, signal.SIGTERM, 2),
        ("batch", 2 * EPOCH, signal.SIGTERM, 0),  # the last step of an epoch
        ("batch", 2 * EPOCH, signal.SIGINT, 2),
        ("batch", BATCHES, signal.SIGTERM, 0),  # the very last step, whose average becomes the result
        ("evaluation", 3, signal.SIGINT, 0),  # between two epochs
        ("evaluation", EVALUATIONS, signal.SIGTERM, 0),  # after the last step
    ],
)
def test_a_stopped_run_goes_on_to_the_same_bits(
    uninterrupted, recipe, tmp_path, monkeypatch, what, number, signum, workers
):
    folder = tmp_path / "run"
    before = signal.getsignal(signum)
    with monkeypatch.context() as patch:
        place = (step, "total_of") if what == "batch" else (compressvit.runs.evaluate, "evaluate")
        calls = at_call(patch, *place, number, kill(signum))
        code, _, err = run("apply", "--no-report", recipe, "--output", folder, *WORKERS[workers])
    assert code == 128 + signum
    assert f"stopped by {signal.Signals(signum).name}" in err
    assert "--resume" in err
    assert "Traceback" not in err
    assert number <= len(calls) <= number + 1  # at most the rest of a step
    assert signal.getsignal(signum) is before
    assert not (folder / "student").exists()

    assert "1_distill" in done("apply", "--no-report", recipe, "--output", folder, *WORKERS[workers], "--resume")
    assert student_bytes(folder) == student_bytes(uninterrupted(workers))
    for phase, kind in (
        *(("teacher", kind) for kind in ("train", "epoch", "evaluate")),
        *(("1_distill", kind) for kind in ("train", "epoch", "evaluate")),
    ):
        lines = [
            [{k: v for k, v in line.items() if k != "time"} for line in metrics(f, phase=phase, kind=kind)]
            for f in (folder, uninterrupted(workers))
        ]
        assert lines[0] == lines[1]  # as if nothing had happened: no line lost, none twice


@pytest.mark.slow
@pytest.mark.parametrize("signum", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_to_the_whole_group_reaches_the_loader_processes_too(recipe, tmp_path, signum):
    folder = tmp_path / "run"
    command = ["apply", "--no-report", recipe, "--output", folder, *WORKERS[2], "teacher.finetune.epochs=1000"]
    program = [sys.executable, "-m", "compressvit.cli", *map(str, command)]
    process = subprocess.Popen(program, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, start_new_session=True)
    try:
        for _ in range(1200):
            time.sleep(0.1)
            if (folder / "metrics.jsonl").is_file() and len(metrics(folder)) > 20:
                break
        os.killpg(process.pid, signum)
        err = process.communicate(timeout=60)[1].decode()
    finally:
        process.kill()
    assert process.returncode == 128 + signum
    assert f"stopped by {signum.name}" in err
    assert "Traceback" not in err
    assert load_checkpoint(folder / "checkpoints" / "teacher.pt")["steps"] >= EPOCH
    with pytest.raises(ProcessLookupError):  # nobody is left
        os.killpg(process.pid, 0)


@pytest.mark.wide
def test_a_crash_loses_no_more_than_an_epoch(uninterrupted, recipe, tmp_path, monkeypatch):
    def crash(result):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        at_call(patch, step, "total_of", 2 * EPOCH + 2, crash)
        code, _, err = run("apply", "--no-report", recipe, "--output", tmp_path / "run", *WORKERS[0])
    assert code == 130
    assert "compressvit: stopped by SIGINT; the run is kept up to" in err
    out = done("apply", "--no-report", recipe, "--output", tmp_path / "run", *WORKERS[0], "--resume")
    assert "resumed at epoch 2, step 2 of 6" in out
    assert student_bytes(tmp_path / "run") == student_bytes(uninterrupted(0))


def test_a_loss_that_is_not_finite_stops_and_keeps_the_checkpoint(uninterrupted, recipe, tmp_path, monkeypatch):
    def spoil(result):
        return result[0] * math.nan, {**result[1], "prediction": torch.tensor(math.nan)}

    folder = tmp_path / "run"
    with monkeypatch.context() as patch:
        at_call(patch, step, "total_of", 2 * EPOCH + 2, spoil)
        message = refused("apply", recipe, "--output", folder, *WORKERS[0])
    for words in ("1_distill", "loss is nan", "step 3", "prediction nan", "1_distill.pt", "smaller lr"):
        assert words in message
    assert "loss is nan" in (folder / "run.log").read_text()
    saved = load_checkpoint(folder / "checkpoints" / "1_distill.pt")
    assert (saved["epoch"], saved["steps"], saved["done"]) == (1, 2, False)
    assert all(torch.isfinite(t).all() for t in saved["model"].values())
    done("apply", "--no-report", recipe, "--output", folder, *WORKERS[0], "--resume")
    assert student_bytes(folder) == student_bytes(uninterrupted(0))


@pytest.mark.wide_unless(lambda error: isinstance(error, OSError))
@pytest.mark.parametrize(
    "error",
    [OSError(errno.ENOSPC, "No space left on device"), RuntimeError("PytorchStreamWriter failed writing file data/0")],
    ids=["system", "torch"],
)
def test_a_full_disk_keeps_the_old_checkpoint_whole(uninterrupted, recipe, tmp_path, monkeypatch, error):
    folder = tmp_path / "run"
    original, saves = torch.save, []

    def full(content, path):
        saves.append(path)
        original(content, path)
        if len(saves) == 3:  # the second epoch of the distillation
            path.write_bytes(path.read_bytes()[:100])
            raise error

    with monkeypatch.context() as patch:
        patch.setattr(torch, "save", full)
        message = refused("apply", recipe, "--output", folder, *WORKERS[0])
    for words in ("1_distill.pt", "no space left", "--resume"):
        assert words in message
    assert len(saves) == 3
    assert sorted(p.name for p in (folder / "checkpoints").iterdir()) == ["1_distill.pt", "teacher.pt"]
    assert load_checkpoint(folder / "checkpoints" / "1_distill.pt")["epoch"] == 1
    done("apply", "--no-report", recipe, "--output", folder, *WORKERS[0], "--resume")
    assert student_bytes(folder) == student_bytes(uninterrupted(0))


def test_a_damaged_checkpoint_is_refused(recipe, finished, tmp_path):
    folder = tmp_path / "run"
    shutil.copytree(finished, folder)
    (folder / "results.json").unlink()  # so that it is not finished
    file = folder / "checkpoints" / "1_distill.pt"
    file.write_bytes(file.read_bytes()[:1000])
    message = refused("apply", recipe, "--output", folder, "seed=3", "--resume")
    for words in ("1_distill.pt", "not a readable checkpoint", "remove it"):
        assert words in message
    torch.save({"done": False, "model": {}, "epoch": 1}, file)
    message = refused("apply", recipe, "--output", folder, "seed=3", "--resume")
    for words in ("1_distill.pt has no 'frozen'", "another version", "remove it"):
        assert words in message
    file.unlink()
    done("apply", "--no-report", recipe, "--output", folder, "seed=3", "--resume")
    assert student_bytes(folder) == student_bytes(finished)


def test_a_damaged_teacher_is_written_again_from_its_checkpoint(recipe, finished, tmp_path):
    folder = tmp_path / "run"
    shutil.copytree(finished, folder)
    whole = (folder / "teacher" / TENSORS).read_bytes()
    (folder / "teacher" / TENSORS).write_bytes(whole[:1000])
    out = done("apply", "--no-report", recipe, "--output", folder, "seed=3", "--resume")
    assert "teacher/model.safetensors: missing or damaged, and made again" in out
    assert (folder / "teacher" / TENSORS).read_bytes() == whole


@pytest.mark.wide
def test_a_link_to_a_run_can_be_overwritten(recipe, finished, tmp_path):
    shutil.copytree(finished, tmp_path / "run")
    (tmp_path / "link").symlink_to(tmp_path / "run")
    done("apply", "--no-report", recipe, "--output", tmp_path / "link", "seed=3", "--overwrite")
    assert (tmp_path / "link").is_symlink()
    assert student_bytes(tmp_path / "run") == student_bytes(finished)


def test_resuming_a_trained_run_only_reports(recipe, finished, tmp_path, monkeypatch):
    folder = tmp_path / "run"
    shutil.copytree(finished, folder)
    (folder / "results.json").unlink()  # all is trained, and nothing reported
    with monkeypatch.context() as patch:
        batches = at_call(patch, step, "total_of", 0, None)
        out = done("apply", "--no-report", recipe, "--output", folder, "seed=3", "--resume")
    assert batches == []
    assert "student / teacher" in out
    assert student_bytes(folder) == student_bytes(finished)
    results = [json.loads((f / "results.json").read_text()) for f in (folder, finished)]
    for result in results:
        result.pop("slower")  # what is said of the latencies
        for side in ("teacher", "student"):
            result[side].pop("latency_ms")
            result[side].pop("latency_ratio", None)
    assert results[0] == results[1]


@pytest.mark.wide
def test_what_was_learned_from_images_is_not_learned_again(recipe, tmp_path, monkeypatch):
    """Fits take long, and on another machine they may end with other ranks, which the checkpoint does not fit."""
    steps = "steps=[low_rank: {budget: {parameters: 0.5}}, distill: {epochs: 1}]"
    words = ("apply", "--no-report", recipe, steps, "calibration.images=16", "--output")
    whole, folder = tmp_path / "whole", tmp_path / "run"
    done(*words, whole)
    with monkeypatch.context() as patch:
        at_call(patch, step, "total_of", EPOCH + 2, kill(signal.SIGTERM))
        code, *_ = run(*words, folder)
    assert code == 128 + signal.SIGTERM
    with monkeypatch.context() as patch:
        patch.setattr(compressvit.runs.run, "transform_", lambda *_: pytest.fail("it was fitted again"))
        out = done(*words, folder, "--resume")
    assert "0_low_rank: read from" in out
    assert student_bytes(folder) == student_bytes(whole)
    ledgers = [json.loads((f / "results.json").read_text())["ledger"] for f in (folder, whole)]
    assert ledgers[0] == ledgers[1]
    assert all(entry["output_error"] > 0 for entry in ledgers[0])

    (folder / "results.json").unlink()  # so that it is not finished
    (folder / "checkpoints" / "0_low_rank.ledger.json").write_text("[")
    message = refused(*words, folder, "--resume")
    assert f"Remove {folder / 'checkpoints' / '0_low_rank'}: --resume then makes it again" in message
    shutil.rmtree(folder / "checkpoints" / "0_low_rank")
    assert "read from" not in done(*words, folder, "--resume")
    assert student_bytes(folder) == student_bytes(whole)


def test_overwriting_a_run_leaves_nothing_of_it(recipe, finished, tmp_path):
    folder = tmp_path / "run"
    shutil.copytree(finished, folder)
    (folder / "checkpoints" / "stray.pt").write_text("of the old run")
    done("apply", "--no-report", recipe, "--output", folder, "seed=4", "--overwrite")
    assert load_recipe(folder / "resolved.yaml").seed == 4
    assert not (folder / "checkpoints" / "stray.pt").exists()
    assert len(metrics(folder, phase="1_distill", kind="evaluate")) == 2
    assert student_bytes(folder) != student_bytes(finished)


def test_the_same_seed_gives_the_same_bits(recipe, finished, tmp_path):
    done("apply", "--no-report", recipe, "--output", tmp_path / "run", "seed=3")
    assert student_bytes(tmp_path / "run") == student_bytes(finished)
