"""What the laws of `test_laws.py` do not say: the registry's refusals, shared tensors in the ledger, models that are not supported."""

from __future__ import annotations

import pytest
import timm
import torch
from helpers.contract import EXAMPLES, structure
from helpers.models import VIT, build
from timm.models.vision_transformer import ParallelScalingBlock

from compressvit.errors import UserError
from compressvit.model.backbone import supported
from compressvit.model.surgery import skeleton
from compressvit.transforms import IRPE, TRANSFORMS, LowRank, Multiplex, Plan, Quantise, Transform
from compressvit.transforms import transform as register
from compressvit.transforms.applying import compress, transform_


def test_a_second_transform_of_one_name_is_refused():
    before = dict(TRANSFORMS.items())
    with pytest.raises(
        TypeError, match=r"two transforms are called 'multiplex': compressvit\.transforms\.multiplex and"
    ):

        @register("multiplex", Plan)
        class Another(Transform):
            """Never registered."""

    assert before == dict(TRANSFORMS.items())


def test_ledger_counts_a_tensor_shared_by_an_earlier_step_once():
    model = build("vit")
    transform_(model, [Multiplex(share=2)])
    ledger = transform_(model, [IRPE()])
    unique = {
        id(p): p.numel() for e in ledger for n, p in model.get_submodule(e.path).named_parameters() if "rpe_k" not in n
    }
    assert sum(e.before for e in ledger) == sum(unique.values())


def _structural() -> list[Transform]:
    """All that look for blocks; biases are found by their names wherever they are, and every model has a classifier; no backbone has
    a decoder."""
    others = ("bitfit", "head_norm", "adaptive_lors")
    return [s[0] for name, s in EXAMPLES.items() if not s[0].plan_class.loads_values and name not in others]


UNSUPPORTED = {
    "xcit": ("xcit_nano_12_p16_224", {}, "Xcit"),
    "eva_post_norm": ("eva02_enormous_patch14_clip_224", {"depth": 2}, "is a Eva"),
    "levit": ("levit_128s", {}, "Levit"),
    "resnet": ("resnet26", {}, "ResNet"),
    "parallel": ("vit_tiny_patch16_224", {**VIT, "block_fn": ParallelScalingBlock}, "ParallelScalingBlock"),
    "parallel_pairs": ("vit_small_patch16_18x2_224", {"depth": 2}, "ParallelThingsBlock without an `attn`"),
    "post_norm": ("vit_base_patch16_rpn_224", {"depth": 2}, "is a ResPostBlock"),
    "differential": ("vit_tiny_patch16_224", {**VIT, "attn_layer": "diff"}, "DiffAttention"),
}


@pytest.mark.wide_unless(lambda kind: kind != "xcit")
@pytest.mark.parametrize("kind", UNSUPPORTED)
def test_unsupported_models_are_refused_by_name(kind):
    name, args, word = UNSUPPORTED[kind]
    with torch.device("meta"):
        model = timm.create_model(name, **args)
    before = structure(model)
    specs = [spec for spec in _structural() if spec.needed()]
    assert specs
    for spec in specs:
        with pytest.raises(UserError) as refusal:
            spec.plan(model)
        assert name in str(refusal.value)
        assert word in str(refusal.value)
        assert supported(*spec.needed()) in str(refusal.value)
    assert structure(model) == before


@pytest.mark.wide_unless(lambda kind: kind in ("resnet", "parallel", "post_norm"))
@pytest.mark.parametrize("kind", UNSUPPORTED)
def test_what_needs_no_known_block_works_on_them(kind):
    name, args, _ = UNSUPPORTED[kind]
    with torch.device("meta"):
        model = timm.create_model(name, **args)
    for spec in (LowRank(rank=2, metric="weights"), Quantise(bits=8, metric="weights")):
        student = skeleton(model)
        spec.plan(student).apply(student)
        assert sum(p.numel() for p in student.parameters()) < sum(p.numel() for p in model.parameters())


@pytest.mark.parametrize("spec", [IRPE(), Multiplex(share=2, mlp_conv=3)], ids=lambda spec: spec.name)
def test_dropped_patches_have_no_place_on_the_grid(spec):
    model = timm.create_model("vit_tiny_patch16_224", **VIT, patch_drop_rate=0.5)
    with pytest.raises(UserError, match=r"drops patches in training.*patch_drop_rate=0"):
        spec.plan(model)
    compress(model, [Multiplex(share=2)])
