"""Adapters of a frozen backbone: the formulas in plain arithmetic, where they start, what they refuse.

The literature's counts are in tests/test_published.py, exact merging in tests/artifacts/test_merge.py, what every transform must do in
tests/contract/.
"""

from __future__ import annotations

import copy
import re

import pytest
import timm
import torch
from helpers.contract import EXAMPLES, Case, backbones_of, teacher
from helpers.models import build, images_for, outputs, randomise
from torch import Tensor, nn

from compressvit.errors import UserError
from compressvit.model import surgery
from compressvit.model.backbone import describe
from compressvit.transforms import (
    PHM,
    SSF,
    VPT,
    Adapters,
    AdaptFormer,
    Compacter,
    FacT,
    Freeze,
    LoRA,
    RepAdapter,
)
from compressvit.transforms.applying import compress
from compressvit.transforms.bottleneck import AdapterLinear, Bottleneck
from compressvit.transforms.fact import FacTTerm
from compressvit.transforms.lora import LoRATerm
from compressvit.transforms.phm import PHMLinear
from compressvit.transforms.repadapter import RepBottleneck
from compressvit.transforms.ssf import ScaleShift

EXACT = 1e-13  # relative, in float64; measured up to 5e-16


def filled(module: nn.Module, seed: int = 0) -> nn.Module:
    """The module in float64 and eval mode, with random values everywhere."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in module.double().parameters():
            parameter.normal_(generator=generator)
    return module.eval()


def tokens(*shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)


def gap(a: Tensor, b: Tensor) -> float:
    assert a.shape == b.shape
    return ((a - b).abs().max() / b.abs().max()).item()


def randomise_added(model: nn.Module, scale: float = 0.2) -> nn.Module:
    """Move what transforms added, and nothing else."""
    added = surgery.added_parameters(model)
    randomise(nn.ParameterList(p for n, p in model.named_parameters() if n in added), scale)
    return model


# ------------------------------------------------------------------------------------------------------------- the formulas


@pytest.mark.parametrize("scale", [0.7, "learnable"])
def test_an_adapter_is_a_bottleneck_with_a_gelu(scale):
    a = filled(Bottleneck(AdapterLinear(6, 4), AdapterLinear(4, 6), "gelu", scale))
    x = tokens(2, 5, 6)
    h = x @ a.down.weight.T + a.down.bias
    h = h * (1 + torch.erf(h / 2**0.5)) / 2
    assert gap(a(x), a.scale * (h @ a.up.weight.T + a.up.bias)) < EXACT


@pytest.mark.parametrize("backbone", ["vit", "swin", "convnext", "convnext_conv_mlp"])
def test_adapters_act_on_what_leaves_a_sublayer(backbone):
    plain = build(backbone).double()
    model = randomise_added(compress(plain, [Adapters(width=3)]))
    for path in model._compression.plans[0].widths:
        seen = {}
        ours, theirs = model.get_submodule(path), plain.get_submodule(path)
        hook = ours.register_forward_hook(lambda m, i, k, o, seen=seen: seen.update(i=i, k=k, o=o), with_kwargs=True)
        outputs(model, images_for(model).double())
        hook.remove()
        h = theirs(*seen["i"], **seen["k"])
        last = backbone != "convnext_conv_mlp"
        h, out = (h, seen["o"]) if last else (h.movedim(1, -1), seen["o"].movedim(1, -1))
        assert gap(out, h + ours.adapter(h)) < EXACT
        assert gap(out, h) > 1e-2


def parallel_inputs(backbone: str, block: nn.Module, x: Tensor) -> tuple[Tensor, Tensor]:
    """u and `LN u` of a timm block, channels last: what enters its second half, and what its MLP reads."""
    if backbone.startswith("convnext"):
        mixed = block.conv_dw(x)
        normed = block.norm(mixed).movedim(1, -1) if block.use_conv_mlp else block.norm(mixed.movedim(1, -1))
        return x.movedim(1, -1), normed
    attended = block._attn(block.norm1(x)) if backbone == "swin" else block.ls1(block.attn(block.norm1(x)))
    return x + attended, block.norm2(x + attended)


@pytest.mark.wide_unless(lambda backbone: backbone in ("vit", "convnext"))
@pytest.mark.parametrize(
    ("spec", "s"), [(AdaptFormer(width=3, scale=0.7), 0.7), (AdaptFormer(scale="learnable"), None)]
)
@pytest.mark.parametrize("reads", ["normed", "residual"])
@pytest.mark.parametrize("backbone", ["vit", "dinov2_registers", "swin", "convnext", "convnext_conv_mlp"])
def test_adaptformer_is_a_branch_parallel_to_the_mlp(backbone, reads, spec, s):
    """`y = u + MLP(LN2 u) + s·(ReLU(v Dᵀ + b_D) Uᵀ + b_U)`; LayerScale is the MLP's alone."""
    plain = build(backbone).double()
    model = randomise_added(compress(plain, [spec.model_copy(update={"input": reads})]))
    info = describe(model).blocks[1]  # Swin's shifted one
    shape = {"swin": (*info.resolution, info.width), "convnext": (info.width, 5, 6), "vit": (7, info.width)}
    x = tokens(2, *shape[describe(model).family.name])
    block, timms = model.get_submodule(info.path), plain.get_submodule(info.path)
    branch = block.adaptformer
    u, normed = parallel_inputs(backbone, timms, x)
    v = normed if reads == "normed" else u
    hidden = (v @ branch.down.weight.T + branch.down.bias).clamp(min=0)
    beside = (hidden @ branch.up.weight.T + branch.up.bias) * (branch.scale if s is None else s)
    if backbone.startswith("convnext"):
        beside = beside.movedim(-1, 1)
    assert gap(block(x), timms(x) + beside) < EXACT
    assert beside.abs().max() > 1e-2


@pytest.mark.parametrize("rank", [None, 1, 2])
def test_a_phm_matrix_is_a_sum_of_kronecker_products(rank):
    layer = filled(PHMLinear(6, 9, 3, rank))
    factors = layer.weight if rank is None else [a @ b for a, b in zip(layer.left, layer.right, strict=True)]
    dense = sum(torch.kron(a, w) for a, w in zip(layer.rule, factors, strict=True))
    assert dense.shape == (9, 6)
    assert gap(layer.dense(), dense) < EXACT
    x = tokens(2, 5, 6)
    assert gap(layer(x), x @ dense.T + layer.bias) < EXACT


@pytest.mark.parametrize(("spec", "shared"), [(Compacter(n=2), True), (PHM(n=2), False)])
def test_compacter_shares_one_rule_among_all_adapters(spec, shared):
    model = compress(build("swin"), [spec])
    rules = [p for n, p in model.named_parameters(remove_duplicate=False) if n.endswith(".rule")]
    assert len(rules) == 2 * 2 * 6  # two projections of two adapters of six blocks
    assert len({id(rule) for rule in rules}) == (1 if shared else len(rules))


@pytest.mark.parametrize("groups", [1, 2, 4])
def test_a_repadapter_is_block_diagonal_and_affine(groups):
    width, hidden, s = 12, 8, 0.5
    layer = filled(RepBottleneck(width, hidden, groups, s))
    up = torch.zeros(width, hidden, dtype=torch.float64)
    for row in range(width):
        for column in range(hidden):
            group, out_of, in_of = row * groups // width, row % (width // groups), column % (hidden // groups)
            if column * groups // hidden == group:
                up[row, column] = layer.up_weight[group, out_of, in_of]
    x = tokens(2, 5, width)
    inner = x @ layer.down.weight.T + layer.down.bias
    assert gap(layer(x), s * (inner @ up.T + layer.up_bias)) < EXACT
    r, c = layer.as_affine()
    assert gap(x @ r.T + c, x + layer(x)) < EXACT


@pytest.mark.parametrize("parts", [(0,), (2,), (0, 2), (0, 1, 2)])
def test_a_lora_term_is_its_product_on_the_parts_that_were_asked_for(parts):
    term = filled(LoRATerm(6, 4, 2, parts, 3, scale=1.5))
    x = tokens(2, 5, 6)
    product = term.product()
    assert gap(term(x), x @ product.T) < EXACT
    for part, rows in enumerate(product.split(4)):
        if part in parts:
            k = parts.index(part)
            assert gap(rows, 1.5 * term.up[k] @ term.down[k]) < EXACT
        else:
            assert not rows.any()


def test_lora_of_q_and_v_leaves_k():
    plain = build("vit").double()
    model = randomise_added(compress(plain, [LoRA(rank=2, alpha=3.0)]))
    x, path = tokens(2, 5, 48), "blocks.1.attn.qkv"
    ours, theirs = (m.get_submodule(path)(x).chunk(3, -1) for m in (model, plain))
    assert torch.equal(ours[1], theirs[1])
    term = model.get_submodule(path).lora
    for third, down, up in zip((0, 2), term.down, term.up, strict=True):
        assert gap(ours[third], theirs[third] + 3.0 / 2 * x @ down.T @ up.T) < EXACT
        assert gap(ours[third], theirs[third]) > 1e-2


@pytest.mark.parametrize("tucker", [False, True], ids=["tt", "tk"])
@pytest.mark.parametrize(("slots", "on_inputs"), [(3, False), (1, False), (4, False), (4, True)])
def test_a_fact_term_is_its_product_slot_by_slot(slots, on_inputs, tucker):
    width, r, s = 6, 3, 0.5
    term = filled(FacTTerm(width, r, slots, on_inputs, s, tucker))
    x = tokens(2, 5, width * slots if on_inputs else width)
    product = term.product()
    assert gap(term(x), x @ product.T) < EXACT
    for j, slot in enumerate(product.split(width, dim=1 if on_inputs else 0)):
        sigma = sum(term.mix[j, k] * term.core[k] for k in range(r)) if tucker else term.sigma[j]
        assert gap(slot, s * term.v @ sigma @ term.u) < EXACT


@pytest.mark.parametrize("form", ["tt", "tk"])
def test_fact_shares_its_outer_factors_within_a_width(form):
    model = compress(build("swin"), [FacT(form=form, rank=3)])
    terms = {n.removesuffix(".fact"): m for n, m in model.named_modules() if isinstance(m, FacTTerm)}
    private, common = ("sigma", ("u", "v")) if form == "tt" else ("mix", ("u", "v", "core"))
    for name in common:
        for stage in range(2):
            assert len({id(getattr(t, name)) for path, t in terms.items() if path.startswith(f"layers.{stage}.")}) == 1
        assert len({id(getattr(t, name)) for t in terms.values()}) == 2
    assert len({id(getattr(t, private)) for t in terms.values()}) == len(terms) == 4 * 6


@pytest.mark.parametrize("first", [True, False])
def test_a_scale_and_shift_is_of_the_channels(first):
    layer = filled(ScaleShift(6, channels_first=first))
    z = tokens(2, 6, 3, 4)
    out = layer(z if first else z.movedim(1, -1))
    for channel in range(6):
        expected = layer.scale[channel] * z[:, channel] + layer.shift[channel]
        assert gap(out[:, channel] if first else out[..., channel], expected) < EXACT


def test_settings_reach_the_layers():
    adapter = compress(teacher("vit"), [RepAdapter(width=4, groups=4, scale=0.3, dropout=0.2)]).blocks[0].mlp.repadapter
    assert (adapter.scale, adapter.dropout.p, adapter.up_weight.shape[0]) == (0.3, 0.2, 4)
    term = compress(teacher("vit"), [FacT(rank=3, scale=0.3)]).blocks[0].mlp.fc2.fact
    assert (term.scale, term.tucker, term.on_inputs, term.u.shape) == (0.3, True, True, (3, 48))
    adapter = compress(teacher("vit"), [Adapters(width=3, bias=True, act="relu")]).blocks[0].mlp.adapter
    assert (type(adapter.act), adapter.down.bias.shape, adapter.up.bias.shape) == (nn.ReLU, (3,), (48,))


# ---------------------------------------------------------------------------------------------------- the start: the identity

STARTS = [
    pytest.param(spec, backbone, id=f"{name}{index}-{backbone}")
    for name in ["adapters", "phm", "compacter", "adaptformer", "repadapter", "lora", "ssf", "fact", "freeze", "bitfit"]
    for index, spec in enumerate(EXAMPLES[name])
    for backbone in backbones_of(spec)
]


@pytest.mark.wide_unless(lambda backbone: backbone == "vit")
@pytest.mark.parametrize(("spec", "backbone"), STARTS)
def test_the_model_is_unchanged_at_the_start_and_not_behind_it(spec, backbone):
    model = Case(spec, backbone).student()
    images = images_for(model)
    before = outputs(teacher(backbone), images)
    assert gap(outputs(model, images), before) <= 1e-6  # measured 0
    added = surgery.added_parameters(model)
    assert bool(added) == (spec.name not in ("freeze", "bitfit"))
    if added:
        assert gap(outputs(randomise_added(model), images), before) > 1e-3  # measured at least 3e-3


def test_what_starts_at_random_comes_from_the_seed():
    made = []
    for seed in (0, 0, 1):
        torch.manual_seed(seed)
        made.append(compress(teacher("vit"), [SSF(std=0.02)]).state_dict()["blocks.0.mlp.fc1.ssf.scale"])
    assert torch.equal(made[0], made[1])
    assert not torch.equal(made[0], made[2])
    assert abs(made[0].std().item() - 0.02) < 0.005


def test_the_dropout_of_a_repadapter_is_for_training():
    layer = filled(RepBottleneck(12, 8, 2, 1.0, dropout=0.5))
    x = tokens(2, 5, 12)
    assert torch.equal(layer(x), layer(x))
    training = copy.deepcopy(layer).train()
    assert not torch.equal(training(x), training(x))


# --------------------------------------------------------------------------------------------------------------- bad input


@pytest.mark.parametrize(
    ("backbone", "spec", "words"),
    [
        ("vit", RepAdapter(width=8, groups=3), r"repadapter\.groups=3 does not divide the 8 of width; it can be one of \[1, 2, 4, 8\]"),
        ("swin", RepAdapter(width=9, groups=3), r"does not divide the 16 of layers\.0\.blocks\.0; it can be one of \[1\]"),
        ("convnext", RepAdapter(place="attention"), r"blocks of convnext_tiny have no attention; use place=block"),
        ("vit", PHM(n=5), r"phm\.n=5 does not divide the width 48 of blocks\.0\.attn .* n can be one of \[1, 2, 3, 6\] there"),
        ("vit", Compacter(n=4), r"compacter\.n=4 does not divide the bottleneck 6 of blocks\.0\.attn .* one of \[1, 2, 3, 6\]"),
        ("convnext", Adapters(places=("attn",)), r"adapters\.places asks for attn, but the blocks of convnext_tiny have mlp"),
        ("convnext", LoRA(), r"lora\.targets: q, v are projections of attention, which .* convnext_tiny do not have; they have fc1, fc2"),
        ("vit", LoRA(rank=49), r"lora\.rank=49 is more than blocks\.0\.attn\.qkv, \(144, 48\), can have; the largest is 48"),
        ("vit", FacT(rank=49), r"fact\.rank=49 is more than the width 48 of blocks\.0"),
        ("headless", Freeze(train="head"), r"freeze\.train=head .* has none; give the student one with student\.head=new"),
        ("convnext", Freeze(train="attention"), r"blocks of convnext_tiny have no attention; train mlp or head"),
    ],
)  # fmt: skip
def test_what_does_not_fit_is_refused_with_a_way_out(backbone, spec, words):
    with pytest.raises(UserError, match=words):
        spec.plan(build(backbone))


@pytest.mark.parametrize("kind", [Adapters, PHM, Compacter])
def test_a_ratio_that_leaves_no_neuron_is_refused_with_one_that_does(kind):
    model = build("vit")
    with pytest.raises(UserError, match=r"ratio=0\.02 of the 48 channels of blocks\.0 leaves no neuron") as refusal:
        kind(ratio=0.02).plan(model)
    enough = float(re.search(r"at least ([\d.]+)", str(refusal.value))[1])
    more = {} if kind is Adapters else {"n": 1}
    assert set(kind(ratio=enough, **more).plan(model).widths.values()) == {1}


@pytest.mark.parametrize(
    ("kind", "given", "words"),
    [
        (Adapters, {"width": 0}, "width: should be greater than or equal to 1"),
        (Adapters, {"width": 4, "ratio": 0.5}, r"width=4 and ratio=0\.5 are both given; remove one of them"),
        (Adapters, {"places": ()}, "places: should have at least 1 item"),
        (AdaptFormer, {"width": 0}, "width: should be greater than or equal to 1"),
        (RepAdapter, {"groups": 0}, "groups: should be greater than or equal to 1"),
        (RepAdapter, {"dropout": 1}, "dropout: should be less than 1"),
        (LoRA, {"rank": 0}, "rank: should be greater than or equal to 1"),
        (PHM, {"n": 0}, "n: should be greater than or equal to 1"),
        (FacT, {"rank": 0}, "rank: should be greater than or equal to 1"),
        (VPT, {"prompts": 0}, "prompts: should be greater than or equal to 1"),
    ],
)
def test_numbers_that_make_no_sense_are_refused_by_name(kind, given, words):
    with pytest.raises(UserError, match=words):
        kind(**given)


def test_an_mlp_of_three_layers_is_adapted_in_both_first_ones():
    sizes = {"img_size": 28, "embed_dim": 48, "depth": 1, "num_heads": 2}
    with torch.device("meta"):
        model = timm.create_model("aimv2_large_patch14_224", **sizes)
    assert set(LoRA(rank=2, targets=("fc1",)).plan(model).layers) == {"blocks.0.mlp.fc1_g", "blocks.0.mlp.fc1_x"}
    with pytest.raises(UserError, match=r"48×48 slots, which blocks\.0\.mlp\.fc1_g, \(132, 48\), is not made of"):
        FacT(rank=2).plan(model)
    for other in (RepAdapter(width=4), RepAdapter(width=4, place="attention"), LoRA(rank=2), Adapters(ratio=0.25)):
        other.plan(model)
