"""Runs in several processes with models in shards are those with whole ones."""

from __future__ import annotations

import os
import signal

import pytest
import torch
from helpers.runs import RECIPE, TINY, refused, run, undrawn
from helpers.together import together
from helpers.training import random_batches, tiny_vit
from rich.console import Console
from safetensors.torch import load_file

import compressvit
from compressvit import processes
from compressvit.log import RunLog
from compressvit.model import stored
from compressvit.rows import read_metrics
from compressvit.training.sharding.refusals import torch_divides

pytestmark = pytest.mark.skipif(not torch_divides(), reason="an older torch")

# batches of 4, of which the last of the 19 images that are held out is one of 3, so that a process has more of them than the other
DEALT = RECIPE.replace("batch_size: 8", "batch_size: 4, eval_batch_size: 4").replace("limit_val: 16", "limit_val: 19")
MEASURED = DEALT + "diagnostics: [cka]\n"


def with_options(text, options):
    """The recipe with these options of both its phases."""
    return text.replace("finetune: {", f"finetune: {{{options}, ").replace("distill: {", f"distill: {{{options}, ")


def command(*words):
    """As `test_processes.py` has it."""
    with undrawn():
        return run(*words)


def files_of(folder):
    return {str(p.relative_to(folder)) for p in folder.rglob("*") if p.is_file() and "tensorboard" not in p.parts}


def applied(folder, name, text):
    """The weights of the student after a run of two processes, and the rows of metrics.jsonl."""
    (folder / f"{name}.yaml").write_text(text)
    words = ("apply", "--no-report", "--device", "cpu", folder / f"{name}.yaml", "--output", folder / name)
    (code, out, err), (other, *silent) = together(2, command, *words)
    assert (code, other) == (0, 0), err
    assert silent[0] == ""
    assert ("in shards" in out) is ("sharded" in text)
    rows = [row.model_dump() for row in read_metrics(folder / name / "metrics.jsonl")]
    return load_file(folder / name / "student" / stored.TENSORS), rows


OPTIONS = {
    "plain": "clip_grad: 1",
    "averaged": "ema: 0.9, keep: best, accumulate: 2, clip_grad: 0.1",
    "bf16": "precision: bf16, activation_checkpointing: true, optimizer: lion, lr: 1e-4",
}


@pytest.mark.wide
@pytest.mark.parametrize("kind", OPTIONS)
def test_the_artifact_of_a_run_in_shards_is_that_of_one_with_whole_models(kind, tmp_path):
    text = with_options(MEASURED, OPTIONS[kind])
    whole, told = applied(tmp_path, "whole", text)
    parts, found = applied(tmp_path, "parts", with_options(text, "sharded: true"))
    assert files_of(tmp_path / "whole") == files_of(tmp_path / "parts")
    assert any("diagnostics" in name and "cka" in name for name in files_of(tmp_path / "parts"))
    assert whole.keys() == parts.keys()
    for name, value in whole.items():  # measured 4e-5, 2e-6 and 0
        assert (parts[name] - value).abs().max() <= 1e-3 * value.abs().max(), name
    assert [(row["phase"], row["kind"], row["step"]) for row in told] == [
        (r["phase"], r["kind"], r["step"]) for r in found
    ]
    for mine, theirs in zip(told, found, strict=True):
        for key, value in mine.items():
            if key != "time" and isinstance(value, float):  # measured 8e-7
                assert theirs[key] == pytest.approx(value, rel=1e-4, abs=1e-6), (mine["phase"], mine["kind"], key)


def stopped(words, at):
    """The command, in whose second process a signal comes after that many readings of the log."""
    scalars, left = RunLog.scalars, at

    def counted(self, phase, kind, step, values):
        nonlocal left
        left -= kind == "train"
        if left == 0 and processes.place() == 1:
            os.kill(os.getpid(), signal.SIGTERM)
        return scalars(self, phase, kind, step, values)

    RunLog.scalars = counted
    return command(*words)


@pytest.mark.wide
def test_a_run_in_shards_that_was_stopped_goes_on_from_there(tmp_path):
    (tmp_path / "recipe.yaml").write_text(with_options(DEALT, "sharded: true, ema: 0.9"))
    words = ("apply", "--no-report", "--device", "cpu", tmp_path / "recipe.yaml")
    together(2, command, *words, "--output", tmp_path / "whole")
    (code, _, err), (other, *silent) = together(2, stopped, (*words, "--output", tmp_path / "run"), 5)
    assert (code, other) == (143, 143), err
    assert silent[1] == ""
    (code, out, err), _ = together(2, command, *words, "--output", tmp_path / "run", "--resume")
    assert code == 0, err
    assert "resumed at epoch" in out
    one, two = ((tmp_path / name / "student" / stored.TENSORS).read_bytes() for name in ("whole", "run"))
    assert one == two


def test_distill_from_python_in_shards(tmp_path):
    data = random_batches(8, 8)

    def distilled(sharded):
        world, rank = processes.launched(), processes.place()
        mine = [(images[rank::world], targets[rank::world]) for images, targets in data]
        student, teacher = tiny_vit(seed=1), tiny_vit(seed=2)
        options = {"epochs": 2, "lr": 0.05, "optimizer": "sgd", "keep": "best", "sharded": sharded}
        more = {"device": "cpu", "output": tmp_path / str(sharded), "console": Console(quiet=True)}
        found = compressvit.distill(student, teacher, mine, validation=data[:2], **more, **options)
        return found.figures, student.state_dict()

    (figures, whole), _ = together(2, distilled, False)
    (first, one), (second, two) = together(2, distilled, True)
    assert first == second
    assert first["agreement"] == figures["agreement"]
    for name, value in whole.items():
        assert torch.equal(one[name], two[name])
        assert (one[name] - value).abs().max() <= 1e-5 * value.abs().max(), name
    assert files_of(tmp_path / "True") == files_of(tmp_path / "False")


def test_a_diagnostic_that_reads_gradients_is_refused(tmp_path):
    (tmp_path / "recipe.yaml").write_text(with_options(TINY, "sharded: true") + "diagnostics: [gradients]\n")
    told = refused("apply", tmp_path / "recipe.yaml", "--output", tmp_path / "run")
    assert (
        "gradients reads gradients, of which sharded=true leaves no process whole ones; leave one of them out" in told
    )
