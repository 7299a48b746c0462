"""Fitting layers in order, each on what the fitted layers before it produce."""

from __future__ import annotations

import copy
import tempfile

import pytest
import timm
import torch
from helpers.models import BACKBONES, SWIN, build, images_for, outputs, randomise

from compressvit import LORS, Multiplex
from compressvit.errors import UserError
from compressvit.pipeline import compress, compression_of
from compressvit.sequential import BRANCHES, Regression, fit_in_order
from compressvit.source import Source

LAYERS = ("attn.qkv", "attn.proj", "mlp.fc1", "mlp.fc2")


def build_any(name: str) -> torch.nn.Module:
    if name != "swin_padded":
        return build(name)
    torch.manual_seed(0)  # 6×6 tokens in windows of 4×4: the last windows are filled up
    return timm.create_model("swin_tiny_patch4_window7_224", **{**SWIN, "img_size": 24}).eval()


def paths_of(model):
    return [n for n, _ in model.named_modules() if n.endswith(LAYERS)]


def relative(a, b):
    return ((a - b).norm() / b.norm()).item()


@pytest.mark.parametrize("name", [*BACKBONES, "swin_padded"])
def test_what_a_layer_is_asked_for_makes_the_hidden_state_the_teachers(name, monkeypatch):
    """Put the wanted outputs in place of the last layer's of each branch: the student's sum is then the teacher's, whatever came before."""
    from compressvit import sequential

    teacher = build_any(name)
    for path, parameter in teacher.named_parameters():
        if path.endswith("gamma"):  # none is so small that it cannot be corrected
            parameter.data.abs_().add_(0.1)
    student = copy.deepcopy(teacher)
    randomise(student, 0.02)
    images = images_for(teacher, 4)
    asked: dict[str, torch.Tensor] = {}
    tokens = sequential._tokens

    def noting(ours, theirs, layer, *hidden):
        x, y = tokens(ours, theirs, layer, *hidden)
        asked[layer] = y
        return x, y

    monkeypatch.setattr(sequential, "_tokens", noting)
    checked = []

    def fit(path, regression):
        block, _, layer = path.partition(".attn.") if ".attn." in path else path.partition(".mlp.")
        layer = path.removeprefix(f"{block}.")
        if layer not in BRANCHES:
            return
        # the residual stream after the branch is what the next norm sees, or the block's output
        after = f"{block}.norm2" if layer == "attn.proj" else block
        ends = []
        for model, replaced in ((student, asked[layer]), (teacher, None)):
            found = {}
            hooks = [
                model.get_submodule(after).register_forward_hook(
                    lambda m, i, o, found=found, after=after: found.setdefault("x", i[0] if "norm" in after else o)
                )
            ]
            if replaced is not None:
                hooks.append(model.get_submodule(path).register_forward_hook(lambda m, i, o, y=replaced: y))
            model(images)
            for hook in hooks:
                hook.remove()
            ends.append(found["x"])
        checked.append((path, relative(*ends)))

    paths = paths_of(teacher)
    fit_in_order(student, teacher, [images], paths, fit, dict.fromkeys(paths, 1.0))
    assert [path for path, _ in checked] == [p for p in paths if p.endswith(tuple(BRANCHES))]
    assert max(error for _, error in checked) < 1e-5  # measured 3e-7


def test_a_model_that_is_its_teacher_is_asked_for_nothing_new():
    teacher = build("vit")
    student = copy.deepcopy(teacher)
    seen = []

    def fit(path, regression):
        layer = teacher.get_submodule(path)
        weight = layer.weight.double()
        found, _ = regression.solve(weight, layer.bias)
        assert relative(found, weight) < 1e-4  # measured 3e-5
        assert relative(regression.bias(weight), layer.bias.double()) < 1e-4  # measured 1e-6
        assert regression.error(weight, layer.bias) < 1e-3  # rounding of the sums of squares; measured 3e-4
        seen.append(path)

    paths = paths_of(teacher)
    with torch.no_grad():
        fit_in_order(student, teacher, images_for(teacher, 32).split(8), paths, fit, dict.fromkeys(paths, 1.0))
    assert seen == paths


@pytest.mark.parametrize("name", ["vit", "deit_distilled", "dinov2_registers", "headless", "swin"])
@pytest.mark.parametrize("share", [1, 2])
def test_fitted_in_order_the_model_is_closer_to_its_teacher(name, share):
    teacher = build(name)
    images, unseen = images_for(teacher, 96), images_for(teacher, 32, seed=2)
    errors = []
    for sequential in (False, True):
        spec = LORS(rank=8, share=share, metric="inputs", sequential=sequential)
        student = compress(teacher, [spec], calibration=images.split(16))
        errors.append(relative(student.forward_features(unseen), teacher.forward_features(unseen)))
    assert errors[1] < 0.97 * errors[0], errors  # measured 0.55 to 0.93


def test_too_few_images_do_no_harm():
    teacher = build("vit")
    images, unseen = images_for(teacher, 2), images_for(teacher, 32, seed=2)
    errors = [
        relative(
            outputs(compress(teacher, [LORS(rank=8, share=1, sequential=s)], images), unseen), outputs(teacher, unseen)
        )
        for s in (False, True)
    ]
    assert errors[1] < 1.2 * errors[0], errors


def test_a_ridge_is_chosen_by_images_that_were_left_out():
    torch.manual_seed(0)
    prior, truth = torch.randn(6, 40).double(), torch.randn(6, 40).double()
    few, many = Regression(), Regression()
    for regression, count, noise in ((few, 20, 30.0), (many, 4000, 0.0)):
        for sums in (regression.fitted, regression.held_out):
            x = torch.randn(count, 40)
            weight = truth if regression is many else prior
            sums.add(x, x @ weight.float().mT + noise * torch.randn(count, 6), torch.ones(count, 1))
    assert relative(many.solve(prior, None)[0], truth) < 0.01
    assert relative(few.solve(prior, None)[0], prior) < 1.0  # with the smallest ridge: 3.6


def test_composed_with_sharing_and_transforms():
    teacher = build("vit")
    images, unseen = images_for(teacher, 96), images_for(teacher, 32, seed=2)
    errors = []
    for sequential in (False, True):
        steps = [Multiplex(share=2, mlp_conv=3), LORS(rank=8, sequential=sequential)]
        student = compress(teacher, steps, calibration=images)
        errors.append(relative(student.forward_features(unseen), teacher.forward_features(unseen)))
    assert errors[1] < errors[0]
    groups = compression_of(student).ties
    assert groups
    assert all(len(g) == 2 for g in groups)


def test_nothing_is_left_behind_and_the_teacher_is_untouched(monkeypatch, tmp_path):
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    teacher = build("swin")
    before = {n: p.clone() for n, p in teacher.state_dict().items()}
    student = compress(teacher, [LORS(rank=2, share=1)], calibration=images_for(teacher, 8))
    assert not list(tmp_path.iterdir())
    assert all(torch.equal(p, before[n]) for n, p in teacher.state_dict().items())
    assert not teacher.training
    assert all(p.requires_grad for p in student.parameters())


def test_the_ledger_has_the_errors_that_were_fitted():
    teacher = build("vit")
    made = {
        s: compression_of(compress(teacher, [LORS(rank=6, share=1, sequential=s)], images_for(teacher, 64))).ledger
        for s in (False, True)
    }
    for entry in made[True]:
        assert 0 < entry.output_error < 1, entry
    assert [e.path for e in made[True]] == [e.path for e in made[False]]
    assert made[True][-1].output_error != made[False][-1].output_error


def test_numbers_that_are_not_finite_are_named():
    teacher = build("vit")
    with torch.no_grad():
        teacher.blocks[1].mlp.fc1.weight[0, 0] = float("inf")
    paths = paths_of(teacher)
    with pytest.raises(UserError, match=r"blocks\.1\.mlp\.fc1 sees numbers that are not finite"):
        fit_in_order(
            copy.deepcopy(teacher),
            teacher,
            [images_for(teacher, 4)],
            paths,
            lambda path, regression: None,
            dict.fromkeys(paths, 1.0),
        )
    with pytest.raises(UserError, match="there is no calibration image"):
        fit_in_order(teacher, teacher, [], paths, lambda path, regression: None, dict.fromkeys(paths, 1.0))


def test_a_class_token_counts_as_much_as_its_gradient_says():
    teacher = build("headless")
    found = Source(copy.deepcopy(teacher), images_for(teacher, 32)).moments(["blocks.3.mlp.fc2"], outputs=True)
    patches = teacher.patch_embed.num_patches
    # at the last layer the class token's share of the loss is all that tells it from a patch
    assert patches / 4 < found["blocks.3.mlp.fc2"].prefix_weight < patches * 4
    swin = build("swin")
    path = "layers.1.blocks.3.mlp.fc2"
    assert Source(copy.deepcopy(swin), images_for(swin, 8)).moments([path], outputs=True)[path].prefix_weight == 1.0
