"""Training in shards: what is not finite, the best weights, evaluation, and what is refused."""

from __future__ import annotations

import pytest
import timm
import timm.optim
import torch
from helpers.images import side
from helpers.shards import RELATIONS, SGD, distilled, models, most_apart
from helpers.together import together
from helpers.training import Normed, fit, random_batches, tiny_vit, values

from compressvit import processes
from compressvit.errors import UserError
from compressvit.training.evaluate import evaluate
from compressvit.training.pairs import match_layers
from compressvit.training.phases.distill import Distill
from compressvit.training.phases.finetune import Finetune
from compressvit.training.sharding import divided
from compressvit.training.sharding.refusals import BY_NUMBER, torch_divides

pytestmark = pytest.mark.skipif(not torch_divides(), reason="an older torch")

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
