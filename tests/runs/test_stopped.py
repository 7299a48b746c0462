"""A run that is stopped by a signal where no training waits for one says what is kept, and how it is continued."""

from __future__ import annotations

import os
import signal

import pytest
from helpers.runs import TINY, run

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
