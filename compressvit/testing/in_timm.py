"""Laws of compatibility with timm and torch: features, heads, copies, precisions, checkpoints, files."""

from __future__ import annotations

import copy
import tempfile
from pathlib import Path
from typing import Any

import torch
from torch import nn

from compressvit.artifacts import artifact
from compressvit.artifacts.adapter import load_adapter, remove_adapter, save_adapter
from compressvit.model import ties
from compressvit.testing.cases import EVERY_CASE, FIRST_EXAMPLE, Case, law, require
from compressvit.testing.models import forward, images_for, is_detector, outputs, same_values, structure, values
from compressvit.transforms.applying import compress
from compressvit.transforms.record import compression_of, only_adapted


@law(FIRST_EXAMPLE)
def features_and_head_are_the_forward_pass(case: Case) -> None:
    """Not asked of a detector."""
    if is_detector(case.teacher):
        return
    model: Any = case.student()
    teacher: Any = case.teacher
    images = images_for(model)
    with torch.no_grad():
        features = model.forward_features(images)
        require(
            torch.equal(model.forward_head(features), model(images)),
            f"{case}: forward_head(forward_features(x)) is not forward(x)",
        )
        require(
            features.shape == teacher.forward_features(images).shape,
            f"{case}: the features have another shape than the teacher's",
        )


@law(FIRST_EXAMPLE)
def intermediates_are_those_of_the_forward_pass(case: Case) -> None:
    """Not asked of a detector."""
    if is_detector(case.teacher):
        return
    model: Any = case.student()
    teacher: Any = case.teacher
    images = images_for(model)
    with torch.no_grad():
        features, intermediates = model.forward_intermediates(images)
        expected = teacher.forward_intermediates(images)[1]
        require(
            torch.equal(features, model.forward_features(images)),
            f"{case}: forward_intermediates ends with other features than forward_features",
        )
    require(
        len(expected) >= 2 and [i.shape for i in intermediates] == [e.shape for e in expected],
        f"{case}: forward_intermediates has other shapes than the teacher's",
    )


@law(FIRST_EXAMPLE)
def a_new_classifier_fits(case: Case) -> None:
    model: Any = case.student()
    groups = ties.tied_groups(model)
    model.reset_classifier(3)
    heads = model.get_classifier()
    for head in heads if isinstance(heads, tuple) else (heads,):
        require(head.out_features == 3, f"{case}: reset_classifier(3) gives a classifier of {head.out_features}")
    require(
        is_detector(model) or outputs(model).shape == (2, 3),
        f"{case}: after reset_classifier(3) the outputs are not of 3 classes",
    )
    require(ties.tied_groups(model) == groups, f"{case}: reset_classifier changes what is shared")


@law(FIRST_EXAMPLE)
def a_deep_copy_is_equal_and_separate(case: Case) -> None:
    model = case.student()
    images = images_for(model)
    before = outputs(model, images)
    copied = copy.deepcopy(model)
    require(structure(copied) == structure(model), f"{case}: a deep copy has another structure")
    require(compression_of(copied).plans == compression_of(model).plans, f"{case}: a deep copy has other plans")
    require(torch.equal(outputs(copied, images), before), f"{case}: a deep copy computes something else")
    with torch.no_grad():
        for parameter in copied.parameters():
            parameter.mul_(0.5)
    require(not torch.equal(outputs(copied, images), before), f"{case}: the outputs do not depend on the parameters")
    require(torch.equal(outputs(model, images), before), f"{case}: a model shares memory with its deep copy")


@law(EVERY_CASE)
def it_runs_in_bfloat16(case: Case) -> None:
    model = case.student()
    images = images_for(model)
    expected = outputs(model, images)
    half = model.to(torch.bfloat16)
    require({p.dtype for p in half.parameters()} == {torch.bfloat16}, f"{case}: .to(bfloat16) leaves parameters behind")
    got = outputs(half, images.bfloat16())
    require(got.dtype == torch.bfloat16, f"{case}: a bfloat16 model has {got.dtype} outputs")
    difference = (got.float() - expected).norm() / expected.norm()
    require(difference < 0.03, f"{case}: in bfloat16 the outputs differ by {difference:.2g}")  # measured: 0.0132


@law(FIRST_EXAMPLE)
def a_model_in_bfloat16_is_compressed_in_bfloat16(case: Case) -> None:
    model = case.build().to(torch.bfloat16)
    made = compress(model, [case.spec])
    require(
        {p.dtype for p in made.parameters()} == {torch.bfloat16},
        f"{case}: what is added has not the precision of the model",
    )
    require(outputs(made).isfinite().all(), f"{case}: outputs in bfloat16 are not finite")


@law(FIRST_EXAMPLE)
def it_runs_under_autocast(case: Case) -> None:
    model = case.student()
    images = images_for(model)
    expected = outputs(model, images)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        got = outputs(model, images)
    difference = (got.float() - expected).norm() / expected.norm()
    require(difference < 0.02, f"{case}: under autocast the outputs differ by {difference:.2g}")  # measured: 0.0079


@law(EVERY_CASE)
def state_dict_fits_a_rebuilt_structure(case: Case) -> None:
    model = case.student()
    fresh = case.build(seed=11)
    case.plan().apply(fresh)
    images = images_for(model)
    require(
        not torch.equal(outputs(fresh, images), outputs(model, images)),
        f"{case}: the outputs do not depend on the weights",
    )
    fresh.load_state_dict(model.state_dict(), strict=True)
    for name, parameter in fresh.named_parameters():  # torch sums in another order where a weight asks for a gradient
        parameter.requires_grad_(model.get_parameter(name).requires_grad)
    require(
        torch.equal(outputs(fresh, images), outputs(model, images)),
        f"{case}: a rebuilt structure with the student's state dict computes something else",
    )


@law(EVERY_CASE)
def an_artifact_is_loaded_to_the_bit(case: Case) -> None:
    model = case.student()
    with tempfile.TemporaryDirectory() as folder:
        again = artifact.load(artifact.save(model, Path(folder) / "student"))
    require(structure(again) == structure(model), f"{case}: an artifact is loaded with another structure")
    require(
        torch.equal(outputs(again), outputs(model)), f"{case}: an artifact computes something else than the student"
    )


@law(FIRST_EXAMPLE)
def an_adapter_file_comes_and_goes(case: Case) -> None:
    """Applies to transforms that only add to a frozen backbone."""
    model = case.student()
    if not only_adapted(model):
        return
    added = {name for name, p in model.named_parameters() if p.requires_grad}
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name in added:
                parameter.add_(0.1)
    plain = case.build()
    before, state = structure(plain), values(plain)
    with tempfile.TemporaryDirectory() as folder:
        file = save_adapter(model, Path(folder) / "adapter.safetensors")
        load_adapter(plain, file)
    require(
        torch.equal(outputs(plain), outputs(model)), f"{case}: an adapter file on its backbone computes something else"
    )
    remove_adapter(plain)
    require(structure(plain) == before, f"{case}: remove_adapter leaves another structure")
    require(same_values(values(plain), state), f"{case}: remove_adapter leaves other values")


@law(FIRST_EXAMPLE)
def train_and_eval_reach_what_was_added(case: Case) -> None:
    model = case.student()
    images = images_for(model)
    require(not _any_training(model), f"{case}: a teacher in eval mode gives a student in training mode")
    before = outputs(model, images)
    model.train()
    require(all(module.training for module in model.modules()), f"{case}: train() does not reach every module")
    # a copy, because running statistics change
    require(
        outputs(copy.deepcopy(model), images).shape == before.shape, f"{case}: in training, outputs have another shape"
    )
    model.eval()
    require(not _any_training(model), f"{case}: eval() does not reach every module")
    require(torch.equal(outputs(model, images), before), f"{case}: train() and eval() change the outputs")


def _any_training(model: nn.Module) -> bool:
    return any(module.training for module in model.modules())


@law(FIRST_EXAMPLE)
def gradient_checkpointing_gives_the_same_gradients(case: Case) -> None:
    model: Any = case.student().train()
    images, gradients = images_for(model), []
    for enable in (False, True):
        model.zero_grad()
        torch.manual_seed(0)  # for dropout
        model.set_grad_checkpointing(enable)
        forward(model, images).square().sum().backward()
        gradients.append({name: p.grad.clone() for name, p in model.named_parameters() if p.requires_grad})
    require(same_values(*gradients), f"{case}: gradient checkpointing changes gradients")
