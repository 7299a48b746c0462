"""`sweep --jobs`: signals reach every run, none is left behind, and the runs are those one after another."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time

import pytest
from helpers.runs import QUICK, TINY, done, run, student_bytes

from compressvit.report import sweep as report_sweep
from compressvit.runs import sweep as runs_sweep
from compressvit.training.stopping import StopRequest


@pytest.fixture
def recipe(tmp_path):
    file = tmp_path / "quick.yaml"
    file.write_text(QUICK)
    return file


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    file = tmp_path_factory.mktemp("tiny") / "tiny.yaml"
    file.write_text(TINY)
    return file


# In the place of `compressvit apply`: says that it began, waits for a signal, and says which it was
WAITS = """
import pathlib, signal, sys, time
folder = pathlib.Path(sys.argv[sys.argv.index("--output") + 1])
folder.mkdir(parents=True)
def stop(number, frame):
    with (folder / "stopped").open("a") as file:
        file.write(f"{number} ")
    sys.exit(128 + number)
signal.signal(signal.SIGINT, stop)
signal.signal(signal.SIGTERM, stop)
(folder / "begun").touch()
time.sleep(60)
"""


@pytest.fixture
def hang_up():
    """A closed terminal ends no tests where it is not handled."""

    def unhandled(number, frame):
        raise AssertionError("SIGHUP is not handled")

    before = signal.signal(signal.SIGHUP, unhandled)
    yield
    signal.signal(signal.SIGHUP, before)


@pytest.mark.parametrize(
    ("sent", "received"),
    [
        ((signal.SIGINT,), signal.SIGINT),
        # a closed terminal, which can tell it twice; `apply` writes its checkpoint at SIGTERM
        ((signal.SIGHUP, signal.SIGHUP), signal.SIGTERM),
    ],
)
def test_a_signal_reaches_every_run_once_and_all_are_waited_for(recipe, tmp_path, monkeypatch, hang_up, sent, received):
    monkeypatch.setattr(runs_sweep, "_COMMAND", (sys.executable, "-c", WAITS))
    monkeypatch.setattr(runs_sweep, "_PAUSE", 0.01)
    folder = tmp_path / "swept"

    def interrupt():
        until = time.monotonic() + 30
        while len(list(folder.glob("*/begun"))) < 2 and time.monotonic() < until:
            time.sleep(0.01)
        for number in sent:
            os.kill(os.getpid(), number)

    threading.Thread(target=interrupt).start()
    code, _, err = run("sweep", recipe, "seed=0,1,2", "--jobs", "2", "--output", folder)
    assert code == 128 + sent[0]
    assert f"stopped by {sent[0].name}; 0 of 3 runs are finished" in err
    told = {path.parent.name: path.read_text() for path in folder.glob("*/stopped")}
    assert told == dict.fromkeys(("seed-0", "seed-1"), f"{received:d} ")
    assert not (folder / "seed-2").exists()


def test_nohup_is_obeyed(hang_up):
    signal.signal(signal.SIGHUP, signal.SIG_IGN)
    with StopRequest(hang_up=True) as stop:
        os.kill(os.getpid(), signal.SIGHUP)
    assert stop.signum is None


def test_a_second_signal_while_a_run_is_started_leaves_none_behind(recipe, tmp_path, monkeypatch):
    begun = []

    class Popen(subprocess.Popen):
        def __init__(self, *words, **settings):
            super().__init__(*words, **settings)
            begun.append(self)
            for _ in range(2):
                os.kill(os.getpid(), signal.SIGINT)

    monkeypatch.setattr(runs_sweep.subprocess, "Popen", Popen)
    monkeypatch.setattr(runs_sweep, "_COMMAND", (sys.executable, "-c", "import time; time.sleep(60)"))
    code, _, _ = run("sweep", recipe, "seed=0,1", "--jobs", "2", "--output", tmp_path / "swept")
    left = [one for one in begun if one.poll() is None]
    for one in left:
        one.kill()
    assert code == 130
    assert len(begun) == 1
    assert not left


def test_what_a_run_in_a_process_says_is_told(recipe, tmp_path, monkeypatch):
    says = "import sys; print('compressvit: no', file=sys.stderr); sys.exit('seed=1' in sys.argv and 2)"
    monkeypatch.setattr(runs_sweep, "_COMMAND", (sys.executable, "-c", says))
    monkeypatch.setattr(report_sweep, "compare", lambda *_, **__: [])
    code, out, _ = run("sweep", recipe, "seed=0,1", "--jobs", "2", "--output", tmp_path / "swept")
    assert code == 2
    assert f"finished, 1 of 2: {tmp_path / 'swept' / 'seed-0'}" in out
    assert out.endswith(f"not finished: {tmp_path / 'swept' / 'seed-1'}: no")


@pytest.mark.slow
def test_runs_side_by_side_are_those_one_after_another(tiny, tmp_path):
    words = ("sweep", tiny, "seed=0,1", "--no-report", "--output")
    done(*words, tmp_path / "one")
    done(*words, tmp_path / "two", "--jobs", "2")
    for name in ("seed-0", "seed-1"):
        assert student_bytes(tmp_path / "one" / name) == student_bytes(tmp_path / "two" / name)


@pytest.mark.slow
def test_a_sweep_side_by_side_that_was_stopped_goes_on(tiny, tmp_path):
    folder = tmp_path / "swept"
    words = [
        "sweep",
        str(tiny),
        "seed=0,1",
        "--jobs",
        "2",
        "--output",
        str(folder),
        "steps.1.distill.epochs=200",
        "--no-report",
    ]
    command = [sys.executable, "-m", "compressvit", *words]
    sweep = subprocess.Popen(command, stderr=subprocess.PIPE, stdout=subprocess.PIPE)
    while sweep.poll() is None and len(list(folder.glob("*/checkpoints/1_distill.pt"))) < 2:
        time.sleep(0.05)
    sweep.send_signal(signal.SIGINT)
    _, err = sweep.communicate(timeout=120)
    assert sweep.returncode == 130, err
    assert not list(folder.glob("*/.lock"))  # none is left behind
    assert not list(folder.glob("*/results.json"))
    done(*words, "--resume")
    assert len(list(folder.glob("*/results.json"))) == 2
