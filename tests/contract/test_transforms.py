"""The contract of a transform: planning changes nothing, applying keeps every path, folding keeps the function.

All of it over every example of `helpers/contract.py` and every backbone; it goes on in `test_in_timm.py` and
`test_composed.py`.
"""

from __future__ import annotations

import pytest
import timm
import torch
from helpers.contract import (
    BLIND_AT_START,
    BLIND_FOREVER,
    EXAMPLES,
    REFUSED,
    every_case,
    every_transform,
    same_values,
    structure,
    teacher,
    values,
)
from helpers.models import VIT, build, images_for, outputs
from timm.models.vision_transformer import ParallelScalingBlock
from torch import nn

from compressvit.errors import UserError
from compressvit.model import surgery, ties
from compressvit.model.backbone import supported
from compressvit.transforms import IRPE, TRANSFORMS, Multiplex, Plan, Transform
from compressvit.transforms import transform as register
from compressvit.transforms.applying import compress, transform_
from compressvit.transforms.record import compression_of, trained_names

# --------------------------------------------------------------------------------------------------------- the registry


def test_every_registered_transform_has_an_example():
    assert set(EXAMPLES) == set(TRANSFORMS)
    assert len(TRANSFORMS) >= 3
    for name, specs in EXAMPLES.items():
        assert specs, f"{name} has no example"
        for spec in specs:
            assert type(spec) is TRANSFORMS[name]
            assert spec.name == spec.plan_class.transform == name


def test_every_field_of_every_transform_is_documented():
    fields = [(name, key, field) for name, spec in TRANSFORMS.items() for key, field in spec.model_fields.items()]
    assert fields
    for name, key, field in fields:
        assert field.description, f"{name}.{key} has no description"


def test_a_second_transform_of_one_name_is_refused():
    before = dict(TRANSFORMS)
    with pytest.raises(
        TypeError, match=r"two transforms are called 'multiplex': compressvit\.transforms\.multiplex and"
    ):

        @register("multiplex", Plan)
        class Another(Transform):
            """Never registered."""

    assert before == TRANSFORMS


# ------------------------------------------------------------------------------------------------------------- planning


@every_case
def test_plan_does_not_change_the_model(spec, backbone, fit):
    model = build(backbone)
    before, state = structure(model), values(model)
    fit(spec, backbone).plan(model)
    assert structure(model) == before
    assert same_values(values(model), state)
    assert compression_of(model).plans == []


@every_case
def test_plan_needs_no_values(spec, backbone, fit):
    spec = fit(spec, backbone)
    empty = surgery.skeleton(teacher(backbone))
    assert all(p.is_meta for p in empty.parameters())
    assert spec.plan(empty) == spec.plan(teacher(backbone))


@every_case
def test_plan_survives_json_and_rebuilds_the_structure(spec, backbone, fit, student):
    plan = fit(spec, backbone).plan(teacher(backbone))
    again = type(spec).plan_class.model_validate_json(plan.model_dump_json())
    assert again == plan
    fresh = build(backbone, seed=11)
    again.apply(fresh)
    assert structure(fresh) == structure(student(spec, backbone))


@every_transform
def test_plan_is_frozen_and_refuses_unknown_keys(spec, backbone, fit):
    plan = fit(spec, backbone).plan(teacher(backbone))
    content = {**plan.model_dump(mode="json"), "surprise": 1}
    with pytest.raises(ValueError, match="surprise"):
        type(plan).model_validate(content)
    field = next(iter(type(plan).model_fields))
    with pytest.raises(ValueError, match="frozen"):
        setattr(plan, field, None)


# ------------------------------------------------------------------------------------------------------------- applying


@every_case
def test_no_path_or_key_goes_or_changes_shape(spec, backbone, fit):
    model = build(backbone)
    modules = dict(model.named_modules())
    shapes = {name: t.shape for name, t in model.state_dict().items()}
    drops = fit(spec, backbone).plan(model).drops(model)
    transform_(model, [fit(spec, backbone)])
    after = dict(model.named_modules())
    assert modules.keys() <= after.keys()
    assert all(after[path] is module for path, module in modules.items()), (
        "a module was replaced, so its hooks are lost"
    )
    replaced = {name.rpartition(".")[0] for name in drops}  # these alone may be another kind of module now
    assert all(
        isinstance(after[path], timm_type)
        for path, timm_type in _types(teacher(backbone)).items()
        if path not in replaced
    )
    own = model.state_dict()
    assert shapes.keys() - own.keys() == drops, "a key goes only where the plan says so"
    assert all(own[name].shape == shape for name, shape in shapes.items() if name in own)


def _types(model: nn.Module) -> dict[str, type]:
    return {path: type(module) for path, module in model.named_modules()}


@every_case
def test_hooks_by_path_still_fire(spec, backbone, fit):
    model = build(backbone)
    images = images_for(model)
    fired: list[str] = []
    for path, module in model.named_modules():
        module.register_forward_hook(lambda *_, path=path: fired.append(path))
    outputs(model, images)
    before = set(fired)
    transform_(model, [fit(spec, backbone)])
    fired.clear()
    outputs(model, images)
    assert len(before) > 40
    assert before <= set(fired)


@every_case
def test_ledger_adds_up(spec, backbone, fit):
    model = build(backbone)
    before = ties.count_parameters(model)
    ledger = transform_(model, [fit(spec, backbone)])
    assert sum(e.after - e.before for e in ledger) == ties.count_parameters(model) - before
    assert len({e.path for e in ledger}) == len(ledger)
    for paths, total in ((teacher(backbone), sum(e.before for e in ledger)), (model, sum(e.after for e in ledger))):
        unique = {id(p): p.numel() for e in ledger for p in paths.get_submodule(e.path).parameters()}
        assert total == sum(unique.values())
    assert all(e.change for e in ledger)
    assert compression_of(model).ledger == ledger


def test_ledger_counts_a_tensor_shared_by_an_earlier_step_once():
    model = build("vit")
    transform_(model, [Multiplex(share=2)])
    ledger = transform_(model, [IRPE()])
    unique = {
        id(p): p.numel() for e in ledger for n, p in model.get_submodule(e.path).named_parameters() if "rpe_k" not in n
    }
    assert sum(e.before for e in ledger) == sum(unique.values())


@every_case
def test_compress_leaves_the_teacher_alone(spec, backbone, fit):
    model = build(backbone)
    before, state = structure(model), values(model)
    made = compress(model, [fit(spec, backbone)])
    assert structure(model) == before
    assert same_values(values(model), state)
    assert compression_of(model).plans == []
    with torch.no_grad():
        for parameter in made.parameters():
            parameter.add_(1.0)
    assert same_values(values(model), state), "teacher and student share memory"


@every_case
def test_same_seed_same_student(spec, backbone, fit):
    made = []
    for _ in range(2):
        torch.manual_seed(5)
        made.append(values(compress(teacher(backbone), [fit(spec, backbone)])))
    assert same_values(*made)


@every_case
def test_every_parameter_is_trained(spec, backbone, student):
    model = student(spec, backbone).train()
    images = images_for(model)
    added = surgery.added_parameters(model)
    trained = trained_names(model)
    assert added or trained or not compression_of(model).ledger, (
        "it adds nothing, frees nothing, and tests nothing here"
    )
    assert (trained is not None) == spec.freezes
    optimizer = torch.optim.SGD((p for p in model.parameters() if p.requires_grad), lr=0.1)
    for step in range(2):
        optimizer.zero_grad()
        # All tokens: behind the last block, a class token does not see what was done to the others.
        features = model.forward_features(images)
        (features.square().mean() + model.forward_head(features).square().mean()).backward()
        blind = {**BLIND_FOREVER, **(BLIND_AT_START if step == 0 else {})}
        for name, parameter in model.named_parameters():
            if trained is not None and name not in trained:
                assert not parameter.requires_grad, f"{name} is not frozen"
                assert parameter.grad is None
                continue
            assert parameter.grad is not None, f"{name} is not reached"
            if (name in added or trained) and not name.endswith(tuple(blind)):
                assert parameter.grad.abs().max() > 0, f"{name} learns nothing in step {step}"
        optimizer.step()


# ------------------------------------------------------------------------------------------------- folding and refusing


@every_case
def test_fold_keeps_the_function_or_says_why_not(spec, backbone, student):
    model = student(spec, backbone)
    images = images_for(model)
    before, shape = outputs(model, images), structure(model)
    for plan in compression_of(model).plans:
        refusal = None
        try:
            plan.fold(model)
        except UserError as error:
            refusal = str(error)
        if refusal is not None:
            assert refusal.startswith(f"{spec.name} cannot be folded")
            assert len(refusal) > 80, "why not, and what to do instead"
            assert structure(model) == shape
            assert torch.equal(outputs(model, images), before)
        else:
            assert (outputs(model, images) - before).abs().max() <= 1e-5 * before.abs().max()  # measured 1e-6


def _structural() -> list[Transform]:
    """All that look for blocks; biases are found by their names wherever they are, and every model has a classifier."""
    others = ("bitfit", "head_norm")
    return [s[0] for name, s in EXAMPLES.items() if not s[0].plan_class.loads_values and name not in others]


UNSUPPORTED = {
    "beit": ("beit_base_patch16_224", {}, "Beit"),
    "eva": ("eva02_tiny_patch14_224", {}, "Eva"),
    "swinv2": ("swinv2_tiny_window8_256", {}, "SwinTransformerV2"),
    "resnet": ("resnet18", {}, "ResNet"),
    "parallel": ("vit_tiny_patch16_224", {**VIT, "block_fn": ParallelScalingBlock}, "ParallelScalingBlock"),
    "differential": ("vit_tiny_patch16_224", {**VIT, "attn_layer": "diff"}, "DiffAttention"),
}


@pytest.mark.parametrize("kind", UNSUPPORTED)
def test_unsupported_models_are_refused_by_name(kind):
    name, args, word = UNSUPPORTED[kind]
    with torch.device("meta"):
        model = timm.create_model(name, **args)
    before = structure(model)
    specs = _structural()
    assert specs
    for spec in specs:
        with pytest.raises(UserError) as refusal:
            spec.plan(model)
        assert name in str(refusal.value)
        assert word in str(refusal.value)
        assert supported("attention") in str(refusal.value)
    assert structure(model) == before


@pytest.mark.parametrize(("name", "backbone"), REFUSED)
def test_transforms_that_do_not_fit_a_backbone_say_so(name, backbone, fit):
    model = build(backbone)
    before = structure(model)
    for spec in EXAMPLES[name]:
        with pytest.raises(UserError, match=REFUSED[name, backbone]):
            compress(model, [fit(spec, backbone)])
    assert structure(model) == before


@pytest.mark.parametrize("spec", [IRPE(), Multiplex(share=2, mlp_conv=3)], ids=lambda spec: spec.name)
def test_dropped_patches_have_no_place_on_the_grid(spec):
    model = timm.create_model("vit_tiny_patch16_224", **VIT, patch_drop_rate=0.5)
    with pytest.raises(UserError, match=r"drops patches in training.*patch_drop_rate=0"):
        spec.plan(model)
    compress(model, [Multiplex(share=2)])
