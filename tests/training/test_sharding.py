"""Training in shards (`sharded`), which is that of one process with whole models."""

from __future__ import annotations

import copy
import gc
import os
import signal

import pytest
import torch
from helpers.images import side
from helpers.shards import RELATIONS, SGD, distilled, models, most_apart
from helpers.together import together
from helpers.training import Heard, fit, random_batches, tiny_vit, values

from compressvit import processes
from compressvit.model import ties
from compressvit.training.loop import Interrupted, Trainer
from compressvit.training.pairs import match_layers
from compressvit.training.phases.distill import Distill, _trained_along
from compressvit.training.sharding import divided
from compressvit.training.sharding.refusals import torch_divides

pytestmark = pytest.mark.skipif(not torch_divides(), reason="an older torch")

CASES = {  # of 20 steps; measured 2e-15 in all of them
    "plain": {},
    "multiplexed": {"kind": "multiplexed"},
    "averaged": {"ema": 0.9, "clip_grad": 0.1, "activation_checkpointing": True},
    "accumulated": {"kind": "multiplexed", "accumulate": 2, "epochs": 4},
    "one number": {"kind": "one number", "clip_grad": 0.1},
    "all share": {"kind": "all share"},
}


@pytest.mark.wide_unless(lambda case: case in ("plain", "multiplexed"))
@pytest.mark.parametrize("case", CASES)
def test_two_processes_with_shards_train_as_one_with_whole_models(case, tmp_path):
    data = random_batches(10, 8)
    alone, told = distilled(tmp_path / "one", data, **CASES[case])
    both = together(2, lambda: distilled(tmp_path / "two", data, sharded=True, **CASES[case]))
    before = values(models(CASES[case].get("kind", "plain"))[0])
    assert any((alone[name] != before[name]).any() for name in alone)
    assert most_apart(alone, [weights for weights, _ in both]) <= 1e-12
    for mine, theirs in zip(told, both[0][1], strict=True):
        assert theirs["loss"] == pytest.approx(mine["loss"], rel=1e-12)


@pytest.mark.wide
def test_three_processes_whose_parts_differ(tmp_path):
    """No size of the student is a multiple of 3, and of some tensors two processes have nothing."""
    data, options = random_batches(6, 9), {"kind": "multiplexed", "optimizer": "adamw", "lr": 0.01, "clip_grad": 0.1}
    alone, _ = distilled(tmp_path / "one", data, **options)
    found = together(3, lambda: distilled(tmp_path / "three", data, sharded=True, **options))
    assert most_apart(alone, [weights for weights, _ in found]) <= 1e-9  # AdamW; measured 4e-13


@pytest.mark.wide
def test_losses_that_look_inside_the_last_block_that_they_need(tmp_path):
    """Nothing that a block returns is in the loss, so the backward pass enters blocks in the middle; what is behind is not trained."""
    only = {"prediction": {"weight": 0.0}, "hidden_relation": {"weight": 0.0}, "attention_relation": {"weight": 1.0}}
    data = random_batches(4, 8)
    for layers in ([[0, 0]], [[0, 0], [2, 2]]):
        options = {"losses": only, "layers": layers}
        alone, _ = distilled(tmp_path / f"one{len(layers)}", data, **options)
        folder = tmp_path / f"two{len(layers)}"
        both = together(2, lambda: distilled(folder, data, sharded=True, **options))  # noqa: B023
        before = values(models()[0])
        assert most_apart(alone, [weights for weights, _ in both]) <= 1e-12
        for weights, _ in both:
            assert torch.equal(weights["head.weight"], before["head.weight"])
            assert torch.equal(weights["blocks.3.mlp.fc1.weight"], before["blocks.3.mlp.fc1.weight"])
            assert not torch.equal(weights["blocks.0.attn.qkv.weight"], before["blocks.0.attn.qkv.weight"])


@pytest.mark.wide
def test_what_a_loss_trains_besides(tmp_path):
    """A projection between features of two widths, which works after the student, twice in a pass."""

    def widened(sharded, folder):
        student, teacher = tiny_vit(seed=2).double(), tiny_vit(seed=1, embed_dim=24).double().eval()
        losses = {"prediction": {"weight": 0.0}, "feature": {"weight": 1.0, "form": "mse"}}
        spec = Distill(**SGD, sharded=sharded, losses=losses)
        with processes.joined():
            world, rank = processes.count(), processes.rank()
            mine = [(images[rank::world].double(), targets[rank::world]) for images, targets in random_batches(6, 8)]
            terms = [term for term in spec.terms(student, [], None, teacher) if term.name == "feature"]
            terms[0].module.double()
            with _trained_along(student, terms):
                fit(student, spec, mine, folder, terms=terms, teacher=side(teacher))
            return values(student) | {f"of terms {n}": p.detach() for n, p in terms[0].module.named_parameters()}

    alone = widened(False, tmp_path / "one")
    both = together(2, widened, True, tmp_path / "two")
    assert "of terms weight" in alone
    assert most_apart(alone, both) <= 1e-12


# ---------------------------------------------------------------------------------------------------------------- what is held


def held_bytes():
    """Of all tensors of this process in double precision but batches, each storage once."""
    gc.collect()
    tensors = [t for t in gc.get_objects() if isinstance(t, torch.Tensor) and t.dtype == torch.float64]
    tensors = [divided.local(t) for t in tensors if t.device.type == "cpu"]
    found = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors if t.shape[-2:] != (8, 8)}
    return sum(found.values())


@pytest.mark.wide_unless(lambda kind: kind == "plain")
@pytest.mark.parametrize("kind", ["plain", "multiplexed"])
def test_a_process_holds_half_of_models_and_state(kind, tmp_path, monkeypatch):
    held = []
    close = Trainer.close_epoch

    def watched(trainer):
        close(trainer)
        models = {"student": trainer.model, "average": trainer.average.module, "teacher": trainer.teacher.model}
        parts = {name: [divided.local(p) for p in model.parameters()] for name, model in models.items()}
        parts["state"] = [v for each in trainer.optimizer.state.values() for v in each.values() if v.ndim]
        held.append({name: sum(t.nbytes for t in tensors) for name, tensors in parts.items()})
        held[-1]["all"] = held_bytes()

    monkeypatch.setattr(Trainer, "close_epoch", watched)

    def measured(sharded):
        del held[:]
        before = held_bytes()
        distilled(tmp_path / str(sharded), random_batches(2, 4), kind=kind, sharded=sharded, ema=0.9, optimizer="adamw")
        return [{**row, "all": row["all"] - before} for row in held]

    whole, parts = (together(2, measured, sharded) for sharded in (False, True))
    for of_process, other in zip(whole, parts, strict=True):
        for row, mine in zip(of_process, other, strict=True):
            for name in ("student", "average", "teacher", "state"):
                # a table of positions, (1, N, C), is that of one process
                assert 0.45 * row[name] < mine[name] < 0.55 * row[name], name
            assert mine["all"] < 0.6 * row["all"]


def test_models_are_plain_ones_afterwards(tmp_path):
    def looked_at():
        student, teacher = models("multiplexed")
        before = [form(model) for model in (student, teacher)]
        taught = values(teacher)
        spec = Distill(**SGD, losses=RELATIONS, sharded=True, activation_checkpointing=True)
        with processes.joined():
            terms = spec.terms(student, match_layers(student, teacher, "matched")[0], None, teacher)
            for phase in ("one", "two"):  # a model that was in shards can be in shards
                data = [(images.double(), targets) for images, targets in random_batches(2, 4)]
                fit(student, spec, data, tmp_path / phase, terms=terms, teacher=side(teacher))
        assert [form(model) for model in (student, teacher)] == before
        assert all(torch.equal(taught[name], value) for name, value in values(teacher).items())
        assert not hasattr(student, "unshard")
        copied = copy.deepcopy(student)
        images = torch.randn(2, 1, 8, 8, dtype=torch.float64)
        assert torch.equal(copied(images), student(images))
        return True

    assert together(2, looked_at) == [True, True]


def form(model):
    """Parameters by identity, ties, classes, hooks and attributes."""
    hooks = ("_forward_hooks", "_forward_pre_hooks", "_state_dict_hooks", "_load_state_dict_post_hooks")
    return (
        [(name, id(p), p.shape, p.requires_grad) for name, p in model.named_parameters(remove_duplicate=False)],
        ties.tied_groups(model),
        [(type(module), sorted(vars(module))) for module in model.modules()],
        [len(vars(module)[name]) for module in model.modules() for name in hooks],
    )


@pytest.mark.parametrize(
    ("kind", "wanted"),
    [
        ("plain", [[0], [1], [2], [3]]),
        ("multiplexed", [[0, 1], [2, 3]]),
        ("all share", [[0, 1, 2, 3]]),
        ("rooted", [[1], [2]]),
    ],
)
def test_blocks_that_share_are_one_unit(kind, wanted):
    student = models("plain" if kind == "rooted" else kind)[0]
    if kind == "rooted":  # the first block shares with the last, and that with what is in no block
        ties.tie(student, [("norm.weight", "blocks.3.norm1.weight"), ("blocks.3.norm2.bias", "blocks.0.norm2.bias")])
    assert divided.units(student) == [[student.blocks[i] for i in unit] for unit in wanted]


# ------------------------------------------------------------------------------------------------------- stopped and taken up


def stopped(folder, data, at, **options):
    """A training in which a signal comes to the second process after that many steps."""
    seen = []

    def counted(self, phase, kind, step, values):
        seen.append(kind == "train")
        if sum(seen) == at and processes.place() == 1:
            os.kill(os.getpid(), signal.SIGTERM)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Heard, "scalars", counted)
        with pytest.raises(Interrupted):
            distilled(folder, data, **options)


@pytest.mark.wide_unless(lambda sharded, then: sharded and then)
@pytest.mark.parametrize(("sharded", "then"), [(True, True), (True, False), (False, True)])
def test_a_training_that_was_stopped_ends_with_the_same_weights(sharded, then, tmp_path):
    options = {"kind": "multiplexed", "optimizer": "adamw", "lr": 0.01, "ema": 0.9, "log_every": 1}
    data = random_batches(5, 8)
    whole = together(2, lambda: distilled(tmp_path / "whole", data, sharded=then, **options)[0])
    together(2, lambda: stopped(tmp_path / "run", data, 7, sharded=sharded, **options))
    again = together(2, lambda: distilled(tmp_path / "run", data, sharded=then, **options)[0])
    assert most_apart(whole[0], again) <= (0 if sharded is then else 1e-12)  # of other sums; measured 5e-15


@pytest.mark.wide
def test_models_are_whole_after_a_signal(tmp_path):
    def interrupted():
        student, teacher = models()
        before = values(student)
        data = [(images.double(), targets) for images, targets in random_batches(3, 4)]
        spec = Distill(**SGD, losses=RELATIONS, sharded=True)
        terms = spec.terms(student, match_layers(student, teacher, "matched")[0], None, teacher)

        def stop(model):
            os.kill(os.getpid(), signal.SIGTERM)
            return {}

        with processes.joined(), pytest.raises(Interrupted):
            fit(student, spec, data, tmp_path, terms=terms, teacher=side(teacher), evaluate=stop)
        assert all(value.shape == before[name].shape for name, value in values(student).items())
        return not torch.equal(before["head.weight"], student.head.weight)

    assert together(2, interrupted) == [True, True]
