"""Prompt tokens: the counts, the paper's formulas in code of its own, what timm's interface sees of them, and what they refuse.

What every transform must do is in test_transforms*.py, for prompts of every block.
"""

from __future__ import annotations

import copy
import itertools
import math

import pytest
import timm
import torch
from helpers.contract import same_values, structure, teacher
from helpers.models import BACKBONES, EVERYTHING, VIT, build, images_for, outputs
from helpers.prompts import EXACT, FORMS, gap, prompted, prompts_of, shapes
from torch import Tensor, nn

from compressvit.artifacts import artifact
from compressvit.artifacts.adapter import load_adapter, remove_adapter, save_adapter
from compressvit.errors import UserError
from compressvit.model import cost, surgery, ties
from compressvit.model.backbone import describe, head_names
from compressvit.transforms import IRPE, SSF, VPT, FacT, LoRA, Multiplex, RepAdapter
from compressvit.transforms.applying import apply_plans, compress, materialise
from compressvit.transforms.record import compression_of, trained_names
from compressvit.transforms.vpt.prompts import Prompts

VITS = ("vit", "vit_no_class_token", "deit_distilled", "dinov2_registers", "headless", "clip")


# -------------------------------------------------------------------------------------------------------------- counts


@pytest.mark.wide_unless(lambda name, deep: deep and name != "deit_base_distilled_patch16_224")
@pytest.mark.parametrize(
    ("name", "deep", "widths"),
    [
        ("vit_base_patch16_224", True, [768] * 12),
        ("vit_base_patch16_224", False, [768]),
        ("swin_tiny_patch4_window7_224", True, [96] * 2 + [192] * 2 + [384] * 6 + [768] * 2),
        ("swin_tiny_patch4_window7_224", False, [96]),
        ("deit_base_distilled_patch16_224", True, [768] * 12),
    ],
)
def test_prompts_times_width_over_the_blocks(name, deep, widths):
    with torch.device("meta"):
        model = timm.create_model(name)
    before = ties.count_parameters(model)
    plan = VPT(deep=deep).plan(model)
    ledger = apply_plans(model, [plan])
    added = 10 * sum(widths)  # 92160 in a ViT-B, 44160 in a Swin-T
    assert ties.count_parameters(model) - before == added
    assert {e.path: e.after - e.before for e in ledger} == {p: 10 * w for p, w in zip(plan.blocks, widths, strict=True)}
    heads = sum(model.get_parameter(n).numel() for n in head_names(model))
    assert sum(p.numel() for p in model.parameters() if p.requires_grad) == added + heads


def test_macs_by_hand():
    """All but the MLP's: norm, qkv, the two products of attention, proj."""
    n, m, p, blocks = 17, VIT["embed_dim"], 5, VIT["depth"]
    macs = [cost.macs(model, (3, 32, 32)) for model in (teacher("vit"), prompted("vit", count=p))]
    assert macs[1] - macs[0] == blocks * (p * (m + 4 * m * m) + 2 * m * ((n + p) ** 2 - n**2))
    travelling = cost.macs(prompted("vit", deep=False, count=p), (3, 32, 32))
    assert travelling - macs[1] == blocks * p * (m + 8 * m * m), "they go through the MLP, too"


@pytest.mark.parametrize(("backbone", "patch", "width"), [("vit", 8, 48), ("swin", 2, 16)])
def test_they_start_uniform(backbone, patch, width):
    bound = math.sqrt(6 / (3 * patch**2 + width))
    model = compress(teacher(backbone), [VPT(prompts=100)])
    assert len(prompts_of(model)) == len(describe(model).blocks)
    for prompts in prompts_of(model):
        assert 0.98 * bound < prompts.tokens.abs().max() <= bound
        assert abs(prompts.tokens.std() - bound / math.sqrt(3)) < 0.05 * bound  # seen 0.007


# --------------------------------------------------------------------------------------------------- the formulas, a ViT


def widened(mask: Tensor, at: int, count: int) -> Tensor:
    """An additive mask, (…, N, N) or (…, 1, N), for a sequence with prompts, entry by entry."""
    n = mask.shape[-1]
    place = [i if i < at else i + count for i in range(n)]
    rows = place if mask.shape[-2] > 1 else range(n + count)  # what is said of keys is said to prompts, too
    new = mask.new_zeros(*mask.shape[:-2], n + count, n + count)
    for (i, row), (j, column) in itertools.product(enumerate(rows), enumerate(place)):
        new[..., row, column] = mask[..., min(i, mask.shape[-2] - 1), j]
    return new


@torch.no_grad()
def reference_vit(student: nn.Module, backbone: str, images: Tensor, deep: bool, mask=None) -> list[Tensor]:
    """The teacher's own timm blocks on sequences with the prompts in them, as the paper has it: the outputs of all, without prompts."""
    model = copy.deepcopy(teacher(backbone)).double()
    at, tokens = model.num_prefix_tokens, [p.tokens for p in prompts_of(student)]
    count = len(tokens[0])
    mask = None if mask is None else widened(mask, at, count)
    x = model.norm_pre(model._pos_embed(model.patch_embed(images)))
    seen = []
    for i, block in enumerate(model.blocks):
        if deep or i == 0:
            x = torch.cat([x[:, :at], tokens[i].expand(len(x), -1, -1), x[:, at:]], dim=1)
        x = block(x, attn_mask=mask)
        seen.append(torch.cat([x[:, :at], x[:, at + count :]], dim=1))
        x = seen[-1] if deep else x
    return [*seen, model.norm(seen[-1])]


@pytest.mark.wide_unless(lambda backbone: backbone in ("vit", "clip"))
@FORMS
@pytest.mark.parametrize("backbone", VITS)
def test_a_vit_is_the_papers_formula(backbone, deep):
    model = prompted(backbone, deep)
    images = images_for(model).double()
    *blocks, features = reference_vit(model, backbone, images, deep)
    with torch.no_grad():
        assert gap(model.forward_features(images), features) < EXACT
        ours = model.forward_intermediates(images, output_fmt="NLC", intermediates_only=True)
        for y, expected in zip(ours, blocks, strict=True):
            assert gap(y, expected[:, model.num_prefix_tokens :]) < EXACT
        assert torch.equal(model(images), model.forward_head(model.forward_features(images)))
    plain = outputs(copy.deepcopy(teacher(backbone)).double(), images)
    assert gap(outputs(model, images), plain) > 1e-3, "the prompts do nothing"  # seen 2.9e-3 and more


@FORMS
@pytest.mark.parametrize("kind", ["additive", "boolean", "keys"])
def test_masks_are_for_the_images_tokens(kind, deep):
    model = prompted("vit", deep)
    images, n = images_for(model).double(), 17
    allowed = torch.rand(2, 1, n, n, generator=torch.Generator().manual_seed(0)) < 0.6
    allowed = allowed[..., :1, :] if kind == "keys" else allowed
    additive = torch.zeros(allowed.shape, dtype=torch.float64).masked_fill(~allowed, -1e9)
    expected = reference_vit(model, "vit", images, deep, additive)[-1]
    with torch.no_grad():
        given = additive if kind == "additive" else allowed
        assert gap(model.forward_features(images, attn_mask=given), expected) < EXACT
        assert gap(model.forward_intermediates(images, attn_mask=given)[0], expected) < EXACT
        # Causal is the sequence with prompts, where the class token comes first and sees none of them.
        causal, plain = (m.forward_features(images, is_causal=True) for m in (model, build("vit").double()))
        assert gap(causal[:, :1], plain[:, :1]) < EXACT
        assert gap(causal[:, 1:], plain[:, 1:]) > 1e-3


# ------------------------------------------------------------------------------------------------------ laws of prompts


CASES = [("vit", True), ("vit", False), ("dinov2_registers", True), ("swin", True), ("swin", False)]
every_form = pytest.mark.parametrize(("backbone", "deep"), CASES)


@every_form
def test_without_prompts_it_is_the_teacher(backbone, deep):
    model = prompted(backbone, deep)
    plain = copy.deepcopy(teacher(backbone)).double()
    (plan,) = compression_of(model).plans
    assert plan.sets_aside
    plan.set_aside(model)
    assert structure(model) == structure(plain)
    assert torch.equal(outputs(model), outputs(plain))


@every_form
def test_only_prompts_and_the_head_are_trained(backbone, deep):
    model = prompted(backbone, deep).train()
    wanted = {f"{path}.tokens" for path, m in model.named_modules() if isinstance(m, Prompts)} | head_names(model)
    assert trained_names(model) == wanted
    assert surgery.added_parameters(model) == wanted - head_names(model)
    model(images_for(model).double()).square().sum().backward()
    assert {name for name, p in model.named_parameters() if p.grad is not None} == wanted
    assert all(model.get_parameter(name).grad.abs().max() > 0 for name in wanted)


@every_form
def test_dropout_is_of_an_images_prompts(backbone, deep):
    model = prompted(backbone, deep, dropout=0.5)
    seen: list[Tensor] = []
    attention = model.get_submodule(f"{describe(model).blocks[0].path}.attn")
    attention.register_forward_pre_hook(lambda m, inputs: seen.append(inputs[0]))
    images = images_for(model).double()[:1].expand(2, -1, -1, -1)
    outputs(model, images)
    outputs(model.train(), images)
    at = model.num_prefix_tokens if backbone != "swin" else 0
    for x, differ in zip(seen, (False, True), strict=True):
        of_images = x[:, at : at + 3].unflatten(0, (2, -1))  # two images, and Swin's windows of each
        assert torch.equal(of_images, of_images[:, :1].expand_as(of_images)), "windows of one image differ"
        assert torch.equal(of_images[0], of_images[1]) != differ
    prompts = Prompts(4, 1000, dropout=0.5).train()
    nn.init.ones_(prompts.tokens)
    assert set(prompts.of(2).unique().tolist()) == {0.0, 2.0}
    assert torch.equal(prompts.eval().of(2), torch.ones(2, 4, 1000))


# -------------------------------------------------------------------------------------------------- timm's interface


@pytest.mark.wide_unless(lambda backbone, deep, every: backbone == "deit_distilled" and deep and every > 1)
@FORMS
@pytest.mark.parametrize("every", [7, 1], ids=["some", "all"])
@pytest.mark.parametrize("backbone", ["deit_distilled", "dinov2_registers", "vit_no_class_token"])
@torch.no_grad()
def test_intermediates_are_the_teachers_in_every_form(backbone, deep, every):
    model, plain = prompted(backbone, deep), copy.deepcopy(teacher(backbone)).double()
    images = images_for(model).double()
    *blocks, _ = reference_vit(model, backbone, images, deep)
    names = ("indices", "output_fmt", "norm", "return_prefix_tokens", "stop_early", "output_dict")
    forms = itertools.product((None, [2, -1], [1]), ("NCHW", "NLC"), *[(False, True)] * 4)
    for values in itertools.islice(forms, 0, None, every):
        given = dict(zip(names, values, strict=True))
        for only in (True, False):
            theirs, ours = (m.forward_intermediates(images, **given, intermediates_only=only) for m in (plain, model))
            assert shapes(ours) == shapes(theirs)
        last = (ours["image_intermediates"] if given["output_dict"] else ours[1])[-1]
        last = last[0] if isinstance(last, tuple) else last
        expected = blocks[1 if given["indices"] == [1] else 3]
        expected = (plain.norm(expected) if given["norm"] else expected)[:, plain.num_prefix_tokens :]
        assert gap(last.flatten(2).mT if last.ndim == 4 else last, expected) < EXACT
    assert shapes(model.get_intermediate_layers(images, 2)) == shapes(plain.get_intermediate_layers(images, 2))


@FORMS
@torch.no_grad()
def test_layers_behind_an_intermediate_one_can_go(deep):
    model = prompted("vit", deep)
    images = images_for(model).double()
    expected = reference_vit(model, "vit", images, deep)[1]
    assert model.prune_intermediate_layers([1], prune_norm=True) == [1]
    assert len(model.blocks) == 2
    assert gap(model.forward_features(images), expected) < EXACT
    assert gap(model.forward_intermediates(images, output_fmt="NLC")[1][-1], expected[:, 1:]) < EXACT


@pytest.mark.wide_unless(lambda backbone: backbone == "vit")
@pytest.mark.parametrize("backbone", ["vit", "deit_distilled", "clip", "swin"])
def test_prompts_that_travel_leave_the_rest_of_the_contract(backbone, tmp_path):
    model = compress(teacher(backbone), [VPT(prompts=3, deep=False, dropout=0.1)])
    images = images_for(model)
    before = outputs(model, images)
    assert torch.equal(outputs(copy.deepcopy(model), images), before)
    again = artifact.load(artifact.save(model, tmp_path / "student"))
    assert structure(again) == structure(model)
    assert torch.equal(outputs(again, images), before)
    plain = load_adapter(build(backbone), save_adapter(model, tmp_path / "prompts.safetensors"))
    assert torch.equal(outputs(plain, images), before)
    assert structure(remove_adapter(plain)) == structure(teacher(backbone))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert (outputs(model, images).float() - before).norm() / before.norm() < 0.02  # seen 0.0042
    gradients = []
    for enable in (False, True):
        model.train().zero_grad()
        model.set_grad_checkpointing(enable)
        torch.manual_seed(0)
        model(images).square().sum().backward()
        gradients.append({name: p.grad.clone() for name, p in model.named_parameters() if p.requires_grad})
    assert same_values(*gradients)
    assert outputs(model.to(torch.bfloat16), images.bfloat16()).isfinite().all()


@pytest.mark.wide  # each takes seconds
@pytest.mark.parametrize(("backbone", "deep"), [("vit", True), ("vit", False), ("swin", True), ("swin", False)])
def test_compile_captures_the_whole_student(backbone, deep):
    architecture, args = BACKBONES[backbone]
    small = args | {"vit": {"depth": 2}, "swin": {"depths": (2,), "num_heads": (2,)}}[backbone]
    model = compress(timm.create_model(architecture, **small).eval(), [VPT(prompts=3, deep=deep)])
    images = images_for(model)
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    assert (outputs(compiled, images) - outputs(model, images)).abs().max() <= 1e-6  # seen 0.0


# ------------------------------------------------------------------------------------------------------ with other steps


@pytest.mark.wide_unless(lambda backbone: backbone in ("vit", "swin"))
@every_form
@pytest.mark.parametrize("first", [True, False], ids=["prompts_first", "prompts_second"])
def test_transforms_of_multiplexing_that_change_nothing_change_no_prompted_student(backbone, deep, first):
    other = Multiplex(share=1, **(EVERYTHING if deep else EVERYTHING | {"mlp_conv": 0}))
    expected = compress(teacher(backbone), [VPT(prompts=3, deep=deep)])
    made = compress(teacher(backbone), [VPT(prompts=3, deep=deep), other][:: 1 if first else -1])
    for ours, theirs in zip(prompts_of(made), prompts_of(expected), strict=True):
        ours.load_state_dict(theirs.state_dict())
    assert gap(outputs(made), outputs(expected)) < 1e-5  # seen 6.1e-07


@pytest.mark.wide_unless(lambda backbone: backbone == "vit")
@every_form
@pytest.mark.parametrize("first", [True, False], ids=["prompts_first", "prompts_second"])
def test_what_merges_still_merges(backbone, deep, first):
    linear = [RepAdapter(width=4), LoRA(rank=2), FacT(rank=2), SSF()]
    steps = [VPT(prompts=3, deep=deep), *linear] if first else [*linear, VPT(prompts=3, deep=deep)]
    model = compress(teacher(backbone), steps).double()
    with torch.no_grad():
        for parameter in (model.get_parameter(name) for name in sorted(surgery.added_parameters(model))):
            parameter.add_(0.1 * torch.randn_like(parameter))
    merged = materialise(model)
    assert [plan.transform for plan in compression_of(merged).plans] == ["vpt"]
    assert gap(outputs(merged), outputs(model)) < EXACT  # seen 5.3e-15


def test_conflicts_are_refused():
    tries = {
        "vpt needs attention, and convnext_tiny is a ConvNeXt, whose blocks have none; adapt it with .*lora": (
            "convnext",
            [VPT()],
        ),
        r"vpt wants to add tokens in blocks\.0\.attn, where the earlier vpt did": ("vit", [VPT(), VPT(deep=False)]),
        r"blocks\.0\.attn, where the earlier vpt did; apply one": ("vit", [VPT(deep=False), VPT()]),
        r"layers\.0\.blocks\.0\.attn, where the earlier vpt did": ("swin", [VPT(deep=False), VPT()]),
        "irpe needs every token.*those of vpt.*leave out one": ("vit", [IRPE(), VPT()]),
        "irpe needs every token.*those of vpt": ("vit", [VPT(), IRPE()]),
        "irpe needs every token.*have none": ("vit", [VPT(deep=False), IRPE()]),
        r"mlp_conv needs every token.*those of vpt.*multiplex\.mlp_conv=0, or use vpt\.deep=true": (
            "vit",
            [Multiplex(share=1, mlp_conv=3), VPT(deep=False)],
        ),
        r"mlp_conv needs every token.*use vpt\.deep=true.*, or multiplex\.mlp_conv=0": (
            "vit",
            [VPT(deep=False), Multiplex(share=1, mlp_conv=3)],
        ),
        r"multiplex\.mlp_conv needs every token": ("swin", [VPT(deep=False), Multiplex(share=1, mlp_conv=3)]),
    }
    for words, (backbone, steps) in tries.items():
        model = build(backbone)
        before = structure(model)
        with pytest.raises(UserError, match=words):
            compress(model, steps)
        assert structure(model) == before
    for backbone in ("vit", "swin"):  # deep prompts are gone before the convolution
        compress(build(backbone), [VPT(), Multiplex(share=1, mlp_conv=3)])
        compress(build(backbone), [Multiplex(share=1, mlp_conv=3), VPT()])
