"""Laws of planning, applying, training and folding: planning changes nothing, paths stay, the ledger adds up, the function is kept."""

from __future__ import annotations

import torch
from pydantic import ValidationError
from torch import nn

from compressvit.errors import UserError
from compressvit.model import surgery, ties
from compressvit.model.backbone import describe
from compressvit.model.modules import as_timm
from compressvit.testing.cases import EVERY_CASE, FIRST_EXAMPLE, Case, law, require
from compressvit.testing.models import forward, images_for, is_detector, outputs, same_values, structure, values
from compressvit.transforms.applying import compress, transform_
from compressvit.transforms.record import compression_of, trained_names

# ------------------------------------------------------------------------------------------------------------- planning


@law(FIRST_EXAMPLE)
def every_field_is_documented(case: Case) -> None:
    for key, field in type(case.spec).model_fields.items():
        require(field.description, f"{case.spec.name}.{key} has no description")
    require(
        type(case.spec).__doc__,
        f"{type(case.spec).__name__} has no docstring, the first line of which recipes' schema shows",
    )


@law(EVERY_CASE)
def plan_does_not_change_the_model(case: Case) -> None:
    model = case.build()
    before, state = structure(model), values(model)
    case.spec.plan(model)
    require(structure(model) == before, f"{case}: plan() changes the structure of the model")
    require(same_values(values(model), state), f"{case}: plan() changes values of the model")
    require(compression_of(model).plans == [], f"{case}: plan() records something")


@law(EVERY_CASE)
def plan_needs_no_values(case: Case) -> None:
    empty = surgery.skeleton(case.teacher)
    require(
        case.spec.plan(empty) == case.spec.plan(case.teacher),
        f"{case}: plan() of a model on the meta device is another than of one with values",
    )


@law(EVERY_CASE)
def plan_survives_json_and_rebuilds_the_structure(case: Case) -> None:
    plan = case.plan()
    again = type(case.spec).plan_class.model_validate_json(plan.model_dump_json())
    require(again == plan, f"{case}: the plan read back from JSON is another")
    fresh = case.build(seed=11)
    again.apply(fresh)
    require(
        structure(fresh) == structure(case.student()),
        f"{case}: the plan from JSON does not rebuild the student's structure",
    )


@law(FIRST_EXAMPLE)
def plan_is_frozen_and_refuses_unknown_keys(case: Case) -> None:
    plan = case.spec.plan(case.teacher)
    try:
        type(plan).model_validate({**plan.model_dump(mode="json"), "surprise": 1})
    except ValidationError as error:
        require("surprise" in str(error), f"{case}: an unknown key of the plan is not named")
    else:
        raise AssertionError(f"{case}: the plan takes an unknown key")
    for field in list(type(plan).model_fields)[:1]:
        try:
            setattr(plan, field, None)
        except ValidationError:
            continue
        raise AssertionError(f"{case}: the plan can be changed; derive it from compressvit's Plan")


# ------------------------------------------------------------------------------------------------------------- applying


@law(EVERY_CASE)
def no_path_or_key_goes_or_changes_shape(case: Case) -> None:
    """Except for keys whose tensors are replaced or resized, which the plan names (`Plan.drops`, `Plan.resizes`)."""
    model = case.build()
    plan = case.plan()
    dropped, resized = plan.drops(model), plan.resizes(model)
    replaced = {name.rpartition(".")[0] for name in dropped}
    modules, shapes = dict(model.named_modules()), {name: t.shape for name, t in model.state_dict().items()}
    transform_(model, [case.spec])
    after, own = dict(model.named_modules()), model.state_dict()
    for path, module in modules.items():
        require(path in after, f"{case}: the module {path} is gone")
        if path not in replaced:
            require(
                after[path] is module,
                f"{case}: {path} is another module, so its hooks are lost; specialise it in place",
            )
            kind = type(case.teacher.get_submodule(path))
            require(isinstance(module, kind), f"{case}: {path} is not a {kind.__name__} any more")
    require(
        dropped <= shapes.keys(), f"{case}: the plan drops keys that the model does not have: {dropped - shapes.keys()}"
    )
    gone = shapes.keys() - own.keys()
    require(gone == dropped, f"{case}: keys {sorted(gone)} go, and the plan drops {sorted(dropped)}")
    for name in shapes.keys() & own.keys():
        changes = own[name].shape != shapes[name]
        require(
            changes == (name in resized),
            f"{case}: {name} changes its shape: {changes}, and the plan says {not changes}",
        )


@law(EVERY_CASE)
def hooks_by_path_still_fire(case: Case) -> None:
    model = case.build()
    images = images_for(model)
    fired: list[str] = []
    for path, module in model.named_modules():
        module.register_forward_hook(lambda *_, path=path: fired.append(path))
    outputs(model, images)
    before = set(fired)
    transform_(model, [case.spec])
    fired.clear()
    outputs(model, images)
    blocks = {info.path for info in describe(case.teacher).blocks}
    require(blocks <= before, f"{case}: not every block of the backbone ran, so hooks say nothing")
    lost = sorted(before - set(fired))
    require(not lost, f"{case}: hooks do not fire any more at {', '.join(lost)}")


@law(EVERY_CASE)
def ledger_adds_up(case: Case) -> None:
    model = case.build()
    before = ties.count_parameters(model)
    ledger = transform_(model, [case.spec])
    change = ties.count_parameters(model) - before
    stated = sum(e.after - e.before for e in ledger)
    require(stated == change, f"{case}: the model has {change:+,} parameters, and the ledger says {stated:+,}")
    require(len({e.path for e in ledger}) == len(ledger), f"{case}: the ledger has two rows of one path")
    for whole, total in ((case.teacher, sum(e.before for e in ledger)), (model, sum(e.after for e in ledger))):
        unique: dict[int, int] = {}
        for entry in ledger:
            unique |= ties.sizes(whole.get_submodule(entry.path))
        require(total == sum(unique.values()), f"{case}: the ledger's rows do not count the parameters at their paths")
    require(all(e.change for e in ledger), f"{case}: a row of the ledger does not say what was changed")
    require(compression_of(model).ledger == ledger, f"{case}: the ledger was not recorded")


@law(EVERY_CASE)
def compress_leaves_the_teacher_alone(case: Case) -> None:
    model = case.build()
    before, state = structure(model), values(model)
    made = compress(model, [case.spec])
    require(structure(model) == before, f"{case}: the teacher's structure changes")
    require(same_values(values(model), state), f"{case}: the teacher's values change")
    require(compression_of(model).plans == [], f"{case}: something was recorded at the teacher")
    with torch.no_grad():
        for parameter in made.parameters():
            parameter.add_(1.0)
    require(same_values(values(model), state), f"{case}: teacher and student share memory")


@law(EVERY_CASE)
def same_seed_same_student(case: Case) -> None:
    teacher, made = case.teacher, []  # which draws numbers when it is first asked for
    for _ in range(2):
        torch.manual_seed(5)
        made.append(values(compress(teacher, [case.spec])))
    require(same_values(*made), f"{case}: two students of one seed differ")


@law(EVERY_CASE)
def the_function_is_kept_at_the_start(case: Case) -> None:
    """Unless the transform sets `changes_at_start`."""
    if case.spec.changes_at_start:
        return
    before, now = outputs(case.teacher), outputs(case.student())
    difference = ((now - before).norm() / before.norm()).item()
    require(
        difference < 1e-5,  # measured up to 1e-6
        f"{case}: the student starts with other outputs than the teacher's (relative difference {difference:.2g}); start what is added "
        "as the identity, or set changes_at_start",
    )


@law(EVERY_CASE)
def every_parameter_is_trained(case: Case) -> None:
    """Every added or unfrozen parameter has a gradient in the first two steps, except those in `blind` and `blind_at_start`."""
    torch.manual_seed(0)  # for dropout, which may leave the hidden layer of a tiny model empty
    model = case.student().train()
    images = images_for(model)
    added = surgery.added_parameters(model)
    trained = trained_names(model)
    changed = case.plan().resizes(case.teacher) | case.plan().drops(case.teacher)
    require(
        added or trained or changed or not compression_of(model).ledger,
        f"{case}: it adds nothing, frees nothing, drops nothing and resizes nothing, but has a ledger",
    )
    require((trained is not None) == case.spec.freezes, f"{case}: `freezes` is not what the plan's trains() does")
    optimizer = torch.optim.SGD((p for p in model.parameters() if p.requires_grad), lr=0.1)
    for step in range(2):
        optimizer.zero_grad()
        _loss(model, images).backward()
        blind = {**case.spec.blind, **(case.spec.blind_at_start if step == 0 else {})}
        for name, parameter in model.named_parameters():
            if trained is not None and name not in trained:
                require(not parameter.requires_grad, f"{case}: {name} is not frozen")
                require(parameter.grad is None, f"{case}: {name}, which is frozen, has a gradient")
                continue
            require(parameter.grad is not None, f"{case}: {name} is not reached by the backward pass")
            if (name in added or trained) and not name.endswith(tuple(blind)):
                assert parameter.grad is not None
                require(
                    parameter.grad.abs().max() > 0,
                    f"{case}: {name} learns nothing in step {step}; name it in blind_at_start (or blind) with the reason",
                )
        optimizer.step()


def _loss(model: nn.Module, images: torch.Tensor) -> torch.Tensor:
    """Of all tokens, because in the last block the class token is not affected by changes to the others."""
    if is_detector(model):
        return forward(model, images).square().mean()
    features = as_timm(model).forward_features(images)
    return features.square().mean() + as_timm(model).forward_head(features).square().mean()


# -------------------------------------------------------------------------------------------------------------- folding


@law(EVERY_CASE)
def fold_keeps_the_function_or_says_why_not(case: Case) -> None:
    model = case.student()
    _move_what_was_added(model)
    images = images_for(model)
    before, shape = outputs(model, images), structure(model)
    for plan in compression_of(model).plans:
        try:
            plan.fold(model)
        except UserError as error:
            text = str(error)
            require(text.startswith(f"{case.spec.name} cannot be folded"), f"{case}: fold() is refused with {text!r}")
            require(len(text) > 80, f"{case}: the refusal of fold() does not say why and what to do instead: {text!r}")
            require(not plan.foldable, f"{case}: the plan says `foldable`, and fold() is refused: {text}")
            require(structure(model) == shape, f"{case}: fold() is refused and changes the model")
            require(torch.equal(outputs(model, images), before), f"{case}: fold() is refused and changes the outputs")
            continue
        difference = (outputs(model, images) - before).abs().max() / before.abs().max()
        require(difference <= 1e-5, f"{case}: fold() changes the outputs by {difference:.2g}")  # measured 1e-6


@torch.no_grad()
def _move_what_was_added(model: nn.Module) -> None:
    """Perturb added parameters, so that a fold that drops them instead of merging them is detected."""
    generator = torch.Generator().manual_seed(4)
    added = surgery.added_parameters(model)
    for name, parameter in model.named_parameters():
        if name in added:
            noise = torch.randn(parameter.shape, generator=generator, dtype=parameter.dtype)
            parameter.add_(0.05 * noise)
