"""Low rank alone: the figures that it has always had, its layer, and its refusals."""

from __future__ import annotations

import copy

import pytest
import torch
from helpers.models import build, images_for, outputs
from torch import nn

from compressvit import LORS, BitFit, LowRank, Multiplex, UserError, compress, load, save
from compressvit.model import surgery, ties
from compressvit.recipe.recipe import RecipeError, parse_recipe
from compressvit.transforms.applying import plan_transforms
from compressvit.transforms.low_rank.layer import FactoredLinear, factor, unfactor
from compressvit.transforms.record import compression_of, trained_names

TARGETS = LowRank.model_fields["targets"].default

# What `lors: {share: 1}` of version 0.1.0 gave for models of `helpers.models.build` and 24 random images: ranks by kind of layer and
# block, None for a layer that stays dense; the norm of the student's outputs, and the first three of them. In one batch, because the labels
# that are drawn for a second one are others now.
BEFORE = {
    ("vit", "parameters", 0.5): (
        [[9, 5, 4, 4], [12, 9, 6, 8], [None, 25, 20, 16], [23, 19, 16, 14]],
        1.3731898,
        [0.1255278, -0.1431712, -0.0990759],
    ),
    ("vit", "macs", 0.6): (
        [[14, 6, 4, 4], [14, 12, 9, 8], [None, None, 27, 20], [26, 23, 20, 18]],
        1.3541573,
        [0.1344850, -0.1232079, -0.0801353],
    ),
    ("swin", "parameters", 0.5): (
        [[1, 1, 13, 11, 11, 12], [1, 2, 4, 6, 5, 6], [2, 2, 15, 14, 16, 15], [3, 2, 11, 11, 11, 10]],
        0.5932442,
        [-0.1028788, -0.0589540, 0.0421439],
    ),
}


@pytest.mark.wide_unless(lambda backbone, unit: (backbone, unit) == ("vit", "parameters"))
@pytest.mark.parametrize(("backbone", "unit", "part"), BEFORE)
def test_the_ranks_and_outputs_are_those_it_has_always_had(backbone, unit, part):
    teacher = build(backbone)
    images = images_for(teacher, 24)
    student = compress(teacher, [LowRank(budget={unit: part}, pivoted=False)], calibration=[images])
    (plan,) = compression_of(student).plans
    ranks, norm, first = BEFORE[backbone, unit, part]
    blocks = [name for name, _ in teacher.named_modules() if name.endswith("mlp")]
    paths = [f"{block.removesuffix('.mlp')}.{target}" for target in TARGETS for block in blocks]
    assert [plan.ranks.get(path) for path in paths] == [rank for kind in ranks for rank in kind]
    assert set(plan.dense) == {path for path in paths if path not in plan.ranks}
    found = outputs(student, images)
    assert found.norm().item() == pytest.approx(norm, rel=1e-5)  # measured: 0 on the machine that made them
    assert found[0, :3].tolist() == pytest.approx(first, rel=1e-4)


# ------------------------------------------------------------------------------------------------------------- the layer


@pytest.mark.parametrize("bias", [True, False])
def test_a_factored_layer_is_two_linear_layers(bias):
    torch.manual_seed(0)
    model = nn.ModuleDict({"layer": nn.Linear(6, 5, bias=bias)})
    layer, before = model["layer"], model["layer"].bias
    calls: list[nn.Module] = []
    layer.register_forward_hook(lambda module, inputs, output: calls.append(module))
    factor(model, "layer", 2)
    assert model["layer"] is layer, "the module that hooks and callers hold"
    assert not isinstance(layer, nn.Linear)
    assert (type(layer.down), type(layer.up)) == (nn.Linear, nn.Linear)
    assert (layer.in_features, layer.out_features, layer.rank) == (6, 5, 2)
    names = ["layer.down.weight", "layer.up.weight"] + ["layer.up.bias"] * bias
    assert list(model.state_dict()) == names
    assert layer.up.bias is before
    assert not hasattr(layer, "weight")
    nn.init.normal_(layer.up.weight)
    x = torch.randn(3, 4, 6)
    expected = x @ layer.down.weight.mT @ layer.up.weight.mT + (before if bias else 0)
    assert torch.allclose(layer(x), expected, atol=1e-6)
    assert calls == [layer]
    assert torch.allclose(x @ layer.effective_weight().mT + (before if bias else 0), expected, atol=1e-6)
    assert "in_features=6, out_features=5, rank=2" in repr(layer)

    dense = nn.Parameter(layer.effective_weight().detach().clone())
    unfactor(model, "layer", dense)
    assert model["layer"] is layer
    assert type(layer) is nn.Linear
    assert list(model.state_dict()) == ["layer.weight"] + ["layer.bias"] * bias
    assert torch.allclose(layer(x), expected, atol=1e-6)


def test_a_layer_that_is_something_else_cannot_be_factored():
    model = nn.ModuleDict({"layer": nn.modules.linear.NonDynamicallyQuantizableLinear(6, 5)})
    with pytest.raises(UserError, match="which cannot become a FactoredLinear"):
        factor(model, "layer", 2)
    assert list(model.state_dict()) == ["layer.weight", "layer.bias"]


def test_the_plan_says_which_keys_go():
    teacher = build("vit")
    (plan,) = plan_transforms(teacher, [LowRank(rank=4, targets=("mlp.fc1",))])
    student = compress(teacher, [LowRank(rank=4, targets=("mlp.fc1",), metric="weights")])
    gone = teacher.state_dict().keys() - student.state_dict().keys()
    assert gone == plan.drops(teacher) == {f"blocks.{i}.mlp.fc1.{n}" for i in range(4) for n in ("weight", "bias")}
    come = student.state_dict().keys() - teacher.state_dict().keys()
    assert come == {f"blocks.{i}.mlp.fc1.{n}" for i in range(4) for n in ("down.weight", "up.weight", "up.bias")}
    added = {name for name in come if not name.endswith(".bias")}  # the bias was there before
    assert surgery.added_parameters(student) == added


def test_a_student_copies_saves_and_loads(tmp_path):
    student = compress(build("swin"), [LowRank(rank=3, metric="weights")])
    images = images_for(student)
    expected = outputs(student, images)
    for again in (copy.deepcopy(student), load(save(student, tmp_path / "student"))):
        assert torch.equal(outputs(again, images), expected)
        assert sum(isinstance(m, FactoredLinear) for m in again.modules()) == 4 * 6


def test_biases_that_were_to_be_trained_still_are():
    student = compress(build("vit"), [BitFit(), LowRank(rank=3, metric="weights", targets=("mlp.*",))])
    biases = {name for name, _ in student.named_parameters() if name.endswith(".bias")}
    assert "blocks.0.mlp.fc1.up.bias" in biases
    assert biases <= trained_names(student)
    assert biases <= {name for name, p in student.named_parameters() if p.requires_grad}


# ------------------------------------------------------------------------------------------------------ other people's tools


@pytest.fixture
def student():
    return compress(build("vit"), [LowRank(rank=6, metric="weights")])


@pytest.mark.filterwarnings("ignore")  # torch announces that it will move
def test_a_quantiser_reaches_both_layers(student):
    images = images_for(student)
    made = torch.ao.quantization.quantize_dynamic(copy.deepcopy(student), {nn.Linear}, dtype=torch.qint8)
    factored = [m for m in made.modules() if isinstance(m, FactoredLinear)]
    assert len(factored) == 4 * 4
    for layer in factored:
        for inner in (layer.down, layer.up):
            assert isinstance(inner, torch.ao.nn.quantized.dynamic.Linear)
    expected, found = outputs(student, images), outputs(made, images)
    assert not torch.equal(found, expected)
    assert (found - expected).norm() < 0.1 * expected.norm()  # measured 0.012


def test_torch_export_sees_two_products_a_layer(student):
    images = images_for(student)
    exported = torch.export.export(student, (images,))
    assert torch.allclose(exported.module()(images), outputs(student, images), atol=1e-6)
    count = sum(str(node.target) == "aten.linear.default" for node in exported.graph.nodes)
    assert count == 2 * 4 * 4 + 1  # and the classifier
    assert {"blocks.0.mlp.fc1.down.weight", "blocks.0.mlp.fc1.up.weight"} <= exported.state_dict.keys()


def test_lora_libraries_find_both_layers_by_path(student):
    """They look for `nn.Linear`s whose names end with the words they are given, and put a layer of theirs in place of each."""

    class Injected(nn.Module):
        def __init__(self, base: nn.Linear):
            super().__init__()
            self.base_layer = base
            self.a = nn.Linear(base.in_features, 2, bias=False)
            self.b = nn.Linear(2, base.out_features, bias=False)
            nn.init.zeros_(self.b.weight)

        def forward(self, x):
            return self.base_layer(x) + self.b(self.a(x))

    images = images_for(student)
    expected = outputs(student, images)
    found = [n for n, m in student.named_modules() if isinstance(m, nn.Linear) and n.endswith(("fc1.down", "fc1.up"))]
    assert len(found) == 2 * 4
    for path in found:
        student.set_submodule(path, Injected(student.get_submodule(path)))
    assert torch.equal(outputs(student, images), expected)
    nn.init.normal_(student.blocks[0].mlp.fc1.up.b.weight)
    assert not torch.equal(outputs(student, images), expected)


# --------------------------------------------------------------------------------------------------------------- refusals


def test_a_shared_weight_is_not_replaced():
    with pytest.raises(
        UserError, match=r"which the earlier multiplex shares among 2 layers; use `lors`, which keeps that"
    ):
        plan_transforms(build("vit"), [Multiplex(share=2), LowRank(rank=2)])


def test_rank_0_leaves_nothing():
    with pytest.raises(UserError, match=r"rank 0 would leave blocks\.0\.attn\.qkv without a weight"):
        plan_transforms(build("vit"), [LowRank(rank=0)])


@pytest.mark.parametrize("share", [1, (1, 1)])
def test_lors_without_sharing_is_refused_with_the_new_name(share):
    with pytest.raises(ValueError, match=r"share: 1 shares nothing; use `low_rank`.*\(Python: LowRank\)"):
        LORS(share=share, budget={"parameters": 0.5})


RECIPE = """
teacher: {{model: vit_tiny_patch16_224, weights: train}}
data: {{name: digits}}
steps:
  - lors: {{{options}}}
"""


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ("share: 1, rank: 4", r"steps\[0\]\.lors: share: 1 shares nothing; use `low_rank`"),
        ("share: 2, rank: 4, groups: 2", r"steps\[0\]\.lors\.groups: is called terms now; use terms"),
    ],
)
def test_recipes_in_old_words_are_refused_with_the_new_ones(options, words):
    with pytest.raises(RecipeError, match=words):
        parse_recipe(RECIPE.format(options=options))


def test_low_rank_after_lors_on_other_layers_composes():
    teacher = build("vit")
    steps = [
        LORS(rank=2, share=2, targets=("attn.*",), metric="weights"),
        LowRank(rank=4, targets=("mlp.*",), metric="weights"),
    ]
    student = compress(teacher, steps)
    assert outputs(student, images_for(student)).isfinite().all()
    assert len(ties.tied_groups(student)) == 2 * 2
    with pytest.raises(UserError, match=r"low_rank comes after lors: blocks\.0\.attn\.qkv has a low-rank term already"):
        plan_transforms(teacher, [steps[0], LowRank(rank=4)])
