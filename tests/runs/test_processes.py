"""Several processes of a launcher make of a run what one makes of it."""

from __future__ import annotations

import json
import os
import signal
from pathlib import Path

import pytest
import torch
from helpers.runs import QUICK, RECIPE, TINY, done, refused, run, undrawn
from helpers.together import together
from helpers.training import random_batches, tiny_vit
from rich.console import Console

import compressvit
from compressvit import processes
from compressvit.data.input import Side, input_config
from compressvit.data.loaders import train_loader
from compressvit.data.opening import open_data
from compressvit.data.spec import Data
from compressvit.files import load_checkpoint
from compressvit.fitting.choices import Choices
from compressvit.log import RunLog
from compressvit.model import stored
from compressvit.rows import read_metrics
from compressvit.runs.evaluate import Scorer

CPU = torch.device("cpu")


# ---------------------------------------------------------------------------------------------------------------- evaluation


@pytest.mark.parametrize("count", [3])
def test_evaluation_counts_every_image_once_and_is_the_same_to_the_bit(count):
    data = Data(name="digits", limit_train=40, limit_val=53, eval_batch_size=8)

    def scores():
        with processes.joined():
            model, teacher = (tiny_vit(seed=seed, num_classes=10) for seed in (0, 1))
            side, other = (Side(m, input_config(m, data)) for m in (model, teacher))
            seen = []
            scorer = Scorer(open_data(data), data, CPU)
            found = scorer.score(side, other, lambda images, targets, *_: seen.append((images, targets)), search=True)
            return found, [torch.cat(part) for part in zip(*seen, strict=True)] if seen else None

    alone, (images, targets) = scores()
    first, *others = together(count, scores)
    assert first[0] == alone
    assert torch.equal(first[1][0], images)
    assert torch.equal(first[1][1], targets)
    assert [found for found, _ in others] == [alone] * (count - 1)
    assert all(seen is None for _, seen in others)


# --------------------------------------------------------------------------------------------------------------- from Python


def test_distill_from_python_takes_the_parts_of_each_process(tmp_path):
    data = random_batches(8, 8)

    def distilled(folder):
        world, rank = processes.launched(), processes.place()
        mine = [(images[rank::world], targets[rank::world]) for images, targets in data]
        student, teacher = tiny_vit(seed=1), tiny_vit(seed=2)
        options = {"epochs": 2, "lr": 0.05, "optimizer": "sgd", "keep": "best"}
        found = compressvit.distill(
            student,
            teacher,
            mine,
            validation=data[:2],
            device="cpu",
            output=folder,
            console=Console(quiet=True),
            **options,
        )
        return found.figures, student.state_dict()

    figures, weights = distilled(tmp_path / "one")
    (first, one), (second, two) = together(2, distilled, tmp_path / "two")
    assert first == second
    assert first["agreement"] == figures["agreement"]
    for name, value in weights.items():
        assert torch.equal(one[name], two[name])
        assert (one[name] - value).abs().max() <= 1e-5 * value.abs().max(), name  # measured 1e-7
    assert files_of(tmp_path / "one") == files_of(tmp_path / "two")


def test_loaders_of_other_lengths_are_refused(tmp_path):
    def refused():
        batches = random_batches(2 + processes.place(), 4)
        with pytest.raises(ValueError) as told:
            compressvit.distill(tiny_vit(), tiny_vit(seed=1), batches, device="cpu")
        return str(told.value)

    assert "train_loader has 2, 3 batches in the 2 processes" in together(2, refused)[0]


# --------------------------------------------------------------------------------------------------------------- a whole run


def command(*words):
    """Exit code, output and errors in each process. The renderer of charts has threads, which a forked process has not."""
    with undrawn():
        return run(*words)


def files_of(folder: Path) -> set[str]:
    return {str(p.relative_to(folder)) for p in folder.rglob("*") if p.is_file() and "tensorboard" not in p.parts}


HALVED = RECIPE.replace("batch_size: 8", "batch_size: 4")
FITTED = TINY.partition("steps:")[0].replace("batch_size: 32", "batch_size: {}") + (
    "calibration: {images: 40}\ndiagnostics: [cka, gradients]\nsteps:\n"
    "  - low_rank: {budget: {parameters: 0.6}}\n  - distill: {epochs: 1}\n  - merge: {}\n"
)
TIMED = TINY.partition("steps:")[0] + (
    "steps:\n  - shrink: {budget: {latency: 0.8}, metric: weights, multiple: 2, batch: 2}\n"
)
PRUNED = TINY.partition("steps:")[0].replace("batch_size: 32", "batch_size: {}") + (
    "steps:\n  - adapters: {width: 8}\n  - prune: {epochs: 1, target: {neurons: 0.5}, score: taylor}\n"
)
RECIPES = {
    "multiplexed": (RECIPE, HALVED),
    "fitted": (FITTED.replace("{}", "32", 1), FITTED.replace("{}", "16", 1)),
    "pruned": (PRUNED.replace("{}", "32", 1), PRUNED.replace("{}", "16", 1)),
}


TRANSFORMED = {
    kind: [f"0_{step}{ending}" for ending in ("/compressvit.json", "/model.safetensors", ".ledger.json")]
    for kind, step in (("multiplexed", "multiplex"), ("fitted", "low_rank"), ("pruned", "adapters"))
}


@pytest.mark.wide_unless(lambda kind: kind == "multiplexed")
@pytest.mark.parametrize("kind", RECIPES)
def test_a_run_of_two_processes_is_that_of_one(kind, tmp_path):
    for name, text in zip(("one", "two"), RECIPES[kind], strict=True):
        (tmp_path / f"{name}.yaml").write_text(text)
    assert run("apply", "--no-report", "--device", "cpu", tmp_path / "one.yaml", "--output", tmp_path / "one")[0] == 0
    words = ("apply", "--no-report", "--device", "cpu", tmp_path / "two.yaml", "--output", tmp_path / "two")
    (code, out, err), (other, nothing, silent) = together(2, command, *words)
    assert code == 0, err
    assert (other, nothing, silent) == (0, "", "")
    assert "in each of 2 processes" in out
    more = {f"checkpoints/{name}" for name in TRANSFORMED[kind]}  # how the others come to the leader's student
    assert files_of(tmp_path / "two") == files_of(tmp_path / "one") | more
    one, two = ([row.model_dump() for row in read_metrics(tmp_path / n / "metrics.jsonl")] for n in ("one", "two"))
    assert [(row["phase"], row["kind"], row["step"]) for row in one] == [
        (r["phase"], r["kind"], r["step"]) for r in two
    ]
    for mine, theirs in zip(one, two, strict=True):
        for key, value in mine.items():
            if key != "time" and isinstance(value, float):  # AdamW; measured 3e-5
                assert theirs[key] == pytest.approx(value, rel=2e-3, abs=1e-5), (mine["phase"], mine["kind"], key)
    assert json.loads((tmp_path / "two" / "environment.json").read_text())["processes"] == 2
    if kind == "fitted":
        alone, shared = (json.loads((tmp_path / n / "diagnostics" / "cka.json").read_text()) for n in ("one", "two"))
        assert [record["row"] for record in shared["records"]] == [record["row"] for record in alone["records"]]
        for mine, theirs in zip(alone["records"], shared["records"], strict=True):
            assert theirs["cka"] == pytest.approx(mine["cka"], abs=1e-3)  # of weights that differ a little; measured


def test_the_leader_alone_measures_and_chooses(tmp_path, monkeypatch):
    """Latencies, which differ from process to process: what they have to be is left to chance, but not that all agree."""
    (tmp_path / "recipe.yaml").write_text(TIMED)
    put = Choices.put

    def told(self, name, value):
        assert processes.leads()
        put(self, name, value)

    monkeypatch.setattr(Choices, "put", told)
    words = ("apply", "--no-report", "--device", "cpu", tmp_path / "recipe.yaml", "--output", tmp_path / "run")
    (code, _, err), (other, *silent) = together(2, command, *words)
    assert code == other
    assert code == 0 or "latency" in err
    assert silent == ["", ""]


# -------------------------------------------------------------------------------------------------------------- how it ends


@pytest.mark.parametrize("words", [[], ["--overwrite"]])
def test_a_restart_takes_up_its_own_run_alone(words, tmp_path, monkeypatch):
    """torchrun starts processes again with the words of the first time; a run of another launch is refused, or deleted, as those say."""
    (tmp_path / "recipe.yaml").write_text(QUICK)
    words = ("apply", "--no-report", tmp_path / "recipe.yaml", "--output", tmp_path / "run", *words)
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "first")
    assert run(*words)[0] == 0
    began = json.loads((tmp_path / "run" / "environment.json").read_text())
    assert began["launch"] == "first"
    monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", "1")
    assert "nothing to do" in done(*words)
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "second")
    if words[-1] == "--overwrite":
        assert "nothing to do" not in done(*words)
    else:
        assert "is not empty" in refused(*words)
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "none")  # one without a name is known by the launcher
    assert processes.launch() == f"none, process {os.getppid()}"


def test_one_device_for_several_processes_is_refused(tmp_path):
    (tmp_path / "recipe.yaml").write_text(TINY)
    words = ("apply", tmp_path / "recipe.yaml", "--output", tmp_path / "run", "--device", "cuda:0")
    (code, _, err), _ = together(2, command, *words)
    assert code == 2
    assert "--device cuda:0 is one device, and there are 2 processes; give --device cuda" in err


def test_what_is_wrong_is_told_once(tmp_path):
    (tmp_path / "recipe.yaml").write_text(TINY)
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "mine.txt").write_text("not to be lost")
    words = ("apply", tmp_path / "recipe.yaml", "--output", tmp_path / "run")
    (code, _, err), (other, *silent) = together(2, command, *words)
    assert (code, other) == (2, 2)
    assert "is not empty" in err
    assert silent == ["", ""]
    (code, _, err), (other, *silent) = together(2, command, "apply", tmp_path / "recipe.yaml", "data.nme=x")
    assert (code, other, silent) == (2, 2, ["", ""])
    assert "did you mean 'name'?" in err


def test_another_number_of_processes_is_refused(tmp_path):
    (tmp_path / "recipe.yaml").write_text(TINY)
    words = ("apply", "--no-report", tmp_path / "recipe.yaml", "--output", tmp_path / "run")
    assert run(*words)[0] == 0
    (tmp_path / "run" / "results.json").unlink()
    (code, _, err), _ = together(2, command, *words, "--resume")
    assert code == 2
    assert "was started with 1 process, and there are 2 now" in err


def test_too_few_images_for_the_processes(tmp_path):
    (tmp_path / "recipe.yaml").write_text(TINY)
    words = ("apply", tmp_path / "recipe.yaml", "data.limit_train=10", "--output", tmp_path / "run")

    def few():
        with processes.joined():
            data = Data(name="digits", limit_train=1, limit_val=1)
            train_loader(open_data(data), data, input_config(tiny_vit(), data), CPU)

    def told():
        with pytest.raises(ValueError, match="1 images to train on are too few for 2 processes"):
            few()
        return words

    assert len(together(2, told)) == 2


def stopped(words, at: int):
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


def test_a_signal_to_one_stops_all_and_the_run_goes_on_from_there(tmp_path):
    (tmp_path / "recipe.yaml").write_text(HALVED)
    words = ("apply", "--no-report", "--device", "cpu", tmp_path / "recipe.yaml")
    together(2, command, *words, "--output", tmp_path / "whole")
    (code, _, err), (other, *silent) = together(2, stopped, (*words, "--output", tmp_path / "run"), 5)
    assert (code, other) == (143, 143), err
    assert "stopped by SIGTERM" in err
    assert silent[1] == ""
    saved = load_checkpoint(max((tmp_path / "run" / "checkpoints").glob("*.pt"), key=os.path.getmtime))
    assert len(saved["random_states"]) == 2
    (code, out, err), _ = together(2, command, *words, "--output", tmp_path / "run", "--resume")
    assert code == 0, err
    assert "resumed at epoch" in out
    one, two = ((tmp_path / name / "student" / stored.TENSORS).read_bytes() for name in ("whole", "run"))
    assert one == two


def test_one_that_has_died_is_told_by_the_others():
    def answers():
        try:
            with processes.joined():
                if processes.rank() == 1:
                    os._exit(0)
                processes.told(processes.gathered(0))
        except ValueError as error:
            return str(error)

    told, nothing = together(2, answers)
    assert nothing is None
    assert "process 0 cannot go on, because another process of the run has ended" in told
