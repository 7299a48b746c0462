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
from helpers.training import fit, random_batches, tiny_vit
from rich.console import Console

import compressvit
from compressvit import processes
from compressvit.data.input import Side, input_config
from compressvit.data.loaders import eval_loader, train_loader
from compressvit.data.opening import open_data
from compressvit.data.spec import Data
from compressvit.files import load_checkpoint
from compressvit.fitting.choices import Choices
from compressvit.log import RunLog
from compressvit.model import stored
from compressvit.model.weights import build
from compressvit.rows import read_metrics
from compressvit.runs.evaluate import Scorer
from compressvit.tasks.base import find_task
from compressvit.training.phases.finetune import Finetune
from compressvit.training.terms import Term, labels_term

CPU = torch.device("cpu")
SWIN = {"embed_dim": 8, "depths": (1, 1, 1, 1), "num_heads": (2, 2, 2, 2), "window_size": 2}
REGIONS = {
    "backbone": "swin_tiny_patch4_window7_224", "backbone_args": SWIN, "img_size": 64, "num_classes": 3, "channels": 16,
    "representation": 32,
}  # fmt: skip


# ------------------------------------------------------------------------------------------------------------------ training


def trained(spec, batches, folder, *, double):
    """The weights after training on this process's part of every batch, and what was logged."""
    model = tiny_vit()
    with processes.joined():
        world, rank = processes.count(), processes.rank()
        mine = [(images[rank::world], targets[rank::world]) for images, targets in batches]
        if double:
            model, mine = model.double(), [(images.double(), targets) for images, targets in mine]
        heard = fit(model, spec, mine, folder)
    return {name: value.clone() for name, value in model.state_dict().items()}, heard.of("epoch")


CASES = {  # of 20 steps: how much a weight may differ, relative to the largest of its tensor; measured 2e-15, 4e-15 and 3e-16
    "plain": ({}, 10, 1e-12),
    "accumulated": ({"accumulate": 2}, 20, 1e-12),
    "averaged": ({"ema": 0.9, "clip_grad": 0.1}, 10, 1e-12),
}


@pytest.mark.wide_unless(lambda case: case != "averaged")
@pytest.mark.parametrize("case", CASES)
def test_two_processes_train_as_one_with_twice_their_batch(case, tmp_path):
    options, batches, most = CASES[case]
    spec = Finetune(epochs=2, lr=0.1, optimizer="sgd", momentum=0.9, weight_decay=0.01, log_every=5, **options)
    data = random_batches(batches, 8)
    alone, told = trained(spec, data, tmp_path / "one", double=True)
    both = together(2, lambda: trained(spec, data, tmp_path / "two", double=True))
    assert any((alone[name] != tiny_vit().double().state_dict()[name]).any() for name in alone)
    for weights, _ in both:
        for name, value in alone.items():
            assert (weights[name] - value).abs().max() <= most * value.abs().max(), name
    for mine, theirs in zip(told, both[0][1], strict=True):
        assert theirs["loss"] == pytest.approx(mine["loss"], rel=1e-6)  # computed in float32; measured 4e-8


def test_a_loss_that_leaves_parameters_out_is_divided(tmp_path):
    """A model whose head no loss reads, in some of the steps of an accumulation."""
    spec = Finetune(epochs=1, lr=0.1, optimizer="sgd", accumulate=2)

    def headless():
        def second_block(batch):
            return batch.student_taps["blocks.1"]["output"].square().mean(), {}

        model = tiny_vit()
        with processes.joined():
            term = Term("size", 1.0, second_block, (("blocks.1", "output"),))
            fit(model, spec, random_batches(4, 8), tmp_path / str(processes.rank()), terms=[term])
        return model.state_dict()

    one, other = together(2, headless)
    before = tiny_vit().state_dict()
    assert all(torch.equal(one[name], other[name]) for name in one)
    assert torch.equal(one["head.weight"], before["head.weight"])
    assert not torch.equal(one["blocks.0.mlp.fc1.weight"], before["blocks.0.mlp.fc1.weight"])


def test_batches_without_labels_in_one_process(tmp_path):
    def unlabelled():
        with processes.joined():
            world, rank = processes.count(), processes.rank()
            mine = [(images[rank::world], targets[rank::world].clone()) for images, targets in random_batches(4, 8)]
            if rank:
                mine[1][1].fill_(-1)
            heard = fit(tiny_vit(), Finetune(epochs=1, lr=0.1, optimizer="sgd", log_every=1), mine, tmp_path)
            return [line.get("top1") for line in heard.of("train")]

    one, other = together(2, unlabelled)
    assert one == other
    assert all(value is not None for value in one)


class Normed(torch.nn.Module):
    """A batch norm of tokens."""

    def __init__(self):
        super().__init__()
        self.bn = torch.nn.BatchNorm1d(16)

    def forward(self, x):
        return self.bn(x.transpose(1, 2)).transpose(1, 2)


@pytest.mark.parametrize("ema", [None, 0.9])
def test_statistics_of_batch_norms_are_the_leaders_in_every_process(ema, tmp_path):
    seen = []

    def evaluate(model):
        seen.append(model.patch_embed.norm.bn.running_mean.clone())
        return {}

    def statistics():
        model = tiny_vit()
        model.patch_embed.norm = Normed()
        with processes.joined():
            world, rank = processes.count(), processes.rank()
            mine = [(images[rank::world], targets[rank::world]) for images, targets in random_batches(4, 8)]
            spec = Finetune(epochs=2, lr=0.1, optimizer="sgd", ema=ema)
            fit(model, spec, mine, tmp_path / str(ema), evaluate=evaluate)
        return [*seen, model.patch_embed.norm.bn.running_mean]

    one, other = together(2, statistics)
    assert len(one) == 3
    assert all(torch.equal(mine, theirs) for mine, theirs in zip(one, other, strict=True))
    assert not torch.equal(one[0], one[1])


def test_a_detector_that_has_no_losses_in_eval_mode(tmp_path):
    task = find_task("detection")

    def detector():
        torch.manual_seed(0)
        model = build("faster_rcnn", **REGIONS)
        target = {
            "boxes": torch.tensor([[0.1, 0.1, 0.5, 0.5]]),
            "labels": torch.tensor([1]),
            "crowd": torch.tensor([False]),
        }
        batches = [(torch.randn(1, 3, 64, 64), [target]) for _ in range(2)]
        with processes.joined():
            spec = Finetune(epochs=1, lr=0.001, optimizer="sgd")
            fit(model, spec, batches, tmp_path / "run", terms=[labels_term(1.0, 0.0, task)], task=task)
        return [parameter.detach() for parameter in model.parameters()]

    one, other = together(2, detector)
    assert all(torch.equal(mine, theirs) for mine, theirs in zip(one, other, strict=True))


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
    "calibration: {images: 16}\ndiagnostics: [cka, gradients]\nsteps:\n"
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


# --------------------------------------------------------------------------------------------------------------------- parts


def test_batches_of_all_together_are_those_of_one():
    data = Data(name="digits", batch_size=10, limit_train=45, limit_val=23)
    half = data.model_copy(update={"batch_size": 5})

    def batches(data):
        with processes.joined():
            torch.manual_seed(0)
            datasets = open_data(data)
            config = input_config(tiny_vit(), data)
            train = [set(map(bytes, images.numpy())) for images, _ in train_loader(datasets, data, config, CPU)]
            divided = processes.count() > 1
            held_out = [len(images) for images, _ in eval_loader(datasets, data, config, CPU, distributed=divided)]
            return train, held_out

    whole, counts = batches(data)
    (one, first), (two, second) = together(2, batches, half)
    assert len(whole) == len(one) == len(two) == 4
    assert all(a | b == both and not a & b for both, a, b in zip(whole, one, two, strict=True))
    assert (counts, first, second) == ([10, 10, 3], [5, 5, 3], [5, 5])


def test_what_the_leader_does_alone_reaches_all():
    def calls():
        with processes.joined():
            seen = []
            value = processes.led(lambda: seen.append(processes.count()) or {"of": processes.place()})
            mine = processes.led_for(lambda: "made", "given")
            firsts = processes.first(lambda: processes.count())
            with pytest.raises(ValueError if processes.leads() else processes.ToldElsewhere):
                processes.led(lambda: [].index(0))
            with pytest.raises(KeyboardInterrupt) as stop:
                processes.led(lambda: os.kill(os.getpid(), signal.SIGINT) or signal.sigwait([]))
            return seen, value, mine, firsts, stop.value.args, processes.gathered(processes.rank())

    one, two = together(2, calls)
    assert one == ([1], {"of": 0}, "made", 1, (), [0, 1])
    assert two == ([], {"of": 0}, "given", 1, (signal.SIGINT,), [0, 1])


def test_sums_and_signals_are_of_all():
    def calls():
        with processes.joined():
            rank = processes.rank()
            true = torch.tensor(rank != 1)
            buffer = torch.tensor([float(rank)])
            processes.alike([buffer])
            rows = [{"loss": 2.0 * rank}, {"loss": 1.0, **({"top1": 50.0} if rank == 1 else {})}]
            return processes.means(rows), processes.any_of(rank), bool(processes.everywhere(true)), buffer.item()

    # a value that only some have, e.g. the accuracy where others' batches have no label, is the mean of those
    assert together(3, calls) == [([{"loss": 2.0}, {"loss": 1.0, "top1": 50.0}], 2, False, 0.0)] * 3


@pytest.mark.parametrize(
    ("set_", "lacking"), [({"WORLD_SIZE": "2"}, "RANK, MASTER_ADDR, MASTER_PORT"), ({"WORLD_SIZE": "two"}, "no number")]
)
def test_a_launcher_that_tells_too_little(set_, lacking, monkeypatch, tmp_path):
    for name, value in set_.items():
        monkeypatch.setenv(name, value)
    code, _, err = run("apply", "quickstart", "--output", tmp_path / "run")
    assert code == 2
    assert lacking in err
    assert not (tmp_path / "run").exists()
