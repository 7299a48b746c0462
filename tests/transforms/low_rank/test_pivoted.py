"""The pivoted form of `low_rank`: the function of two factors in r² fewer numbers, for everything that takes two factors."""

from __future__ import annotations

import copy
import json
import pickle

import pytest
import torch
from helpers.models import build, images_for, outputs
from torch import nn

from compressvit import BitFit, LowRank, UserError, compress, load, merge, save
from compressvit.fitting.lowrank import spectrum
from compressvit.fitting.pivoted import LARGEST
from compressvit.model import cost, surgery, ties
from compressvit.model.backbone import input_size
from compressvit.model.linear import effective_weight
from compressvit.testing.pairs import compose_or_refuse
from compressvit.transforms import SSF, LoRA
from compressvit.transforms.align import matched_weights
from compressvit.transforms.applying import materialise, plan_transforms
from compressvit.transforms.low_rank.layer import Factored, factor, set_bias_, unfactor
from compressvit.transforms.low_rank.pivoted_layer import (
    PivotedInputs,
    PivotedOutputs,
    Split,
    channels,
    is_pivoted,
    pivot,
)
from compressvit.transforms.record import compression_of, trained_names

WEIGHTS = {"metric": "weights"}


def layer_of(kind: str, inputs: int, outputs: int, bias: bool = True, seed: int = 0) -> nn.ModuleDict:
    torch.manual_seed(seed)
    options = {"bias": bias, "dtype": torch.float64}
    layer = nn.Linear(inputs, outputs, **options) if kind == "linear" else nn.Conv2d(inputs, outputs, 1, **options)
    return nn.ModuleDict({"layer": layer})


def factors_of(inputs: int, outputs: int, rank: int, seed: int = 1) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return spectrum(torch.randn(outputs, inputs, generator=generator, dtype=torch.float64)).factors(rank)


# ------------------------------------------------------------------------------------------------------------- the layer


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("kind", ["linear", "conv"])
@pytest.mark.parametrize(("inputs", "outputs"), [(6, 11), (11, 6), (7, 7)])
def test_a_pivoted_layer_computes_what_two_factors_do(kind, inputs, outputs, bias):
    model = layer_of(kind, inputs, outputs, bias)
    layer, before = model["layer"], model["layer"].bias.detach().clone() if bias else None
    up, down = factors_of(inputs, outputs, 4)
    x = torch.randn(3, inputs, 2, 5, dtype=torch.float64).movedim(*((1, -1) if kind == "linear" else (1, 1)))
    dense = copy.deepcopy(layer)
    with torch.no_grad():
        dense.weight.copy_((up @ down).reshape(dense.weight.shape))
    expected = dense(x)
    calls: list[nn.Module] = []
    hook = layer.register_forward_hook(lambda module, inputs, output: calls.append(module))
    pivot(model, "layer", 4)
    assert model["layer"] is layer, "the module that hooks and callers hold"
    layer.set_factors(up, down)
    assert isinstance(layer, PivotedInputs if inputs <= outputs else PivotedOutputs), "the shorter side is put in order"
    plain = nn.Linear if kind == "linear" else nn.Conv2d
    assert (type(layer.down), type(layer.up)) == (plain, plain)
    assert (layer.in_features, layer.out_features, layer.rank) == (inputs, outputs, 4)
    assert sum(p.numel() for p in layer.parameters()) == 4 * (inputs + outputs - 4) + outputs * bias
    assert (layer(x) - expected).abs().max() < 1e-12 * expected.abs().max()  # measured 8e-16
    assert calls == [layer]
    hook.remove()
    assert (layer.effective_weight() - up @ down).abs().max() < 1e-12  # measured 2e-15
    assert (layer.bias is None) == (not bias)
    coefficients = layer.down.weight if inputs <= outputs else layer.up.weight
    assert coefficients.abs().max() <= LARGEST
    assert "rank=4" in repr(layer)
    for again in (copy.deepcopy(layer), pickle.loads(pickle.dumps(model))["layer"]):
        assert torch.equal(again(x), layer(x))
    if bias:
        assert torch.allclose(layer.bias, before)
        set_bias_(layer, before + 1)
        assert torch.allclose(layer(x), expected + 1)
        set_bias_(layer, before)
    unfactor(model, "layer", nn.Parameter(layer.effective_weight().detach()))
    assert type(layer) is plain
    assert list(model.state_dict()) == ["layer.weight"] + ["layer.bias"] * bias
    assert torch.allclose(layer(x), expected)


@pytest.mark.parametrize(("inputs", "outputs"), [(6, 11), (11, 6)])
def test_a_bias_that_was_frozen_stays_frozen(inputs, outputs):
    model = layer_of("linear", inputs, outputs)
    model["layer"].bias.requires_grad_(False)
    pivot(model, "layer", 3)
    biases = [p for name, p in model.named_parameters() if name.endswith("bias")]
    assert biases
    assert not any(p.requires_grad for p in biases)
    unfactor(model, "layer", nn.Parameter(torch.zeros(outputs, inputs)))
    assert not model["layer"].bias.requires_grad


def rounded(layer: nn.Linear) -> None:
    """The weight in 8 bits a row, symmetric, as weight-only quantisers store it."""
    with torch.no_grad():
        scale = layer.weight.abs().amax(dim=1, keepdim=True) / 127
        layer.weight.copy_((layer.weight / scale).round() * scale)


# The error of the pivoted form over that of two factors. On a DINOv2 ViT-S/14 and its own inputs, layers of blocks 0, 5 and 11 at ranks
# that are about half of their parameters: float32 0.8 to 1.7, half precision 1.1 to 2.5, bfloat16 0.8 to 2.2, weights of 8 bits 0.7 to 3.0.
@pytest.mark.parametrize(
    ("precision", "most"),
    [("float32", 2), ("float16", 2), ("bfloat16", 2), ("int8", 2)],  # measured up to 1.4, 1.6, 1.6 and 1.6
)
@pytest.mark.parametrize(("inputs", "outputs"), [(96, 288), (288, 96), (96, 96)])
def test_rounding_is_not_amplified(inputs, outputs, precision, most):
    generator = torch.Generator().manual_seed(0)
    left, _, right = torch.linalg.svd(torch.randn(outputs, inputs, generator=generator).double(), full_matrices=False)
    values = torch.logspace(0, -2, 96, dtype=torch.float64)
    up, down = spectrum(left * values @ right).factors(40)
    x = torch.randn(200, inputs, generator=generator).double()
    errors = []
    for make in (factor, pivot):
        model = layer_of("linear", inputs, outputs)
        make(model, "layer", 40)
        layer = model["layer"]
        layer.set_factors(up, down)
        expected = layer(x)
        if precision == "int8":
            rounded(layer.down), rounded(layer.up)
            found = layer(x)
        else:
            dtype = getattr(torch, precision)
            found = layer.to(dtype)(x.to(dtype)).double()
        errors.append(((found - expected).norm() / expected.norm()).item())
    assert 0 < errors[1] < most * errors[0], errors
    assert errors[1] < {"float32": 1e-6, "float16": 2e-3, "bfloat16": 2e-2, "int8": 5e-2}[precision]


# ----------------------------------------------------------------------------------------------------------- the student


@pytest.mark.wide_unless(lambda backbone: backbone != "vit")
@pytest.mark.parametrize(
    ("backbone", "options"),
    [("vit", {"metric": "outputs"}), ("convnext_conv_mlp", WEIGHTS)],
    ids=["in_order", "conv"],
)
def test_a_student_computes_what_one_of_two_factors_does(backbone, options):
    teacher = build(backbone)
    images = images_for(teacher, 12)
    two, one = (
        compress(
            teacher, [LowRank(rank=5, pivoted=form, **options)], calibration=images if options != WEIGHTS else None
        )
        for form in (False, True)
    )
    difference = (outputs(one) - outputs(two)).abs().max() / outputs(two).abs().max()
    assert difference < 1e-5  # measured 2e-7
    layers = [module for module in one.modules() if is_pivoted(module)]
    assert len(layers) == sum(isinstance(module, Factored) for module in two.modules()) > 8
    assert ties.count_parameters(two) - ties.count_parameters(one) == len(layers) * 5**2
    size = input_size(teacher)
    assert cost.macs(one, size) < cost.macs(two, size)
    ledgers = [compression_of(student).ledger for student in (two, one)]
    for before, after in zip(*ledgers, strict=True):
        kinds = [entry.change.removesuffix(" rank 5 in place of the weight") for entry in (before, after)]
        assert kinds == ["low", "pivoted"]
        assert after.weight_error == pytest.approx(before.weight_error, rel=1e-3)


@pytest.mark.wide_unless(lambda unit: unit == "parameters")
@pytest.mark.parametrize("unit", ["parameters", "bytes", "macs"])
def test_the_same_budget_leaves_less_error(unit):
    teacher = build("vit")
    students = [
        compress(teacher, [LowRank(budget={unit: 0.5}, **WEIGHTS, **options)]) for options in ({"pivoted": False}, {})
    ]
    before, plan = (compression_of(student).plans[0] for student in students)
    assert (before.pivoted, plan.pivoted) == (False, True)
    lost = [sum(entry.weight_error**2 for entry in compression_of(s).ledger if entry.weight_error) for s in students]
    assert lost[1] < lost[0]  # measured 0.93, 0.97 and 0.93 of it


def test_what_is_given_decides_the_form():
    assert LowRank(budget={"macs": 0.5}).pivots
    assert not LowRank(budget={"macs": 0.5}, pivoted=False).pivots
    assert not LowRank(rank=3).pivots
    assert LowRank(rank=3, pivoted=True).pivots
    assert LowRank(rank=3).with_budget("macs", 0.5).pivots


def test_a_student_saves_and_loads(tmp_path):
    student = compress(build("swin"), [LowRank(rank=3, pivoted=True, **WEIGHTS)])
    images = images_for(student)
    assert cost.file_bytes(student) == (save(student, tmp_path / "student") / "model.safetensors").stat().st_size
    again = load(tmp_path / "student")
    assert torch.equal(outputs(again, images), outputs(student, images))
    assert sum(is_pivoted(module) for module in again.modules()) == 4 * 6
    path = "layers.0.blocks.0.mlp.fc2.join.order"
    state = student.state_dict()
    assert state[path].dtype == torch.int64
    for wrong in (state[path] + 1, torch.zeros_like(state[path])):
        with pytest.raises(UserError, match=f"{path} is damaged: it is no order of 16 channels"):
            student.load_state_dict({**state, path: wrong})


def test_artifacts_from_before_have_two_factors(tmp_path):
    student = compress(build("vit"), [LowRank(rank=3, **WEIGHTS)])
    file = save(student, tmp_path / "student") / "compressvit.json"
    manifest = json.loads(file.read_text())
    assert manifest["transforms"][0]["plan"].pop("pivoted") is False
    del manifest["checksum"]
    file.write_text(json.dumps(manifest))
    images = images_for(student)
    assert torch.equal(outputs(load(tmp_path / "student"), images), outputs(student, images))


@pytest.mark.parametrize(("backbone", "into"), [("vit", merge), ("convnext_conv_mlp", materialise)])
def test_it_folds_into_plain_layers(backbone, into):
    student = compress(build(backbone), [LowRank(rank=3, pivoted=True, **WEIGHTS)])
    for plain in (into(student),):
        assert {type(m) for m in plain.modules()} == {type(m) for m in build(backbone).modules()}
        assert not surgery.added_modules(plain)
        assert (outputs(plain) - outputs(student)).abs().max() < 1e-5  # measured 3e-7


@pytest.mark.wide_unless(lambda spec: spec.name == "lora")
@pytest.mark.parametrize(
    ("spec", "backbone"),
    [(SSF(std=0.1), "vit"), (SSF(std=0.1), "convnext_conv_mlp"), (LoRA(rank=2, targets=("fc1", "fc2")), "vit")],
    ids=["ssf-vit", "ssf-conv", "lora-vit"],
)
def test_adapters_work_on_it(spec, backbone):
    assert compose_or_refuse(LowRank(rank=3, pivoted=True, **WEIGHTS), spec, backbone) is None


def test_biases_that_were_to_be_trained_still_are():
    student = compress(build("vit"), [BitFit(), LowRank(rank=3, pivoted=True, targets=("mlp.*",), **WEIGHTS)])
    biases = {name for name, _ in student.named_parameters() if name.endswith(".bias")}
    assert {"blocks.0.mlp.fc1.up.bias", "blocks.0.mlp.fc2.up.bias", "blocks.0.mlp.fc2.down.bias"} <= biases
    assert biases <= trained_names(student)
    assert {name for name, p in student.named_parameters() if p.requires_grad} == trained_names(student)


def test_blocks_are_matched_by_what_their_layers_compute():
    student = compress(build("vit"), [LowRank(rank=3, pivoted=True, **WEIGHTS)])
    for name, weight in matched_weights(student, "blocks.0", "blocks.0").items():
        assert torch.allclose(weight, effective_weight(student.get_submodule(f"blocks.0.{name}")), atol=1e-6)


def test_a_graph_has_two_products_a_layer():
    model = nn.Sequential(nn.Linear(12, 20), nn.Linear(20, 12))
    pivot(model, "0", 4), pivot(model, "1", 4)
    model[0].set_factors(*factors_of(12, 20, 4))
    model[1].set_factors(*factors_of(20, 12, 4))
    x = torch.randn(6, 5, 12)
    program = torch.export.export(model, (x[:2],), dynamic_shapes=({0: torch.export.Dim("batch", min=1)},))
    assert torch.allclose(program.module()(x), model(x), atol=1e-6)
    assert sum(str(node.target) == "aten.linear.default" for node in program.graph.nodes) == 4
    for capture in (torch.fx.symbolic_trace, torch.jit.script):
        assert torch.equal(capture(model)(x), model(x))


# --------------------------------------------------------------------------------------------------------------- refusals


def test_the_full_rank_saves_nothing():
    spec = LowRank(rank=48, pivoted=True)
    words = r"low_rank\.pivoted: rank 48 is the full rank of blocks\.0\.attn\.qkv, .* give a rank of at most 47"
    with pytest.raises(UserError, match=words):
        plan_transforms(build("vit"), [spec])


def test_noise_has_no_rows_to_keep():
    with pytest.raises(ValueError, match="pivoted: true stores rows of the teacher's weights, which init: scratch"):
        LowRank(rank=3, init="scratch", pivoted=True)


def test_channels_are_gathered_where_that_is_faster_and_selected_in_graphs():
    x = torch.randn(2, 3, 5, 7, dtype=torch.float64, requires_grad=True)
    for dim, count in ((-1, 7), (3, 7), (1, 3), (0, 2)):
        order = torch.randperm(count)[: count - 1]
        assert torch.equal(channels(x, dim, order), x.index_select(dim, order))
    assert torch.autograd.gradcheck(lambda x: channels(x, -1, torch.tensor([4, 0, 6])), x)
    split = Split(7, 3, dim=-1)
    called = [str(node.target) for node in torch.export.export(split, (x.detach(),)).graph.nodes]
    assert sum("index_select" in name for name in called) == 2
    assert not any("gather" in name for name in called)
