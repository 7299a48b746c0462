"""The contract of a transform, over everything that is registered and every backbone.

A new transform needs an entry in `EXAMPLES` and nothing else to be held to all of this.
"""

from __future__ import annotations

import copy
import functools
import itertools
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest
import timm
import torch
from conftest import BACKBONES, VIT, build, images_for
from timm.models.vision_transformer import ParallelScalingBlock
from torch import Tensor, nn

from compressvit import artifact, surgery, ties
from compressvit.backbone import SUPPORTED
from compressvit.errors import UserError
from compressvit.pipeline import compress, compression_of, plan_transforms, transform_
from compressvit.transforms import IRPE, TRANSFORMS, LoadWeights, Multiplex, Plan, Transform
from compressvit.transforms import transform as register

ARTIFACT = "an artifact that fits, made by the test"

# Every registered transform, at settings that between them use everything it has.
EXAMPLES: dict[str, list[Transform]] = {
    "multiplex": [
        Multiplex(share=2, mixing_bias=True, mlp_conv=3),
        Multiplex(share=2, mlp_conv=3, form="reference", init="first"),
        Multiplex(share=1, head_mixing=False, mlp_conv=5),
    ],
    "irpe": [IRPE()],
    "load_weights": [LoadWeights(artifact=ARTIFACT)],
}

# What a transform does not do, and the words that say so. Everything else must work.
REFUSED = {("irpe", "swin"): "is a Swin, which has a relative position table already"}

# Parameters that cannot have a gradient when training starts, by the end of their names, and why.
BLIND_AT_START = {
    "mlp_conv.norm.weight": "the convolution behind it starts at zero",
    "mlp_conv.norm.bias": "the convolution behind it starts at zero",
}
BLIND_FOREVER = {"logit_mix.bias": "the softmax does not see a constant added to a row"}

CASES = [
    pytest.param(spec, backbone, id=f"{name}{index}-{backbone}")
    for name, specs in EXAMPLES.items()
    for index, spec in enumerate(specs)
    for backbone in BACKBONES
    if (name, backbone) not in REFUSED
]
every_case = pytest.mark.parametrize(("spec", "backbone"), CASES)
# For what depends on the layers and not on their settings: the first example of each is enough.
every_transform = pytest.mark.parametrize(("spec", "backbone"), [case for case in CASES if "0-" in case.id])


@functools.cache
def teacher(backbone: str) -> nn.Module:
    """Not to be changed: `test_compress_leaves_the_teacher_alone` and its like say who did."""
    return build(backbone)


@pytest.fixture(scope="session")
def fit(tmp_path_factory) -> Callable[..., Transform]:
    """Give a spec that reads an artifact one that fits a backbone after some transforms."""

    @functools.cache
    def artifact_of(backbone: str, before: tuple[Transform, ...]) -> Path:
        return artifact.save(compress(build(backbone, seed=7), before), tmp_path_factory.mktemp("artifact") / "student")

    def fit(spec: Transform, backbone: str, before: Sequence[Transform] = ()) -> Transform:
        if getattr(spec, "artifact", None) != ARTIFACT:
            return spec
        structure = tuple(s for s in before if not s.plan_class.loads_values)
        return spec.model_copy(update={"artifact": str(artifact_of(backbone, structure))})

    return fit


@pytest.fixture(scope="session")
def student(fit) -> Callable[[Transform, str], nn.Module]:
    """The compressed model of a case; a copy, so that a test may do with it what it likes."""
    made: dict[tuple[Transform, str], nn.Module] = {}

    def student(spec: Transform, backbone: str) -> nn.Module:
        if (spec, backbone) not in made:
            torch.manual_seed(3)
            made[spec, backbone] = compress(teacher(backbone), [fit(spec, backbone)])
        return copy.deepcopy(made[spec, backbone])

    return student


def structure(model: nn.Module) -> dict[str, object]:
    """Everything about a model but its values."""
    return {
        "modules": [(path, type(module)) for path, module in model.named_modules()],
        "tensors": {name: (tuple(t.shape), t.dtype) for name, t in model.state_dict().items()},
        "ties": ties.tied_groups(model),
    }


def values(model: nn.Module) -> dict[str, Tensor]:
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


def same_values(a: dict[str, Tensor], b: dict[str, Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


@torch.no_grad()
def outputs(model: nn.Module, images: Tensor) -> Tensor:
    return model(images)


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
    transform_(model, [fit(spec, backbone)])
    after = dict(model.named_modules())
    assert modules.keys() <= after.keys()
    assert all(after[path] is module for path, module in modules.items()), (
        "a module was replaced, so its hooks are lost"
    )
    assert all(isinstance(after[path], timm_type) for path, timm_type in _types(teacher(backbone)).items())
    own = model.state_dict()
    assert shapes.keys() <= own.keys()
    assert all(own[name].shape == shape for name, shape in shapes.items())


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
    assert added or not compression_of(model).ledger, (
        "a transform with a structure adds parameters, or tests nothing here"
    )
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    for step in range(2):
        optimizer.zero_grad()
        # All tokens: behind the last block, a class token does not see what was done to the others.
        features = model.forward_features(images)
        (features.square().mean() + model.forward_head(features).square().mean()).backward()
        blind = {**BLIND_FOREVER, **(BLIND_AT_START if step == 0 else {})}
        for name, parameter in model.named_parameters():
            assert parameter.grad is not None, f"{name} is not reached"
            if name in added and not name.endswith(tuple(blind)):
                assert parameter.grad.abs().max() > 0, f"{name} learns nothing in step {step}"
        optimizer.step()


# ------------------------------------------------------------------------------------------------------ timm's own ways


@every_transform
def test_features_and_head_are_the_forward_pass(spec, backbone, student):
    model = student(spec, backbone)
    images = images_for(model)
    with torch.no_grad():
        features = model.forward_features(images)
        assert torch.equal(model.forward_head(features), model(images))
        assert features.shape == teacher(backbone).forward_features(images).shape


@every_transform
def test_intermediates_are_those_of_the_forward_pass(spec, backbone, student):
    model = student(spec, backbone)
    images = images_for(model)
    with torch.no_grad():
        features, intermediates = model.forward_intermediates(images)
        assert torch.equal(features, model.forward_features(images))
        expected = teacher(backbone).forward_intermediates(images)[1]
    assert len(intermediates) == len(expected) >= 2
    assert [i.shape for i in intermediates] == [e.shape for e in expected]


@every_transform
def test_a_new_classifier(spec, backbone, student):
    model = student(spec, backbone)
    groups = ties.tied_groups(model)
    model.reset_classifier(3)
    heads = model.get_classifier()
    for head in heads if isinstance(heads, tuple) else (heads,):
        assert head.out_features == 3
    assert outputs(model, images_for(model)).shape == (2, 3)
    assert ties.tied_groups(model) == groups


@every_transform
def test_a_deep_copy_is_equal_and_separate(spec, backbone, student):
    model = student(spec, backbone)
    images = images_for(model)
    before = outputs(model, images)
    copied = copy.deepcopy(model)
    assert structure(copied) == structure(model)
    assert compression_of(copied).plans == compression_of(model).plans
    assert torch.equal(outputs(copied, images), before)
    with torch.no_grad():
        for parameter in copied.parameters():
            parameter.mul_(0.5)
    assert not torch.equal(outputs(copied, images), before)
    assert torch.equal(outputs(model, images), before)


@every_case
def test_bfloat16(spec, backbone, student):
    model = student(spec, backbone)
    images = images_for(model)
    expected = outputs(model, images)
    half = model.to(torch.bfloat16)
    assert {p.dtype for p in half.parameters()} == {torch.bfloat16}
    got = outputs(half, images.bfloat16())
    assert got.dtype == torch.bfloat16
    assert (got.float() - expected).norm() / expected.norm() < 0.03  # seen 0.0132


@every_transform
def test_a_model_in_bfloat16_is_compressed_in_bfloat16(spec, backbone, fit):
    model = build(backbone).to(torch.bfloat16)
    made = compress(model, [fit(spec, backbone)])
    assert {p.dtype for p in made.parameters()} == {torch.bfloat16}
    assert outputs(made, images_for(model).bfloat16()).isfinite().all()


@every_transform
def test_autocast(spec, backbone, student):
    model = student(spec, backbone)
    images = images_for(model)
    expected = outputs(model, images)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        got = outputs(model, images)
    assert (got.float() - expected).norm() / expected.norm() < 0.02  # seen 0.0079


@every_case
def test_state_dict_fits_a_rebuilt_structure(spec, backbone, fit, student):
    model = student(spec, backbone)
    fresh = build(backbone, seed=11)
    fit(spec, backbone).plan(fresh).apply(fresh)
    images = images_for(model)
    assert not torch.equal(outputs(fresh, images), outputs(model, images))
    fresh.load_state_dict(model.state_dict(), strict=True)
    assert torch.equal(outputs(fresh, images), outputs(model, images))


@every_transform
def test_train_and_eval(spec, backbone, student):
    model = student(spec, backbone)
    images = images_for(model)
    assert not any(module.training for module in model.modules()), "a teacher in eval mode gives a student in eval mode"
    before = outputs(model, images)
    model.train()
    assert all(module.training for module in model.modules())
    assert outputs(model, images).shape == before.shape
    model.eval()
    assert not any(module.training for module in model.modules())
    assert torch.equal(outputs(model, images), before)


@every_transform
def test_gradient_checkpointing_gives_the_same_gradients(spec, backbone, student):
    model = student(spec, backbone).train()
    images, gradients = images_for(model), []
    for enable in (False, True):
        model.zero_grad()
        model.set_grad_checkpointing(enable)
        model(images).square().sum().backward()
        gradients.append({name: p.grad.clone() for name, p in model.named_parameters()})
    assert same_values(*gradients)


@pytest.mark.parametrize("backbone", ["vit", "swin"])
def test_compile_captures_the_whole_student(backbone):
    architecture, args = BACKBONES[backbone]
    shallow = timm.create_model(
        architecture, **args | {"vit": {"depth": 2}, "swin": {"depths": (2,), "num_heads": (2,)}}[backbone]
    )
    model = compress(shallow.eval(), [Multiplex(share=2, mixing_bias=True, mlp_conv=3, form="reference")])
    images = images_for(model)
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    difference = (outputs(compiled, images) - outputs(model, images)).abs().max()
    assert difference <= 1e-6  # seen 0.0


@pytest.mark.slow
def test_compiled_student_computes_the_same():
    model = compress(teacher("vit"), [Multiplex(share=2, mixing_bias=True, mlp_conv=3, form="reference"), IRPE()])
    images = images_for(model)
    difference = (outputs(torch.compile(model), images) - outputs(model, images)).abs().max()
    assert difference <= 1e-6  # TOLERANCE


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


def _structural() -> list[Transform]:
    return [specs[0] for specs in EXAMPLES.values() if not specs[0].plan_class.loads_values]


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
        assert SUPPORTED in str(refusal.value)
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


# ---------------------------------------------------------------------------------------------------------- composition

# Pairs that must be refused, and the words that say so. Every other pair must compose, where both fit the backbone.
CONFLICTS = {
    ("multiplex", "multiplex"): "merge the two steps into one `multiplex`",
    ("irpe", "irpe"): "irpe is applied twice",
}


@pytest.mark.parametrize("backbone", ["vit", "deit_distilled", "swin"])
@pytest.mark.parametrize("names", list(itertools.product(EXAMPLES, EXAMPLES)), ids=lambda names: "+".join(names))
def test_every_ordered_pair_composes_or_is_refused(names, backbone, fit, tmp_path):
    model = build(backbone)
    before, state = structure(model), values(model)
    first, second = (EXAMPLES[name][0] for name in names)
    expected = REFUSED.get((names[0], backbone)) or REFUSED.get((names[1], backbone)) or CONFLICTS.get(names)
    if expected:
        with pytest.raises(UserError, match=expected):
            compress(model, [first, second])
        assert structure(model) == before
        assert same_values(values(model), state)
        return
    first = fit(first, backbone)
    made = compress(model, [first, fit(second, backbone, before=[first])])
    images = images_for(model)
    assert outputs(made, images).isfinite().all()
    assert [plan.transform for plan in compression_of(made).plans] == list(names)
    ledger = compression_of(made).ledger
    assert sum(e.after - e.before for e in ledger) == ties.count_parameters(made) - ties.count_parameters(model)
    again = artifact.load(artifact.save(made, tmp_path / "student"))
    assert structure(again) == structure(made)
    assert torch.equal(outputs(again, images), outputs(made, images))


def test_all_is_planned_before_the_first_change():
    model = build("vit")
    before, state = structure(model), values(model)
    with pytest.raises(UserError, match="irpe is applied twice"):
        transform_(model, [Multiplex(share=2), IRPE(), IRPE()])
    with pytest.raises(UserError, match="there is no artifact at nowhere"):
        transform_(model, [Multiplex(share=2), LoadWeights(artifact="nowhere")])
    assert structure(model) == before
    assert same_values(values(model), state)
    assert len(plan_transforms(model, [Multiplex(share=2), IRPE(), LoadWeights(artifact="nowhere")])) == 3


# --------------------------------------------------------------------------------------------------------- load_weights


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


@pytest.mark.parametrize("backbone", ["vit", "swin"])
def test_loaded_weights_are_resampled_to_another_resolution(backbone, tmp_path):
    spec = Multiplex(share=2, mlp_conv=3)
    architecture, args = BACKBONES[backbone]
    larger = {**args, "img_size": 64} | ({"window_size": 8} if backbone == "swin" else {})
    small = artifact.save(compress(build(backbone, seed=9), [spec]), tmp_path / "small")
    made = compress(timm.create_model(architecture, **larger).eval(), [spec, LoadWeights(artifact=str(small))])
    source = artifact.load(small)
    resampled = {"vit": "pos_embed", "swin": "relative_position_bias_table"}[backbone]
    kept = 0
    for name, tensor in made.state_dict().items():
        if name.endswith(resampled):
            assert tensor.shape != source.state_dict()[name].shape
        else:
            assert torch.equal(tensor, source.state_dict()[name]), name
            kept += 1
    assert kept > 40
    assert outputs(made, images_for(made)).isfinite().all()
