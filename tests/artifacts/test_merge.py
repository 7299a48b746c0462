"""Merging: an affine map of channels goes into a layer, and mergeable adapters into the backbone, exactly."""

from __future__ import annotations

import copy
import itertools
from collections.abc import Callable, Sequence

import pytest
import timm
import torch
from helpers.contract import ADAPTED_BACKBONES, same_values, structure, values
from helpers.models import SWIN, build, images_for, outputs, randomise
from helpers.ranks import ranked
from timm.layers import StdConv2d
from torch import Tensor, nn

from compressvit.artifacts import artifact
from compressvit.artifacts.merge import merged_copy
from compressvit.errors import UserError
from compressvit.model.affine import PaddedConv2d, merge_after_, merge_before_
from compressvit.model.backbone import describe
from compressvit.model.families.beit import SMALL as BEIT
from compressvit.model.surgery import added_parameters, fill_slot, skeleton, specialise
from compressvit.transforms import PHM, SSF, Adapters, FacT, LoRA, LowRank, Multiplex, RepAdapter, Transform
from compressvit.transforms.applying import apply_plans, compress, materialise
from compressvit.transforms.lora import LoRATerm, WithLoRA
from compressvit.transforms.lors.layers import LowRankTerm, SharedLowRankLinear
from compressvit.transforms.low_rank.layer import factor
from compressvit.transforms.record import compression_of, trained_names
from compressvit.transforms.shrink.plan import ShrinkPlan
from compressvit.transforms.term import add_to_weight_

IN, OUT = 6, 10


def relative(a: Tensor, b: Tensor) -> float:
    assert a.shape == b.shape
    return ((a - b).norm() / b.norm()).item()


def affine(size: int, shift: bool = True, seed: int = 0) -> tuple[Tensor, Tensor]:
    """A dense R near the identity, and c; in float64."""
    generator = torch.Generator().manual_seed(seed)
    r, c = (torch.randn(*shape, generator=generator, dtype=torch.float64) for shape in ((size, size), (size,)))
    return torch.eye(size, dtype=torch.float64) + 0.3 * r, c * shift


def mapped(x: Tensor, r: Tensor, c: Tensor, channels: int) -> Tensor:
    """`R x + c` over a dimension."""
    return (x.double().movedim(channels, -1) @ r.T + c).movedim(-1, channels).to(x)


@torch.no_grad()
def run(layer: nn.Module, x: Tensor) -> Tensor:
    return layer(x, x, x)[0] if isinstance(layer, nn.MultiheadAttention) else layer(x)


def noise(*shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(1))


def conv(kernel: int, **options) -> Callable[..., nn.Module]:
    return lambda **more: nn.Conv2d(IN, OUT, kernel, **{**options, **more})


SEQUENCE, IMAGE = noise(2, 5, IN), noise(2, IN, 8, 8)
# By name: the layer, inputs, and their channels' dimension.
LAYERS: dict[str, tuple[Callable[..., nn.Module], Tensor, int]] = {
    "linear": (lambda **more: nn.Linear(IN, OUT, **more), SEQUENCE, -1),
    "attention": (lambda **more: nn.MultiheadAttention(IN, 2, batch_first=True, **more), SEQUENCE, -1),
    "1x1": (conv(1), IMAGE, 1),
    "patchify": (conv(4, stride=4), IMAGE, 1),
    "unpadded": (conv(3, padding="valid"), IMAGE, 1),
    "replicate": (conv(3, padding=1, padding_mode="replicate"), IMAGE, 1),
    "reflect": (conv(3, padding="same", padding_mode="reflect"), IMAGE, 1),
    "padded": (conv(3, padding=1), IMAGE, 1),
    "padded_one_way": (conv(3, padding=(2, 0)), IMAGE, 1),
    "same": (conv(3, padding="same"), IMAGE, 1),
    "stride": (conv(3, padding=1, stride=2), IMAGE, 1),
    "dilation": (conv(3, padding=2, dilation=2), IMAGE, 1),
}
PADDED = (
    "padded",
    "padded_one_way",
    "same",
    "stride",
    "dilation",
)  # with zeros, which are not where the map takes zeros
every_layer = pytest.mark.parametrize("name", LAYERS)


def layer_of(name: str, **options) -> tuple[nn.Module, Tensor, int]:
    make, x, channels = LAYERS[name]
    torch.manual_seed(0)
    layer = make(**options).eval()
    randomise(layer)  # attention starts without biases
    return layer, x, channels


# ---------------------------------------------------------------------------------------------------------- into one layer


@every_layer
def test_a_map_before_a_layer_goes_into_it(name):
    layer, x, channels = layer_of(name)
    kind, (r, c) = type(layer), affine(IN)
    expected = run(layer, mapped(x, r, c, channels))
    merge_before_(layer, r, c)
    assert relative(run(layer, x), expected) < 1e-5  # measured 2e-7
    assert type(layer) is (PaddedConv2d if name in PADDED else kind)


@every_layer
def test_maps_merge_one_after_the_other(name):
    """The second finds a border that is not zero any more; a map without a shift moves it, too."""
    layer, x, channels = layer_of(name)
    maps = [affine(IN), affine(IN, shift=False, seed=1), affine(IN, seed=2)]
    y = x
    for r, c in reversed(maps):  # the last one merged is the first to see x
        y = mapped(y, r, c, channels)
    expected = run(layer, y)
    for r, c in maps:
        merge_before_(layer, r, c)
    assert relative(run(layer, x), expected) < 1e-5  # measured 4e-7


def test_a_border_can_become_zero_again():
    layer, x, _ = layer_of("padded")
    identity, c = torch.eye(IN, dtype=torch.float64), affine(IN)[1].float().double()  # so that −c takes all of it back
    expected = run(layer, x)
    for shift in (c, -c):
        merge_before_(layer, identity, shift)
    assert not layer.pad_value.any()
    assert relative(run(layer, x), expected) < 1e-5  # measured 5e-8


@every_layer
def test_without_a_bias_only_a_map_without_a_shift_merges(name):
    layer, x, channels = layer_of(name, bias=False)
    before, (r, c) = values(layer), affine(IN)
    with pytest.raises(UserError, match=rf"{type(layer).__name__} has no bias .* qkv_bias=True\), or keep the adapter"):
        merge_before_(layer, r, c)
    assert same_values(values(layer), before)
    expected = run(layer, mapped(x, r, 0 * c, channels))
    merge_before_(layer, r, 0 * c)
    assert relative(run(layer, x), expected) < 1e-5  # measured 3e-7
    assert type(layer) is not PaddedConv2d, "zeros stay zeros"


@pytest.mark.parametrize("name", [n for n in LAYERS if n != "attention"])
def test_a_map_behind_a_layer_goes_into_it(name):
    layer, x, channels = layer_of(name)
    r, c = affine(OUT)
    for _ in range(2):  # the second time behind a `PaddedConv2d`, where there is one
        expected = mapped(run(layer, x), r, c, channels)
        merge_after_(layer, r, c)
        assert relative(run(layer, x), expected) < 1e-5  # measured 3e-7
        merge_before_(layer, *affine(IN))
    bare, x, channels = layer_of(name, bias=False)
    expected = mapped(run(bare, x), r, 0 * c, channels)
    merge_after_(bare, r, 0 * c)
    assert relative(run(bare, x), expected) < 1e-5  # measured 3e-7
    with pytest.raises(UserError, match="has no bias"):
        merge_after_(bare, r, c)


@pytest.mark.parametrize("groups", [2, IN])
def test_grouped_convolutions_take_a_scale_and_shift_behind_and_nothing_before(groups):
    layer = nn.Conv2d(IN, IN, 3, padding=1, groups=groups)
    before, (r, c) = values(layer), affine(IN)
    with pytest.raises(UserError, match=rf"convolution of {groups} groups would make it dense; put the adapter after"):
        merge_before_(layer, r, c)
    with pytest.raises(UserError, match=rf"convolution of {groups} groups would make it dense; only a scale and shift"):
        merge_after_(layer, r, c)
    assert same_values(values(layer), before)
    r = torch.diag(r.diagonal())
    expected = mapped(run(layer, IMAGE), r, c, 1)
    merge_after_(layer, r, c)
    assert relative(run(layer, IMAGE), expected) < 1e-5  # measured 8e-8


def extended(kind: type, slot: str, term: nn.Module) -> nn.Module:
    """A linear layer that computes with more than its own weight."""
    holder = nn.ModuleDict({"layer": nn.Linear(IN, OUT)})
    specialise(holder, "layer", type("Extended", (kind, nn.Linear), {}) if kind is WithLoRA else kind)
    fill_slot(holder, "layer", slot, term)
    return holder["layer"]


def factored() -> nn.Module:
    holder = nn.ModuleDict({"layer": nn.Linear(IN, OUT)})
    factor(holder, "layer", 2)
    return holder["layer"]


NOT_PLAIN = {
    "factored": factored,
    "shared": lambda: extended(SharedLowRankLinear, "low_rank", LowRankTerm(IN, OUT, 2)),
    "lora": lambda: extended(WithLoRA, "lora", LoRATerm(IN, OUT, 2, (0,), 1, 1.0)),
    "normalised": lambda: StdConv2d(IN, OUT, 1),
    "unfused": lambda: nn.MultiheadAttention(IN, 2, kdim=IN + 1),
    "parametrised": lambda: nn.utils.parametrizations.weight_norm(nn.Linear(IN, OUT)),
}


@pytest.mark.parametrize("name", NOT_PLAIN)
def test_a_layer_that_computes_with_more_than_its_weight_is_refused(name):
    """Writing to the weight of a factored layer, or to half of a sum, would be lost or wrong without a word."""
    torch.manual_seed(0)
    layer = NOT_PLAIN[name]()
    randomise(layer)
    before = values(layer)
    with pytest.raises(UserError, match=r"merging before .* would not be exact: it computes with more"):
        merge_before_(layer, *affine(IN))
    if name != "unfused":
        with pytest.raises(UserError, match=r"merging after .* would not be exact: it computes with more"):
            merge_after_(layer, *affine(OUT))
    if name in ("factored", "shared", "parametrised"):
        with pytest.raises(
            UserError, match=r"nothing can be added to the weight of a .* low rank; fold that step first"
        ):
            add_to_weight_(layer, torch.ones(OUT, IN))
    assert same_values(values(layer), before)


def test_other_layers_and_maps_are_refused_by_name():
    for kind in (nn.LayerNorm(IN), nn.ReLU()):
        for merge, where in ((merge_before_, "before"), (merge_after_, "after")):
            with pytest.raises(UserError, match=rf"merging {where} a {type(kind).__name__} is not defined"):
                merge(kind, *affine(IN))
    layer, _, _ = layer_of("padded")
    before, (r, c) = values(layer), affine(IN)
    r[0] = 0
    with pytest.raises(UserError, match="pads with zeros would not be exact: R has no inverse"):
        merge_before_(layer, r, c)
    assert same_values(values(layer), before)
    assert type(layer) is nn.Conv2d


# ------------------------------------------------------------------------------------------------------------ whole models

ALL_PROJECTIONS = ("q", "k", "v", "proj", "fc1", "fc2")
MERGEABLE: dict[str, Transform] = {
    "repadapter": RepAdapter(width=4, scale=5.0),
    "lora": LoRA(rank=2, alpha=3.0, targets=ALL_PROJECTIONS),
    "ssf": SSF(),
    "fact_tk": FacT(rank=3, scale=0.5),
    "fact_tt": FacT(rank=2, form="tt", scale=0.5),
}


NOT_BEFORE_KEYS = ("dinov3", "eva02", "swin_v2", "vit_relpos", "cvt")  # no bias takes in a shift


def build_any(name: str, seed: int = 0) -> nn.Module:
    if name != "swin_padded":
        return build(name, seed)
    torch.manual_seed(seed)  # 6×6 tokens in windows of 4×4: φ(0) of the tokens that fill them up reaches the others
    model = timm.create_model("swin_tiny_patch4_window7_224", **{**SWIN, "img_size": 24}).eval()
    randomise(model, 0.02)
    return model


def adapted(model: nn.Module, steps: Sequence[Transform]) -> nn.Module:
    """The compressed model, with random values in everything that was added."""
    torch.manual_seed(3)
    made = compress(model, steps)
    added = added_parameters(made)
    randomise(nn.ParameterList(p for n, p in made.named_parameters() if n in added))
    return made


@pytest.mark.wide_unless(lambda name, backbone: backbone == "vit" or (name, backbone) == ("lora", "swin"))
@pytest.mark.parametrize("backbone", [*ADAPTED_BACKBONES, "swin_padded"])
@pytest.mark.parametrize("name", MERGEABLE)
def test_merged_is_the_untouched_architecture_and_computes_the_same(name, backbone):
    plain = build_any(backbone)
    family = describe(plain).family
    if any(map(family.lacks, MERGEABLE[name].needed())):
        return
    made = adapted(plain, [MERGEABLE[name]])
    if name == "repadapter" and backbone in NOT_BEFORE_KEYS:
        with pytest.raises(UserError, match="there is nothing to materialise"):
            materialise(made)
        return
    images = images_for(plain)
    expected = outputs(made, images)
    merged = materialise(made)
    assert structure(merged) == structure(plain)
    assert structure(materialise(skeleton(made))) == structure(plain), "as a plan does it, without values"
    assert relative(outputs(merged, images), expected) < 1e-5  # measured up to 1.5e-6
    assert relative(outputs(plain, images), expected) > 1e-2  # measured at least 3e-2
    assert torch.equal(outputs(made, images), expected), "the model it was made from changed"
    fresh = build_any(backbone, seed=5)
    fresh.load_state_dict(merged.state_dict(), strict=True)
    assert torch.equal(outputs(fresh, images), outputs(merged, images))
    assert compression_of(merged).plans == []


@pytest.mark.wide_unless(lambda names: set(names) == {"repadapter", "lora"} or names == ("ssf", "fact_tk"))
@pytest.mark.parametrize("names", [*itertools.permutations(("repadapter", "lora", "ssf", "fact_tk"), 2)], ids="+".join)
def test_two_adapters_merge_in_either_order(names):
    """RepAdapter's R multiplies what the others add to a weight; SSF scales what was added before it, and nothing after."""
    plain = build("vit")
    made = adapted(plain, [MERGEABLE[name] for name in names])
    expected = outputs(made)
    merged = materialise(made)
    assert structure(merged) == structure(plain)
    assert relative(outputs(merged), expected) < 1e-5  # measured up to 1.1e-6


@pytest.mark.wide_unless(lambda name, first, share: (name, first, share) == ("lora", "lors", 2))
@pytest.mark.parametrize("share", [1, 2])
@pytest.mark.parametrize("first", ["lors", "adapter"])
@pytest.mark.parametrize("name", MERGEABLE)
def test_low_rank_layers_take_adapters_in_once_they_are_dense(name, first, share):
    low_rank = ranked(share, rank=2, metric="weights")
    steps = [low_rank, MERGEABLE[name]][:: 1 if first == "lors" else -1]
    plain = build("swin" if share == 1 else "vit")
    made = adapted(plain, steps)
    expected = outputs(made)
    merged = materialise(made)
    assert structure(merged) == structure(plain)
    assert relative(outputs(merged), expected) < 1e-5  # measured up to 8e-7
    # alone, before the low-rank step is folded, the adapter has nowhere to go
    plan = next(plan for plan in compression_of(made).plans if plan.transform not in ("lors", "low_rank"))
    before = values(made)
    with pytest.raises(UserError, match=r"cannot be folded: \S+ is low rank.* Fold the low-rank step first"):
        plan.fold(made)
    assert same_values(values(made), before)


@pytest.mark.wide_unless(lambda name, order: name == "lora" or (name, order) == ("ssf", 1))
@pytest.mark.parametrize("order", [1, -1], ids=["shared_first", "adapted_first"])
@pytest.mark.parametrize("name", MERGEABLE)
def test_nothing_merges_into_a_shared_weight(name, order):
    """A private change of it would change its siblings."""
    steps = [Multiplex(share=2), MERGEABLE[name]][::order]
    made = adapted(build("vit"), steps)
    shape, before, expected = structure(made), values(made), outputs(made)
    words = rf"{MERGEABLE[name].name} cannot be folded: blocks\.0\.\S+ is shared by 2 layers"
    plan = next(plan for plan in compression_of(made).plans if plan.foldable)
    for fold in (lambda: materialise(made), lambda: plan.fold(made)):
        with pytest.raises(UserError, match=words) as refusal:
            fold()
        for way_out in ("Keep it unmerged", "merge it before sharing", "untie the layers first"):
            assert way_out in str(refusal.value)
        assert structure(made) == shape
        assert same_values(values(made), before)
        assert torch.equal(outputs(made), expected)


def test_what_was_frozen_stays_frozen():
    made = adapted(build("vit"), [LowRank(rank=2, metric="weights"), MERGEABLE["lora"], Adapters(width=2)])
    merged = materialise(made)
    assert {n for n, p in merged.named_parameters() if p.requires_grad} == trained_names(merged)
    assert trained_names(merged) < trained_names(made)


def test_a_plain_model_can_be_trained_again():
    merged = materialise(adapted(build("vit"), [LowRank(rank=2, metric="weights"), MERGEABLE["lora"]]))
    assert all(p.requires_grad for p in merged.parameters())
    assert trained_names(merged) is None


def test_what_is_dense_again_is_free_for_a_further_step(tmp_path):
    """And the record is the one that the file has, which is read from the plans."""
    forms = {"blocks.0": {"ranks": {"attn.proj": 5}}, "blocks.1": {"neurons": 40, "ranks": {"mlp.fc1": 6}}}
    made = build("vit")
    apply_plans(made, [ShrinkPlan(forms=forms)])
    merged = materialise(made)
    for model in (merged, artifact.load(artifact.save(merged, tmp_path / "merged"))):
        further = LowRank(rank=2, metric="weights", targets=("attn.proj",))
        assert outputs(compress(model, [further])).isfinite().all()
        with pytest.raises(UserError, match=r"the earlier shrink made blocks\.1\.mlp\.fc1 narrower"):
            compress(model, [LowRank(rank=2, metric="weights", targets=("mlp.fc1",))])
    phm = materialise(adapted(build("vit"), [PHM(n=2, ratio=0.25)]))
    with pytest.raises(UserError, match="adapters"):
        compress(phm, [Adapters(width=2)])


def test_merged_before_it_is_shared_is_the_way_out():
    merged = materialise(adapted(build("vit"), [MERGEABLE["lora"]]))
    shared = compress(merged, [Multiplex(share=2)])
    assert outputs(shared).isfinite().all()
    assert [plan.transform for plan in compression_of(shared).plans] == ["multiplex"]


def test_a_projection_without_a_bias_takes_no_shift():
    plain = timm.create_model("vit_tiny_patch16_224", img_size=32, embed_dim=48, depth=2, num_heads=4, qkv_bias=False)
    made = adapted(plain.eval(), [RepAdapter(width=4)])
    before = copy.deepcopy(values(made))
    with pytest.raises(
        UserError, match=r"repadapter cannot be folded: blocks\.0\.attn\.qkv has no bias to take in its shift\."
    ):
        merged_copy(made)
    assert same_values(values(made), before)
    beit = timm.create_model("beit_base_patch16_224", **{**BEIT, "qkv_bias": False}).eval()
    with pytest.raises(UserError, match=r"blocks\.0\.attn\.qkv has no bias to take in its shift"):
        merged_copy(adapted(beit, [RepAdapter(width=4)]))
    ssf = adapted(plain, [SSF()])
    assert "blocks.0.attn.qkv" not in compression_of(ssf).plans[0].layers
    assert relative(outputs(materialise(ssf)), outputs(ssf)) < 1e-5  # measured 1e-7
