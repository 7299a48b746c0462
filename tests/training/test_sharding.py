"""Training in shards (`sharded`), which is that of one process with whole models."""

from __future__ import annotations

import copy
import gc
import os
import signal

import pytest
import timm
import timm.optim
import torch
from helpers.images import side
from helpers.together import together
from helpers.training import Heard, Normed, fit, random_batches, tiny_vit, values

import compressvit
from compressvit import processes
from compressvit.errors import UserError
from compressvit.model import ties
from compressvit.training.evaluate import evaluate
from compressvit.training.loop import Interrupted, Trainer
from compressvit.training.pairs import match_layers
from compressvit.training.phases.distill import Distill, _trained_along
from compressvit.training.phases.finetune import Finetune
from compressvit.training.sharding import divided
from compressvit.training.sharding.refusals import BY_NUMBER, torch_divides

pytestmark = pytest.mark.skipif(not torch_divides(), reason="an older torch")

RELATIONS = {"prediction": {"weight": 1.0}, "attention_relation": {"weight": 1.0}, "hidden_relation": {"weight": 0.1}}
SGD = {"epochs": 2, "lr": 0.1, "optimizer": "sgd", "momentum": 0.9, "weight_decay": 0.01, "log_every": 5}


def models(kind="plain", depth=4):
    """A student and its teacher, in double precision."""
    teacher = tiny_vit(seed=1, depth=depth).double().eval()
    if kind == "plain":
        return tiny_vit(seed=2, depth=depth).double(), teacher
    steps = {
        "multiplexed": [compressvit.Multiplex(share=2)],
        "one number": [compressvit.AdaptFormer(width=4, scale="learnable", dropout=0)],
        "all share": [compressvit.LORS(rank=2, init="scratch", share=4)],
    }
    torch.manual_seed(3)
    return compressvit.compress(teacher, steps[kind]), teacher


def distilled(folder, data, *, kind="plain", losses=None, batches=slice(None), **options):
    """The weights after distilling with this process's part of every batch, and what the log heard."""
    student, teacher = models(kind)
    spec = Distill(**{**SGD, "losses": RELATIONS if losses is None else losses, **options})
    with processes.joined():
        world, rank = processes.count(), processes.rank()
        mine = [(images[rank::world].double(), targets[rank::world]) for images, targets in data][batches]
        terms = spec.terms(student, match_layers(student, teacher, spec.layers)[0], None, teacher)
        with _trained_along(student, terms):
            heard = fit(student, spec, mine, folder, terms=terms, teacher=side(teacher))
    return values(student), heard.of("epoch")


def most_apart(one, others):
    """The largest difference of a weight, relative to the largest of its tensor."""
    return max(
        ((weights[name] - value).abs().max() / value.abs().max()).item()
        for weights in others
        for name, value in one.items()
    )


CASES = {  # of 20 steps; measured 2e-15 in all of them
    "plain": {},
    "multiplexed": {"kind": "multiplexed"},
    "averaged": {"ema": 0.9, "clip_grad": 0.1, "activation_checkpointing": True},
    "accumulated": {"kind": "multiplexed", "accumulate": 2, "epochs": 4},
    "one number": {"kind": "one number"},
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


# ------------------------------------------------------------------------------------------------------ what is not finite, best


def spoilt(count):
    """Batches of which one has an image that is not finite, in the part of the second process."""
    data = random_batches(count, 8)
    data[2][0][1, 0, 0, 0] = float("nan")
    return data


@pytest.mark.wide
def test_steps_that_are_not_finite_are_left_out(tmp_path):
    options = {"skip_nonfinite": 3, "kind": "multiplexed"}
    alone, _ = distilled(tmp_path / "one", spoilt(5), **options)
    both = together(2, lambda: distilled(tmp_path / "two", spoilt(5), sharded=True, **options))
    assert most_apart(alone, [weights for weights, _ in both]) <= 1e-12


@pytest.mark.wide
def test_a_training_that_diverges_leaves_the_weights_from_before(tmp_path):
    def diverged():
        student, teacher = models()
        spec = Distill(**{**SGD, "log_every": 1}, losses=RELATIONS, sharded=True)
        with processes.joined():
            rank = processes.rank()
            mine = [(images[rank::2].double(), targets[rank::2]) for images, targets in spoilt(4)]
            terms = spec.terms(student, match_layers(student, teacher, "matched")[0], None, teacher)
            with pytest.raises(UserError, match="the loss is nan at step 3") as told:
                fit(student, spec, mine, tmp_path / "run", terms=terms, teacher=side(teacher))
        return values(student), str(told.value)

    (mine, told), (theirs, _) = together(2, diverged)
    wanted = together(2, lambda: distilled(tmp_path / "two", spoilt(4), sharded=True, max_steps=2))[0][0]
    assert all(torch.equal(mine[name], value) and torch.equal(theirs[name], value) for name, value in wanted.items())
    assert "stopped" in told


@pytest.mark.wide
@pytest.mark.parametrize("keep", ["start", "first"])
def test_the_best_weights_are_kept(keep, tmp_path):
    scores = {"start": [3, 1, 2], "first": [1, 3, 2]}[keep]

    def best():
        given, seen = iter(scores), []

        def evaluated(model):
            seen.append({name: divided.local(value).clone() for name, value in model.state_dict().items()})
            return {"top1": next(given), "images": 1}

        student, teacher = models("multiplexed")
        spec = Distill(**SGD, losses=RELATIONS, keep="best", sharded=True)
        with processes.joined():
            data = [(images.double(), targets) for images, targets in random_batches(2, 4)]
            terms = spec.terms(student, match_layers(student, teacher, "matched")[0], None, teacher)
            fit(student, spec, data, tmp_path / "run", terms=terms, teacher=side(teacher), evaluate=evaluated)
        return seen[scores.index(3)], values(student)

    (first, mine), (second, theirs) = together(2, best)
    for name, value in mine.items():
        assert torch.equal(value, theirs[name])
        whole = torch.cat([first[name], second[name]]) if first[name].shape != value.shape else first[name]
        assert torch.equal(whole, value), name


@pytest.mark.wide
def test_statistics_of_batch_norms_are_the_leaders(tmp_path):
    def statistics(sharded):
        model, seen = tiny_vit(), []
        model.patch_embed.norm = Normed()
        model.double()

        def evaluated(judged):
            seen.append(judged.patch_embed.norm.bn.running_mean.clone())
            return {}

        with processes.joined():
            rank = processes.rank()
            mine = [(images[rank::2].double(), targets[rank::2]) for images, targets in random_batches(3, 8)]
            spec = Finetune(**SGD, sharded=sharded, ema=0.9)
            fit(model, spec, mine, tmp_path / str(sharded), evaluate=evaluated)
        return [*seen, model.patch_embed.norm.bn.running_mean, model.patch_embed.norm.bn.running_var]

    (one, other), (whole, _) = (together(2, statistics, sharded) for sharded in (True, False))
    for value, mine, theirs in zip(whole, one, other, strict=True):
        assert torch.equal(mine, theirs)
        assert torch.allclose(mine, value, rtol=1e-12, atol=1e-14)


# ------------------------------------------------------------------------------------------------------------------ evaluation


@pytest.mark.wide_unless(lambda classes, counts: classes == 4 and counts == (3, 2))
@pytest.mark.parametrize("classes", [4, 0])
@pytest.mark.parametrize("counts", [(3, 2), (0, 2)])
def test_evaluation_in_shards_is_that_of_whole_models_to_the_bit(classes, counts):
    """Also where a process has fewer batches than another, or none."""

    def scores():
        student, teacher = tiny_vit(seed=1, num_classes=classes), tiny_vit(seed=2, num_classes=classes)
        with processes.joined():
            mine = random_batches(max(counts), 4, seed=processes.rank())[: counts[processes.rank()]]

            def score():
                return evaluate(side(student), mine, torch.device("cpu"), teacher=side(teacher), divided=True)

            whole = score()
            parts = [divided.Divided(model, torch.device("cpu"), trained=False) for model in (student, teacher)]
            found = [score(), score()]
            for part in parts:
                assert all(
                    divided.is_shard(parameter) for parameter in part.model.parameters()
                )  # nothing whole is left
                part.end()
            return whole, *found, score()

    for whole, *others in together(2, scores):
        assert others == [whole] * 3


# ------------------------------------------------------------------------------------------------------------ what is refused


def test_optimisers_that_treat_every_number_by_itself():
    """Of whole tensors they make what they make of two halves, and before the first step they have no state."""
    generator = torch.Generator().manual_seed(0)
    shapes = [(40, 36), (37,), (1, 40, 36), (36, 3, 2, 2)]
    begun = [torch.randn(shape, generator=generator, dtype=torch.float64) for shape in shapes]
    gradients = [[torch.randn(shape, generator=generator, dtype=torch.float64) for shape in shapes] for _ in range(6)]

    def stepped(name, half):
        part = (lambda t: t) if half is None else (lambda t: (*t.chunk(2), t[:0])[half])
        parameters = [torch.nn.Parameter(part(value).clone()) for value in begun]
        more = {"momentum": 0.9} if timm.optim.get_optimizer_info(name).has_momentum else {}
        optimizer = timm.optim.create_optimizer_v2(
            [{"params": parameters}], opt=name, lr=0.05, weight_decay=0.1, **more
        )
        assert not optimizer.state, name
        for step in gradients:
            for parameter, gradient in zip(parameters, step, strict=True):
                parameter.grad = part(gradient).clone()
            optimizer.step()
        for parameter, state in optimizer.state.items():
            for value in state.values():
                assert not isinstance(value, torch.Tensor) or value.ndim == 0 or value.shape == parameter.shape, name
        return [parameter.detach() for parameter in parameters]

    for name in sorted(BY_NUMBER):
        halves = zip(stepped(name, 0), stepped(name, 1), strict=True)
        for whole, each in zip(stepped(name, None), halves, strict=True):
            assert (torch.cat(each)[: len(whole)] - whole).abs().max() < 1e-12, name


REFUSED = {
    "compile=true expects whole": {"compile": True},
    "precision=fp16": {"precision": "fp16"},
    "lamb needs whole ones": {"optimizer": "lamb"},
    "leave cache out": {"cache": {"views": 1}},
}


@pytest.mark.parametrize("words", REFUSED)
def test_options_that_do_not_go_together_with_shards(words):
    student, teacher = (tiny_vit(seed=seed).to("meta") for seed in (0, 1))
    spec = Distill(sharded=True, **REFUSED[words])
    with pytest.raises(UserError, match=f"sharded=true .*{words}"):
        spec.refuse(setting(student, teacher))


def test_models_that_cannot_be_in_shards():
    student, teacher = (tiny_vit(seed=seed).to("meta") for seed in (0, 1))
    student.norm.double()
    with pytest.raises(UserError, match="needs one precision of all that is trained, and the student has several"):
        Distill(sharded=True).refuse(setting(student, teacher))
    unknown = timm.create_model("resnet10t", num_classes=4).to("meta")
    with pytest.raises(UserError, match="sharded needs"):
        Finetune(sharded=True).refuse(setting(unknown, None))


def setting(student, teacher):
    from compressvit.training.phases import Setting

    return Setting(side(student), None if teacher is None else side(teacher), 8)


def test_one_process_passes_shards_over(tmp_path, monkeypatch):
    data = random_batches(4, 8)
    assert most_apart(distilled(tmp_path / "one", data)[0], [distilled(tmp_path / "two", data, sharded=True)[0]]) == 0
    assert Distill(sharded=True).summary(8).endswith("sharded passed over in one process")
    monkeypatch.setenv("WORLD_SIZE", "4")
    assert Distill(sharded=True).summary(8).endswith("in shards")
