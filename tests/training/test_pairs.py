"""Which student block learns from which teacher block: the rule, pairs by hand, and the pairs that make no sense."""

from __future__ import annotations

import copy

import pytest
import timm
import torch
from helpers.images import side
from helpers.models import BACKBONES, SWIN, VIT, build, examples, images_for
from timm.models.vision_transformer import ParallelScalingBlock
from torch import nn

from compressvit.diagnostics.cka_layers import likeness
from compressvit.errors import UserError
from compressvit.model import surgery
from compressvit.model.backbone import describe
from compressvit.training.pairs import LayerPair, match_layers
from compressvit.transforms import IRPE, LORS, LowRank, Multiplex
from compressvit.transforms.applying import apply_plans, compress


def indices(pairs: list[LayerPair]) -> list[tuple[int, int]]:
    return [(p.student.index, p.teacher.index) for p in pairs]


def swin(**args) -> nn.Module:
    with torch.device("meta"):
        return timm.create_model("swin_tiny_patch4_window7_224", **{**SWIN, **args})


def vit(**args) -> nn.Module:
    with torch.device("meta"):
        return timm.create_model("vit_tiny_patch16_224", **{**VIT, **args})


# -------------------------------------------------------------------------------------------------------------- matched


@pytest.mark.wide_unless(lambda name, transforms: name in ("vit", "swin") and len(transforms) == 1)
@pytest.mark.parametrize(
    ("name", "transforms", "expected", "how"),
    [
        ("vit", [Multiplex(share=2)], [1, 3], "the last block of every share group"),
        ("vit", [Multiplex(share=4)], [3], "the last block of every share group"),
        ("vit", [Multiplex(share=2), IRPE()], [1, 3], "the last block of every share group"),
        ("vit", [Multiplex(share=1)], [3], "the last block of every stage"),
        ("vit", [], [3], "the last block of every stage"),
        ("swin", [Multiplex(share=2)], [1, 3, 5], "the last block of every share group"),
        ("swin", [Multiplex(share=(2, 4))], [1, 5], "the last block of every share group"),
        ("swin", [Multiplex(share=(1, 2))], [1, 3, 5], "the last block of every share group"),
        ("swin", [], [1, 5], "the last block of every stage"),
        ("deit_distilled", [Multiplex(share=2)], [1, 3], "the last block of every share group"),
        ("headless", [Multiplex(share=2)], [1, 3], "the last block of every share group"),
    ],
)
def test_matched_takes_the_end_of_every_group(name, transforms, expected, how):
    teacher = build(name)
    pairs, reason = match_layers(compress(teacher, transforms), teacher, "matched")
    assert indices(pairs) == [(i, i) for i in expected]
    assert reason == how
    assert [str(p) for p in pairs] == [f"{i}↔{i}" for i in expected]
    assert all(p.same_tokens and p.attends_alike for p in pairs)


@pytest.mark.wide_unless(lambda name: name in ("vit", "swin"))
@pytest.mark.parametrize("name", BACKBONES)
def test_matched_pairs_are_alike_and_need_no_values(name):
    teacher = build(name)
    student = compress(teacher, [Multiplex(share=2, mlp_conv=3)])
    pairs, how = match_layers(student, teacher, "matched")
    assert pairs
    for pair in pairs:
        assert pair.student == pair.teacher
        assert pair.student in describe(teacher).blocks
    assert match_layers(surgery.skeleton(student), surgery.skeleton(teacher), "matched") == (pairs, how)


def test_matched_swin_pairs_have_shifted_windows():
    teacher = build("swin")
    pairs, _ = match_layers(compress(teacher, [Multiplex(share=2)]), teacher, "matched")
    assert [p.student.shift for p in pairs] == [(2, 2)] * 3


def test_matched_with_other_depths_distils_the_prediction():
    for student, teacher, depths in (
        (swin(depths=(2, 2)), swin(), r"stages of \[2, 2\] blocks and the teacher of \[2, 4\]"),
        (vit(depth=2), vit(), r"stages of \[2\] blocks and the teacher of \[4\]"),
    ):
        pairs, how = match_layers(student, teacher, "matched")
        assert pairs == []
        assert how.endswith("so relations are not distilled; give distill.layers, pairs or auto, to have them")
        assert depths.replace("\\", "") in how


@pytest.mark.wide_unless(lambda kind: kind == "other blocks")
@pytest.mark.parametrize("kind", ["convolutional", "other family", "other blocks", "both unknown"])
def test_matched_with_another_architecture_distils_the_prediction(kind):
    with torch.device("meta"):
        resnet = timm.create_model("resnet18", num_classes=5)
    student, teacher = {
        "convolutional": (vit(), resnet),
        "other family": (vit(), swin()),
        "other blocks": (vit(), vit(block_fn=ParallelScalingBlock)),
        "both unknown": (resnet, copy.deepcopy(resnet)),
    }[kind]
    for a, b in ((student, teacher), (teacher, student)):
        pairs, how = match_layers(a, b, "matched")
        assert pairs == []
        reason = {
            "convolutional": "compressvit knows no blocks of resnet18",
            "other family": "are of different architectures",
            "other blocks": "compressvit knows no blocks of vit_tiny_patch16_224",
            "both unknown": "compressvit knows no blocks of resnet18",
        }[kind]
        assert f"{reason}: no layer pairs, so relations are not distilled" in how
        assert how.endswith("give distill.layers, pairs or auto, to have them") == (kind == "other family")
        if kind == "other family":
            continue
        with pytest.raises(UserError, match=f"gives pairs, but {reason}; remove it to distil the prediction"):
            match_layers(a, b, ((0, 0),))


# -------------------------------------------------------------------------------------------------------------- by hand


def test_pairs_by_hand_keep_their_order():
    teacher = build("vit")
    student = compress(teacher, [Multiplex(share=2)])
    pairs, how = match_layers(student, teacher, ((2, 0), (0, 3), (2, 1)))
    assert indices(pairs) == [(2, 0), (0, 3), (2, 1)]
    assert how == "as given"
    assert pairs[0].student.path == "blocks.2"
    assert pairs[0].teacher.path == "blocks.0"


def test_pairs_of_models_of_other_depth_and_width():
    student, teacher = swin(depths=(2, 2), embed_dim=32), swin(depths=(2, 6))
    pairs, _ = match_layers(student, teacher, ((1, 1), (3, 7), (2, 4)))
    assert indices(pairs) == [(1, 1), (3, 7), (2, 4)]
    assert [(p.student.width, p.teacher.width) for p in pairs] == [(32, 16), (64, 32), (64, 32)]


def test_released_pairs_of_the_paper():
    with torch.device("meta"):
        tiny, base = (timm.create_model(f"swin_{size}_patch4_window7_224") for size in ("tiny", "base"))
    given = ((1, 1), (3, 3), (5, 9), (7, 15), (9, 21), (11, 23))
    pairs, _ = match_layers(tiny, base, given)
    assert tuple(indices(pairs)) == given
    # the last stage's windows fill its 7×7 grid, so that nothing is left to shift there
    assert [p.student.shift for p in pairs] == [(3, 3)] * 5 + [(0, 0)]


@pytest.mark.parametrize(
    ("student", "teacher", "said"),
    [
        ("vit_no_class_token", "vit", "prefix tokens are left out, because the student has 0 and the teacher 1"),
        (
            "vit",
            "deit_distilled",
            "but for class tokens, prefix tokens are left out, because the student has 1 and the teacher 2",
        ),
        (
            "dinov2_registers",
            "vit",
            "but for class tokens, prefix tokens are left out, because the student has 5 and the teacher 1",
        ),
        ("vit", "vit", ""),
    ],
)
def test_prefix_tokens_that_one_lacks_are_left_out(student, teacher, said):
    pairs, how = match_layers(build(student), build(teacher), "matched")
    assert pairs
    assert all(p.same_tokens == (not said) and p.attends_alike for p in pairs)
    assert how == "the last block of every stage" + (f"; {said}" if said else "")


# ------------------------------------------------------------------------------------------------------------- refusals


@pytest.mark.parametrize(
    ("pair", "message"),
    [
        ((1, 3), r"\[1, 3\] differs in stage: 0 in the student, 1 in the teacher.*fit student block 1: \[1\]"),
        ((4, 0), r"\[4, 0\] differs in stage: 1 in the student, 0 in the teacher.*fit student block 4: \[2, 4\]"),
        (
            (2, 3),
            r"\[2, 3\] differs in window shift: \(0, 0\) in the student, \(2, 2\) in the teacher.*block 2: \[2, 4\]",
        ),
        (
            (5, 2),
            r"\[5, 2\] differs in window shift: \(2, 2\) in the student, \(0, 0\) in the teacher.*block 5: \[3, 5\], "
            r"the nearest is \[5, 3\]",
        ),
    ],
)
def test_pairs_that_do_not_see_the_same_tokens(pair, message):
    teacher = build("swin")
    with pytest.raises(UserError, match=message):
        match_layers(compress(teacher, [Multiplex(share=2)]), teacher, ((0, 0), pair))


@pytest.mark.parametrize(
    ("student", "teacher", "grids", "attention"),
    [
        (swin, {"img_size": 64}, True, False),
        (swin, {"window_size": 8}, False, False),
        (vit, {"img_size": 64}, True, True),
    ],
)
def test_pairs_of_another_resolution_or_window(student, teacher, grids, attention):
    """Attention is over the same tokens in windows of the same size alone, or where it is over the whole image."""
    for layers in ("matched", ((1, 1), (3, 3))):
        pairs, how = match_layers(student(), student(**teacher), layers)
        assert pairs
        assert all(pair.attends_alike == attention for pair in pairs)
        assert ("these are compared on the smaller one" in how) == grids
        assert ("attention relations of all pairs are left out" in how) == (not attention)


def test_a_student_block_without_a_partner_names_those_of_the_teacher_block():
    student, teacher = swin(depths=(1, 2)), swin(depths=(1, 1))
    with pytest.raises(
        UserError,
        match=r"\[2, 1\] differs in window.*no teacher block fits it; student blocks that fit teacher block 1: \[1\]",
    ):
        match_layers(student, teacher, ((2, 1),))
    with pytest.raises(UserError, match=r"names block 9 of the teacher.*that fits is \[1, 1\]"):
        match_layers(student, teacher, ((2, 9),))
    larger = timm.create_model("hiera_tiny_224", **{**examples()["hiera"].args, "img_size": 64})
    with pytest.raises(UserError, match=r"names block 9 of the teacher, which has 4 \(0 to 3\)$"):  # none fits
        match_layers(build("hiera"), larger, ((2, 9),))


@pytest.mark.parametrize(
    ("pair", "message"),
    [
        (
            (4, 0),
            r"the pair \[4, 0\] names block 4 of the student, which has 4 \(0 to 3\); the nearest pair that fits is \[3, 0\]",
        ),
        (
            (0, 6),
            r"the pair \[0, 6\] names block 6 of the teacher, which has 6 \(0 to 5\); the nearest pair that fits is \[0, 5\]",
        ),
        ((-1, 0), r"names block -1 of the student.* that fits is \[0, 0\]"),
    ],
)
def test_blocks_that_do_not_exist(pair, message):
    with pytest.raises(UserError, match=message):
        match_layers(vit(), vit(depth=6), (pair,))


def test_candidates_are_pairs_that_work():
    student, teacher = swin(), swin(depths=(2, 6))
    tried = 0
    for s, t in ((s, t) for s in range(6) for t in range(8)):
        try:
            match_layers(student, teacher, ((s, t),))
        except UserError as error:
            candidates = [int(word) for word in str(error).rpartition("[")[2].rstrip("]").split(", ")]
            tried += 1
        else:
            continue
        assert t not in candidates
        assert indices(match_layers(student, teacher, tuple((s, c) for c in candidates))[0]) == [
            (s, c) for c in candidates
        ]
    # a pair works within one stage and one shift: 2 in the first stage, 2 × (2·3) in the second
    assert tried == 6 * 8 - 2 - 12


def test_layers_that_share_linear_weights_count_as_sharing():
    teacher = vit(depth=4)
    student = vit(depth=4)
    apply_plans(student, [LORS(rank=2, share=2).plan(student)])
    pairs, how = match_layers(student, teacher, "matched")
    assert [(p.student.index, p.teacher.index) for p in pairs] == [(1, 1), (3, 3)]
    assert how == "the last block of every share group"
    alone = vit(depth=4)
    apply_plans(alone, [LowRank(rank=2).plan(alone)])
    pairs, how = match_layers(alone, teacher, "matched")
    assert [(p.student.index, p.teacher.index) for p in pairs] == [(3, 3)]
    assert how == "the last block of every stage"


# ----------------------------------------------------------------------------------------------------------------- auto


def on(student, teacher, images):
    """CKA of the two models' blocks on these images."""
    batches = images.split(8)
    return likeness(side(student), side(teacher), lambda: batches, torch.device("cpu"), images=len(images))


@pytest.mark.parametrize("name", ["vit", "swin"])
def test_auto_finds_the_blocks_that_a_student_has(name):
    """A student that has lost the last blocks of a stage is its teacher up to there; by depth it would learn from later ones."""
    teacher, student = build(name), build(name)
    blocks = student.blocks if name == "vit" else student.layers[1].blocks
    del blocks[-2:]
    pairs, how = match_layers(student, teacher, "auto", on(student, teacher, images_for(teacher, 32)))
    assert indices(pairs) == [(i, i) for i in range(len(describe(student).blocks))]
    assert how == "auto: the most similar by CKA"
    assert indices(match_layers(student, teacher, "auto")[0]) != indices(pairs)


def test_auto_of_a_copy_is_the_diagonal():
    teacher = build("vit")
    student = compress(teacher, [Multiplex(share=2, init="first")])
    images = images_for(teacher, 32)
    assert indices(match_layers(build("vit"), teacher, "auto", on(build("vit"), teacher, images))[0]) == [
        (i, i) for i in range(4)
    ]
    pairs = indices(match_layers(student, teacher, "auto", on(student, teacher, images))[0])
    assert [s for s, _ in pairs] == [1, 3]  # the ends of the share groups


def test_auto_without_values_pairs_by_depth():
    for student, teacher, expected in (
        (vit(), vit(), [(i, i) for i in range(4)]),
        (vit(depth=2), vit(), [(0, 1), (1, 3)]),
        (swin(depths=(2, 2)), swin(), [(0, 0), (1, 1), (2, 4), (3, 5)]),
    ):
        pairs, how = match_layers(surgery.skeleton(student), surgery.skeleton(teacher), "auto")
        assert indices(pairs) == expected
        assert how == "auto: the most similar by CKA, measured when the phase begins; by depth until then"


def test_auto_pairs_blocks_of_other_architectures():
    pairs, how = match_layers(vit(), swin(), "auto")
    assert indices(pairs) == [(0, 0), (1, 2), (2, 3), (3, 5)]  # by depth: 4 blocks and 6
    assert "but for" not in how
    assert "prefix tokens are left out, because the student has 1 and the teacher 0" in how
    assert "these are compared on the smaller one" in how
    assert "attention relations of all pairs are left out" in how


def test_tokens_in_an_order_of_their_own_have_no_pairs_elsewhere():
    for a, b in ((build("hiera"), vit()), (vit(), build("hiera"))):
        for layers in ("matched", "auto"):
            pairs, how = match_layers(a, b, layers)
            assert pairs == []
            assert how == (
                "the tokens of hiera_tiny_224 come in an order of its own, which those of another architecture have not: "
                "no layer pairs, so relations are not distilled"
            )
        with pytest.raises(UserError, match=r"distill.layers gives pairs, but the tokens of hiera_tiny_224 come in an"):
            match_layers(a, b, ((0, 0),))
    assert match_layers(build("hiera"), build("hiera"), "auto")[0]
