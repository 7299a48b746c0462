"""timm's Eva: our attention is timm's, projections are seen and changed however attention has them, and what rotary positions ask for."""

from __future__ import annotations

import pytest
import timm
import torch
from helpers.models import build, images_for, outputs
from timm.layers import AttentionRope, LayerNorm
from timm.models.eva import EvaAttention

from compressvit.errors import UserError
from compressvit.model import surgery
from compressvit.model.backbone import describe
from compressvit.model.families.eva import SMALL, ExplicitAttentionRope, ExplicitEvaAttention
from compressvit.model.family import FAMILIES
from compressvit.model.taps import Taps, qkv_taps, tapped_qkv
from compressvit.transforms import VPT, Align, LowRank, Narrow, Quantise, Shrink
from compressvit.transforms.applying import compress
from compressvit.transforms.record import compression_of

WIDTH, HEADS, PREFIX = 24, 3, 2
KINDS = [
    *(
        (ExplicitEvaAttention, EvaAttention, options)
        for options in ({}, {"qkv_bias": False}, {"qkv_bias_separate": True})
    ),
    *((kind, kind.__bases__[1], {"qkv_fused": False}) for kind in (ExplicitEvaAttention, ExplicitAttentionRope)),
    (ExplicitEvaAttention, EvaAttention, {"rotate_half": True, "qk_norm": True, "scale_norm": True, "gated": True}),
    (ExplicitAttentionRope, AttentionRope, {}),
    (ExplicitAttentionRope, AttentionRope, {"qkv_fused": False, "num_kv_heads": 1, "rotate_half": True}),
]


@pytest.mark.parametrize("fused", [True, False])
@pytest.mark.parametrize(("ours", "theirs", "options"), KINDS, ids=str)
@torch.no_grad()
def test_attention_with_empty_slots_is_timms(ours, theirs, options, fused):
    torch.manual_seed(0)
    scale_norm = {"scale_norm": False} | options
    attention = theirs(WIDTH, HEADS, num_prefix_tokens=PREFIX, norm_layer=LayerNorm, **scale_norm).eval()
    for parameter in attention.parameters():
        parameter.add_(0.2 * torch.randn_like(parameter))
    x = torch.randn(2, PREFIX + 9, WIDTH)
    mask = torch.rand(2, 1, PREFIX + 9, PREFIX + 9) > 0.3
    of_heads = [torch.randn(HEADS, 9, 16)] * ("num_kv_heads" not in options)  # angles for every head
    calls = [{"rope": rope} for rope in (None, torch.randn(9, 16), *of_heads)]
    calls += [{"rope": torch.randn(9, 16), "attn_mask": mask}, {"is_causal": True}]
    expected = [attention(x, **call) for call in calls]
    model = torch.nn.ModuleDict({"attn": attention})
    surgery.specialise(model, "attn", ours)
    attention.fused_attn = fused
    for call, wanted in zip(calls, expected, strict=True):
        assert (attention(x, **call) - wanted).abs().max() < 2e-6, call  # measured 6e-7


@pytest.mark.parametrize("name", ["dinov3", "eva02"])
@torch.no_grad()
def test_taps_see_queries_keys_and_values_before_they_are_turned(name):
    model = build(name)
    images = images_for(model)
    info = describe(model).blocks[1]
    attention = model.get_submodule(f"{info.path}.attn")
    before = outputs(model, images)
    taps = Taps(model, [*qkv_taps(info), (f"{info.path}.norm1", "output")])
    model(images)
    seen = taps.pop()
    x = seen[f"{info.path}.norm1"]["output"]
    if name == "dinov3":
        bias = torch.cat([attention.q_bias, torch.zeros_like(attention.q_bias), attention.v_bias])
        expected = torch.nn.functional.linear(x, attention.qkv.weight, bias).chunk(3, dim=-1)
        assert bias.abs().max() > 1e-3
    else:
        expected = tuple(layer(x) for layer in (attention.q_proj, attention.k_proj, attention.v_proj))
    for found, wanted in zip(tapped_qkv(seen, info), expected, strict=True):
        assert torch.allclose(found, wanted, atol=1e-6)
    taps.close()
    assert torch.equal(outputs(model, images), before)
    assert not getattr(attention, "qkv_bias_separate", False)


@torch.no_grad()
def test_prompts_are_not_turned():
    model = build("dinov3")
    student = compress(model, [VPT(prompts=3)])
    images = images_for(model)
    seen: dict[str, torch.Tensor] = {}
    block = student.blocks[0]
    block.register_forward_pre_hook(lambda _, inputs, others: seen.update(x=inputs[0], **others), with_kwargs=True)
    block.register_forward_hook(lambda _, inputs, output: seen.update(y=output))
    student(images)
    x, plain = seen["x"], model.blocks[0]
    tokens = block.norm1.vpt.tokens.expand(len(x), -1, -1)
    plain.attn.num_prefix_tokens += 3
    long = plain.norm1(torch.cat([x[:, :5], tokens, x[:, 5:]], dim=1))
    attended = plain.attn(long, rope=seen["rope"])
    y = x + plain.gamma_1 * torch.cat([attended[:, :5], attended[:, 8:]], dim=1)
    y = y + plain.gamma_2 * plain.mlp(plain.norm2(y))
    assert torch.allclose(seen["y"], y, atol=1e-6)


SPECS = {  # and the same without what makes it closer
    "low_rank": (LowRank(rank=12, metric="inputs"), {"sequential": False}),
    "bits": (Quantise(bits=3, group=16), {"sequential": False}),
    "neurons": (Narrow(neurons=0.5), {"metric": "weights"}),
    "heads": (Narrow(heads=0.75), {"metric": "weights"}),
}


@pytest.mark.wide_unless(lambda name, kind: (name, kind) == ("eva02", "neurons"))
@pytest.mark.parametrize("kind", SPECS)
@pytest.mark.parametrize("name", ["dinov3", "eva02"])
def test_fitted_to_images_it_is_closer_to_its_teacher(name, kind):
    teacher = build(name)
    images, unseen = images_for(teacher, 64), images_for(teacher, 32, seed=2)
    wanted = patches(teacher, unseen)
    spec, without = SPECS[kind]
    errors = []
    for changes in ({}, without):
        student = compress(teacher, [spec.model_copy(update=changes)], calibration=images.split(16))
        errors.append(((patches(student, unseen) - wanted).norm() / wanted.norm()).item())
    assert errors[0] < 0.99 * errors[1], errors  # measured 0.28 to 0.97


@pytest.mark.wide_unless(lambda spec: spec.neurons)
@pytest.mark.parametrize("spec", [Narrow(neurons=0.5), Narrow(heads=0.5)], ids=["neurons", "heads"])
def test_split_layers_are_changed_as_whole_ones(spec):
    """Queries, keys and values in three layers and SwiGLU in two, or each in one."""
    split = build("eva02")
    example = FAMILIES["eva"].examples["eva02"]
    whole = timm.create_model(example.model, **{**example.args, "qkv_fused": True, "swiglu_align_to": 0}).eval()
    own = split.state_dict()
    for path in (f"blocks.{i}" for i in range(4)):
        own[f"{path}.attn.qkv.weight"] = torch.cat([own.pop(f"{path}.attn.{part}_proj.weight") for part in "qkv"])
        own |= {f"{path}.attn.{part}_bias": own.pop(f"{path}.attn.{part}_proj.bias") for part in "qv"}
        for kind in ("weight", "bias"):
            own[f"{path}.mlp.fc1.{kind}"] = torch.cat([own.pop(f"{path}.mlp.fc1_{part}.{kind}") for part in "gx"])
    whole.load_state_dict(own)
    images, unseen = images_for(split, 64), images_for(split, 8, seed=2)
    one_by_one = spec.model_copy(update={"sequential": False})
    students = [compress(model, [one_by_one], images) for model in (split, whole)]
    ours, theirs = (outputs(student, unseen) for student in students)
    assert (ours - theirs).norm() < 1e-6 * theirs.norm()  # measured 1e-7
    assert (theirs - outputs(whole, unseen)).norm() > 1e-3 * theirs.norm()


@torch.no_grad()
def patches(model: torch.nn.Module, images: torch.Tensor) -> torch.Tensor:
    """Their final tokens, of which alone the classifier reads the mean."""
    return model.forward_features(images)[:, model.num_prefix_tokens :]


def test_biases_of_attention_itself_go_with_their_heads():
    teacher = build("dinov3")
    unseen = images_for(teacher, 8, seed=2)
    student = compress(teacher, [Narrow(heads=3, neurons=96, metric="weights")])
    attention = student.blocks[0].attn
    assert [len(getattr(attention, name)) for name in ("q_bias", "k_bias", "v_bias")] == [36] * 3
    kept = [
        head for head in range(4) if torch.equal(attention.q_bias[:12], teacher.blocks[0].attn.q_bias[12 * head :][:12])
    ]
    assert kept, "the biases of the heads that stay"
    assert outputs(student, unseen).isfinite().all()


@pytest.mark.parametrize(
    ("model", "args", "spec", "words"),
    [
        (
            "eva02_base_patch14_224",
            {},
            Narrow(neurons=0.5),
            r"has no neurons that can be removed: a norm inside the SwiGLU",
        ),
        (
            "vit_small_patch16_rope_mixed_224",
            {},
            Narrow(heads=2),
            "heads, each of which has its own frequencies of rotary",
        ),
        ("vit_small_patch16_rope_mixed_224", {}, Align(share=2), r"own frequencies .*; set align\.heads=false"),
        ("vit_base_patch16_sapiens2", {"num_kv_heads": 2}, Narrow(heads=2), "several of which share a key and a value"),
        (
            "vit_small_patch16_dinov3",
            {},
            Narrow(head_dim=8),
            "turns them in pairs by rotary positions, .* try `heads` instead of",
        ),
        (
            "vit_small_patch16_dinov3",
            {},
            VPT(deep=False),
            r"the arguments of its `forward_intermediates`, or vpt\.deep=true",
        ),
    ],
)
def test_what_is_refused_and_why(model, args, spec, words):
    with torch.device("meta"):
        made = timm.create_model(model, **{**SMALL, **args})
    with pytest.raises(UserError, match=words):
        spec.plan(made)


def test_shrink_takes_heads_and_neurons_but_no_dimensions_of_heads():
    teacher = build("eva02")
    spec = Shrink(budget={"parameters": 0.6}, methods=("heads", "neurons"), multiple=4, metric="weights")
    forms = compression_of(compress(teacher, [spec])).plans[0].forms.values()
    assert any(form.heads for form in forms) or any(form.neurons for form in forms)
    assert all(form.head_dim is None for form in forms)
