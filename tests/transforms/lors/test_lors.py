"""LORS: the paper's arithmetic, and what it keeps of a teacher."""

from __future__ import annotations

import copy

import pytest
import torch
from helpers.models import build, images_for, outputs
from helpers.ranks import ranked

import compressvit
from compressvit import LORS, LowRank, Multiplex
from compressvit.artifacts import artifact
from compressvit.errors import UserError
from compressvit.model import cost, ties
from compressvit.transforms.applying import compress, materialise
from compressvit.transforms.lors.layers import LowRankTerm, SharedLowRankLinear
from compressvit.transforms.low_rank.layer import FactoredLinear

ALL_RANKS = [("vit", 4), ("swin", 2), ("deit_distilled", 4)]


def relative(a: torch.Tensor, b: torch.Tensor) -> float:
    return ((a - b).norm() / b.norm()).item()


# ------------------------------------------------------------------------------------------------------------- the paper


def test_terms_of_rank_r_are_one_of_their_sum():
    model = build("vit")
    depth = len(model.blocks)
    plan = LORS(rank=3, terms=tuple(range(1, depth + 1)), targets=("mlp.fc1",)).plan(model)
    assert plan.ranks == {f"blocks.{i}.mlp.fc1": 3 * (i + 1) for i in range(depth)}
    assert plan.groups == (tuple(f"blocks.{i}.mlp.fc1" for i in range(depth)),)


# -------------------------------------------------------------------------------------------------------- the arithmetic


@pytest.mark.parametrize("tokens", [1, 5, 400])
@pytest.mark.parametrize("bias", [True, False])
def test_both_orders_of_the_product_are_the_same(tokens, bias):
    torch.manual_seed(0)
    layer = torch.nn.Linear(24, 36, bias=bias).double()
    layer.__class__ = SharedLowRankLinear
    layer.low_rank = LowRankTerm(24, 36, 5, dtype=torch.float64)
    torch.nn.init.normal_(layer.low_rank.up)
    x = torch.randn(2, tokens, 24, dtype=torch.float64)
    expected = x @ (layer.weight + layer.low_rank.up @ layer.low_rank.down).mT + (layer.bias if bias else 0)
    assert (layer(x) - expected).abs().max() < 1e-12


@pytest.mark.wide_unless(
    lambda backbone, metric, alone: alone and (backbone, metric) in (("vit", "outputs"), ("swin", "weights"))
)
@pytest.mark.parametrize(("backbone", "share"), ALL_RANKS)
@pytest.mark.parametrize("metric", ["weights", "inputs", "outputs"])
@pytest.mark.parametrize("alone", [False, True])
def test_full_rank_keeps_the_teachers_function(backbone, share, metric, alone):
    teacher = build(backbone)
    images = images_for(teacher, 8)
    full = tuple(m.out_features for n, m in teacher.named_modules() if n.endswith("attn.proj"))
    spec = ranked(1 if alone else share, rank=full, metric=metric)
    student = compress(teacher, [spec], calibration=images)
    assert not torch.equal(outputs(student, images), outputs(teacher, images))
    assert relative(outputs(student, images), outputs(teacher, images)) < 1e-4  # measured 2e-6 at most


@pytest.mark.wide
@pytest.mark.parametrize("share", [1, 2])
def test_more_rank_is_closer_and_the_metric_of_the_outputs_is_closest(share):
    teacher = build("vit")
    images = images_for(teacher, 32)
    errors = {}
    for metric in ("weights", "inputs", "outputs"):
        for rank in (4, 12):
            student = compress(teacher, [ranked(share, rank=rank, metric=metric)], calibration=images)
            errors[metric, rank] = relative(outputs(student, images), outputs(teacher, images))
    for metric in ("weights", "inputs", "outputs"):
        assert errors[metric, 12] < errors[metric, 4]
    assert errors["outputs", 12] < errors["weights", 12]


@pytest.mark.parametrize("backbone", ["vit", "swin"])
def test_whitening_loses_less_of_every_layers_output_than_plain_truncation(backbone):
    teacher = build(backbone)
    images = images_for(teacher, 16)
    seen: dict[str, torch.Tensor] = {}
    paths = [n for n, m in teacher.named_modules() if n.endswith((".qkv", "attn.proj", ".fc1", ".fc2"))]
    for path in paths:
        teacher.get_submodule(path).register_forward_hook(
            lambda module, inputs, _, path=path: seen.__setitem__(path, inputs[0].flatten(0, -2))
        )
    outputs(teacher, images)
    inputs = dict(seen)
    made = {
        metric: compress(teacher, [LowRank(rank=4, metric=metric, ridge=1e-6, sequential=False)], calibration=images)
        for metric in ("inputs", "weights")
    }
    assert len(paths) >= 8
    for path in paths:
        weight = teacher.get_submodule(path).weight
        whitened, plain = (
            (inputs[path] @ (made[m].get_submodule(path).effective_weight() - weight).mT).norm()
            for m in ("inputs", "weights")
        )
        assert whitened <= plain * 1.001, path


@pytest.mark.wide_unless(lambda metric: metric != "inputs")
@pytest.mark.parametrize("metric", ["weights", "inputs", "outputs"])
def test_both_factors_are_of_one_size(metric):
    teacher = build("vit")
    student = compress(teacher, [LowRank(rank=6, metric=metric)], calibration=images_for(teacher, 32))
    terms = [m for m in student.modules() if isinstance(m, FactoredLinear)]
    assert len(terms) == 4 * len(teacher.blocks)
    for term in terms:
        assert torch.allclose(term.up.weight.norm(dim=0), term.down.weight.norm(dim=1), rtol=1e-4)


def test_the_first_layers_weight_is_shared_whatever_an_earlier_step_put_there():
    teacher = build("vit")
    full = min(teacher.blocks[0].attn.proj.weight.shape)
    steps = [Multiplex(share=2, head_mixing=False), LORS(rank=full, init="first", metric="weights")]
    student = compress(teacher, steps)
    ledger = [entry for entry in student._compression.ledger if entry.step == "lors"]
    assert ledger
    assert all(entry.weight_error < 1e-5 for entry in ledger)
    layer = student.blocks[1].mlp.fc1
    assert relative(layer.effective_weight(), teacher.blocks[1].mlp.fc1.weight) < 1e-5


@pytest.mark.wide_unless(lambda spec: spec.name == "lors")
@pytest.mark.parametrize("spec", [LORS(rank=4, share=2), LowRank(rank=4), LowRank(budget={"parameters": 0.6})], ids=str)
def test_a_weight_of_zeros(spec):
    teacher = build("vit")
    teacher.blocks[0].attn.proj.weight.data.zero_()
    images = images_for(teacher, 8)
    assert outputs(compress(teacher, [spec], calibration=images), images).isfinite().all()


def test_a_classifier_of_one_class():
    """Its likelihood has no gradient."""
    teacher = build("vit")
    teacher.reset_classifier(1)
    images = images_for(teacher, 8)
    assert outputs(compress(teacher, [LowRank(rank=4)], calibration=images), images).isfinite().all()


@pytest.mark.wide_unless(lambda dtype: dtype is torch.bfloat16)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_is_measured_in_full(dtype):
    teacher = build("vit")
    images = images_for(teacher, 16)
    reference = compress(teacher, [LowRank(rank=6)], calibration=images)
    student = compress(copy.deepcopy(teacher).to(dtype), [LowRank(rank=6)], calibration=images.to(dtype))
    assert next(student.parameters()).dtype == dtype
    a = student.blocks[0].mlp.fc1.effective_weight().float()
    assert (
        relative(a, reference.blocks[0].mlp.fc1.effective_weight()) < 0.05
    )  # measured 3e-3 (float16), 2e-2 (bfloat16)


@pytest.mark.wide
def test_the_callers_images_and_model_are_left_alone():
    teacher = build("vit")
    batches = [images_for(teacher, 4), images_for(teacher, 4)]
    state = {n: p.clone() for n, p in teacher.state_dict().items()}
    generator = compress(teacher, [LORS(rank=2, share=2, metric="outputs")], calibration=iter(batches))
    listed = compress(teacher, [LORS(rank=2, share=2, metric="outputs")], calibration=batches)
    assert torch.equal(outputs(generator, batches[0]), outputs(listed, batches[0]))
    assert not any(b.requires_grad or b.grad is not None for b in batches)
    assert all(p.requires_grad and p.grad is None for p in teacher.parameters())
    assert all(torch.equal(p, state[n]) for n, p in teacher.state_dict().items())
    twice = [LORS(rank=2, targets=("attn.*",), metric="inputs"), LORS(rank=2, targets=("mlp.*",), metric="inputs")]
    compress(teacher, twice, calibration=iter(batches))  # a generator serves both steps


# --------------------------------------------------------------------------------------------------- low rank alone


def test_low_rank_alone_drops_the_weight_and_cuts_macs():
    teacher = build("vit")
    student = compress(teacher, [LowRank(rank=4, metric="weights")])
    layer = student.blocks[1].mlp.fc1
    assert isinstance(layer, FactoredLinear)
    assert teacher.state_dict().keys() - student.state_dict().keys() == {
        f"blocks.{i}.{target}.{name}"
        for i in range(len(teacher.blocks))
        for target in LORS.model_fields["targets"].default
        for name in ("weight", "bias")
    }
    size = images_for(teacher).shape[1:]
    assert cost.macs(student, size) < 0.6 * cost.macs(teacher, size)
    again = compress(teacher, [LORS(rank=4, share=2, metric="weights")])
    assert cost.macs(again, size) >= cost.macs(teacher, size)  # sharing does not


# ------------------------------------------------------------------------------------------------------- composition


@pytest.mark.wide
def test_sharing_and_private_terms_make_one_student_in_either_order():
    teacher = build("vit")
    images = images_for(teacher, 16)
    sharing, terms = Multiplex(share=2, mlp_conv=3), LORS(rank=6)
    made = compress(teacher, [sharing, terms], calibration=images)
    other = compress(teacher, [terms.model_copy(update={"share": 2}), sharing], calibration=images)
    assert ties.count_parameters(made) == ties.count_parameters(other)
    assert made.blocks[0].mlp.fc1.weight is made.blocks[1].mlp.fc1.weight
    assert made.blocks[0].mlp.fc1.bias is made.blocks[1].mlp.fc1.bias  # MiniViT shares biases too
    assert made.blocks[0].mlp.fc1.low_rank.up is not made.blocks[1].mlp.fc1.low_rank.up
    assert relative(outputs(other, images), outputs(made, images)) < 1e-4
    alone = compress(teacher, [Multiplex(share=2, mlp_conv=3)])
    expected = outputs(teacher, images)
    assert relative(outputs(made, images), expected) < relative(outputs(alone, images), expected)


def test_what_low_rank_has_fitted_is_not_averaged_away():
    teacher = build("vit")
    full = min(teacher.blocks[0].attn.proj.weight.shape)
    terms = LORS(rank=(0, full, 0, full), share=2, metric="weights")
    student = compress(teacher, [terms, Multiplex(share=2, head_mixing=False)])
    for i in (1, 3):
        assert relative(student.blocks[i].mlp.fc1.effective_weight(), teacher.blocks[i].mlp.fc1.weight) < 1e-5


def test_blocks_that_an_earlier_step_left_alone_keep_their_weight():
    student = compress(build("swin"), [Multiplex(share=(1, 2)), LORS(rank=2, metric="weights")])
    plan = student._compression.plans[1]
    assert plan.paths
    assert all(path.startswith("layers.1.") for path in plan.paths)


# -------------------------------------------------------------------------------------------------------- materialising


@pytest.mark.wide_unless(lambda share: share == 2)
@pytest.mark.parametrize("share", [1, 2])
def test_materialised_is_a_plain_timm_model_that_computes_the_same(share, tmp_path):
    teacher = build("vit")
    student = compress(teacher, [ranked(share, rank=4, metric="weights")])
    images = images_for(teacher)
    before = outputs(student, images)
    plain = materialise(student)
    assert relative(outputs(plain, images), before) < 1e-5
    assert not torch.equal(outputs(plain, images), outputs(teacher, images))
    assert torch.equal(outputs(student, images), before), "the model it was made from changed"
    assert {type(m) for m in plain.modules()} == {type(m) for m in teacher.modules()}
    assert plain.state_dict().keys() == teacher.state_dict().keys()
    assert ties.tied_groups(plain) == []
    assert ties.count_parameters(plain) == ties.count_parameters(teacher)
    stored = artifact.save(student, tmp_path / "student")
    assert torch.equal(outputs(artifact.load(stored, materialise=True), images), outputs(plain, images))
    assert artifact.load(artifact.save(plain, tmp_path / "plain")).state_dict().keys() == teacher.state_dict().keys()


def test_materialising_beside_sharing_keeps_its_transforms_and_cannot_be_saved(tmp_path):
    student = compress(build("vit"), [Multiplex(share=2, mlp_conv=3), LORS(rank=4, metric="weights")])
    images = images_for(student)
    plain = materialise(student)
    assert relative(outputs(plain, images), outputs(student, images)) < 1e-5
    assert plain.blocks[0].mlp_conv is not None
    assert type(plain.blocks[0].mlp.fc1) is torch.nn.Linear
    with pytest.raises(UserError, match=r"materialised model shares less .* save the model it was made from"):
        compressvit.save(plain, tmp_path / "plain")


def test_nothing_to_materialise():
    with pytest.raises(UserError, match=r"nothing to materialise: .* made by multiplex"):
        materialise(compress(build("vit"), [Multiplex(share=2)]))
    with pytest.raises(UserError, match="made by no transform"):
        materialise(build("vit"))
