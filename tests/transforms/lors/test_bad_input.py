"""What LORS refuses, and what it does with calibration images that are few, alike or damaged."""

from __future__ import annotations

import re
from functools import partial

import pytest
import torch
from helpers.models import build, images_for, outputs
from helpers.ranks import ranked
from timm.layers import Mlp
from torch import nn

from compressvit import LORS, Align, LowRank, Multiplex
from compressvit.errors import UserError
from compressvit.model import cost
from compressvit.recipe.recipe import load_recipe
from compressvit.runs.plan import plan_recipe
from compressvit.transforms.applying import compress, materialise, plan_transforms
from compressvit.transforms.low_rank.pivoted_layer import pivoted_linear


def relative(a: torch.Tensor, b: torch.Tensor) -> float:
    return ((a - b).norm() / b.norm()).item()


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
        ([], LORS(rank=4, terms=(1, 2)), r"lors\.terms lists 2 numbers, but .* has 4 blocks"),
        ([], LORS(rank=4, share=3), r"lors\.share=3 does not divide the 4 blocks of stage 0 .* \[1, 2, 4\]"),
        ([], LORS(rank=4, share=(2, 2)), r"lors\.share gives 2 numbers, \[2, 2\], but .* has 1 stage"),
        ([], LORS(rank=4, targets=("attn.qvk",)), r"'attn.qvk' matches no linear layer .* did you mean 'attn.qkv'"),
        ([], LowRank(rank=0), r"rank 0 would leave blocks\.0\.attn\.qkv without a weight"),
        (
            [Multiplex(share=2)],
            LORS(rank=4, share=4),
            r"lors wants to share blocks\.0\.attn\.qkv\.weight among 4 layers, but the earlier multiplex shares it among 2; "
            r"leave lors\.share and group_by out",
        ),
        ([LORS(rank=2, metric="weights")], LORS(rank=2), r"applied twice: .* different targets, or merge"),
        (
            [LORS(rank=2, share=4, metric="weights")],
            Multiplex(share=2),
            r"multiplex wants to share .* but the earlier lors shares .* give both steps the same share",
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


@pytest.mark.wide_unless(lambda share, positions: share == 1 and positions == 50.0)
@pytest.mark.parametrize("share", [1, 2])
@pytest.mark.parametrize("positions", [1.0, 50.0])
def test_too_few_images_are_told_and_regularised(share, positions, caplog):
    teacher = build("vit")
    with torch.no_grad():  # tokens that differ by their positions alone may look like a rich set
        teacher.pos_embed.mul_(positions)
    unseen = images_for(teacher, 32, seed=2)
    spec = ranked(share, rank=12)

    def error(images):
        caplog.clear()
        student = compress(teacher, [spec], calibration=images)
        return relative(outputs(student, unseen), outputs(teacher, unseen))

    plain = compress(teacher, [spec.model_copy(update={"metric": "weights"})])
    without = relative(outputs(plain, unseen), outputs(teacher, unseen))
    for images in (images_for(teacher, 2), images_for(teacher, 5).repeat(8, 1, 1, 1)):
        found = error(images)
        assert any(
            "distinct calibration images, fewer than 8: layers are fitted one by one" in r.getMessage()
            for r in caplog.records
        )
        assert found < 1.3 * without, (found, without)  # measured 0.05 to 1.15
    error(images_for(teacher, 8))
    assert not any("different ones" in record.getMessage() for record in caplog.records)


def test_up_to_which_rank_low_rank_is_faster(monkeypatch):
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
    assert cost.break_even_rank(40, 60, 5, pivoted=partial(pivoted_linear, 40, 60)) == (39, 39)  # every rank is faster


@pytest.mark.wide_unless(lambda form: form == "auto")
@pytest.mark.parametrize(("form", "by_macs"), [("false", 72), ("auto", 95)])
def test_the_plan_says_up_to_which_rank_low_rank_is_faster(form, by_macs):
    recipe = load_recipe("fashion_mnist_low_rank", [f"steps.0.low_rank.pivoted={form}"])
    (note,) = (text for text in plan_recipe(recipe, "x").notes if "faster than the dense layer" in text)
    assert re.search(rf"blocks\.0\.attn\.qkv \(288×96, 17 tokens\) {by_macs} / \d+;", note), note


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
    student = compress(teacher, [LowRank(rank=full, targets=("mlp.fc2",), metric="weights")])
    weight = student.blocks[0].mlp.fc2.effective_weight()
    assert relative(weight, teacher.blocks[0].mlp.fc2.weight) < 1e-4  # measured 1.5e-7


def unlike_blocks():
    """A ViT whose later two blocks have narrower MLPs."""
    model = build("vit")
    for block in model.blocks[2:]:
        block.mlp = Mlp(48, 100)
    return model


@pytest.mark.wide_unless(lambda spec: spec.share == 4 and spec.name == "lors")
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
        (Align(share=4), r"blocks.2.mlp.fc1.weight has another shape than that of blocks.0; give an align.share"),
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
        compress(model, [LowRank(rank=2, metric="weights")])


@pytest.mark.parametrize(
    ("steps", "words"),
    [
        (
            [Multiplex(share=2, init="scratch"), LORS(rank=2)],
            "the earlier multiplex.init=scratch .*; multiplex.init=mean, or give lors.init=scratch",
        ),
        (
            [Align(share=2), LORS(rank=2, share=2, group_by="similarity")],
            "the earlier align has matched the blocks of different groups; leave align out",
        ),
        ([Align(share=2), LORS(share="auto", budget={"parameters": 0.5})], "would choose its own groups"),
    ],
)
def test_steps_whose_work_would_be_undone(steps, words):
    with pytest.raises(UserError, match=words):
        plan_transforms(build("vit"), steps)
