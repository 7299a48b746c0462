"""Adapters on some blocks or stages, and where in a block they act."""

from __future__ import annotations

import re

import pytest
import torch
from helpers.models import build, images_for, outputs, randomise
from torch import Tensor, nn

from compressvit import merge
from compressvit.errors import UserError
from compressvit.model import surgery
from compressvit.model.backbone import describe
from compressvit.recipe.recipe import parse_recipe
from compressvit.transforms import TRANSFORMS, Adapters, AdaptFormer, FacT, LoRA, RepAdapter
from compressvit.transforms.applying import compress
from compressvit.transforms.on_blocks import OnBlocks
from compressvit.transforms.record import compression_of

EXACT = 1e-13  # relative, in float64; measured up to 8e-16
SPECS = [spec.examples()[0] for spec in TRANSFORMS.values() if issubclass(spec, OnBlocks)]


def gap(a: Tensor, b: Tensor) -> float:
    assert a.shape == b.shape
    return ((a - b).abs().max() / b.abs().max()).item()


def moved(model: nn.Module) -> nn.Module:
    added = surgery.added_parameters(model)
    assert added
    randomise(nn.ParameterList(p for n, p in model.named_parameters() if n in added), 0.2)
    return model


def adapted(model: nn.Module) -> list[int]:
    """The blocks with something added; nothing may be added elsewhere."""
    added = surgery.added_parameters(model)
    blocks = describe(model).blocks
    assert all(any(name.startswith(f"{info.path}.") for info in blocks) for name in added)
    return [info.index for info in blocks if any(name.startswith(f"{info.path}.") for name in added)]


def test_every_adapter_but_prompts_can_be_put_on_some_blocks():
    names = {"adapters", "adaptformer", "compacter", "fact", "lora", "phm", "repadapter", "ssf"}
    assert {spec.name for spec in SPECS} == names


@pytest.mark.wide_unless(lambda spec, chosen: spec.name == "lora" or len(chosen.get("blocks", ())) > 1)
@pytest.mark.parametrize("spec", SPECS, ids=lambda spec: spec.name)
@pytest.mark.parametrize(
    ("chosen", "expected"),
    [
        ({"blocks": (3,)}, [3]),
        ({"blocks": (4, "1-2", "0-1")}, [0, 1, 2, 4]),
        ({"stages": (0,)}, [0, 1]),
        ({"stages": (1,)}, [2, 3, 4, 5]),
        ({"stages": (0, 1)}, [0, 1, 2, 3, 4, 5]),
    ],
    ids=str,
)
def test_the_blocks_that_are_named_are_adapted_and_no_other(spec, chosen, expected):
    given = type(spec).model_validate({**spec.model_dump(), **chosen})
    model = compress(build("swin"), [given])
    assert adapted(model) == expected
    rebuilt = build("swin")
    compression_of(model).plans[0].apply(rebuilt)
    assert adapted(rebuilt) == expected


def test_the_model_is_changed_from_the_first_adapted_block_on():
    plain = build("vit").double()
    model = moved(compress(plain, [Adapters(width=4, blocks=(2,))]))
    images = images_for(model).double()
    before, after = ([x for _, x in _blocks(m, images)] for m in (plain, model))
    assert [torch.equal(a, b) for a, b in zip(before, after, strict=True)] == [True, True, False, False]


def _blocks(model: nn.Module, images: Tensor) -> list[tuple[int, Tensor]]:
    found: list[tuple[int, Tensor]] = []
    hooks = [b.register_forward_hook(lambda m, i, o, k=k: found.append((k, o))) for k, b in enumerate(model.blocks)]
    outputs(model, images)
    for hook in hooks:
        hook.remove()
    return found


def test_blocks_are_written_in_a_recipe():
    text = (
        "teacher: {model: vit_tiny_patch16_224}\ndata: {name: digits}\n"
        "steps: [{repadapter: {blocks: [0, 2-3], groups: 4}}, {adaptformer: {stages: [0], form: serial}}]\n"
    )
    first, second = (step.spec for step in parse_recipe(text).steps)
    assert (first.blocks, second.stages, second.form) == ((0, "2-3"), (0,), "serial")


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ({"blocks": (3, "4-6")}, r"lora\.blocks asks for block 6, but swin_\S+ has 6: 0 to 5"),
        ({"blocks": ("2-10000000000",)}, r"lora\.blocks asks for block 10000000000, but swin_\S+ has 6"),
        ({"blocks": ("0-" + 30 * "9",)}, r"lora\.blocks asks for block 9{30}, but swin_\S+ has 6"),
        ({"stages": (2,)}, r"lora\.stages asks for stage 2, but swin_\S+ has 2: 0 to 1"),
    ],
)
def test_what_the_model_does_not_have_is_refused(given, words):
    with pytest.raises(UserError, match=words):
        LoRA(**given).plan(build("swin"))


def test_a_vit_has_one_stage():
    with pytest.raises(UserError, match=r"stage 1, but vit_\S+ has one, 0; choose by `blocks`"):
        LoRA(stages=(1,)).plan(build("vit"))


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ({"blocks": (1,), "stages": (0,)}, "blocks and stages are both given; remove one of them"),
        ({"blocks": ("5-3",)}, "blocks: 5-3 ends before it begins; did you mean 3-5?"),
        ({"blocks": ()}, "at least 1 item"),
        ({"blocks": (-1,)}, "greater than or equal to 0"),
        ({"blocks": ("all",)}, "pattern"),
    ],
)
def test_blocks_that_make_no_sense_are_refused(given, words):
    with pytest.raises(UserError, match=re.escape(words)):
        FacT(**given)


# ----------------------------------------------------------------------------------------------------- where in a block


@pytest.mark.parametrize("backbone", ["vit", "dinov2_registers", "swin", "convnext", "convnext_conv_mlp"])
def test_adaptformer_in_series_reads_what_leaves_the_mlp(backbone):
    """`m + s·(ReLU(m Dᵀ + b_D) Uᵀ + b_U)`; LayerScale and the residual come after it."""
    plain = build(backbone).double()
    model = moved(compress(plain, [AdaptFormer(width=3, scale=0.7, form="serial")]))
    for info in describe(model).blocks:
        ours, theirs = (m.get_submodule(f"{info.path}.mlp") for m in (model, plain))
        grid = backbone.endswith("conv_mlp")
        x = torch.randn(2, info.width, 4, 4).double() if grid else torch.randn(2, 4, 4, info.width).double()
        m, found = theirs(x), ours(x)
        if grid:
            m, found = m.movedim(1, -1), found.movedim(1, -1)
        branch = ours.adaptformer
        hidden = (m @ branch.down.weight.T + branch.down.bias).clamp(min=0)
        assert gap(found, m + 0.7 * (hidden @ branch.up.weight.T + branch.up.bias)) < EXACT
        assert gap(found, m) > 1e-2


@pytest.mark.parametrize("form", ["parallel", "serial"])
def test_both_forms_of_adaptformer_cost_the_same(form):
    model = compress(build("vit"), [AdaptFormer(width=3, form=form)])
    added = surgery.added_parameters(model)
    assert sum(model.get_parameter(name).numel() for name in added) == 4 * (2 * 48 * 3 + 3 + 48)


def test_an_adaptformer_in_series_has_no_choice_of_input():
    with pytest.raises(UserError, match="form: serial reads what leaves the MLP; leave out input: residual"):
        AdaptFormer(form="serial", input="residual")


@pytest.mark.wide_unless(lambda groups: groups == 2)
@pytest.mark.parametrize("act", [None, "gelu"])
@pytest.mark.parametrize("groups", [1, 2, 4])
@pytest.mark.parametrize("position", ["before", "after"])
@pytest.mark.parametrize("place", ["attn", "mlp"])
def test_a_repadapter_acts_before_or_after_a_sublayer(place, position, groups, act):
    plain = build("vit").double()
    spec = RepAdapter(
        width=4, groups=groups, place="attention" if place == "attn" else place, position=position, act=act, scale=0.5
    )
    model = moved(compress(plain, [spec])).eval()
    ours, theirs = (m.get_submodule(f"blocks.1.{place}") for m in (model, plain))
    other = model.get_submodule("blocks.1." + ("mlp" if place == "attn" else "attn"))
    assert not surgery.added_parameters(other), "the other sublayer has none"
    adapter = getattr(ours, "repadapter" if position == "before" else "repadapter_after")
    up = torch.block_diag(*adapter.up_weight)

    def phi(x: Tensor) -> Tensor:
        hidden = x @ adapter.down.weight.T + adapter.down.bias
        hidden = hidden if act is None else hidden * (1 + torch.erf(hidden / 2**0.5)) / 2
        return x + 0.5 * (hidden @ up.T + adapter.up_bias)

    x = torch.randn(2, 7, 48).double()
    assert gap(ours(x), theirs(phi(x)) if position == "before" else phi(theirs(x))) < EXACT
    assert gap(ours(x), theirs(x)) > 1e-3


@pytest.mark.wide_unless(lambda backbone, groups: groups == 4 and backbone in ("vit", "swin"))
@pytest.mark.parametrize("backbone", ["vit", "dinov2_registers", "swin", "convnext", "convnext_conv_mlp"])
@pytest.mark.parametrize("groups", [1, 4])
def test_every_linear_placement_merges(backbone, groups):
    steps = [RepAdapter(width=4, groups=groups), RepAdapter(width=4, groups=groups, position="after", blocks=("1-3",))]
    model = moved(compress(build(backbone), steps))
    merged = merge(model)
    assert merged.state_dict().keys() == build(backbone).state_dict().keys()
    assert gap(outputs(merged), outputs(model)) < 1e-5  # measured up to 2e-6
    assert gap(outputs(merged), outputs(build(backbone))) > 1e-3


@pytest.mark.parametrize("position", ["before", "after"])
def test_a_repadapter_with_an_activation_is_refused_by_name(position):
    model = compress(build("vit"), [RepAdapter(width=4, position=position, act="relu")])
    with pytest.raises(
        UserError, match=r"repadapter cannot be folded: with act: relu it is not linear, .* Leave act out"
    ):
        merge(model)
