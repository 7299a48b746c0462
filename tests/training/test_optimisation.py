"""Optimisers, schedules and drop path as a phase's options ask for them."""

from __future__ import annotations

import random

import numpy as np
import pytest
import timm.optim
import torch
from helpers.models import build
from helpers.training import fit, random_batches, tiny_vit
from timm.layers import DropPath
from torch import nn

from compressvit.errors import UserError
from compressvit.model.backbone import describe
from compressvit.training import optimisation
from compressvit.training.phases.finetune import Finetune
from compressvit.transforms import Adapters, LoRA, LowRank
from compressvit.transforms.applying import compress

CPU = torch.device("cpu")


@pytest.mark.parametrize(
    ("device", "optimizer", "fused"),
    [("cuda", "adamw", True), ("cuda", "sgd", True), ("cuda", "lamb", False), ("cpu", "adamw", False)],
)
def test_fused_kernels_only_where_they_are(monkeypatch, device, optimizer, fused):
    seen = {}
    monkeypatch.setattr(timm.optim, "create_optimizer_v2", lambda groups, **options: seen.update(options))
    optimisation.build_optimizer(build("vit"), Finetune(epochs=1, optimizer=optimizer), 8, torch.device(device))
    assert seen.get("fused", False) is fused


def test_the_options_reach_the_optimiser():
    spec = Finetune(epochs=1, optimizer="adamw", lr=0.01, lr_reference_batch=64, betas=(0.8, 0.7), weight_decay=0.3)
    optimizer = optimisation.build_optimizer(build("vit"), spec, 16, CPU)
    assert {g["lr"] for g in optimizer.param_groups} == {0.01 * 16 / 64}
    assert {g["betas"] for g in optimizer.param_groups} == {(0.8, 0.7)}
    momentum = optimisation.build_optimizer(
        build("vit"), Finetune(epochs=1, optimizer="momentum", momentum=0.6), 16, CPU
    )
    assert {g["momentum"] for g in momentum.param_groups} == {0.6}


def test_weights_decay_and_nothing_else():
    model = build("vit")
    optimizer = optimisation.build_optimizer(model, Finetune(epochs=1, weight_decay=0.3), 8, CPU)
    decayed = {id(p): g["weight_decay"] for g in optimizer.param_groups for p in g["params"]}
    for name, parameter in model.named_parameters():
        plain = parameter.ndim == 1 or name in ("cls_token", "pos_embed")
        assert decayed[id(parameter)] == (0.0 if plain else 0.3), name


def test_only_what_requires_a_gradient_is_optimised_and_once():
    model = compress(build("vit"), [LoRA(rank=2)])
    optimizer = optimisation.build_optimizer(model, Finetune(epochs=1), 8, CPU)
    chosen = [id(p) for g in optimizer.param_groups for p in g["params"]]
    assert sorted(chosen) == sorted(id(p) for p in model.parameters() if p.requires_grad)


@pytest.mark.parametrize(
    ("name", "steps"),
    [
        ("vit", []),
        ("swin", []),
        ("vit", [LowRank(rank=4, metric="weights", sequential=False)]),
        ("vit", [Adapters(width=2)]),
    ],
)
def test_rates_fall_from_layer_to_layer(name, steps):
    """Layers counted from the head, as in the fine-tuning of BEiT: blocks one by one, what transforms put into them too."""
    model = compress(build(name), steps)
    spec = Finetune(epochs=1, lr=1.0, layer_decay=0.5, weight_decay=0.3)
    optimizer = optimisation.build_optimizer(model, spec, 8, CPU)
    optimisation.build_schedule(optimizer, spec, 4).step_update(0)
    rate = {id(p): g["lr"] for g in optimizer.param_groups for p in g["params"]}
    decay = {id(p): g["weight_decay"] for g in optimizer.param_groups for p in g["params"]}
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    assert rate.keys() == {id(p) for p in trained.values()}
    blocks = describe(model).blocks
    for path, parameter in trained.items():
        index = next((block.index for block in blocks if block.holds(path)), None)
        if path.startswith("head."):
            assert rate[id(parameter)] == 1.0
        elif index is not None:  # behind the blocks come the norm and the head
            assert rate[id(parameter)] == pytest.approx(0.5 ** (len(blocks) - index)), path
        elif path.startswith("patch_embed."):
            assert rate[id(parameter)] == pytest.approx(0.5 ** (len(blocks) + 1))
        assert decay[id(parameter)] in (0.0, 0.3)
    assert len(trained) > 15


def test_the_rate_that_is_logged_is_that_of_the_head(tmp_path):
    model = tiny_vit()
    heard = fit(model, Finetune(epochs=1, lr=1e-3, layer_decay=0.5, log_every=1), random_batches(2, 4), tmp_path)
    plain = fit(tiny_vit(), Finetune(epochs=1, lr=1e-3, log_every=1), random_batches(2, 4), tmp_path / "plain")
    rates = [[line["lr"] for line in each.of("train")] for each in (heard, plain)]
    assert rates[0] == pytest.approx(rates[1])


def test_a_model_that_does_not_tell_its_layers_has_no_rates_for_them():
    model = nn.Sequential(nn.Flatten(), nn.Linear(12, 2))
    with pytest.raises(
        UserError, match=r"^layer_decay=0.7 needs a model that tells its layers .* and Sequential does not"
    ):
        optimisation.build_optimizer(model, Finetune(epochs=1, layer_decay=0.7), 8, CPU)


def rates(spec: Finetune, steps_per_epoch: int) -> list[float]:
    """Of every optimiser step of the phase."""
    optimizer = torch.optim.SGD(nn.Linear(1, 1).parameters(), lr=spec.lr)
    schedule = optimisation.build_schedule(optimizer, spec, steps_per_epoch)
    found = []
    for step in range(spec.epochs * steps_per_epoch):
        schedule.step_update(step)
        found.append(optimizer.param_groups[0]["lr"])
    return found


def test_the_cosine_is_warmed_up_and_ends_at_its_least():
    spec = Finetune(epochs=10, lr=1.0, warmup_epochs=2, warmup_lr=0.1, min_lr=0.05)
    found = rates(spec, 5)
    assert found[:10] == pytest.approx([0.1 + 0.9 * i / 10 for i in range(10)])
    cosine = [0.05 + 0.95 * (1 + np.cos(np.pi * i / 50)) / 2 for i in range(10, 50)]
    assert found[10:] == pytest.approx(cosine)


def test_poly_falls_with_a_power_of_what_is_left():
    found = rates(Finetune(epochs=4, lr=1.0, schedule="poly", min_lr=0.1), 5)
    assert found == pytest.approx([0.1 + 0.9 * (1 - i / 20) ** 0.9 for i in range(20)])
    straight = rates(Finetune(epochs=4, lr=1.0, schedule="poly", power=1.0), 5)
    assert straight == pytest.approx([1 - i / 20 for i in range(20)])


def test_steps_and_a_constant_rate():
    steps = rates(Finetune(epochs=6, lr=1.0, schedule="step", decay_epochs=2, warmup_epochs=0), 3)
    assert steps == pytest.approx([1.0] * 6 + [0.1] * 6 + [0.01] * 6)
    assert rates(Finetune(epochs=6, lr=1.0, schedule="constant", warmup_epochs=0), 3) == pytest.approx([1.0] * 18)


def test_a_rate_falls_at_the_epochs_that_are_named():
    spec = {"epochs": 12, "lr": 1.0, "schedule": "step", "milestones": (8, 11)}
    assert rates(Finetune(**spec), 3) == pytest.approx([1.0] * 24 + [0.1] * 9 + [0.01] * 3)
    warm = rates(Finetune(**spec, gamma=0.5, warmup_epochs=1, warmup_lr=0.1), 3)
    assert warm == pytest.approx([0.1, 0.4, 0.7] + [1.0] * 21 + [0.5] * 9 + [0.25] * 3), "epochs of the phase"
    assert rates(Finetune(**{**spec, "epochs": 2, "milestones": (0.5,)}), 4) == pytest.approx([1.0] * 2 + [0.1] * 6)
    halves = rates(Finetune(epochs=4, lr=1.0, schedule="step", decay_epochs=2, gamma=0.5), 3)
    assert halves == pytest.approx([1.0] * 6 + [0.5] * 6)


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ({"milestones": (2, 3)}, "milestones are for schedule: step, and this is schedule: cosine; change one of them"),
        (
            {"schedule": "step", "milestones": (3, 2)},
            r"milestones=\[3\.0, 2\.0\] must rise, after epoch 0 and before the 5 epochs end",
        ),
        ({"schedule": "step", "milestones": (0, 2)}, "must rise, after epoch 0"),
        ({"schedule": "step", "milestones": (2, 5)}, "before the 5 epochs end"),
        ({"schedule": "step", "milestones": ()}, "at least 1 item"),
        ({"schedule": "step", "gamma": 1.5}, "less than 1"),
    ],
)
def test_milestones_that_make_no_sense_are_refused(given, words):
    with pytest.raises(UserError, match=words):
        Finetune(epochs=5, **given)


def test_drop_path_rises_linearly_to_its_rate():
    model = build("swin")
    optimisation.set_drop_path(model, 0.25)
    blocks = [model.get_submodule(info.path) for info in describe(model).blocks]
    for name in ("drop_path1", "drop_path2"):
        found = [getattr(block, name) for block in blocks]
        assert isinstance(found[0], nn.Identity)
        assert all(isinstance(module, DropPath) for module in found[1:])
        assert [m.drop_prob for m in found[1:]] == pytest.approx([0.25 * i / 5 for i in range(1, 6)])
    optimisation.set_drop_path(model, None)
    assert blocks[-1].drop_path1.drop_prob == 0.25
    optimisation.set_drop_path(model, 0.0)
    assert all(isinstance(block.drop_path2, nn.Identity) for block in blocks)


def test_randomness_goes_on_where_it_was():
    def draw() -> tuple[float, ...]:
        return random.random(), random.gauss(0, 1), np.random.rand(), np.random.randn(), torch.rand(()).item()

    optimisation.seed_everything(3, 1, 4)
    random.gauss(0, 1), np.random.randn()  # a second normal number waits in both
    state = optimisation.random_state()
    first = draw()
    assert draw() != first
    optimisation.restore_random_state(state)
    assert draw() == first
    seeds = [(3, 1, 4), (3, 1, 5), (3, 2, 4), (4, 1, 4), (3, 1)]
    drawn = set()
    for seed in seeds:
        optimisation.seed_everything(*seed)
        drawn |= {draw()}
    assert len(drawn) == len(seeds)


@pytest.mark.parametrize(("batches", "accumulate", "steps"), [(10, 1, 10), (10, 5, 2), (11, 5, 3), (4, 5, 1)])
def test_the_last_step_may_add_up_fewer_batches(batches, accumulate, steps):
    assert optimisation.steps_per_epoch(batches, accumulate) == steps
