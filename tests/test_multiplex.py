"""Weight multiplexing and iRPE: the published figures, the arithmetic against a plain re-writing, and what is refused.

The number in the comment beside a tolerance is the error seen, the largest over the parameters of that test.
"""

from __future__ import annotations

import copy
import functools
import itertools
import math

import pytest
import timm
import torch
from conftest import BACKBONES, SWIN, VIT, build, images_for
from pydantic import ValidationError
from timm.layers import Attention
from torch import Tensor, nn

from compressvit import surgery, ties
from compressvit.backbone import describe
from compressvit.errors import UserError
from compressvit.layers.attention import ExplicitAttention, HeadMixing
from compressvit.layers.block import SlottedBlock, TokenConv
from compressvit.pipeline import compress, compression_of, transform_
from compressvit.plan import RecipePlan, plan_recipe
from compressvit.recipe import load_recipe
from compressvit.transforms import IRPE, Multiplex, Transform
from compressvit.transforms.irpe import ContextualKeyPosition, bucket_ids, piecewise_index

EVERYTHING = {"head_mixing": True, "mixing_bias": True, "mlp_conv": 3}


def blocks_of(model: nn.Module) -> list[nn.Module]:
    return [model.get_submodule(info.path) for info in describe(model).blocks]


@torch.no_grad()
def randomise(module: nn.Module, scale: float = 0.2, seed: int = 4) -> None:
    """Move every parameter, so that nothing is zero, one, or the identity."""
    generator = torch.Generator().manual_seed(seed)
    for parameter in module.parameters():
        parameter.add_(scale * torch.randn(parameter.shape, generator=generator, dtype=parameter.dtype))


@torch.no_grad()
def equal_within_stages(model: nn.Module) -> nn.Module:
    """Give all blocks of a stage the attention and MLP of its first; norms and LayerScale stay their own."""
    for stage in describe(model).stages:
        first = model.get_submodule(stage[0].path)
        for info in stage[1:]:
            block = model.get_submodule(info.path)
            block.attn.load_state_dict(first.attn.state_dict())
            block.mlp.load_state_dict(first.mlp.state_dict())
    return model


@torch.no_grad()
def gap(a: nn.Module, b: nn.Module) -> float:
    images = images_for(a)
    return (a(images) - b(images)).abs().max().item()


# ----------------------------------------------------------------------------------------------- a student at its start


@pytest.mark.parametrize("init", ["mean", "first"])
@pytest.mark.parametrize("name", BACKBONES)
def test_student_of_a_teacher_with_equal_layers_is_the_teacher(name, init):
    teacher = equal_within_stages(build(name))
    student = compress(teacher, [Multiplex(share=2, init=init, **EVERYTHING)])
    assert ties.tied_groups(student)
    assert gap(student, teacher) < 1e-5  # seen 1.2e-07
    weights = [block.attn.qkv.weight for block in blocks_of(student)]
    assert all(
        torch.equal(ours, block.attn.qkv.weight) for ours, block in zip(weights, blocks_of(teacher), strict=True)
    )


@pytest.mark.parametrize("name", BACKBONES)
def test_transforms_alone_change_nothing_at_the_start(name):
    teacher = build(name)
    student = compress(teacher, [Multiplex(share=1, **EVERYTHING)])
    assert not ties.tied_groups(student)
    assert gap(student, teacher) < 1e-5  # seen 2.4e-07
    randomise(student)
    assert gap(student, teacher) > 1e-3, "the comparison above could not fail"


@pytest.mark.parametrize("name", ["vit", "swin"])
def test_shared_values_are_the_mean_or_the_first_and_norms_stay_private(name):
    teacher = build(name)
    for init in ("mean", "first"):
        student = compress(teacher, [Multiplex(share=2, init=init)])
        blocks = [(ours, theirs) for ours, theirs in zip(blocks_of(student), blocks_of(teacher), strict=True)]
        shared = 0
        for (a, teacher_a), (b, teacher_b) in zip(blocks[::2], blocks[1::2], strict=True):
            for part in ("attn", "mlp"):
                pairs = zip(
                    getattr(teacher_a, part).named_parameters(), getattr(teacher_b, part).parameters(), strict=True
                )
                for (tail, x), y in pairs:
                    ours = getattr(a, part).get_parameter(tail)
                    assert ours is getattr(b, part).get_parameter(tail), f"{part}.{tail} is not shared"
                    expected = (x.double() + y.double()) / 2 if init == "mean" else x
                    assert torch.equal(ours, expected.float())
                    shared += 1
        assert shared == 2 * len(blocks) // 4 * (9 if name == "swin" else 8)
        for ours, theirs in blocks:
            for norm in ("norm1", "norm2"):
                assert torch.equal(getattr(ours, norm).weight, getattr(theirs, norm).weight)
                assert torch.equal(getattr(ours, norm).bias, getattr(theirs, norm).bias)


def test_layer_scale_stays_private():
    teacher = build("dinov2_registers")
    student = compress(teacher, [Multiplex(share=4)])
    scales = [name for name, _ in student.named_parameters() if ".ls" in name]
    assert len(scales) == 8
    assert all(torch.equal(student.get_parameter(n), teacher.get_parameter(n)) for n in scales)


def test_a_later_step_that_shares_nothing_keeps_the_mean():
    teacher = build("vit")
    once = compress(teacher, [Multiplex(share=2, **EVERYTHING)])
    twice = compress(
        teacher,
        [
            Multiplex(share=2, head_mixing=False),
            Multiplex(share=1, **EVERYTHING),
            Multiplex(share=1, head_mixing=False),
        ],
    )
    assert once.state_dict().keys() == twice.state_dict().keys()
    assert all(torch.equal(t, twice.state_dict()[n]) for n, t in once.state_dict().items())
    assert ties.tied_groups(once) == ties.tied_groups(twice)


@pytest.mark.parametrize("name", BACKBONES)
def test_scratch_leaves_nothing_of_the_teacher(name):
    students = []
    for seed in (0, 1):
        teacher = build(name, seed)
        torch.manual_seed(2)
        students.append(compress(teacher, [Multiplex(share=2, init="scratch", **EVERYTHING)]))
    a, b = (s.state_dict() for s in students)
    assert all(torch.equal(a[n], b[n]) for n in a), "two teachers, one seed: the students must be equal"
    teacher = build(name).state_dict()
    same = [n for n in teacher if torch.equal(a[n], teacher[n])]
    assert same == []
    for path, module in students[0].named_modules():
        if isinstance(module, nn.Linear):
            # a truncated normal of std 0.02 over at least 160 values; seen 0.0191 to 0.0219
            assert 0.017 < module.weight.std() < 0.0235, path
            assert module.bias is None or not module.bias.any()
        elif isinstance(module, nn.LayerNorm):
            assert (module.weight == 1).all()
            assert not module.bias.any()
    mixes = [m for m in students[0].modules() if isinstance(m, HeadMixing)]
    assert len(mixes) == 2 * len(describe(students[0]).blocks)
    assert all(torch.equal(m.weight, torch.eye(len(m.weight))) for m in mixes), (
        "form: identity, whatever the rest starts from"
    )


def test_scratch_after_irpe_keeps_the_zero_table():
    student = compress(build("vit"), [IRPE(), Multiplex(share=2, init="scratch")])
    tables = [b.attn.rpe_k.table for b in blocks_of(student)]
    assert len(tables) == 4
    assert not any(t.any() for t in tables)


def test_reference_form_starts_from_noise():
    torch.manual_seed(0)
    args = {**VIT, "embed_dim": 128, "num_heads": 32, "depth": 8}
    teacher = timm.create_model("vit_tiny_patch16_224", **args)
    student = compress(teacher, [Multiplex(share=2, mixing_bias=True, mlp_conv=7, form="reference")])
    mixes = [m for b in blocks_of(student) for m in (b.attn.logit_mix, b.attn.prob_mix)]
    convolutions = [b.mlp_conv.conv for b in blocks_of(student)]
    for modules, count in ((mixes, 16 * 32 * 32), (convolutions, 8 * 128 * 49)):
        noise = torch.cat([m.weight.flatten() for m in modules])
        assert noise.numel() == count
        assert abs(noise.std() - 0.02) < 3 * 0.02 / math.sqrt(2 * count)  # three standard errors; seen one
        assert abs(noise.mean()) < 3 * 0.02 / math.sqrt(count)
        assert not torch.cat([m.bias for m in modules]).any()
    assert all(b.mlp_conv.replace for b in blocks_of(student))
    assert all((b.mlp_conv.norm.weight == 1).all() for b in blocks_of(student))


# ---------------------------------------------------------------------------------------------------- published figures


@functools.cache
def plan_of(recipe: str, *overrides: str) -> RecipePlan:
    """The transforms of a shipped recipe; its phases change no structure, and take long to plan."""
    shipped = load_recipe(recipe, list(overrides))
    transforms = tuple(step for step in shipped.steps if isinstance(step.spec, Transform))
    assert transforms
    return plan_recipe(shipped.model_copy(update={"steps": transforms}))


SWIN_T, SWIN_B, DEIT_B = 28_288_354, 87_768_224, 86_567_656


@pytest.mark.parametrize(
    ("recipe", "overrides", "parameters", "of_teacher"),
    [
        ("mini_swin_t", (), 12_001_765, SWIN_T),
        ("mini_swin_b", (), 46_444_852, SWIN_B),
        ("mini_deit_b", (), 44_060_776, DEIT_B),
        ("mini_deit_b", ("student.args={}",), 44_062_312, DEIT_B),
        ("mini_deit_b", ("steps.0.multiplex.share=12",), 8_636_776, DEIT_B),
        ("mini_deit_b_irpe", (), 44_098_408, DEIT_B),
    ],
)
def test_published_parameters(recipe, overrides, parameters, of_teacher):
    plan = plan_of(recipe, *overrides)
    assert plan.conflicts == []
    assert plan.student.parameters == parameters
    assert plan.teacher.parameters == of_teacher
    assert sum(stage.parameters for stage in plan.stages) == parameters


@pytest.mark.parametrize(("recipe", "giga"), [("mini_swin_t", 4.599), ("mini_swin_b", 15.712)])
def test_published_macs(recipe, giga):
    assert round(plan_of(recipe).student.macs / 1e9, 3) == giga


def test_reference_form_costs_the_same():
    plan, reference = plan_of("mini_swin_t"), plan_of("mini_swin_t", "steps.0.multiplex.form=reference")
    assert plan.student == reference.student


@pytest.mark.parametrize(
    ("architecture", "share", "mixing_bias", "mlp_conv", "parameters"),
    [
        ("swin_tiny_patch4_window7_224", (2, 2, 6, 2), True, 7, 12_001_765),
        ("swin_base_patch4_window7_224", 2, True, 7, 46_444_852),
        ("deit_base_patch16_224", 2, False, 0, 44_062_312),
    ],
)
def test_published_parameters_from_python(architecture, share, mixing_bias, mlp_conv, parameters):
    with torch.device("meta"):
        teacher = timm.create_model(architecture)
    plan = Multiplex(share=share, mixing_bias=mixing_bias, mlp_conv=mlp_conv).plan(teacher)
    plan.apply(teacher)
    assert ties.count_parameters(teacher) == parameters


def test_irpe_adds_64_times_49_parameters_a_layer_to_deit_b():
    with torch.device("meta"):
        teacher = timm.create_model("deit_base_patch16_224", class_token=False, global_pool="avg", fc_norm=False)
    ledger = IRPE().plan(teacher).apply(teacher)
    assert [e.after - e.before for e in ledger] == [64 * 49] * 12


# ---------------------------------------------------------------------------------------------- the arithmetic, plainly


def naive_mlp(mlp: nn.Module, x: Tensor) -> Tensor:
    hidden = x @ mlp.fc1.weight.T + mlp.fc1.bias
    hidden = 0.5 * hidden * (1 + torch.erf(hidden / math.sqrt(2)))
    return hidden @ mlp.fc2.weight.T + mlp.fc2.bias


def naive_norm(norm: nn.Module, x: Tensor) -> Tensor:
    centred = x - x.mean(-1, keepdim=True)
    return centred / torch.sqrt(centred.square().mean(-1, keepdim=True) + norm.eps) * norm.weight + norm.bias


def naive_convolution(conv: nn.Conv2d, grid: Tensor) -> Tensor:
    """Depth-wise, zeros around the grid. grid: (height, width, C)."""
    height, width, _ = grid.shape
    reach = conv.kernel_size[0] // 2
    out = conv.bias.expand_as(grid).clone()
    for i, j in itertools.product(range(height), range(width)):
        for di, dj in itertools.product(range(-reach, reach + 1), repeat=2):
            if 0 <= i + di < height and 0 <= j + dj < width:
                out[i, j] += conv.weight[:, 0, di + reach, dj + reach] * grid[i + di, j + dj]
    return out


def naive_mix(mix: HeadMixing, maps: list[Tensor]) -> list[Tensor]:
    bias = mix.bias if mix.bias is not None else torch.zeros(len(maps), dtype=maps[0].dtype)
    return [sum(mix.weight[g, h] * maps[h] for h in range(len(maps))) + bias[g] for g in range(len(maps))]


def naive_attention(attn: nn.Module, x: Tensor, position: list[Tensor], mask: Tensor | None) -> Tensor:
    """x: (N, C). Add the position terms, mix, add the shift mask, softmax, mix."""
    width = x.shape[-1] // attn.num_heads
    qkv = x @ attn.qkv.weight.T + attn.qkv.bias
    q, k, v = qkv.chunk(3, dim=-1)
    heads = [slice(h * width, (h + 1) * width) for h in range(attn.num_heads)]
    logits = [q[:, h] @ k[:, h].T / math.sqrt(width) + p for h, p in zip(heads, position, strict=True)]
    logits = naive_mix(attn.logit_mix, logits)
    if mask is not None:
        logits = [a + mask for a in logits]
    maps = naive_mix(attn.prob_mix, [a.softmax(-1) for a in logits])
    out = torch.cat([a @ v[:, h] for a, h in zip(maps, heads, strict=True)], dim=-1)
    return out @ attn.proj.weight.T + attn.proj.bias


def naive_mlp_conv(token_conv: nn.Module, grid: Tensor, reference: bool) -> Tensor:
    normed = naive_norm(token_conv.norm, grid)
    return (normed if reference else grid) + naive_convolution(token_conv.conv, normed)


def naive_bucket(distance: int, alpha: float = 1.9) -> int:
    beta, gamma = 2 * alpha, 8 * alpha
    if abs(distance) <= alpha:
        return distance
    size = round(alpha + math.log(abs(distance) / alpha) / math.log(gamma / alpha) * (beta - alpha))
    return int(math.copysign(min(beta, size), distance))


def naive_irpe(table: Tensor, q: Tensor, grid: tuple[int, int], skip: int) -> Tensor:
    """q: (N, D), scaled. A pair with a token that is not on the grid has the last bucket."""
    height, width = grid
    out = q.new_zeros(len(q), len(q))
    for n, m in itertools.product(range(len(q)), repeat=2):
        if min(n, m) < skip:
            out[n, m] = q[n] @ table[:, 49]
    for i, j, a, b in itertools.product(range(height), range(width), range(height), range(width)):
        bucket = (naive_bucket(i - a) + 3) * 7 + naive_bucket(j - b) + 3
        n, m = skip + i * width + j, skip + a * width + b
        out[n, m] = q[n] @ table[:, bucket]
    return out


@pytest.mark.parametrize("form", ["identity", "reference"])
@pytest.mark.parametrize("name", ["vit", "vit_no_class_token", "dinov2_registers"])
def test_vit_block_is_the_formula(name, form):
    torch.manual_seed(0)
    student = compress(build(name), [Multiplex(share=2, form=form, **EVERYTHING), IRPE()]).double()
    block = blocks_of(student)[1]
    randomise(block)
    skip, grid = student.num_prefix_tokens, student.patch_embed.grid_size
    x = torch.randn(skip + grid[0] * grid[1], 48, dtype=torch.float64)
    with torch.no_grad():
        normed = naive_norm(block.norm1, x)
        q = (normed @ block.attn.qkv.weight.T + block.attn.qkv.bias)[:, :48] / math.sqrt(12)
        position = [naive_irpe(block.attn.rpe_k.table, part, grid, skip) for part in q.split(12, dim=-1)]
        scale1, scale2 = (getattr(ls, "gamma", 1.0) for ls in (block.ls1, block.ls2))
        y = x + scale1 * naive_attention(block.attn, normed, position, None)
        tokens = naive_mlp_conv(block.mlp_conv, y[skip:].reshape(*grid, 48), form == "reference").flatten(0, 1)
        # tokens off the grid: the convolution passes them by, the reference's LN does not
        prefix = naive_norm(block.mlp_conv.norm, y[:skip]) if form == "reference" else y[:skip]
        y = torch.cat([prefix, tokens])
        expected = y + scale2 * naive_mlp(block.mlp, naive_norm(block.norm2, y))
        assert (block(x[None])[0] - expected).abs().max() < 1e-12  # seen 1.1e-14


def naive_swin_block(block: nn.Module, x: Tensor, reference: bool) -> Tensor:
    """x: (height, width, C)."""
    height, width, _ = x.shape
    (win, _), (shift, _) = block.window_size, block.shift_size
    normed = naive_norm(block.norm1, x)
    attended = torch.empty_like(x)
    for top, left in itertools.product(range(0, height, win), range(0, width, win)):
        # the window's tokens, as rows and columns of the rolled grid and of the grid itself
        rolled = [(top + i, left + j) for i, j in itertools.product(range(win), repeat=2)]
        tokens = [((i + shift) % height, (j + shift) % width) for i, j in rolled]
        # rolling puts tokens from opposite edges into one window; they must not see each other
        wrapped = [(i + shift >= height, j + shift >= width) for i, j in rolled]
        mask = torch.tensor([[0.0 if a == b else -100.0 for b in wrapped] for a in wrapped], dtype=x.dtype)
        rows = [[(a[0] - b[0] + win - 1) * (2 * win - 1) + a[1] - b[1] + win - 1 for b in rolled] for a in rolled]
        position = block.attn.relative_position_bias_table[torch.tensor(rows)]
        inside = torch.stack([normed[i, j] for i, j in tokens])
        out = naive_attention(block.attn, inside, list(position.unbind(-1)), mask if shift else None)
        for (i, j), value in zip(tokens, out, strict=True):
            attended[i, j] = value
    y = naive_mlp_conv(block.mlp_conv, x + attended, reference)
    return y + naive_mlp(block.mlp, naive_norm(block.norm2, y))


@pytest.mark.parametrize("form", ["identity", "reference"])
@pytest.mark.parametrize("index", [0, 1, 2, 3])
def test_swin_block_is_the_formula(index, form):
    student = compress(build("swin"), [Multiplex(share=2, form=form, **EVERYTHING)]).double()
    block = blocks_of(student)[index]
    assert block.shift_size == ((2, 2) if index % 2 else (0, 0))
    randomise(block)
    torch.manual_seed(0)
    x = torch.randn(*block.input_resolution, block.dim, dtype=torch.float64)
    with torch.no_grad():
        expected = naive_swin_block(block, x, form == "reference")
        assert (block(x[None])[0] - expected).abs().max() < 1e-12  # seen 6.3e-15


def test_swin_blocks_keep_their_shift_and_mask():
    model = equal_within_stages(build("swin"))
    masks = [block.attn_mask for block in blocks_of(model)]
    shifts = [block.shift_size for block in blocks_of(model)]
    transform_(model, [Multiplex(share=(2, 4), **EVERYTHING)])
    blocks = blocks_of(model)
    assert all(block.attn_mask is mask for block, mask in zip(blocks, masks, strict=True))
    assert [block.shift_size for block in blocks] == shifts == [(0, 0), (2, 2)] * 3
    assert [mask is None for mask in masks] == [True, False] * 3
    with torch.no_grad():
        for norm in ("norm1", "norm2"):
            getattr(blocks[1], norm).load_state_dict(getattr(blocks[0], norm).state_dict())
        x = torch.randn(1, 16, 16, 16, generator=torch.Generator().manual_seed(0))
        assert (blocks[0](x) - blocks[1](x)).abs().max() > 1e-2, "equal but for the shift, and the shift must be seen"


def test_a_shared_position_table_is_one_parameter():
    student = compress(build("swin"), [Multiplex(share=(2, 4))])
    tables = [b.attn.relative_position_bias_table for b in blocks_of(student)]
    assert len({id(t) for t in tables}) == 2
    assert all(b.attn._get_rel_pos_bias().shape == (1, b.attn.num_heads, 16, 16) for b in blocks_of(student))


# ----------------------------------------------------------------------------------------------------------------- iRPE


@pytest.mark.parametrize("skip", [0, 2])
@pytest.mark.parametrize("grid", [(14, 14), (5, 9)])
def test_irpe_is_the_quadruple_loop(grid, skip):
    torch.manual_seed(0)
    position = ContextualKeyPosition(3, grid, skip, ratio=1.9, dtype=torch.float64)
    assert position.table.shape == (3, 49 + (skip > 0))
    nn.init.normal_(position.table)
    q = torch.randn(1, 2, skip + grid[0] * grid[1], 3, dtype=torch.float64)
    with torch.no_grad():
        got = position(q)
        for head in range(2):
            expected = naive_irpe(position.table, q[0, head], grid, skip)
            assert (got[0, head] - expected).abs().max() < 1e-13  # seen 1.8e-15


def test_irpe_buckets_of_the_paper():
    # by hand: exact to 1; 2 → 1.95, 3 → 2.32, 4 → 2.58, 13 → 3.66, each rounded, at most 3.8, and cut
    by_hand = {0: 0, 1: 1, 2: 2, 3: 2, 4: 3, 13: 3}
    for distance, bucket in by_hand.items():
        assert piecewise_index(distance, 1.9) == bucket
        assert piecewise_index(-distance, 1.9) == -bucket
    assert set(bucket_ids(14, 14, 0, 1.9).flatten().tolist()) == set(range(49))
    assert set(bucket_ids(14, 14, 1, 1.9).flatten().tolist()) == set(range(50))


def test_irpe_keeps_the_function_and_its_tables_are_private():
    teacher = build("vit_no_class_token")
    student = compress(teacher, [Multiplex(share=2), IRPE()])
    tables = [b.attn.rpe_k.table for b in blocks_of(student)]
    assert len({id(t) for t in tables}) == 4
    assert gap(student, compress(teacher, [Multiplex(share=2)])) == 0
    with torch.no_grad():
        tables[2].normal_(std=10.0)
    assert gap(student, compress(teacher, [Multiplex(share=2)])) > 1e-3


def test_irpe_planned_on_meta_does_not_spoil_the_next_model():
    bucket_ids.cache_clear()
    with torch.device("meta"):
        compress(timm.create_model("vit_tiny_patch16_224", **VIT), [IRPE()])
    student = compress(build("vit"), [IRPE()])
    assert gap(student, build("vit")) < 1e-5  # seen 1.5e-07


def test_irpe_at_another_size_says_so():
    student = compress(timm.create_model("vit_tiny_patch16_224", **VIT, dynamic_img_size=True), [IRPE()])
    with pytest.raises(UserError, match=r"built for 17 tokens and got 65; build the model with the input size"):
        student(torch.randn(1, 3, 64, 64))


# ------------------------------------------------------------------------------------------- timm's ways into attention

MASKS = {
    "none": {},
    "bool": {"attn_mask": torch.arange(81).reshape(9, 9) % 3 > 0},
    "float": {"attn_mask": torch.linspace(-3, 3, 81).reshape(9, 9)},
    "per head": {"attn_mask": torch.linspace(-3, 3, 2 * 4 * 81).reshape(2, 4, 9, 9)},
    "causal": {"is_causal": True},
}
SHAPES = {
    "plain": {},
    "normed": {"qk_norm": True, "scale_norm": True, "norm_layer": nn.LayerNorm},
    "gated": {"gated": True},
    "wide heads": {"attn_head_dim": 20},
}


@pytest.mark.parametrize("mask", MASKS)
@pytest.mark.parametrize("kind", SHAPES)
@pytest.mark.parametrize("fused", [True, False])
def test_attention_with_an_identity_mix_is_timms(kind, mask, fused):
    torch.manual_seed(0)
    theirs = Attention(48, num_heads=4, qkv_bias=True, **SHAPES[kind]).eval()
    randomise(theirs)
    theirs.fused_attn = fused
    ours = copy.deepcopy(nn.ModuleDict({"attn": theirs}))
    surgery.specialise(ours, "attn", ExplicitAttention)
    for slot in ("logit_mix", "prob_mix"):
        surgery.fill_slot(ours, "attn", slot, HeadMixing(4, bias=True))
    x = torch.randn(2, 9, 48)
    with torch.no_grad():
        expected = theirs(x, **MASKS[mask])
        assert (ours["attn"](x, **MASKS[mask]) - expected).abs().max() < 1e-5  # seen 2.9e-06
        if mask != "none":
            assert (theirs(x) - expected).abs().max() > 1e-2, "the mask must matter"


@pytest.mark.parametrize("mask", ["bool", "causal"])
def test_masked_tokens_stay_masked_behind_a_mix(mask):
    torch.manual_seed(0)
    model = nn.ModuleDict({"attn": Attention(48, num_heads=4, qkv_bias=True).eval()})
    surgery.specialise(model, "attn", ExplicitAttention)
    for slot in ("logit_mix", "prob_mix"):
        surgery.fill_slot(model, "attn", slot, HeadMixing(4))
    randomise(model)
    x = torch.randn(1, 9, 48)
    hidden = 8  # the last token: the future of all others, and masked for all
    options = {"is_causal": True} if mask == "causal" else {"attn_mask": (torch.arange(9) != hidden).expand(9, 9)}
    changed = x.clone()
    changed[:, hidden] += 1
    with torch.no_grad():
        difference = (model["attn"](x, **options) - model["attn"](changed, **options))[:, :hidden]
    assert difference.abs().max() == 0


def test_block_passes_masks_on():
    teacher = build("vit")
    student = compress(teacher, [Multiplex(share=1, **EVERYTHING)])
    assert isinstance(student.blocks[0], SlottedBlock)
    x = torch.randn(2, 9, 48, generator=torch.Generator().manual_seed(0))
    x = torch.cat([x, x], dim=1)[:, :17]
    seen = 0
    with torch.no_grad():
        for options in ({"is_causal": True}, {"attn_mask": torch.rand(17, 17) > 0.3}):
            expected = teacher.blocks[0](x, **options)
            assert (student.blocks[0](x, **options) - expected).abs().max() < 1e-5  # seen 2.4e-07
            assert (teacher.blocks[0](x) - expected).abs().max() > 1e-4
            seen += 1
    assert seen == 2


# ---------------------------------------------------------------------------------------------------- other input sizes


def test_another_input_size():
    teacher = timm.create_model("vit_tiny_patch16_224", **VIT, dynamic_img_size=True).eval()
    student = compress(teacher, [Multiplex(share=1, **EVERYTHING)])
    images = torch.randn(2, 3, 64, 64, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        assert (student(images) - teacher(images)).abs().max() < 1e-5  # seen 1.5e-07


@pytest.mark.parametrize(("built", "given"), [((4, 4), (8, 8)), ((4, 8), (6, 12)), ((3, 2), (6, 4))])
def test_convolution_folds_a_grid_of_the_same_shape(built, given):
    small, large = TokenConv(6, 3, built, num_prefix_tokens=1), TokenConv(6, 3, given, num_prefix_tokens=1)
    randomise(small)
    large.load_state_dict(small.state_dict())
    x = torch.randn(2, 1 + given[0] * given[1], 6, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        assert torch.equal(small(x), large(x))
        square = x[:, 1:].reshape(2, *given, 6)
        assert (large(square) - small(x)[:, 1:].reshape_as(square)).abs().max() < 1e-6  # seen 0.0


def test_convolution_refuses_tokens_it_cannot_fold():
    convolution = TokenConv(6, 3, (4, 4), num_prefix_tokens=1)
    with pytest.raises(UserError, match=r"cannot fold 14 tokens into a grid shaped like \(4, 4\)"):
        convolution(torch.randn(1, 15, 6))


@pytest.mark.parametrize("name", ["vit", "swin"])
def test_a_student_keeps_up_with_set_input_size(name):
    teacher, student = build(name), compress(build(name), [Multiplex(share=1, **EVERYTHING)])
    for model in (teacher, student):
        model.set_input_size(img_size=(64, 64))
    assert gap(student, teacher) < 1e-5  # seen 7.5e-08


# ------------------------------------------------------------------------------------------------------------- refusals


@pytest.mark.parametrize(
    ("name", "share", "message"),
    [
        (
            "vit",
            3,
            r"share=3 does not divide the 4 blocks of stage 0 of vit_tiny_patch16_224; it can be one of \[1, 2, 4\]",
        ),
        ("swin", 4, r"share=4 does not divide the 2 blocks of stage 0 of swin_tiny_.*; it can be one of \[1, 2\]"),
        ("swin", (2, 3), r"share=3 does not divide the 4 blocks of stage 1 of .*\[1, 2, 4\]"),
        ("swin", (2,), r"gives 1 numbers, \[2\], but swin_tiny_.* has 2 stages of depth \[2, 4\]; give one number"),
        ("swin", (2, 2, 6, 2), r"gives 4 numbers, \[2, 2, 6, 2\], but .* has 2 stages of depth \[2, 4\]"),
        ("vit", (2, 2), r"gives 2 numbers, \[2, 2\], but .* has 1 stage of depth \[4\]"),
    ],
)
def test_a_share_that_does_not_fit(name, share, message):
    model = build(name)
    with pytest.raises(UserError, match=message):
        compress(model, [Multiplex(share=share)])


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"share": 0}, "at least 1, not 0"),
        ({"share": -2}, "at least 1, not -2"),
        ({"share": (2, 0)}, "at least 1, not 0"),
        ({"share": 2, "mlp_conv": 4}, "must be odd, not 4; try 5"),
        ({"share": 2, "mlp_conv": -1}, "greater than or equal to 0"),
        ({"share": 2, "shar": 2}, "shar"),
        ({"share": 2, "form": "paper"}, "'identity' or 'reference'"),
        ({}, "share"),
    ],
)
def test_a_spec_that_means_nothing(fields, message):
    with pytest.raises(ValidationError, match=message):
        Multiplex(**fields)


def test_a_ratio_that_means_nothing():
    with pytest.raises(ValidationError, match="greater than 1"):
        IRPE(ratio=1.0)


@pytest.mark.parametrize(
    ("first", "second", "message"),
    [
        (
            Multiplex(share=2),
            Multiplex(share=4),
            r"wants to share .*attn.*, but .* is shared already.*merge the two steps",
        ),
        (
            Multiplex(share=1),
            Multiplex(share=2),
            r"wants to add blocks\.0\.attn\.logit_mix, which an earlier step added",
        ),
        (
            Multiplex(share=2, head_mixing=False, mlp_conv=3),
            Multiplex(share=1, head_mixing=False, mlp_conv=5),
            r"wants to add blocks\.0\.mlp_conv, which an earlier step added; apply one `multiplex` with everything",
        ),
    ],
)
def test_twice_is_refused_with_a_way_out(first, second, message):
    model = build("vit")
    with pytest.raises(UserError, match=message):
        compress(model, [first, second])
    student = compress(model, [first])
    with pytest.raises(UserError, match=message):
        compress(student, [second])
    assert compression_of(student).plans == [first.plan(model)]


def test_swin_refuses_nothing_it_can_do():
    student = compress(timm.create_model("swin_tiny_patch4_window7_224", **SWIN), [Multiplex(share=(1, 4))])
    assert {len(group) for group in ties.tied_groups(student)} == {4}
