"""The arithmetic of a training step: accumulation, clipping, schedules, averaging, precision, mixup."""

from __future__ import annotations

import contextlib
import io
import math

import numpy as np
import pytest
import torch
from helpers.images import side
from helpers.models import build
from helpers.training import CPU, Heard, distance, fit, largest_difference, random_batches, tiny_vit, values
from rich.console import Console
from timm.layers import DropPath

from compressvit.errors import UserError
from compressvit.files import load_checkpoint
from compressvit.log import RunLog
from compressvit.model.backbone import describe
from compressvit.training import optimisation as opt
from compressvit.training.loop import Phase, train
from compressvit.training.phases.finetune import Finetune
from compressvit.training.terms import Term, labels_term
from compressvit.transforms.applying import compress
from compressvit.transforms.multiplex import Multiplex

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
        ({"optimizer": "adahessian"}, "'adahessian' needs second derivatives"),
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


@pytest.mark.parametrize("backbone", ["vit", "swin", "convnext"])
def test_stochastic_depth_reaches_every_block_of_every_family(backbone):
    model = build(backbone)
    opt.set_drop_path(model, 0.2)
    last = model.get_submodule(describe(model).blocks[-1].path)
    assert [m.drop_prob for m in last.modules() if isinstance(m, DropPath)] == pytest.approx(
        [0.2] * (1 + (backbone != "convnext"))
    )


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
    for line, (_, targets) in zip(heard.of("train"), seen, strict=True):
        assert 0 <= line["top1"] <= line["top5"] == 100  # of 4 classes
        assert line["top1"] * len(targets) / 100 == pytest.approx(round(line["top1"] * len(targets) / 100))


def test_a_mixed_image_counts_as_the_class_it_has_more_of(tmp_path):
    def certain_of_the_larger_share(batch):
        batch.student_logits.data.copy_(batch.targets)
        return labels_term(1.0, 0.0).function(batch)

    spec = Finetune(epochs=1, mixup=0.8, log_every=1)
    terms = [Term("labels", 1.0, certain_of_the_larger_share)]
    heard = fit(tiny_vit(), spec, random_batches(4, 6), tmp_path, terms=terms)
    assert [line["top1"] for line in heard.of("train")] == [100.0] * 4


def test_mixup_leaves_a_batch_of_one_alone_and_skips_images_without_a_label(tmp_path):
    seen = []

    def look(batch):
        seen.append(batch.targets)
        return labels_term(1.0, 0.0).function(batch)

    (images, targets), (single, _) = random_batches(1, 6)[0], random_batches(1, 1)[0]
    targets[:3] = torch.tensor([-1, 2, -1])
    batches = [(images, targets), (single, torch.tensor([3])), (images, torch.full((6,), -1))]
    spec = Finetune(epochs=1, mixup=0.8, log_every=1)
    heard = fit(tiny_vit(), spec, batches, tmp_path, terms=[Term("labels", 1.0, look)], size=6)
    assert [tuple(t.shape) for t in seen] == [(4, 4), (1,), (6,)]
    assert (seen[2] == -1).all()  # no label at all: images are mixed all the same, and nobody calls them class 0
    lines = heard.of("train")
    assert ["top1" in line for line in lines] == [True, True, False]
    assert lines[2]["loss"] == 0
    assert set(seen[0].nonzero()[:, 1].tolist()) <= set(targets[targets >= 0].tolist())


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


def test_the_bar_shows_every_term_the_accuracies_and_the_gradient(tmp_path):
    shown = []

    class Watched(Heard):
        @contextlib.contextmanager
        def progress(self, description, total, completed=0):
            yield shown.append

    torch.manual_seed(0)
    teacher = tiny_vit(seed=3).eval()
    terms = [labels_term(0.5, 0.0), Term("other", 2.0, lambda batch: (batch.student_logits.square().mean(), {}))]
    heard = Watched()
    train(
        side(tiny_vit()),
        Finetune(epochs=1, log_every=1),
        Phase("phase", 1, 0, tmp_path / "phase.pt"),
        terms,
        random_batches(2, 6),
        batch_size=6,
        device=CPU,
        log=heard,
        evaluate=lambda model: {},
        teacher=side(teacher),
    )
    heard.close()
    assert len(shown) == 2
    for text, line in zip(shown, heard.of("train"), strict=True):
        for word in ("loss", "labels", "other", "top-1", "top-5", "teacher's top-1", "gradient", "lr"):
            assert word in text
        assert f"other {line['other']:.4g}" in text
        assert f"top-1 {line['top1']:.1f}%" in text


def test_the_bar_is_drawn_with_its_numbers():
    screen = io.StringIO()
    log = RunLog(None, Console(file=screen, force_terminal=True, width=100))
    with log.progress("1_distill", 3) as advance:
        advance("loss 1.5")
        advance("loss 0.5  top-1 90.0%")
    log.close()
    for words in ("1_distill", "2/3", "loss 0.5  top-1 90.0%"):
        assert words in screen.getvalue()
