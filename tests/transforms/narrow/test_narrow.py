"""Narrower blocks: what is redundant goes without a trace, what is not is compensated, and the rest are timm's own layers."""

from __future__ import annotations

import pytest
import timm
import torch
from helpers.models import VIT as SMALL
from helpers.models import build, images_for, outputs
from timm.layers import Mlp
from torch import nn

from compressvit.artifacts.merge import merge
from compressvit.errors import UserError
from compressvit.fitting.reference import Reference
from compressvit.model import surgery
from compressvit.model.backbone import describe
from compressvit.transforms import Narrow, Shrink
from compressvit.transforms.applying import compress
from compressvit.transforms.low_rank.layer import Factored
from compressvit.transforms.narrow.form import BlockForm
from compressvit.transforms.narrow.places import places
from compressvit.transforms.narrow.teacher import Settings, TeacherBlock
from compressvit.transforms.shrink.spec import ShrinkBudget

BLOCKS = range(4)


def vit(**more) -> nn.Module:
    """A small ViT whose blocks do something."""
    torch.manual_seed(0)
    model = timm.create_model("vit_tiny_patch16_224", **{**SMALL, **more}).eval()
    for parameter in model.parameters():
        if parameter.ndim > 1:
            nn.init.normal_(parameter, std=parameter[0].numel() ** -0.5)
        elif parameter.abs().sum() == 0:
            nn.init.normal_(parameter, std=0.1)
    return model


def images(count: int = 48) -> torch.Tensor:
    return torch.randn(count, 3, 32, 32, generator=torch.Generator().manual_seed(5))


@torch.no_grad()
def lost(student: nn.Module, teacher: nn.Module) -> float:
    """Relative error of the features of other images."""
    other = torch.randn(16, 3, 32, 32, generator=torch.Generator().manual_seed(6))
    wanted = teacher.forward_features(other)
    return ((student.forward_features(other) - wanted).norm() / wanted.norm()).item()


@torch.no_grad()
def repeat_neurons(model: nn.Module, gated: bool = False) -> None:
    """Make the second half of every MLP's neurons the same as the first."""
    for block in model.blocks:
        fc1, half = block.mlp.fc1, block.mlp.fc2.in_features // 2
        for rows in fc1.weight.chunk(2 if gated else 1) + fc1.bias.chunk(2 if gated else 1):
            rows[half:] = rows[:half]


@torch.no_grad()
def flatten_heads(model: nn.Module) -> None:
    """Let every head's queries and values have half of its dimensions."""
    for block in model.blocks:
        attention = block.attn
        for tensor in (attention.qkv.weight, attention.qkv.bias):
            parts = tensor.unflatten(0, (3, attention.num_heads, attention.head_dim))
            half = attention.head_dim // 2
            for part in (0, 2):
                parts[part][:, half:] = parts[part][:, :half]


@pytest.mark.wide_unless(lambda sequential: sequential)
@pytest.mark.parametrize("sequential", [False, True])
def test_neurons_that_repeat_others_go_without_a_trace(sequential):
    teacher = vit()
    repeat_neurons(teacher)
    student = compress(teacher, [Narrow(neurons=0.5, sequential=sequential)], images())
    assert [block.mlp.fc2.in_features for block in student.blocks] == [96] * 4
    assert lost(student, teacher) < 5e-3  # measured 1.6e-3 one by one, 4e-5 in order, of the ridges
    # in any other half of the neurons something is lost
    assert lost(compress(teacher, [Narrow(neurons=0.25)], images()), teacher) > 0.05  # measured 0.3


def test_gated_neurons_are_pairs_of_rows():
    small = {**SMALL, "embed_dim": 48, "init_values": None}
    torch.manual_seed(0)
    teacher = timm.create_model("vit_giant_patch14_dinov2", **{**small, "patch_size": 8, "num_classes": 0}).eval()
    for parameter in teacher.parameters():
        if parameter.ndim > 1:
            nn.init.normal_(parameter, std=parameter[0].numel() ** -0.5)
    hidden = teacher.blocks[0].mlp.fc2.in_features
    assert teacher.blocks[0].mlp.fc1.out_features == 2 * hidden
    repeat_neurons(teacher, gated=True)
    student = compress(teacher, [Narrow(neurons=(hidden // 2,) * 4)], images())
    assert student.blocks[0].mlp.fc1.out_features == hidden
    assert lost(student, teacher) < 1e-3  # measured 2e-5


@pytest.mark.parametrize("sequential", [False, True])
def test_dimensions_that_say_nothing_go_without_a_trace(sequential):
    teacher = vit()
    flatten_heads(teacher)
    student = compress(teacher, [Narrow(head_dim=6, sequential=sequential)], images())
    for block in student.blocks:
        assert (block.attn.head_dim, block.attn.num_heads, block.attn.proj.in_features) == (6, 4, 24)
    assert lost(student, teacher) < 2e-3  # measured 1e-4, of the ridges
    block = student.blocks[0].attn  # without the fused kernel it computes the same
    fused = outputs(student, images(4))
    for block in student.blocks:
        block.attn.fused_attn = False
    torch.testing.assert_close(outputs(student, images(4)), fused)


def test_heads_go_as_a_whole():
    teacher = vit()
    with torch.no_grad():
        for block in teacher.blocks:  # the output projection does not read two of them
            block.attn.proj.weight[:, 12:36] *= 1e-3
    student = compress(teacher, [Narrow(heads=2)], images())
    assert student.blocks[1].attn.num_heads == 2
    assert lost(student, teacher) < 0.02  # measured 0.002
    wanted = teacher.blocks[1].attn.qkv.weight.detach().unflatten(0, (3, 4, 12))[:, [0, 3]].flatten(0, 2)
    torch.testing.assert_close(student.blocks[1].attn.qkv.weight.detach(), wanted, atol=0.05, rtol=0)


@pytest.mark.wide_unless(lambda name: name == "neurons")
@pytest.mark.parametrize("name", ["neurons", "head_dim"])
def test_more_is_lost_the_less_is_left_and_compensation_helps(name):
    teacher = vit()
    errors = [lost(compress(teacher, [Narrow(**{name: share})], images()), teacher) for share in (0.75, 0.5)]
    assert errors == sorted(errors)
    assert errors[0] > 0.01
    if name == "neurons":
        cut = surgery.deep_copy(teacher)
        with torch.no_grad():
            for block in cut.blocks:  # the smallest neurons, and nothing in their place
                fc1, fc2 = block.mlp.fc1, block.mlp.fc2
                size = fc1.weight.norm(dim=1) * fc2.weight.norm(dim=0)
                fc2.weight[:, size.argsort()[:96]] = 0
        assert errors[1] < 0.8 * lost(cut, teacher)  # measured 0.47 of it


def test_without_gradients_layers_give_on_average_what_the_teachers_do():
    """One by one: whatever a layer loses, it loses around the mean, which its bias keeps."""
    teacher = vit(num_classes=1, class_token=False, global_pool="avg")  # of one class the probability is always 1
    inputs = images()
    forms = {
        "blocks.0": BlockForm(heads=2, head_dim=8, ranks={"attn.qkv": 12}),
        "blocks.1": BlockForm(neurons=64, ranks={"mlp.fc2": 20}),
    }
    student = surgery.deep_copy(teacher)
    plan = Narrow(neurons=0.5, sequential=False).plan(teacher).model_copy(update={"forms": forms})
    plan.apply(student)
    plan.initialise(student, Reference(surgery.deep_copy(teacher), inputs))
    seen = []
    for model in (student, teacher):
        given: list[torch.Tensor] = []
        layer = model.blocks[0].attn.proj
        layer.register_forward_hook(lambda m, i, o, given=given: given.append(o))
        model(inputs)
        seen.append(given[0].detach())
    lost = (seen[0] - seen[1]).norm() / seen[1].norm()
    assert lost > 0.1  # measured 0.5
    spread = seen[1].std()
    assert (
        seen[0].mean(dim=(0, 1)) - seen[1].mean(dim=(0, 1))
    ).abs().max() < 0.1 * spread  # attention itself changes; measured 0.03


@pytest.mark.wide_unless(lambda options: "class_token" in options)
@pytest.mark.parametrize(
    "options", [{}, {"num_classes": 1}, {"qkv_bias": False}, {"class_token": False, "global_pool": "avg"}], ids=str
)
def test_moments_of_deviations_are_moments(options):
    """No eigenvalue is negative: a mean of two moments less the product of one mean would be no moment."""
    teacher = vit(**options)
    with torch.no_grad():
        for block in teacher.blocks:  # means that are not zero
            block.norm1.bias += 1.0
            block.norm2.bias += 1.0
    reference, settings = Reference(surgery.deep_copy(teacher), images()), Settings(1e-3, 0.1)
    for place in places(teacher, describe(teacher)):
        block = TeacherBlock(place, reference, describe(teacher).family, settings)
        for layer in place.layers:
            values = torch.linalg.eigvalsh(block.centred(layer))
            assert values[0] > -1e-4 * values.mean()  # measured -7e-6: of float32 sums


def test_where_nothing_is_left_to_merge_it_is_told():
    with pytest.raises(UserError, match="there is nothing to merge: its layers are plain"):
        merge(compress(vit(), [Narrow(neurons=0.5, metric="weights")]))


@pytest.mark.wide
def test_what_is_left_to_merge_is_merged():
    teacher = vit()
    student = compress(
        teacher, [Shrink(budget=ShrinkBudget(parameters=0.6), methods=("neurons", "rank"), multiple=4)], images()
    )
    merged = merge(student)
    torch.testing.assert_close(outputs(merged, images(2)), outputs(student, images(2)), atol=1e-4, rtol=1e-4)
    assert not any(isinstance(module, Factored) for module in merged.modules())


def test_blocks_that_share_are_refused():
    teacher = vit()
    teacher.blocks[2].mlp.fc1.weight = teacher.blocks[1].mlp.fc1.weight
    with pytest.raises(
        UserError, match=r"blocks\.1\.mlp\.fc1 and blocks\.2\.mlp\.fc1 of vit_tiny_patch16_224 are one weight"
    ):
        compress(teacher, [Narrow(neurons=0.5)], images())


def test_everything_stays_where_all_is_kept():
    teacher = build("vit")
    student = compress(teacher, [Narrow(neurons=1.0, head_dim=12)], images_for(teacher, 32))
    assert torch.equal(outputs(student), outputs(teacher))


def test_the_layers_are_timms_own():
    student = compress(vit(), [Narrow(neurons=0.5, head_dim=6)], images())
    for block in student.blocks:
        kinds = [type(layer) for layer in (block.attn.qkv, block.attn.proj, block.mlp.fc1, block.mlp.fc2)]
        assert kinds == [nn.Linear] * 4
        assert type(block.mlp) is Mlp
        assert type(block.attn).__module__.startswith("timm.")


def test_where_queries_are_normed_only_whole_heads_go():
    model = vit(qk_norm=True)
    with pytest.raises(
        UserError, match=r"blocks\.0 of vit_tiny_patch16_224 has no head dimensions that can be removed"
    ):
        compress(model, [Narrow(head_dim=0.5)], images())
    student = compress(model, [Narrow(heads=0.5)], images())
    assert student.blocks[0].attn.qkv.out_features == 3 * 2 * 12


def test_what_cannot_be_is_refused():
    model = vit()
    for options, text in (
        ({"neurons": (96, 96)}, "narrow.neurons lists 2 numbers, but vit_tiny_patch16_224 has 4 blocks"),
        ({"neurons": 400}, "blocks.0 of vit_tiny_patch16_224 has 192; give at most that, or a share"),
        ({"heads": 7}, "has 4; give at most that"),
    ):
        with pytest.raises(UserError, match=text):
            compress(model, [Narrow(**options)], images())
    with pytest.raises(UserError, match="narrow measures errors on calibration images, and none were given"):
        compress(model, [Narrow(neurons=0.5)])
    with pytest.raises(ValueError, match="at least one of neurons, head_dim and heads"):
        Narrow()
