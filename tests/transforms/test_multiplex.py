"""Weight multiplexing: a student at its start, and what is refused. The published figures are in tests/test_published.py.

The number in the comment beside a tolerance is the error seen, the largest over the parameters of that test.
"""

from __future__ import annotations

import pytest
import timm
import torch
from helpers.models import BACKBONES, EVERYTHING, SWIN, blocks_of, build, equal_within_stages, gap, randomise
from torch import nn

from compressvit.errors import UserError
from compressvit.model import ties
from compressvit.model.backbone import describe
from compressvit.transforms import IRPE, Multiplex
from compressvit.transforms.applying import compress
from compressvit.transforms.multiplex import HeadMixing
from compressvit.transforms.record import compression_of

# ----------------------------------------------------------------------------------------------- a student at its start


@pytest.mark.wide_unless(lambda name: name in ("vit", "swin"))
@pytest.mark.parametrize("init", ["mean", "first"])
@pytest.mark.parametrize("name", BACKBONES)
def test_student_of_a_teacher_with_equal_layers_is_the_teacher(name, init):
    teacher = equal_within_stages(build(name))
    student = compress(teacher, [Multiplex(share=2, init=init, **EVERYTHING)])
    assert ties.tied_groups(student)
    assert gap(student, teacher) < 1e-5  # seen 1.2e-07
    for info in describe(student).blocks:
        name = f"{info.path}.{info.projections[0]}.weight"
        assert torch.equal(student.get_parameter(name), teacher.get_parameter(name))


@pytest.mark.wide_unless(lambda name: name in ("vit", "swin"))
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


@pytest.mark.wide_unless(lambda name: name in ("vit", "swin"))
@pytest.mark.parametrize("name", BACKBONES)
def test_scratch_leaves_nothing_of_the_teacher(name):
    if not hasattr(build(name), "init_weights"):
        with pytest.raises(UserError, match=r"timm's Cait cannot .*; use multiplex\.init=mean"):
            Multiplex(share=2, init="scratch").plan(build(name))
        return
    students = []
    for seed in (0, 1):
        teacher = build(name, seed)
        torch.manual_seed(2)
        students.append(compress(teacher, [Multiplex(share=2, init="scratch", **EVERYTHING)]))
    a, b = (s.state_dict() for s in students)
    assert all(torch.equal(a[n], b[n]) for n in a), "two teachers, one seed: the students must be equal"
    teacher = build(name).state_dict()
    same = [n for n in teacher if torch.equal(a[n], teacher[n]) and teacher[n].is_floating_point()]  # no counter
    assert same == []
    for path, module in students[0].named_modules():
        if hasattr(students[0], "fix_init_weight") and path.endswith((".proj", ".fc2")):
            continue  # smaller by the depth
        if isinstance(module, nn.Linear):
            # a truncated normal of std 0.02 over at least 160 values; seen 0.0191 to 0.0219
            assert module.weight.numel() < 160 or 0.017 < module.weight.std() < 0.0235, path
            assert module.bias is None or not module.bias.any()
        elif isinstance(module, nn.LayerNorm):
            after_a_branch = name == "swin_v2" and path.endswith(("blocks.0.norm1", "blocks.1.norm1", "norm2"))
            assert (module.weight == (0 if after_a_branch else 1)).all()
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


def test_reference_form_replaces_the_residual_stream():
    student = compress(build("vit"), [Multiplex(share=2, mixing_bias=True, mlp_conv=7, form="reference")])
    assert all(b.mlp_conv.replace for b in blocks_of(student))
    assert all((b.mlp_conv.norm.weight == 1).all() for b in blocks_of(student))


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
        ({"share": 2, "form": "paper"}, "'paper' is none of identity, reference"),
        ({}, "share"),
    ],
)
def test_a_spec_that_means_nothing(fields, message):
    with pytest.raises(UserError, match=message):
        Multiplex(**fields)


def test_a_ratio_that_means_nothing():
    with pytest.raises(UserError, match="greater than 1"):
        IRPE(ratio=1.0)


@pytest.mark.parametrize(
    ("first", "second", "message"),
    [
        (
            Multiplex(share=2),
            Multiplex(share=4),
            r"wants to share .*attn.*, but the earlier multiplex shares .* among .*merge two `multiplex` into one",
        ),
        (
            Multiplex(share=1),
            Multiplex(share=2),
            r"applied twice: .* wants to add blocks\.0\.attn\.logit_mix, .* the earlier multiplex added it",
        ),
        (
            Multiplex(share=2, head_mixing=False, mlp_conv=3),
            Multiplex(share=1, head_mixing=False, mlp_conv=5),
            r"wants to add blocks\.0\.mlp_conv, .*; apply only one of the two, with everything",
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
