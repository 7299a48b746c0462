"""Training in several processes, which is that of one with batches of all of them."""

from __future__ import annotations

import os
import signal

import pytest
import torch
from helpers.together import together
from helpers.training import Normed, fit, random_batches, tiny_vit

from compressvit import processes
from compressvit.model.weights import build
from compressvit.tasks.base import find_task
from compressvit.training.loop import Interrupted
from compressvit.training.phases.finetune import Finetune
from compressvit.training.terms import Term, labels_term

CPU = torch.device("cpu")
SWIN = {"embed_dim": 8, "depths": (1, 1, 1, 1), "num_heads": (2, 2, 2, 2), "window_size": 2}
REGIONS = {
    "backbone": "swin_tiny_patch4_window7_224", "backbone_args": SWIN, "img_size": 64, "num_classes": 3, "channels": 16,
    "representation": 32,
}  # fmt: skip


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


@pytest.mark.parametrize("others", [0, signal.SIGUSR1])
def test_a_signal_that_comes_while_processes_agree_is_not_lost(others, tmp_path, monkeypatch):
    """It is taken up in the next step; before it, all go on or stop as agreed."""
    asked = []

    def agreed(value):
        asked.append(value)
        if len(asked) == 2:
            os.kill(os.getpid(), signal.SIGTERM)
            return others
        return value

    monkeypatch.setattr(processes, "any_of", agreed)
    with pytest.raises(Interrupted) as stop:
        fit(tiny_vit(), Finetune(epochs=1), random_batches(6, 4), tmp_path)
    assert stop.value.signum == signal.SIGTERM
    assert asked == ([0, 0] if others else [0, 0, signal.SIGTERM])
