"""Several transforms in a row: every ordered pair composes or is refused; weights loaded between them."""

from __future__ import annotations

import itertools

import pytest
import timm
import torch
from helpers.contract import ADAPTERS, EXAMPLES, backbones_of, same_values, structure, teacher, values
from helpers.models import BACKBONES, build, images_for, outputs

from compressvit.artifacts import artifact
from compressvit.errors import UserError
from compressvit.model.backbone import head_names
from compressvit.testing.pairs import compose_or_refuse
from compressvit.transforms import IRPE, TRANSFORMS, LoadWeights, Multiplex
from compressvit.transforms.applying import compress, plan_transforms, transform_

# ---------------------------------------------------------------------------------------------------------- composition

# The pairs that are refused, where both work on the backbone; every other one must compose.
NO_PLACE = {("irpe", "vpt"), ("vpt", "irpe")}
TWICE = {
    (name, name) for name in (*ADAPTERS, "multiplex", "lors", "low_rank", "irpe") if name not in ("freeze", "bitfit")
}
ONE_WEIGHT = {("low_rank", "lors"), ("lors", "low_rank"), ("multiplex", "low_rank"), ("low_rank", "multiplex")}
ONE_SLOT = set(itertools.permutations(("adapters", "phm", "compacter"), 2))
TOO_LATE = {
    (name, later)
    for name in EXAMPLES
    for later in ("align", "narrow", "shrink")
    if name not in ("align", "load_weights", "freeze", "bitfit", "head_norm")
}
NARROWER = {(name, later) for name in ("narrow", "shrink") for later in ("low_rank", "lors", "multiplex", "fact")}
# The forms that a budget chooses for other values are others.
OTHER_VALUES = {("shrink", "load_weights")}
LAST = {("quantise", later) for later in EXAMPLES}
CONFLICTS = NO_PLACE | ONE_WEIGHT | TWICE | ONE_SLOT | TOO_LATE | NARROWER | OTHER_VALUES | LAST

COMPOSED = {("multiplex", name) for name in ("lora", "vpt", "irpe", "lors")}
COMPOSED |= {("lors", "multiplex"), ("irpe", "multiplex"), ("align", "narrow")}

# Adapters on adapters, and adapters with others, need not be tried on every kind of model.
PAIRS = [
    pytest.param(names, backbone, id=f"{'+'.join(names)}-{backbone}")
    for names in itertools.product(EXAMPLES, EXAMPLES)
    for backbone in ["vit", "swin", "deit_distilled"][: 3 - sum(name in ADAPTERS for name in names)]
    if all(backbone in backbones_of(EXAMPLES[name][0]) or TRANSFORMS[name].freezes for name in names)
]


def is_fast(names, backbone) -> bool:
    """On a ViT multiplex with what shares, is private to a layer, is added, or acts in the attention; a pair without it; and of pairs
    without adapters those that are refused before anything is fitted."""
    refused = not set(names) & set(ADAPTERS) and names in CONFLICTS and names[0] != "shrink"
    return backbone == "vit" and (refused or names in COMPOSED)


@pytest.mark.wide_unless.with_args(is_fast)
@pytest.mark.parametrize(("names", "backbone"), PAIRS)
def test_every_ordered_pair_composes_or_is_refused(names, backbone):
    first, second = (EXAMPLES[name][0] for name in names)
    refusal = compose_or_refuse(first, second, backbone)
    assert (refusal is not None) == (names in CONFLICTS), refusal


def test_all_is_planned_before_the_first_change():
    model = build("vit")
    before, state = structure(model), values(model)
    with pytest.raises(UserError, match="irpe is applied twice: irpe wants to add"):
        transform_(model, [Multiplex(share=2), IRPE(), IRPE()])
    with pytest.raises(UserError, match="there is no artifact at nowhere"):
        transform_(model, [Multiplex(share=2), LoadWeights(artifact="nowhere")])
    assert structure(model) == before
    assert same_values(values(model), state)
    assert len(plan_transforms(model, [Multiplex(share=2), IRPE(), LoadWeights(artifact="nowhere")])) == 3


# --------------------------------------------------------------------------------------------------------- load_weights


@pytest.mark.wide_unless(lambda backbone: backbone == "vit")
@pytest.mark.parametrize("backbone", ["vit", "swin"])
def test_steps_run_top_to_bottom_around_loaded_weights(backbone, tmp_path):
    share, images = Multiplex(share=2), images_for(teacher(backbone))
    other = build(backbone, seed=9)
    plain = artifact.save(other, tmp_path / "plain")
    made = compress(teacher(backbone), [LoadWeights(artifact=str(plain)), share])
    assert torch.equal(outputs(made, images), outputs(compress(other, [share]), images)), "load first, then share"
    multiplexed = artifact.save(compress(other, [share]), tmp_path / "multiplexed")
    made = compress(teacher(backbone), [share, LoadWeights(artifact=str(multiplexed))])
    assert torch.equal(outputs(made, images), outputs(compress(other, [share]), images)), "share first, then load"


def test_loaded_weights_must_have_the_structure(tmp_path):
    plain = artifact.save(build("vit"), tmp_path / "plain")
    with pytest.raises(UserError, match=r"was made by other transforms than this student: none there, multiplex here"):
        compress(teacher("vit"), [Multiplex(share=2), LoadWeights(artifact=str(plain))])


@pytest.mark.wide_unless(lambda backbone: backbone == "deit_distilled")
@pytest.mark.parametrize("backbone", ["vit", "deit_distilled", "swin"])
def test_loaded_weights_take_a_new_head(backbone, tmp_path):
    share = Multiplex(share=2, mlp_conv=3)
    first = compress(build(backbone, seed=9), [share])
    student = str(artifact.save(first, tmp_path / "student"))
    architecture, args = BACKBONES[backbone]
    of_seven = timm.create_model(architecture, **{**args, "num_classes": 7}).eval()
    with pytest.raises(
        UserError, match=r"the classifier of .* is of another size .* load_weights.head=new and student.head=new"
    ):
        compress(of_seven, [share, LoadWeights(artifact=student)])
    made = compress(of_seven, [share, LoadWeights(artifact=student, head="new")])
    loaded, heads = first.state_dict(), head_names(made)
    assert len(heads) == (4 if backbone == "deit_distilled" else 2)
    for name, tensor in made.state_dict().items():
        assert torch.equal(tensor, (of_seven.state_dict() if name in heads else loaded)[name]), name
    images = images_for(made)
    assert outputs(made, images).shape == (2, 7)
    assert torch.equal(made.forward_features(images), first.forward_features(images))


@pytest.mark.wide_unless(lambda backbone: backbone == "vit")
@pytest.mark.parametrize("backbone", ["vit", "swin"])
def test_loaded_weights_are_resampled_to_another_resolution(backbone, tmp_path):
    spec = Multiplex(share=2, mlp_conv=3)
    architecture, args = BACKBONES[backbone]
    larger = {**args, "img_size": 64} | ({"window_size": 8} if backbone == "swin" else {})
    small = artifact.save(compress(build(backbone, seed=9), [spec]), tmp_path / "small")
    made = compress(timm.create_model(architecture, **larger).eval(), [spec, LoadWeights(artifact=str(small))])
    reference = artifact.load(small)
    resampled = {"vit": "pos_embed", "swin": "relative_position_bias_table"}[backbone]
    kept = 0
    for name, tensor in made.state_dict().items():
        if name.endswith(resampled):
            assert tensor.shape != reference.state_dict()[name].shape
        else:
            assert torch.equal(tensor, reference.state_dict()[name]), name
            kept += 1
    assert kept > 40
    assert outputs(made, images_for(made)).isfinite().all()
