"""LORS: the paper's counts, its arithmetic, what it keeps of a teacher, and what it refuses."""

from __future__ import annotations

import copy
import re

import pytest
import timm
import torch
from helpers.models import build, images_for, outputs
from timm.layers import Mlp
from torch import nn

import compressvit
from compressvit import LORS, Align, Multiplex, artifact, cost, ties
from compressvit.errors import UserError
from compressvit.layers.linear import FactoredLinear, LowRank, SharedLowRankLinear
from compressvit.pipeline import compress, materialise, plan_transforms
from compressvit.plan import plan_recipe
from compressvit.recipe import load_recipe
from compressvit.transforms import Transform

ALL_RANKS = [("vit", 4), ("swin", 2), ("deit_distilled", 4)]


def relative(a: torch.Tensor, b: torch.Tensor) -> float:
    return ((a - b).norm() / b.norm()).item()


# ------------------------------------------------------------------------------------------------------------- the paper


def test_the_papers_deit_tiny_on_cifar_100():
    recipe = load_recipe("lors_deit_ti_cifar100")
    with torch.device("meta"):
        teacher = timm.create_model(recipe.teacher.model, num_classes=100, **recipe.teacher.args)
    assert ties.count_parameters(teacher) == 5_405_476
    specs = [step.spec for step in recipe.steps if isinstance(step.spec, Transform)]
    for plan in plan_transforms(teacher, specs):
        plan.apply(teacher)
    assert ties.count_parameters(teacher) == 2_603_812


def test_groups_of_rank_r_are_one_term_of_their_sum():
    model = build("vit")
    depth = len(model.blocks)
    plan = LORS(rank=3, groups=tuple(range(1, depth + 1)), targets=("mlp.fc1",)).plan(model)
    assert plan.ranks == {f"blocks.{i}.mlp.fc1": 3 * (i + 1) for i in range(depth)}
    assert plan.groups == (tuple(f"blocks.{i}.mlp.fc1" for i in range(depth)),)


def test_from_noise_the_terms_start_at_zero():
    torch.manual_seed(0)
    student = compress(build("vit"), [LORS(rank=4, share=2, init="scratch")])
    for path, module in student.named_modules():
        if isinstance(module, LowRank):
            assert not module.up.any()
            assert module.down.abs().min() > 0, path
            assert module.down.abs().max() <= module.down.shape[1] ** -0.5


# -------------------------------------------------------------------------------------------------------- the arithmetic


@pytest.mark.parametrize("tokens", [1, 5, 400])
@pytest.mark.parametrize("bias", [True, False])
def test_both_orders_of_the_product_are_the_same(tokens, bias):
    torch.manual_seed(0)
    layer = torch.nn.Linear(24, 36, bias=bias).double()
    layer.__class__ = SharedLowRankLinear
    layer.low_rank = LowRank(24, 36, 5, dtype=torch.float64)
    torch.nn.init.normal_(layer.low_rank.up)
    x = torch.randn(2, tokens, 24, dtype=torch.float64)
    expected = x @ (layer.weight + layer.low_rank.up @ layer.low_rank.down).mT + (layer.bias if bias else 0)
    assert (layer(x) - expected).abs().max() < 1e-12


@pytest.mark.parametrize(("backbone", "share"), ALL_RANKS)
@pytest.mark.parametrize("metric", ["weights", "inputs", "outputs"])
@pytest.mark.parametrize("alone", [False, True])
def test_full_rank_keeps_the_teachers_function(backbone, share, metric, alone):
    teacher = build(backbone)
    images = images_for(teacher, 8)
    full = tuple(m.out_features for n, m in teacher.named_modules() if n.endswith("attn.proj"))
    spec = LORS(rank=full, share=1 if alone else share, metric=metric)
    student = compress(teacher, [spec], calibration=images)
    assert not torch.equal(outputs(student, images), outputs(teacher, images))
    assert relative(outputs(student, images), outputs(teacher, images)) < 1e-4  # measured 2e-6 at most


@pytest.mark.parametrize("share", [1, 2])
def test_more_rank_is_closer_and_the_metric_of_the_outputs_is_closest(share):
    teacher = build("vit")
    images = images_for(teacher, 32)
    errors = {}
    for metric in ("weights", "inputs", "outputs"):
        for rank in (4, 12):
            student = compress(teacher, [LORS(rank=rank, share=share, metric=metric)], calibration=images)
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
        metric: compress(
            teacher, [LORS(rank=4, share=1, metric=metric, ridge=1e-6, sequential=False)], calibration=images
        )
        for metric in ("inputs", "weights")
    }
    assert len(paths) >= 8
    for path in paths:
        weight = teacher.get_submodule(path).weight
        whitened, plain = (
            (inputs[path] @ (made[m].get_submodule(path).weight - weight).mT).norm() for m in ("inputs", "weights")
        )
        assert whitened <= plain * 1.001, path


@pytest.mark.parametrize("metric", ["weights", "inputs", "outputs"])
def test_both_factors_are_of_one_size(metric):
    teacher = build("vit")
    student = compress(teacher, [LORS(rank=6, share=1, metric=metric)], calibration=images_for(teacher, 32))
    terms = [m for m in student.modules() if isinstance(m, LowRank)]
    assert len(terms) == 4 * len(teacher.blocks)
    for term in terms:
        assert torch.allclose(term.up.norm(dim=0), term.down.norm(dim=1), rtol=1e-4)


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


def test_a_weight_of_zeros_and_a_classifier_of_one_class():
    teacher = build("vit")
    teacher.blocks[0].attn.proj.weight.data.zero_()
    images = images_for(teacher, 8)
    for spec in (LORS(rank=4, share=2), LORS(rank=4, share=1), LORS(share=1, budget={"parameters": 0.6})):
        assert outputs(compress(teacher, [spec], calibration=images), images).isfinite().all()
    teacher.reset_classifier(1)  # its likelihood has no gradient
    assert outputs(compress(teacher, [LORS(rank=4, share=1)], calibration=images), images).isfinite().all()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_is_measured_in_full(dtype):
    teacher = build("vit")
    images = images_for(teacher, 16)
    reference = compress(teacher, [LORS(rank=6, share=1)], calibration=images)
    student = compress(copy.deepcopy(teacher).to(dtype), [LORS(rank=6, share=1)], calibration=images.to(dtype))
    assert next(student.parameters()).dtype == dtype
    a = student.blocks[0].mlp.fc1.weight.float()
    assert relative(a, reference.blocks[0].mlp.fc1.weight) < 0.05  # measured 3e-3 (float16), 2e-2 (bfloat16)


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
    student = compress(teacher, [LORS(rank=4, share=1, metric="weights")])
    layer = student.blocks[1].mlp.fc1
    assert isinstance(layer, FactoredLinear)
    assert isinstance(layer, torch.nn.Linear)
    assert teacher.state_dict().keys() - student.state_dict().keys() == {
        f"blocks.{i}.{target}.weight"
        for i in range(len(teacher.blocks))
        for target in LORS.model_fields["targets"].default
    }
    assert torch.equal(layer.weight, layer.low_rank.up @ layer.low_rank.down)  # for code that reads it past the layer
    size = images_for(teacher).shape[1:]
    assert cost.macs(student, size) < 0.6 * cost.macs(teacher, size)
    again = compress(teacher, [LORS(rank=4, share=2, metric="weights")])
    assert cost.macs(again, size) >= cost.macs(teacher, size)  # sharing does not


# ------------------------------------------------------------------------------------------------------- composition


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


@pytest.mark.parametrize("share", [1, 2])
def test_materialised_is_a_plain_timm_model_that_computes_the_same(share, tmp_path):
    teacher = build("vit")
    student = compress(teacher, [LORS(rank=4, share=share, metric="weights")])
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


# ------------------------------------------------------------------------------------------------------------ bad input


@pytest.mark.parametrize(
    ("before", "spec", "words"),
    [
        (
            [],
            LORS(rank=1000),
            r"rank 1000 of blocks\.0\.attn\.qkv is larger than its \d+×\d+ weight allows; it can be at most",
        ),
        (
            [],
            LORS(rank=(4, 4, 4)),
            r"lors\.rank lists 3 numbers, but .* has 4 blocks; give one number, or one per block",
        ),
        ([], LORS(rank=4, groups=(1, 2)), r"lors\.groups lists 2 numbers, but .* has 4 blocks"),
        ([], LORS(rank=4, share=3), r"lors\.share=3 does not divide the 4 blocks of stage 0 .* \[1, 2, 4\]"),
        ([], LORS(rank=4, share=(2, 2)), r"lors\.share gives 2 numbers, \[2, 2\], but .* has 1 stage"),
        ([], LORS(rank=4, targets=("attn.qvk",)), r"'attn.qvk' matches no linear layer .* did you mean 'attn.qkv'"),
        ([], LORS(rank=0, share=1), r"rank 0 with share 1 would leave blocks\.0\.attn\.qkv without a weight"),
        (
            [Multiplex(share=2)],
            LORS(rank=4, share=4),
            r"an earlier step shares it with 1; leave lors\.share and group_by out",
        ),
        ([LORS(rank=2, metric="weights")], LORS(rank=2), r"applied twice: .* different targets, or merge"),
        (
            [LORS(rank=2, share=4, metric="weights")],
            Multiplex(share=2),
            r"an earlier step shares .* give both steps the same share",
        ),
    ],
)
def test_what_does_not_fit_is_refused_before_anything_changes(before, spec, words):
    with pytest.raises(UserError, match=words):
        compress(build("vit"), [*before, spec])


@pytest.mark.parametrize(
    "fields", [{"rank": -1}, {"rank": 2, "share": 0}, {"rank": 2, "targets": ()}, {"rank": 2, "ridge": -1}]
)
def test_impossible_settings(fields):
    with pytest.raises(ValueError, match=r"rank|share|targets|ridge"):
        LORS(**fields)


def test_calibration_images_that_are_missing():
    with pytest.raises(
        UserError, match=r"lors measures errors on calibration images, and none were given: .*metric=weights"
    ):
        compress(build("vit"), [LORS(rank=2, share=2)])


@pytest.mark.parametrize(
    ("images", "words"),
    [
        (torch.zeros(3, 32, 32), r"not a batch of shape"),
        (torch.zeros(2, 1, 32, 32), r"a tensor \(N, 3, 32, 32\), .* not a batch of shape \(2, 1, 32, 32\)"),
        (torch.zeros(2, 3, 48, 48), r"not a batch of shape \(2, 3, 48, 48\)"),
        ([{"image": torch.zeros(2, 3, 32, 32)}], "not batches of dict"),
        (5, "not int"),
        ([], "there is no calibration image"),
    ],
)
def test_calibration_that_is_no_images(images, words):
    with pytest.raises(UserError, match=words):
        compress(build("vit"), [LORS(rank=2, share=2)], calibration=images)


def test_weights_that_are_not_finite():
    for metric, words in (("weights", r"the weight of blocks\.1\.mlp\.fc1 holds"), ("outputs", "not finite")):
        teacher = build("vit")
        teacher.blocks[1].mlp.fc1.weight.data[0, 0] = torch.nan
        with pytest.raises(UserError, match=words):
            compress(teacher, [LORS(rank=2, share=2, metric=metric)], calibration=images_for(teacher, 4))


def test_inference_mode_is_refused_in_words():
    with torch.inference_mode(), pytest.raises(UserError, match="call it outside"):
        compress(build("vit"), [LORS(rank=2, share=2, metric="weights")])


def test_materialised_weights_can_be_trained_whoever_asks():
    student = compress(build("vit"), [LORS(rank=2, share=2, metric="weights")])
    with torch.no_grad():
        assert all(p.requires_grad for p in materialise(student).parameters())


def test_calibration_images_that_are_not_finite_name_the_first_layer():
    teacher = build("vit")
    images = images_for(teacher, 2)
    images[0, 0, 0, 0] = torch.nan
    with pytest.raises(UserError, match=r"blocks\.0\.attn\.qkv sees numbers that are not finite"):
        compress(teacher, [LORS(rank=2, share=2)], calibration=images)


@pytest.mark.parametrize("share", [1, 2])
@pytest.mark.parametrize("positions", [1.0, 50.0])
def test_too_few_or_constant_images_are_told_and_regularised(share, positions, caplog):
    teacher = build("vit")
    with torch.no_grad():  # tokens that differ by their positions alone may look like a rich set
        teacher.pos_embed.mul_(positions)
    unseen = images_for(teacher, 32, seed=2)
    spec = LORS(rank=12, share=share)

    def error(images):
        caplog.clear()
        student = compress(teacher, [spec], calibration=images)
        return relative(outputs(student, unseen), outputs(teacher, unseen))

    plain = compress(teacher, [spec.model_copy(update={"metric": "weights"})])
    without = relative(outputs(plain, unseen), outputs(teacher, unseen))
    one = images_for(teacher, 1)
    for images in (
        0 * images_for(teacher, 40),
        one,
        one.expand(40, -1, -1, -1),
        images_for(teacher, 5).repeat(8, 1, 1, 1),
    ):
        found = error(images)
        assert any(
            "different ones, fewer than 8: layers are fitted one by one" in r.getMessage() for r in caplog.records
        )
        assert found < 1.3 * without, (found, without)  # measured 0.05 to 1.15
    error(images_for(teacher, 8))
    assert not any("different ones" in record.getMessage() for record in caplog.records)


def test_the_plan_says_up_to_which_rank_low_rank_is_faster(monkeypatch):
    """On a machine whose time is that of the multiply-accumulates."""
    clock = [0]

    def forward(self, x):
        clock[0] += len(x) * self.in_features * self.out_features
        return x.new_zeros(len(x), self.out_features)

    monkeypatch.setattr(nn.Linear, "forward", forward)
    monkeypatch.setattr(cost.time, "perf_counter", lambda: clock[0])
    assert cost.break_even_rank(40, 60, 5) == (
        24,
        21,
    )  # 24 costs as much as the dense layer; the next eighth below is 21
    monkeypatch.undo()
    recipe = load_recipe("fashion_mnist_lors")
    (note,) = (text for text in plan_recipe(recipe, "x").notes if "faster than the dense layer" in text)
    assert re.search(r"blocks\.0\.attn\.qkv \(288×96, 17 tokens\) 72 / \d+;", note), note


def test_images_of_whole_numbers_are_not_normalised():
    teacher = build("vit")
    images = (images_for(teacher, 8) * 50).to(torch.uint8)
    with pytest.raises(UserError, match=r"not images of torch.uint8, which are not normalised"):
        compress(teacher, [LORS(rank=2, share=2)], calibration=images)


def test_a_layer_of_tiny_weights_keeps_them():
    teacher = build("vit")
    with torch.no_grad():
        teacher.blocks[0].mlp.fc2.weight.mul_(1e-9)
    full = min(teacher.blocks[0].mlp.fc2.weight.shape)
    student = compress(teacher, [LORS(rank=full, share=1, targets=("mlp.fc2",), metric="weights")])
    weight = student.blocks[0].mlp.fc2.effective_weight()
    assert relative(weight, teacher.blocks[0].mlp.fc2.weight) < 1e-4  # measured 1.5e-7


def unlike_blocks():
    """A ViT whose later two blocks have narrower MLPs."""
    model = build("vit")
    for block in model.blocks[2:]:
        block.mlp = Mlp(48, 100)
    return model


@pytest.mark.parametrize(
    ("spec", "words"),
    [
        (
            LORS(rank=2, share=4),
            r"blocks.0.mlp.fc1.weight \(192, 48\) and blocks.2.mlp.fc1.weight \(100, 48\) .*another `share`",
        ),
        (
            LORS(rank=2, share=2, group_by="similarity"),
            r"blocks.0.mlp.fc1 and blocks.2.mlp.fc1 are of different shapes",
        ),
        (LORS(share="auto", budget={"parameters": 0.5}), "which share: auto and group_by: similarity may choose"),
        (Align(share=4), r"blocks.2.mlp.fc1.weight is of another than that of blocks.0; give an align.share"),
    ],
    ids=["share", "similarity", "auto", "align"],
)
def test_layers_of_different_shapes_cannot_share(spec, words):
    model = unlike_blocks()
    with pytest.raises(UserError, match=words):
        compress(model, [spec], calibration=images_for(model, 8))
    compress(model, [Align(share=2), LORS(rank=2, share=2)], calibration=images_for(model, 8))


def test_a_target_that_a_later_block_lacks():
    model = build("vit")
    model.blocks[3].mlp = nn.Identity()
    with pytest.raises(
        UserError, match=r"blocks.3.mlp.fc1 of vit_tiny_patch16_224 is no linear layer, as mlp.fc1 is in its first"
    ):
        compress(model, [LORS(rank=2, share=1, metric="weights")])


@pytest.mark.parametrize(
    ("steps", "words"),
    [
        ([Multiplex(share=2, init="scratch"), LORS(rank=2)], "give lors.init=scratch, or multiplex.init=mean"),
        (
            [Align(share=2), LORS(rank=2, share=2, group_by="similarity")],
            "an earlier align has matched the blocks of others; leave align out",
        ),
        ([Align(share=2), LORS(share="auto", budget={"parameters": 0.5})], "lors would choose its own groups"),
    ],
)
def test_steps_whose_work_would_be_undone(steps, words):
    with pytest.raises(UserError, match=words):
        plan_transforms(build("vit"), steps)
