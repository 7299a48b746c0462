"""A run that is stopped by a signal where no training waits for one says what is kept, and how it is continued."""

from __future__ import annotations

import importlib
import os
import signal

import pytest
from helpers.runs import QUICK, TINY, done, run

from compressvit.runs import apply as applying
from compressvit.runs import run as running

PLACES = {
    "before anything is written": (applying, "prepare", "nothing had been written"),
    "at the start": (running.Run, "train_teacher", "there was no checkpoint yet, so the run begins again. Continue"),
    "in a fit": (
        running,
        "transform_",
        "kept up to {}/checkpoints/teacher.pt, and what came after is repeated. Continue",
    ),
    "after the last epoch": (
        applying,
        "finish",
        "kept up to {}/checkpoints/1_distill.pt, and what came after is repeated",
    ),
}


@pytest.mark.wide_unless(lambda place, signum: (place, signum) != ("in a fit", signal.SIGTERM))
@pytest.mark.parametrize(
    ("place", "signum"), [*((place, signal.SIGTERM) for place in PLACES), ("in a fit", signal.SIGINT)]
)
def test_a_stopped_run_can_be_continued(place, signum, tmp_path, monkeypatch):
    where, name, words = PLACES[place]
    original, folder = getattr(where, name), tmp_path / "run"

    def stopped(*args, **kwargs):
        os.kill(os.getpid(), signum)
        return original(*args, **kwargs)

    before = signal.getsignal(signum)
    (tmp_path / "recipe.yaml").write_text(TINY)
    with monkeypatch.context() as patch:
        patch.setattr(where, name, stopped)
        code, _, err = run("apply", tmp_path / "recipe.yaml", "--output", folder, "--no-report", "--device", "cpu")
    assert code == 128 + signum
    assert err.startswith(f"compressvit: stopped by {signum.name}; ")
    assert words.format(folder) in err
    assert err.endswith(f"Continue with: compressvit apply {folder} --resume") == folder.exists()
    assert signal.getsignal(signum) is before


@pytest.fixture
def adapted(tmp_path):
    """A run whose student merges."""
    (tmp_path / "recipe.yaml").write_text(f"{QUICK.partition('steps:')[0]}steps: [repadapter: {{width: 4}}]\n")
    done("apply", tmp_path / "recipe.yaml", "--output", tmp_path / "run", "--no-report", "--device", "cpu")
    return tmp_path / "run"


VERBS = {
    "merge": ("compressvit.runs.merge", "_write", ("merge",)),
    "export": ("compressvit.runs.export", "_written", ("export", "--to", "safetensors")),
    "evaluate": ("compressvit.runs.evaluate", "evaluate", ("evaluate",)),
}


@pytest.mark.wide_unless(lambda verb, signum: (verb, signum) == ("merge", signal.SIGTERM))
@pytest.mark.parametrize("signum", [signal.SIGTERM, signal.SIGUSR1])
@pytest.mark.parametrize("verb", VERBS)
def test_other_verbs_say_that_they_were_stopped_and_leave_nothing_over(verb, signum, adapted, monkeypatch):
    module, name, (word, *options) = VERBS[verb]
    where = importlib.import_module(module)
    original, before = getattr(where, name), (sorted(adapted.rglob("*")), signal.getsignal(signum))

    def stopped(*args, **kwargs):
        found = original(*args, **kwargs)
        os.kill(os.getpid(), signum)
        return found

    with monkeypatch.context() as patch:
        patch.setattr(where, name, stopped)
        code, _, err = run(word, adapted, *options)
    assert (code, err) == (128 + signum, f"compressvit: stopped by {signum.name}; what was written before is whole")
    left = set(adapted.rglob("*")) - {*before[0]}
    assert not [path for path in left if path.name.startswith(".")]
    assert signal.getsignal(signum) == before[1]
