"""Training phases and run folders: what is written, that a stopped run loses nothing, the arithmetic of a step."""

from __future__ import annotations

import contextlib
import copy
import errno
import io
import json
import math
import os
import shutil
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
import timm
import torch
import torch.nn.functional as F
import yaml
from PIL import Image
from rich.console import Console
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from timm.layers import DropPath
from torch import nn
from torchdistill.losses.registry import MIDDLE_LEVEL_LOSS_DICT

import compressvit.run
from compressvit import artifact, ties
from compressvit.cli import main
from compressvit.distill import engine
from compressvit.distill import optimisation as opt
from compressvit.distill.engine import Phase, Teacher, train
from compressvit.distill.evaluate import evaluate
from compressvit.distill.pairs import match_layers
from compressvit.distill.spec import Distill, Finetune, Losses, TorchdistillTerm
from compressvit.distill.taps import Taps
from compressvit.distill.terms import Batch, Term, build_terms, labels_term
from compressvit.errors import UserError
from compressvit.files import load_checkpoint
from compressvit.pipeline import compress
from compressvit.recipe import load_recipe
from compressvit.runlog import RunLog
from compressvit.transforms.multiplex import Multiplex

CPU = torch.device("cpu")
VIT = {"img_size": 8, "patch_size": 4, "in_chans": 1, "embed_dim": 16, "depth": 2, "num_heads": 2}
RECIPE = f"""\
teacher:
  model: vit_tiny_patch16_224
  weights: train
  args: {json.dumps(VIT)}
  finetune: {{epochs: 1, log_every: 1}}
data: {{name: digits, batch_size: 8, limit_train: 56, limit_val: 16}}
steps:
  - multiplex: {{share: 2, mlp_conv: 3}}
  - distill: {{epochs: 2, log_every: 1, losses: {{hidden_relation: {{weight: 0.5}}, labels: {{weight: 0.25}}}}}}
"""


# --- running recipes


@pytest.fixture(autouse=True, scope="module")
def _wide_terminal():
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("COLUMNS", "240")
        yield


def run(*words: object) -> tuple[int, str, str]:
    """Exit code, standard output and standard error of `compressvit WORDS`; white space is squeezed."""
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        code = main([str(word) for word in words])
    return code, *(" ".join(text.getvalue().split()) for text in (out, err))


def done(*words: object) -> str:
    """The standard output of a command that must succeed."""
    code, out, err = run(*words)
    assert code == 0, err
    return out


def refused(*words: object) -> str:
    """The message of a command that must be refused: exit code 2, told once, no stack trace."""
    code, out, err = run(*words)
    assert code == 2, (out, err)
    assert "Traceback" not in out + err
    assert err.startswith("compressvit: ")
    message = err.removeprefix("compressvit: ")
    assert message not in out
    return message


def metrics(folder, **wanted):
    """The lines of metrics.jsonl with the given values; there must be some."""
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    found = [line for line in lines if all(line.get(k) == v for k, v in wanted.items())]
    assert found, wanted
    return found


def student_bytes(folder) -> bytes:
    return (folder / "student" / artifact.TENSORS).read_bytes()


@pytest.fixture(scope="module")
def recipe(tmp_path_factory):
    path = tmp_path_factory.mktemp("engine") / "tiny.yaml"
    path.write_text(RECIPE)
    return path


@pytest.fixture(scope="module")
def finished(recipe):
    """A finished run of `recipe` with an override."""
    folder = recipe.parent / "finished"
    done("apply", recipe, "--output", folder, "seed=3")
    return folder


# --- running phases


class Heard(RunLog):
    """A log that writes no files and keeps what it was told."""

    def __init__(self):
        super().__init__(None, Console(file=io.StringIO()))
        self.lines = []

    def scalars(self, phase, kind, step, values):
        self.lines.append({"kind": kind, "step": step, **values})

    def of(self, kind):
        return [line for line in self.lines if line["kind"] == kind]


def tiny_vit(seed=0, **changes):
    torch.manual_seed(seed)
    return timm.create_model("vit_tiny_patch16_224", **{**VIT, "num_classes": 4, **changes})


def random_batches(count, size, seed=0, classes=4):
    generator = torch.Generator().manual_seed(seed)
    return [
        (torch.randn(size, 1, 8, 8, generator=generator), torch.randint(classes, (size,), generator=generator))
        for _ in range(count)
    ]


def fit(model, spec, batches, folder, *, terms=None, teacher=None, evaluate=lambda model: {}, size=None):
    """Train on a list of batches and return what the log heard."""
    heard = Heard()
    try:
        train(
            model,
            spec,
            Phase("phase", 1, 0, folder / "phase.pt"),
            terms or [labels_term(1.0, spec.smoothing)],
            batches,
            batch_size=size or len(batches[0][0]),
            device=CPU,
            log=heard,
            evaluate=evaluate,
            teacher=teacher,
        )
    finally:
        heard.close()
    return heard


def values(model):
    return {name: tensor.detach().clone() for name, tensor in ties.unique_state(model).items()}


def largest_difference(first, second):
    assert first.keys() == second.keys()
    return max((first[name].double() - second[name].double()).abs().max().item() for name in first)


def distance(first, second):
    """L2 norm of the difference of two sets of parameters."""
    assert first.keys() == second.keys()
    return math.sqrt(sum((first[n].double() - second[n].double()).square().sum().item() for n in first))


# --- the run folder


def test_a_run_folder_holds_everything(finished, recipe):
    expected = {
        "recipe.yaml",
        "resolved.yaml",
        "environment.json",
        "plan.json",
        "checkpoints/teacher.pt",
        "checkpoints/1_distill.pt",
        "teacher/compressvit.json",
        "teacher/model.safetensors",
        "student/compressvit.json",
        "student/model.safetensors",
        "metrics.jsonl",
        "run.log",
        "results.json",
    }
    files = {str(p.relative_to(finished)) for p in finished.rglob("*") if p.is_file()}
    boards = {name for name in files if name.startswith("tensorboard/events.out.tfevents.")}
    assert expected <= files
    assert len(boards) == 1
    assert {name for name in files - expected - boards if name.split("/")[-1].startswith(".")} == set()  # no scratch

    assert (finished / "recipe.yaml").read_text() == RECIPE
    assert load_recipe(finished / "resolved.yaml") == load_recipe(recipe, ["seed=3"])
    environment = json.loads((finished / "environment.json").read_text())
    assert environment["versions"]["torch"].startswith(torch.__version__.split("+")[0])
    assert environment["versions"]["timm"] == timm.__version__
    assert environment["command"][0] == "compressvit"


def test_the_plan_kept_its_word(finished):
    plan = json.loads((finished / "plan.json").read_text())
    results = json.loads((finished / "results.json").read_text())
    for side in ("teacher", "student"):
        model = artifact.load(finished / side)
        assert plan[side]["parameters"] == results[side]["parameters"] == ties.count_parameters(model)
        assert plan[side]["macs"] == results[side]["macs"]
        assert plan[side]["bytes"] == (finished / side / artifact.TENSORS).stat().st_size
    assert results["student"]["bytes"] == plan["student"]["bytes"]
    assert results["read_back_difference"] == 0
    assert results["student"]["latency_ms"] > 0


def test_metrics_hold_every_weighted_term_and_the_rest(finished):
    steps = metrics(finished, phase="1_distill", kind="train")
    assert [line["step"] for line in steps] == list(range(1, 15))
    for line in steps:
        terms = [line[name] for name in ("prediction", "attention_relation", "hidden_relation", "labels")]
        assert sum(terms) == pytest.approx(line["loss"], rel=1e-5)
        assert line["gradient_norm"] > 0
        assert 0 <= line["lr"] <= 1e-3
        assert 0 <= line["attention_relation_kl"] < line["attention_relation"]
        for name in ("top1", "top5", "teacher_top1"):
            assert 0 <= line[name] <= 100
    epochs = metrics(finished, phase="1_distill", kind="epoch")
    assert [line["epoch"] for line in epochs] == [1, 2]
    for key in ("loss", "prediction", "top1", "teacher_top1"):  # an epoch's line is the mean of its batches
        for epoch, line in enumerate(epochs):
            assert line[key] == pytest.approx(np.mean([s[key] for s in steps if s["epoch"] == epoch]), rel=1e-5)
    for phase, count in (("teacher", 1), ("0_multiplex", 1), ("1_distill", 2)):
        lines = metrics(finished, phase=phase, kind="evaluate")
        assert len(lines) == count
        assert all(line["images"] == 16 and 0 <= line["top1"] <= 100 for line in lines)
    assert "agreement" in metrics(finished, phase="0_multiplex")[0]


def test_the_weight_of_a_term_is_in_what_is_logged(finished, recipe, tmp_path):
    half = "steps.1.distill.losses.hidden_relation.weight=0.25"
    done("apply", recipe, "--output", tmp_path / "run", "seed=3", half)
    first = [metrics(f, phase="1_distill", kind="train", step=1)[0] for f in (finished, tmp_path / "run")]
    assert first[1]["hidden_relation"] == pytest.approx(first[0]["hidden_relation"] / 2, rel=1e-5)
    assert first[1]["prediction"] == first[0]["prediction"]


def test_tensorboard_holds_what_metrics_hold(finished):
    board = EventAccumulator(str(finished / "tensorboard"))
    board.Reload()
    expected: dict[str, list] = {}
    for line in metrics(finished):
        for name in line.keys() - {"time", "phase", "kind", "step"}:
            tag = f"{line['phase']}/{line['kind']}/{name}"
            expected.setdefault(tag, []).append((line["step"], pytest.approx(line[name], rel=1e-5)))
    assert "1_distill/train/hidden_relation" in expected
    assert set(board.Tags()["scalars"]) == set(expected)
    for tag, points in expected.items():
        assert [(event.step, event.value) for event in board.Scalars(tag)] == points, tag


def test_the_log_tells_what_happened(finished):
    text = (finished / "run.log").read_text()
    for words in ("teacher 1/1", "before training", "1_distill 2/2", "layer pairs 1↔1", "latency", "run folder"):
        assert words in text


def test_the_student_is_the_checkpoint_and_holds_no_teacher(finished):
    saved = load_checkpoint(finished / "checkpoints" / "1_distill.pt")
    student = artifact.load(finished / "student")
    assert saved["done"]
    assert saved.keys() == {"done", "model", "steps", "epoch"}
    assert saved["steps"] == 14
    assert largest_difference(saved["model"], values(student)) == 0
    assert saved["model"].keys() == ties.unique_state(student).keys()


# --- stopping and going on

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
# Batches: 7 of the teacher's only epoch, then 3 epochs of 7, of which every two (and the seventh alone) make a step.
BATCHES = 7 + 3 * 7
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
    """Runs that nobody stopped, without and with loader processes."""
    folders = {}
    for workers, overrides in WORKERS.items():
        folders[workers] = recipe.parent / f"uninterrupted-{workers}"
        with pytest.MonkeyPatch.context() as patch:
            batches = at_call(patch, engine, "_total", 0, None)
            evaluations = at_call(patch, compressvit.run, "evaluate", 0, None)
            done("apply", recipe, "--output", folders[workers], *overrides)
        assert len(batches) == BATCHES
        assert len(evaluations) > EVALUATIONS
    return folders


def test_loader_processes_do_not_change_the_result(uninterrupted, finished):
    assert student_bytes(uninterrupted[0]) == student_bytes(uninterrupted[2]) != student_bytes(finished)


@pytest.mark.parametrize(
    ("what", "number", "signum", "workers"),
    [
        ("batch", 3, signal.SIGINT, 0),  # amid the teacher's training
        ("batch", 7, signal.SIGTERM, 0),  # the teacher's last step
        ("batch", 9, signal.SIGTERM, 0),  # the end of a step
        ("batch", 10, signal.SIGINT, 0),  # between two batches of a step
        ("batch", 10, signal.SIGTERM, 2),
        ("batch", 14, signal.SIGTERM, 0),  # the last step of an epoch
        ("batch", 14, signal.SIGINT, 2),
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
        place = (engine, "_total") if what == "batch" else (compressvit.run, "evaluate")
        calls = at_call(patch, *place, number, kill(signum))
        code, _, err = run("apply", recipe, "--output", folder, *WORKERS[workers])
    assert code == 128 + signum
    assert f"stopped by {signal.Signals(signum).name}" in err
    assert "--resume" in err
    assert "Traceback" not in err
    assert number <= len(calls) <= number + 1  # at most the rest of a step
    assert signal.getsignal(signum) is before
    assert not (folder / "student").exists()

    assert "1_distill" in done("apply", recipe, "--output", folder, *WORKERS[workers], "--resume")
    assert student_bytes(folder) == student_bytes(uninterrupted[workers])
    for phase, kind in (("teacher", "train"), ("1_distill", "train"), ("1_distill", "evaluate")):
        lines = [
            [{k: v for k, v in line.items() if k != "time"} for line in metrics(f, phase=phase, kind=kind)]
            for f in (folder, uninterrupted[workers])
        ]
        assert lines[0] == lines[1]  # as if nothing had happened: no line lost, none twice


@pytest.mark.slow
@pytest.mark.parametrize("signum", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_to_the_whole_group_reaches_the_loader_processes_too(recipe, tmp_path, signum):
    folder = tmp_path / "run"
    command = ["apply", recipe, "--output", folder, *WORKERS[2], "teacher.finetune.epochs=1000"]
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
    assert load_checkpoint(folder / "checkpoints" / "teacher.pt")["steps"] >= 7
    with pytest.raises(ProcessLookupError):  # nobody is left
        os.killpg(process.pid, 0)


def test_a_crash_loses_no_more_than_an_epoch(uninterrupted, recipe, tmp_path, monkeypatch):
    def crash(result):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        at_call(patch, engine, "_total", 7 + 7 + 4, crash)
        code, _, err = run("apply", recipe, "--output", tmp_path / "run", *WORKERS[0])
    assert (code, err) == (130, "compressvit: stopped")
    out = done("apply", recipe, "--output", tmp_path / "run", *WORKERS[0], "--resume")
    assert "resumed at epoch 2, step 4 of 12" in out
    assert student_bytes(tmp_path / "run") == student_bytes(uninterrupted[0])


def test_a_loss_that_is_not_finite_stops_and_keeps_the_checkpoint(uninterrupted, recipe, tmp_path, monkeypatch):
    def spoil(result):
        return result[0] * math.nan, {**result[1], "prediction": math.nan}

    folder = tmp_path / "run"
    with monkeypatch.context() as patch:
        at_call(patch, engine, "_total", 7 + 7 + 4, spoil)
        message = refused("apply", recipe, "--output", folder, *WORKERS[0])
    for words in ("1_distill", "loss is nan", "step 6", "prediction nan", "1_distill.pt", "smaller lr"):
        assert words in message
    assert "loss is nan" in (folder / "run.log").read_text()
    saved = load_checkpoint(folder / "checkpoints" / "1_distill.pt")
    assert (saved["epoch"], saved["steps"], saved["done"]) == (1, 4, False)
    assert all(torch.isfinite(t).all() for t in saved["model"].values())
    done("apply", recipe, "--output", folder, *WORKERS[0], "--resume")
    assert student_bytes(folder) == student_bytes(uninterrupted[0])


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
    done("apply", recipe, "--output", folder, *WORKERS[0], "--resume")
    assert student_bytes(folder) == student_bytes(uninterrupted[0])


def test_a_damaged_checkpoint_is_refused(recipe, finished, tmp_path):
    folder = tmp_path / "run"
    shutil.copytree(finished, folder)
    file = folder / "checkpoints" / "1_distill.pt"
    file.write_bytes(file.read_bytes()[:1000])
    message = refused("apply", recipe, "--output", folder, "seed=3", "--resume")
    for words in ("1_distill.pt", "not a readable checkpoint", "remove it"):
        assert words in message
    file.unlink()
    done("apply", recipe, "--output", folder, "seed=3", "--resume")
    assert student_bytes(folder) == student_bytes(finished)


def test_resuming_a_finished_run_only_reports(recipe, finished, tmp_path, monkeypatch):
    folder = tmp_path / "run"
    shutil.copytree(finished, folder)
    with monkeypatch.context() as patch:
        batches = at_call(patch, engine, "_total", 0, None)
        out = done("apply", recipe, "--output", folder, "seed=3", "--resume")
    assert batches == []
    assert "student / teacher" in out
    assert student_bytes(folder) == student_bytes(finished)
    results = [json.loads((f / "results.json").read_text()) for f in (folder, finished)]
    for side in ("teacher", "student"):
        for result in results:
            result[side].pop("latency_ms")
    assert results[0] == results[1]


def test_overwriting_a_run_leaves_nothing_of_it(recipe, finished, tmp_path):
    folder = tmp_path / "run"
    shutil.copytree(finished, folder)
    (folder / "checkpoints" / "stray.pt").write_text("of the old run")
    done("apply", recipe, "--output", folder, "seed=4", "--overwrite")
    assert load_recipe(folder / "resolved.yaml").seed == 4
    assert not (folder / "checkpoints" / "stray.pt").exists()
    assert len(metrics(folder, phase="1_distill", kind="evaluate")) == 2
    assert student_bytes(folder) != student_bytes(finished)


def test_the_same_seed_gives_the_same_bits(recipe, finished, tmp_path):
    done("apply", recipe, "--output", tmp_path / "run", "seed=3")
    assert student_bytes(tmp_path / "run") == student_bytes(finished)


# --- the arithmetic of a step


PLAIN = {"optimizer": "momentum", "momentum": 0.0, "lr": 0.1, "schedule": "constant", "log_every": 1}


def joined(batches):
    return tuple(torch.cat(parts) for parts in zip(*batches, strict=True))


def test_accumulating_two_batches_is_one_batch_of_both(tmp_path):
    batches = random_batches(2, 6)
    ends = []
    for name, data, accumulate, steps in (
        ("two", batches, 2, 1),
        ("one", [joined(batches)], 1, 1),
        ("no", batches, 1, 2),
    ):
        model = tiny_vit()
        heard = fit(model, Finetune(epochs=1, accumulate=accumulate, **PLAIN), data, tmp_path / name)
        assert len(heard.of("train")) == steps
        ends.append(values(model))
    assert largest_difference(ends[0], ends[1]) < 1e-6  # measured 2e-8
    assert largest_difference(ends[0], values(tiny_vit())) > 1e-3
    assert largest_difference(ends[0], ends[2]) > 1e-3


def test_the_last_step_of_an_epoch_may_add_up_fewer_batches(tmp_path):
    batches = random_batches(3, 4)
    added = tiny_vit()
    heard = fit(added, Finetune(epochs=1, accumulate=2, **PLAIN), batches, tmp_path / "added")
    assert len(heard.of("train")) == 2
    by_hand = tiny_vit()
    for i, data in enumerate((joined(batches[:2]), batches[2])):
        fit(by_hand, Finetune(epochs=1, **PLAIN), [data], tmp_path / str(i))
    assert largest_difference(values(added), values(by_hand)) < 1e-6  # measured 2e-8


def test_a_gradient_is_clipped_to_its_length_and_logged_before(tmp_path):
    model = tiny_vit()
    start = values(model)
    spec = Finetune(epochs=1, weight_decay=0.0, clip_grad=0.01, **{**PLAIN, "lr": 1.0})
    heard = fit(model, spec, random_batches(1, 8), tmp_path)
    assert heard.of("train")[0]["gradient_norm"] > 0.02
    assert distance(values(model), start) == pytest.approx(0.01, rel=1e-3)


def test_the_learning_rate_warms_up_and_follows_a_cosine(tmp_path):
    options = {"warmup_epochs": 1, "warmup_lr": 1e-4, "lr": 1e-2, "min_lr": 1e-3, "epochs": 4, "log_every": 1}
    heard = fit(tiny_vit(), Finetune(**options), random_batches(5, 2), tmp_path)
    rates = [line["lr"] for line in heard.of("train")]
    assert len(rates) == 20
    for done_steps, rate in enumerate(rates):
        if done_steps < 5:
            expected = 1e-4 + done_steps * (1e-2 - 1e-4) / 5
        else:
            expected = 1e-3 + (1e-2 - 1e-3) * (1 + math.cos(math.pi * done_steps / 20)) / 2
        assert rate == pytest.approx(expected, rel=1e-6), done_steps


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({"schedule": "constant"}, [0.1, 0.1, 0.1, 0.1]),
        ({"schedule": "step", "decay_epochs": 1}, [0.1, 0.1, 0.01, 0.01]),
        ({"schedule": "constant", "lr_reference_batch": 8}, [0.05] * 4),
        ({"schedule": "constant", "lr_reference_batch": 8, "accumulate": 2}, [0.1] * 2),
    ],
)
def test_other_schedules(tmp_path, options, expected):
    spec = Finetune(epochs=2, optimizer="sgd", lr=0.1, log_every=1, **options)
    heard = fit(tiny_vit(), spec, random_batches(2, 4), tmp_path)
    assert [line["lr"] for line in heard.of("train")] == pytest.approx(expected)


def test_max_steps_ends_a_phase_inside_an_epoch(tmp_path):
    evaluated = []
    spec = Finetune(epochs=4, max_steps=7, log_every=3)
    heard = fit(tiny_vit(), spec, random_batches(5, 2), tmp_path, evaluate=lambda model: evaluated.append(1) or {})
    assert [line["step"] for line in heard.of("train")] == [3, 6, 7]
    assert [line["epoch"] for line in heard.of("evaluate")] == [1, 2]
    assert len(evaluated) == 2
    saved = load_checkpoint(tmp_path / "phase.pt")
    assert (saved["steps"], saved["done"]) == (7, True)
    model = tiny_vit(seed=5)
    assert fit(model, spec, random_batches(5, 2), tmp_path).lines == []  # nothing is left to do
    assert largest_difference(values(model), saved["model"]) == 0


def test_evaluate_every_skips_epochs_but_not_the_last(tmp_path):
    heard = fit(tiny_vit(), Finetune(epochs=5, evaluate_every=2), random_batches(1, 2), tmp_path)
    assert [line["epoch"] for line in heard.of("evaluate")] == [2, 4, 5]


def test_weight_decay_spares_what_is_not_a_matrix():
    model = compress(tiny_vit(), [Multiplex(share=2, mlp_conv=3)])
    optimizer = opt.build_optimizer(model, Finetune(weight_decay=0.3), 8, CPU)
    names = {id(p): n for n, p in model.named_parameters()}
    decays = {names[id(p)]: group["weight_decay"] for group in optimizer.param_groups for p in group["params"]}
    assert len(decays) == len(names) == sum(len(g["params"]) for g in optimizer.param_groups)  # a shared tensor once
    assert decays["blocks.0.attn.qkv.weight"] == decays["head.weight"] == 0.3
    assert decays["pos_embed"] == decays["cls_token"] == 0
    flat = [n for n, p in model.named_parameters() if p.ndim == 1]
    assert len(flat) > 10
    assert all(decays[n] == 0 for n in flat)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"optimizer": "adamww"}, "did you mean 'adamw'"),
        ({"optimizer": "sgd", "momentum": 0.0}, "'sgd' cannot be built with momentum=0.0"),
    ],
)
def test_an_optimizer_that_cannot_be_built(options, words):
    with pytest.raises(UserError, match=words):
        opt.build_optimizer(tiny_vit(), Finetune(**options), 8, CPU)


def test_stochastic_depth_rises_linearly():
    model = tiny_vit(depth=5)
    opt.set_drop_path(model, 0.2)
    rates = [getattr(block.drop_path2, "drop_prob", 0.0) for block in model.blocks]
    assert rates == pytest.approx([0, 0.05, 0.1, 0.15, 0.2])
    opt.set_drop_path(model, None)
    assert model.blocks[4].drop_path1.drop_prob == pytest.approx(0.2)
    opt.set_drop_path(model, 0.0)
    assert not any(isinstance(module, DropPath) for module in model.modules())


def test_the_state_of_the_generators_comes_back():
    def draw():
        return [*(np.random.rand(3)), *torch.rand(3).tolist(), opt.random.random(), np.random.normal()]

    opt.seed_everything(5, 1, 2)
    first = draw()
    state = torch.load(saved(opt.random_state()), weights_only=True)  # what a checkpoint can hold
    second = draw()
    opt.restore_random_state(state)
    assert draw() == second != first
    opt.seed_everything(5, 1, 2)
    assert draw() == first
    opt.seed_everything(5, 1, 3)
    assert draw() != first


def saved(content):
    file = io.BytesIO()
    torch.save(content, file)
    file.seek(0)
    return file


def test_the_average_is_what_is_evaluated_and_kept(tmp_path):
    model = compress(tiny_vit(), [Multiplex(share=2)])  # a shared tensor must count once a step, not once a use
    decay, expected, evaluated = 0.7, {}, []

    class Watching(Heard):
        def scalars(self, phase, kind, step, line):
            super().scalars(phase, kind, step, line)
            if kind == "train":
                now = values(model)
                for name, tensor in now.items():
                    expected[name] = decay * expected[name] + (1 - decay) * tensor if name in expected else tensor
                steps.append(now)

    steps = []
    log = Watching()
    train(
        model,
        Finetune(epochs=2, lr=1e-2, ema=decay, log_every=1),
        Phase("phase", 1, 0, tmp_path / "phase.pt"),
        [labels_term(1.0, 0.0)],
        random_batches(3, 4),
        batch_size=4,
        device=CPU,
        log=log,
        evaluate=lambda m: evaluated.append((m is model, largest_difference(values(m), expected))) or {},
    )
    log.close()
    assert len(steps) == 6
    assert [own for own, _ in evaluated] == [False, True]
    assert max(difference for _, difference in evaluated) < 1e-6  # measured 2e-7
    kept = load_checkpoint(tmp_path / "phase.pt")["model"]
    assert largest_difference(values(model), expected) < 1e-6
    assert largest_difference(kept, values(model)) == 0
    assert largest_difference(kept, steps[-1]) > 1e-3  # not the weights of the last step
    assert model.blocks[0].attn.qkv.weight is model.blocks[1].attn.qkv.weight


def test_bf16_runs_on_the_cpu_and_stays_near_fp32(tmp_path):
    losses, ends = {}, {}
    for precision in ("fp32", "bf16"):
        model = tiny_vit()
        spec = Finetune(epochs=2, lr=1e-3, precision=precision, log_every=1)
        heard = fit(model, spec, random_batches(3, 8), tmp_path / precision)
        losses[precision] = [line["loss"] for line in heard.of("train")]
        ends[precision] = values(model)
        assert all(p.dtype is torch.float32 for p in model.parameters())
    assert losses["bf16"] == pytest.approx(losses["fp32"], rel=0.002)  # measured 2e-4
    assert losses["bf16"] != losses["fp32"]
    assert distance(ends["bf16"], ends["fp32"]) < 0.3 * distance(ends["fp32"], values(tiny_vit()))  # measured 0.1


@pytest.mark.parametrize("size", [5, 6])
def test_mixup_pairs_the_images_of_a_batch(tmp_path, size):
    seen = []

    def look(batch):
        seen.append((batch.student_logits.shape, batch.targets))
        return labels_term(1.0, 0.0).function(batch)

    spec = Finetune(epochs=1, mixup=0.8, smoothing=0.1, log_every=1)
    heard = fit(tiny_vit(), spec, random_batches(4, size), tmp_path, terms=[Term("labels", 1.0, look)])
    assert len(seen) == 4
    for shape, targets in seen:
        even = size // 2 * 2
        assert shape == targets.shape == (even, 4)
        assert targets.sum(1) == pytest.approx([1.0] * even)
        assert (targets > 0).all()  # smoothed
    assert any(((targets > 0.1).sum(1) == 2).any() for _, targets in seen)  # and mixed
    assert "top1" not in heard.of("train")[0]  # mixed images have no right answer


@pytest.mark.parametrize("spoilt", ["loss", "gradient"])
def test_what_is_not_finite_is_named_and_the_weights_are_kept(tmp_path, spoilt):
    calls = []

    def term(batch):
        calls.append(1)
        loss = batch.student_logits.float().square().mean()
        if len(calls) == 6:
            # the root has an infinite slope at 0
            loss = loss * math.inf if spoilt == "loss" else loss + (0 * batch.student_logits.sum()).sqrt()
        return loss, {}

    model = tiny_vit()
    after_epoch = []
    with pytest.raises(UserError, match=f"{spoilt}.*at step 6.*spoilable") as caught:
        fit(
            model,
            Finetune(epochs=3),
            random_batches(4, 2),
            tmp_path,
            terms=[Term("spoilable", 1.0, term)],
            evaluate=lambda m: after_epoch.append(values(m)) or {},
        )
    assert "last good checkpoint is kept" in str(caught.value)
    assert len(after_epoch) == 1
    assert largest_difference(load_checkpoint(tmp_path / "phase.pt")["model"], after_epoch[0]) == 0


def test_without_a_checkpoint_the_message_says_so(tmp_path):
    term = Term("bad", 1.0, lambda batch: (batch.student_logits.sum() * math.nan, {}))
    with pytest.raises(UserError, match="no checkpoint had been written"):
        fit(tiny_vit(), Finetune(epochs=1), random_batches(1, 2), tmp_path, terms=[term])
    assert list(tmp_path.iterdir()) == []


# --- the teacher


def distilling(student, teacher, **losses):
    pairs, _ = match_layers(student, teacher, "matched")
    return build_terms(Losses(**losses), pairs, classes=student.num_classes)


def test_the_teacher_is_only_looked_at(tmp_path):
    teacher = tiny_vit(seed=1, drop_path_rate=0.5, proj_drop_rate=0.5).train()
    student = compress(tiny_vit(seed=1), [Multiplex(share=2)])
    before, modes, outputs = values(teacher), [], []
    watching = teacher.blocks[1].register_forward_hook(
        lambda module, args, output: modes.append(module.training) or outputs.append(output.requires_grad)
    )
    spec = Distill(epochs=2)
    fit(student, spec, random_batches(3, 4), tmp_path, terms=distilling(student, teacher), teacher=Teacher(teacher))
    watching.remove()
    assert modes == [False] * 6
    assert outputs == [False] * 6
    assert largest_difference(values(teacher), before) == 0
    assert all(p.grad is None for p in teacher.parameters())
    assert largest_difference(values(student), values(compress(tiny_vit(seed=1), [Multiplex(share=2)]))) > 1e-4
    for model in (teacher, student):
        assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())


def test_teacher_accuracy_is_logged_beside_the_students(tmp_path):
    teacher = tiny_vit(seed=1)
    batches = random_batches(1, 8)
    with torch.no_grad():
        right = 100 * (teacher.eval()(batches[0][0]).argmax(1) == batches[0][1]).float().mean().item()
    student = tiny_vit(seed=2)
    spec = Distill(epochs=1, log_every=1)
    heard = fit(student, spec, batches, tmp_path, terms=distilling(student, teacher), teacher=Teacher(teacher))
    line = heard.of("train")[0]
    assert line["teacher_top1"] == pytest.approx(right)
    assert 0 < line["teacher_top1"] < 100
    assert line["top1"] != line["teacher_top1"]


SIZES = [
    "teacher.args={img_size: 16, patch_size: 8, embed_dim: 16, depth: 2, num_heads: 2}",  # 3 channels, mean 0.5
    "student.model=deit_tiny_patch16_224",  # ImageNet's mean
    "student.weights=random",
    f"student.args={json.dumps(VIT)}",
]


def test_the_teacher_sees_the_images_as_it_knows_them(recipe, tmp_path, monkeypatch):
    seen: dict[str, list] = {"teacher": [], "student": [], "trained teacher": []}
    original = compressvit.run.train

    def watch(model, spec, phase, *args, teacher=None, **kwargs):
        mine = "student" if teacher else "trained teacher"
        hooks = [model.register_forward_pre_hook(lambda m, images: seen[mine].append(images[0].clone()))]
        if teacher:
            keep = lambda m, images: seen["teacher"].append(images[0].clone())  # noqa: E731
            hooks.append(teacher.model.register_forward_pre_hook(keep))
        original(model, spec, phase, *args, teacher=teacher, **kwargs)
        for hook in hooks:
            hook.remove()

    monkeypatch.setattr(compressvit.run, "train", watch)
    done("apply", recipe, "--output", tmp_path / "run", *SIZES, "steps.1.distill.epochs=1")
    assert seen["trained teacher"][0].shape == (8, 3, 16, 16)
    pairs = [(s, t) for s, t in zip(seen["student"], seen["teacher"], strict=False) if s.shape[0] == t.shape[0]]
    assert len(pairs) >= 7
    mean, std = np.mean([0.485, 0.456, 0.406]), np.mean([0.229, 0.224, 0.225])
    for ours, theirs in pairs[:7]:
        assert ours.shape == (8, 1, 8, 8)
        assert theirs.shape == (8, 3, 16, 16)
        pixels = ours * std + mean
        assert pixels.min() > -1e-5
        assert pixels.max() < 1 + 1e-5
        pixels = F.interpolate(pixels, (16, 16), mode="bicubic", antialias=True).expand(-1, 3, -1, -1)
        assert (theirs - (pixels - 0.5) / 0.5).abs().max() < 1e-5


def test_a_trained_teacher_leaves_no_stochastic_depth_behind(recipe, tmp_path, monkeypatch):
    rates = {}
    original = compressvit.run.train

    def watch(model, spec, phase, *args, **kwargs):
        original(model, spec, phase, *args, **kwargs)
        rates[phase.name] = [m.drop_prob for m in model.modules() if isinstance(m, DropPath)]

    monkeypatch.setattr(compressvit.run, "train", watch)
    overrides = ["teacher.finetune.drop_path=0.3", "steps.1.distill.epochs=1"]
    done("apply", recipe, "--output", tmp_path / "run", *overrides)
    assert rates == {"teacher": [0.3, 0.3], "1_distill": []}


def test_a_teacher_of_another_architecture_teaches_its_prediction(recipe, tmp_path):
    overrides = [
        "teacher={model: test_resnet, weights: train, finetune: {epochs: 1}}",
        "student.model=vit_tiny_patch16_224",
        "student.weights=random",
        f"student.args={json.dumps(VIT)}",
        "data.limit_train=8",
        "data.limit_val=4",
        "steps.1.distill={epochs: 1, log_every: 1}",
    ]
    out = done("apply", recipe, "--output", tmp_path / "run", *overrides)
    for words in ("vit_tiny_patch16_224 and test_resnet are of different architectures", "only the prediction"):
        assert words in out
    line = metrics(tmp_path / "run", phase="1_distill", kind="train")[0]
    assert line["loss"] == line["prediction"] > 0
    assert not {"attention_relation", "hidden_relation"} & line.keys()
    manifest = json.loads((tmp_path / "run" / "student" / "compressvit.json").read_text())
    assert manifest["architecture"] == "vit_tiny_patch16_224"


def test_weights_that_cannot_be_had_are_refused_before_anything_runs(recipe, tmp_path, monkeypatch):
    import huggingface_hub

    def unreachable(*args, **kwargs):
        raise ConnectionError("the network is down")

    monkeypatch.setattr(huggingface_hub, "get_hf_file_metadata", unreachable)
    monkeypatch.setattr(huggingface_hub, "try_to_load_from_cache", lambda *args, **kwargs: None)
    monkeypatch.setattr(timm, "create_model", offline(timm.create_model))
    message = refused("apply", recipe, "--output", tmp_path / "run", "teacher={model: deit_tiny_patch16_224.fb_in1k}")
    for words in ("deit_tiny_patch16_224.fb_in1k", "could not be downloaded", "network is down", "model.safetensors"):
        assert words in message
    assert "teacher.weights=PATH" in message
    assert not (tmp_path / "run").exists()


def offline(create_model):
    def create(name, pretrained=False, **kwargs):
        assert not pretrained, "the hub is asked first"
        return create_model(name, pretrained=False, **kwargs)

    return create


# --- taps and torchdistill's losses


def test_taps_read_inputs_and_outputs_and_forget_them():
    model = tiny_vit()
    taps = Taps(model, [("blocks.0", "output"), ("blocks.1", "input"), ("blocks.1", "output"), ("head", "input")], CPU)
    images = torch.randn(2, 1, 8, 8)
    model(images)
    seen = taps.pop()
    assert seen.keys() == {"blocks.0", "blocks.1", "head"}
    assert torch.equal(seen["blocks.0"]["output"], seen["blocks.1"]["input"])
    assert seen["blocks.1"]["output"].shape == (2, 5, 16)
    assert seen["head"]["input"].shape == (2, 16)
    assert not any(io for ios in taps.pop().values() for io in ios.values() if io is not None)
    taps.close()
    model(images)
    assert not any(m._forward_hooks for m in model.modules())


@pytest.mark.parametrize(
    ("tap", "words"),
    [
        (("blocks.0.atn", "output"), ["'blocks.0.atn'", "no module of VisionTransformer", "'blocks.0.attn'"]),
        (("blocks.0", "outputs"), ["'blocks.0'", "'outputs'", "'output'"]),
    ],
)
def test_a_tap_that_is_not_there(tap, words):
    with pytest.raises(UserError) as caught:
        Taps(tiny_vit(), [tap], CPU)
    for word in words:
        assert word in str(caught.value)


PATHS = {"student_output_path": "blocks.1", "teacher_output_path": "blocks.1"}
HEADS = {
    "student_module_path": "head",
    "student_module_io": "output",
    "teacher_module_path": "head",
    "teacher_module_io": "output",
}
AT_PAIRS = {"last": {w: {"path": "blocks.1", "io": "output"} for w in ("student", "teacher")}}
TORCHDISTILL = {
    "SPKDLoss": {**PATHS, "reduction": "batchmean"},
    "ATLoss": {"at_pairs": AT_PAIRS, "mode": "code"},
    "KDLoss": {**HEADS, "temperature": 2.0, "alpha": 0.5},
    "PKTLoss": {**HEADS, "student_module_io": "input", "teacher_module_io": "input"},
}


def only(**terms):
    """Losses with nothing but the given terms."""
    off = {name: {"weight": 0} for name in ("prediction", "attention_relation", "hidden_relation")}
    return Losses(**{**off, **terms})


@pytest.mark.parametrize("name", TORCHDISTILL)
def test_a_torchdistill_loss_by_name(name, tmp_path):
    spec = only(torchdistill=(TorchdistillTerm(loss=name, weight=0.5, kwargs=TORCHDISTILL[name]),))
    (term,) = build_terms(spec, [], classes=4)
    assert term.name == f"torchdistill/{name}"
    teacher, student = tiny_vit(seed=1).eval(), tiny_vit(seed=2)
    gaps = []
    for model in (copy.deepcopy(teacher), student):
        taps = [Taps(m, side, CPU) for m, side in ((model, term.student_taps), (teacher, term.teacher_taps))]
        images, targets = random_batches(1, 6)[0]
        logits = [m(images) for m in (model, teacher)]
        loss, _ = term.function(Batch(*logits, *(t.pop() for t in taps), targets))
        gaps.append(loss.item())
        for tap in taps:
            tap.close()
    assert gaps[1] > gaps[0]
    if name != "KDLoss":  # half of which is the cross-entropy with the labels
        assert gaps[0] == pytest.approx(0, abs=1e-6)
    heard = fit(
        student, Distill(epochs=1, log_every=1), random_batches(2, 6), tmp_path, terms=[term], teacher=Teacher(teacher)
    )
    lines = heard.of("train")
    assert len(lines) == 2
    assert all(line[term.name] == line["loss"] and line["gradient_norm"] > 0 for line in lines)
    assert lines[0]["loss"] == pytest.approx(gaps[1] / 2, rel=1e-4)


@pytest.mark.parametrize(
    ("name", "kwargs", "words"),
    [
        ("SPKDLos", {}, ["no mid-level loss 'SPKDLos'", "did you mean 'SPKDLoss'?"]),
        ("SPKDLoss", PATHS, ["SPKDLoss does not take", "reduction"]),
        ("KDLoss", {**HEADS, "temperature": 1}, ["KDLoss does not take"]),
    ],
)
def test_a_torchdistill_loss_that_cannot_be_built(name, kwargs, words):
    with pytest.raises(UserError) as caught:
        build_terms(only(torchdistill=(TorchdistillTerm(loss=name, kwargs=kwargs),)), [], classes=4)
    for word in words:
        assert word in str(caught.value)


def test_a_torchdistill_loss_with_weights_of_its_own_is_refused(monkeypatch):
    monkeypatch.setitem(MIDDLE_LEVEL_LOSS_DICT, "ProjectingLoss", lambda: nn.Linear(2, 2))
    with pytest.raises(UserError, match="ProjectingLoss has weights of its own"):
        build_terms(only(torchdistill=(TorchdistillTerm(loss="ProjectingLoss"),)), [], classes=4)


@pytest.mark.parametrize(
    ("name", "kwargs", "words"),
    [
        ("SPKDLoss", {**TORCHDISTILL["SPKDLoss"], "student_output_path": "blocks.7"}, ["'blocks.7'", "'blocks.1'"]),
        ("KDLoss", {**TORCHDISTILL["KDLoss"], "student_module_io": "outputs"}, ["'outputs'", "'output'"]),
        (
            "KDLoss",
            {**TORCHDISTILL["KDLoss"], "teacher_module_path": "norm"},
            ["KDLoss failed", "(8, 10)", "(8, 5, 16)"],
        ),
        ("SPKDLoss", {**TORCHDISTILL["SPKDLoss"], "student_output_path": 3}, ["SPKDLoss failed", "KeyError"]),
    ],
)
def test_a_torchdistill_loss_that_does_not_fit_is_a_conflict_of_the_plan(recipe, tmp_path, name, kwargs, words):
    term = json.dumps([{"loss": name, "kwargs": kwargs}])
    message = refused("apply", recipe, "--output", tmp_path / "run", f"steps.1.distill.losses.torchdistill={term}")
    assert "steps[1].distill" in message
    for word in words:
        assert word in message
    assert not (tmp_path / "run").exists()


def test_torchdistill_losses_in_a_recipe(recipe, tmp_path):
    terms = json.dumps([{"loss": name, "kwargs": TORCHDISTILL[name]} for name in ("SPKDLoss", "ATLoss")])
    overrides = [f"steps.1.distill.losses.torchdistill={terms}", "steps.1.distill.epochs=1"]
    out = done("apply", recipe, "--output", tmp_path / "run", *overrides)
    assert "torchdistill/SPKDLoss" in out
    for line in metrics(tmp_path / "run", phase="1_distill", kind="train"):
        assert line["torchdistill/SPKDLoss"] > 0
        assert line["torchdistill/ATLoss"] > 0


# --- backbones without a classifier, and images without labels


@pytest.fixture(scope="module")
def unlabeled(tmp_path_factory):
    """Overrides for a headless backbone on a folder of images, and where the run goes."""
    root = tmp_path_factory.mktemp("unlabeled")
    generator = np.random.default_rng(0)
    (root / "images").mkdir()
    for i in range(40):
        ramp = np.add.outer(np.arange(8) * generator.integers(0, 30), np.arange(8) * generator.integers(0, 30))
        Image.fromarray((ramp % 256).astype(np.uint8)).save(root / "images" / f"{i:02}.png")
    torch.manual_seed(0)
    backbone = timm.create_model("vit_tiny_patch16_224", **VIT, num_classes=0, global_pool="avg")
    with torch.no_grad():  # fresh blocks do next to nothing, so that sharing them would cost nothing
        for parameter in backbone.parameters():
            parameter.add_(0.3 * torch.randn_like(parameter))
    artifact.save(backbone, root / "backbone")
    return [
        f"teacher.weights={root / 'backbone'}",
        "teacher.finetune=null",
        "teacher.num_classes=0",
        "teacher.args.global_pool=avg",
        f"data={{name: images, root: {root / 'images'}, batch_size: 8, val_fraction: 0.2}}",
    ]


FEATURES = (
    "steps.1.distill={epochs: 8, lr: 3e-3, log_every: 1, losses: {prediction: {weight: 0}, feature: {weight: 1}}}"
)


def test_a_headless_backbone_is_distilled_by_its_features(recipe, unlabeled, tmp_path):
    out = done("apply", recipe, "--output", tmp_path / "run", *unlabeled, FEATURES, "steps.1.distill.mixup=0.1")
    assert "cosine of the outputs" in out
    before = metrics(tmp_path / "run", phase="0_multiplex", kind="evaluate")[0]
    after = metrics(tmp_path / "run", phase="1_distill", kind="evaluate")[-1]
    assert before["images"] == after["images"] == 8
    assert before["cosine"] < after["cosine"] <= 1
    assert 1 - after["cosine"] < 0.7 * (1 - before["cosine"])
    lines = metrics(tmp_path / "run", phase="1_distill")
    assert lines[0]["feature"] > lines[-2]["feature"]
    assert not any("top1" in line or "teacher_top1" in line or "agreement" in line for line in lines)
    student = json.loads((tmp_path / "run" / "results.json").read_text())["student"]
    assert student["top1"] is None
    assert student["cosine"] == pytest.approx(after["cosine"], abs=1e-5)


def test_features_have_no_accuracy(tmp_path):
    # a label could be read as an index into them
    model = tiny_vit(num_classes=0)
    term = Term("square", 1.0, lambda batch: (batch.student_logits.square().mean(), {}))
    heard = fit(model, Finetune(epochs=1, log_every=1), random_batches(1, 4), tmp_path, terms=[term])
    assert heard.of("train")[0].keys() >= {"square", "lr"}
    assert not {"top1", "top5"} & heard.of("train")[0].keys()


def test_the_prediction_of_a_headless_backbone_is_refused(recipe, unlabeled, tmp_path):
    message = refused("apply", recipe, "--output", tmp_path / "run", *unlabeled, "steps.1=distill")
    for words in ("losses.prediction", "no classifier", "losses.prediction.weight=0", "losses.feature.weight=1"):
        assert words in message
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("step", "name"),
    [
        ("steps.1=finetune", "steps[1].finetune"),
        ("steps.1.distill.losses={labels: {weight: 1}}", "steps[1].distill"),
    ],
)
def test_learning_from_labels_that_are_not_there_is_refused(recipe, unlabeled, tmp_path, step, name):
    with_head = [o for o in unlabeled if "num_classes" not in o and "finetune" not in o]
    overrides = [*with_head, "teacher.finetune=null", "teacher.num_classes=4", step]
    message = refused("apply", recipe, "--output", tmp_path / "run", *overrides)
    for words in (name, "labels", "none"):
        assert words in message
    assert not (tmp_path / "run").exists()


def test_a_teacher_cannot_be_trained_without_labels(recipe, unlabeled, tmp_path):
    data = next(o for o in unlabeled if o.startswith("data="))
    message = refused("apply", recipe, "--output", tmp_path / "run", data, "teacher.num_classes=4")
    assert "teacher.finetune" in message
    assert "labels" in message
    assert not (tmp_path / "run").exists()


# --- labels and classes


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        (["teacher.num_classes=5"], ["10 classes", "teacher's head", "5 apart", "teacher.num_classes=10"]),
        (
            ["student.args={num_classes: 3}", "student.weights=random", "steps=[finetune]"],
            ["10 classes", "student's head", "3 apart", "student.args.num_classes"],
        ),
    ],
)
def test_labels_beyond_the_head_are_refused_before_anything_is_trained(recipe, tmp_path, overrides, words):
    message = refused("apply", recipe, "--output", tmp_path / "run", *overrides)
    for word in words:
        assert word in message
    assert not (tmp_path / "run").exists()


@pytest.fixture(scope="module")
def three_classes(tmp_path_factory):
    """A folder data set whose number of classes only its folders tell."""
    root = tmp_path_factory.mktemp("classes")
    generator = np.random.default_rng(0)
    for split, count in (("train", 8), ("val", 2)):
        for label in ("ant", "bee", "cat"):
            (root / split / label).mkdir(parents=True)
            for i in range(count):
                pixels = generator.integers(0, 256, (8, 8), dtype=np.uint8)
                Image.fromarray(pixels).save(root / split / label / f"{i}.png")
    return f"data={{name: folder, root: {root}, batch_size: 8}}"


def test_a_head_is_sized_by_the_opened_data_and_the_figures_follow(recipe, three_classes, tmp_path):
    folder = tmp_path / "run"
    done("apply", recipe, "--output", folder, three_classes, "steps.1.distill.epochs=1")
    plan, results = (json.loads((folder / name).read_text()) for name in ("plan.json", "results.json"))
    for side in ("teacher", "student"):
        model = artifact.load(folder / side)
        assert model.num_classes == 3
        assert results[side]["parameters"] == plan[side]["parameters"] == ties.count_parameters(model)


# --- evaluation


class Table(nn.Module):
    """A model that looks its logits up: image i is filled with the number i."""

    def __init__(self, logits):
        super().__init__()
        self.num_classes = logits.shape[1]
        self.logits = nn.Parameter(logits)

    def forward(self, images):
        return self.logits[images[:, 0, 0, 0].long()]


def numbered(count, targets, size=2):
    images = torch.arange(float(count))[:, None, None, None].expand(count, 1, 2, 2)
    return [(images[i : i + size], torch.tensor(targets[i : i + size])) for i in range(0, count, size)]


def test_evaluation_counts_what_is_right():
    logits = torch.eye(7)[[0, 1, 2, 3, 4]] - 0.01 * torch.arange(7)
    model = Table(logits).train()
    targets = [0, 1, 3, 6, -1]  # right, right, among five, wrong, a broken image
    result = evaluate(model, numbered(5, targets), CPU)
    assert result["images"] == 4
    assert result["top1"] == 50
    assert result["top5"] == 75
    assert result["loss"] == pytest.approx(F.cross_entropy(logits[:4], torch.tensor(targets[:4])).item(), rel=1e-5)
    assert "agreement" not in result
    assert model.training


def test_evaluation_compares_with_the_teacher():
    ours, theirs = torch.tensor([[1.0, 0], [0, 1], [3, 1]]), torch.tensor([[2.0, 0], [1, 0], [1, 3]])
    data = numbered(3, [-1, -1, -2])  # -2: the stand-in of a broken image
    result = evaluate(Table(ours), data, CPU, teacher=Table(theirs), labelled=False)
    assert result["images"] == 2
    assert result["top1"] is result["top5"] is result["loss"] is None
    assert result["agreement"] == 50
    assert result["cosine"] == pytest.approx(0.5)
    doubled = evaluate(
        Table(ours), data, CPU, teacher=Table(ours), teacher_input=lambda images: 0 * images, labelled=False
    )
    assert doubled["agreement"] == 50  # the teacher saw image 0 twice


def test_outputs_of_different_widths_are_not_compared():
    result = evaluate(Table(torch.eye(3)), numbered(3, [0, 1, 0]), CPU, teacher=Table(torch.eye(3, 4)[[0, 1, 0]]))
    assert result["top1"] == pytest.approx(200 / 3)
    assert result["teacher_top1"] == 100
    assert result["teacher_loss"] < result["loss"]
    assert result["agreement"] is result["cosine"] is None


def test_evaluation_refuses_what_it_cannot_count():
    with pytest.raises(UserError, match=r"label 5.*3 classes"):
        evaluate(Table(torch.eye(3)), numbered(3, [0, 5, 2]), CPU)
    with pytest.raises(UserError, match="no readable image"):
        evaluate(Table(torch.eye(3)), numbered(3, [-1, -1, -1]), CPU)


def test_resolved_recipes_are_plain_yaml(finished):
    content = yaml.safe_load((finished / "resolved.yaml").read_text())
    assert content["seed"] == 3
    assert content["steps"][1]["distill"]["losses"]["labels"]["weight"] == 0.25
