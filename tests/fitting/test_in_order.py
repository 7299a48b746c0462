"""Fitting layers in order, each on what the fitted layers before it produce."""

from __future__ import annotations

import copy
import tempfile
from functools import partial

import pytest
import timm
import torch
from helpers.models import BACKBONES, SWIN, VIT, build, family_of, images_for, outputs, randomise
from helpers.ranks import ranked

from compressvit import LORS, AdaptFormer, LowRank, Multiplex
from compressvit.errors import UserError
from compressvit.fitting import in_order
from compressvit.fitting.in_order import LayerFit, fit_in_order
from compressvit.fitting.reference import Reference
from compressvit.fitting.regression import Regression
from compressvit.model.backbone import describe
from compressvit.transforms.applying import compress, transform_
from compressvit.transforms.record import compression_of

LAYERS = ("attn.qkv", "attn.proj", "mlp.fc1", "mlp.fc2")


def build_any(name: str) -> torch.nn.Module:
    if name != "swin_padded":
        return build(name)
    torch.manual_seed(0)  # 6×6 tokens in windows of 4×4: the last windows are filled up
    return timm.create_model("swin_tiny_patch4_window7_224", **{**SWIN, "img_size": 24}).eval()


def paths_of(model):
    found = {f"{info.path}.{layer}" for info in describe(model).blocks for layer in LAYERS}
    return [name for name, _ in model.named_modules() if name in found]


def relative(a, b):
    return ((a - b).norm() / b.norm()).item()


@pytest.mark.wide_unless(lambda name: name in ("vit", "swin", "hiera"))
@pytest.mark.parametrize("name", [*(name for name in BACKBONES if family_of(name).branches), "hiera", "swin_padded"])
def test_what_a_layer_is_asked_for_makes_the_hidden_state_the_teachers(name, monkeypatch):
    """Put the wanted outputs in place of the last layer's of each branch: the student's sum is then the teacher's, whatever came before."""

    teacher = build_any(name)
    branches = describe(teacher).family.branches
    for path, parameter in teacher.named_parameters():
        if path.endswith("gamma"):  # none is so small that it cannot be corrected
            parameter.data.abs_().add_(0.1)
    student = copy.deepcopy(teacher)
    randomise(student, 0.02)
    images = images_for(teacher, 4)
    asked: dict[str, torch.Tensor] = {}
    pair = in_order._Asked.pair

    def noting(layer, *rest):
        x, y, weights = pair(layer, *rest)
        asked[layer.name] = y
        return x, y, weights

    monkeypatch.setattr(in_order._Asked, "pair", noting)
    checked = []

    def fit(path, module, regression):
        block, _, layer = path.partition(".attn.") if ".attn." in path else path.partition(".mlp.")
        layer = path.removeprefix(f"{block}.")
        if layer not in branches:
            return 0.0
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
                hooks.append(
                    model.get_submodule(path).register_forward_hook(lambda m, i, o, y=replaced: y.reshape(o.shape))
                )
            model(images)
            for hook in hooks:
                hook.remove()
            ends.append(found["x"])
        checked.append((path, relative(*ends)))
        return 0.0

    paths = paths_of(teacher)
    fit_in_order(student, teacher, [images], {path: LayerFit(partial(fit, path)) for path in paths})
    assert [path for path, _ in checked] == [p for p in paths if p.endswith(tuple(branches))]
    assert max(error for _, error in checked) < 1e-5  # measured 3e-7


def test_a_branch_whose_layers_are_fitted_does_not_run_again():
    """Of the student, the attention of a block runs once to fit each of its layers and once more for the MLP, not for every layer after."""
    teacher = build("vit")
    student = copy.deepcopy(teacher)
    images = images_for(teacher, 4)
    runs = []
    student.blocks[0].attn.qkv.register_forward_hook(lambda *_: runs.append("qkv"))
    fits = {path: LayerFit(lambda module, regression: 0.0) for path in paths_of(teacher)}
    fit_in_order(student, teacher, [images[:2], images[2:]], fits)
    assert len(runs) == 1 + 2 * 2  # to learn the order of the layers; for proj and fc1, of two batches
    assert not any("forward" in vars(module) for module in student.modules())


def test_a_fit_that_fails_leaves_every_module_as_it_was():
    teacher = build("vit")
    student = copy.deepcopy(teacher)
    student.blocks[0].attn.forward = own = partial(type(student.blocks[0].attn).forward, student.blocks[0].attn)

    def fail(module, regression):
        raise ValueError

    fits = {"blocks.0.attn.qkv": LayerFit(lambda module, regression: 0.0), "blocks.0.mlp.fc2": LayerFit(fail)}
    fits["blocks.0.mlp.fc1"] = fits["blocks.0.attn.qkv"]
    with pytest.raises(ValueError):
        fit_in_order(student, teacher, [images_for(teacher, 4)], fits)
    assert student.blocks[0].attn.forward is own
    assert [name for name, module in student.named_modules() if "forward" in vars(module)] == ["blocks.0.attn"]


def test_a_model_that_is_its_teacher_is_asked_for_nothing_new():
    teacher = build("vit")
    student = copy.deepcopy(teacher)
    seen = []

    def fit(path, module, regression):
        weight, bias = module.weight.double(), module.bias.double()
        for fixed in (None, bias):
            found, _ = regression.solve(weight, fixed)
            assert relative(found, weight) < 1e-4  # measured 3e-5
        assert relative(regression.whole.best_bias(weight), bias) < 1e-4  # measured 1e-6
        seen.append(path)
        return regression.error(weight, bias)

    paths = paths_of(teacher)
    errors = fit_in_order(
        student, teacher, images_for(teacher, 32).split(8), {path: LayerFit(partial(fit, path)) for path in paths}
    )
    assert seen == paths == list(errors)
    assert max(errors.values()) < 1e-3  # rounding of the sums of squares; measured 3e-4


@pytest.mark.wide_unless(lambda name, share, metric: (name, share, metric) == ("vit", 2, "auto"))
@pytest.mark.parametrize("name", ["vit", "deit_distilled", "dinov2_registers", "headless", "swin"])
@pytest.mark.parametrize(
    ("share", "metric"), [(1, "inputs"), (1, "outputs"), (2, "inputs"), (2, "auto")]
)  # and the default
def test_fitted_in_order_the_model_is_closer_to_its_teacher(name, share, metric):
    teacher = build(name)
    images, unseen = images_for(teacher, 96), images_for(teacher, 32, seed=2)
    errors = []
    for sequential in (False, True):
        spec = ranked(share, rank=8, metric=metric, sequential=sequential)
        student = compress(teacher, [spec], calibration=images.split(16))
        errors.append(relative(student.forward_features(unseen), teacher.forward_features(unseen)))
    most = 0.97 if metric == "inputs" else 1.0  # measured 0.48 to 0.93, and up to 0.97
    assert errors[1] < most * errors[0], errors


def test_too_few_images_do_no_harm():
    teacher = build("vit")
    images, unseen = images_for(teacher, 2), images_for(teacher, 32, seed=2)
    errors = [
        relative(outputs(compress(teacher, [LowRank(rank=8, sequential=s)], images), unseen), outputs(teacher, unseen))
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
    zero = torch.zeros(6).double()
    assert relative(many.solve(prior, zero)[0], truth) < 0.01
    assert relative(few.solve(prior, zero)[0], prior) < 1.0  # with the smallest ridge: 3.6


@pytest.mark.wide
def test_composed_with_sharing_and_transforms():
    teacher = build("vit")
    images, unseen = images_for(teacher, 48), images_for(teacher, 32, seed=2)
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
    student = compress(teacher, [LowRank(rank=2)], calibration=images_for(teacher, 8))
    assert not list(tmp_path.iterdir())
    assert all(torch.equal(p, before[n]) for n, p in teacher.state_dict().items())
    assert not teacher.training
    assert all(p.requires_grad for p in student.parameters())


def test_the_ledger_has_the_errors_that_were_fitted():
    """Of the last layer on the student's own inputs, recomputed from the models alone: no residual stream to correct there."""
    teacher = build("vit")
    images = images_for(teacher, 64)
    student = compress(teacher, [LowRank(rank=6, targets=("mlp.fc1",))], images)
    path = "blocks.3.mlp.fc1"
    entry = next(e for e in compression_of(student).ledger if e.path == path)
    seen = {}
    for name, model in (("student", student), ("teacher", teacher)):
        module = model.get_submodule(path)
        hook = module.register_forward_hook(lambda m, i, o, name=name: seen.__setitem__(name, o))
        outputs(model, images)
        hook.remove()
    # a class token may count as more than one token in the fit
    assert entry.output_error == pytest.approx(relative(seen["student"], seen["teacher"]), rel=0.25)  # measured 0.03


@pytest.mark.wide
def test_one_source_for_two_students_keeps_nothing_of_the_first():
    teacher = build("headless")
    images = images_for(teacher, 32)
    together, errors = Reference(copy.deepcopy(teacher), images), []
    for spec in (LowRank(rank=4), LORS(rank=8, share=2), LowRank(rank=20, sequential=False)):
        alone, shared = copy.deepcopy(teacher), copy.deepcopy(teacher)
        torch.manual_seed(0)
        first = transform_(alone, [spec], images)
        torch.manual_seed(0)
        second = transform_(shared, [spec], together)
        assert [e.output_error for e in first] == pytest.approx([e.output_error for e in second], rel=1e-4)
        assert relative(outputs(shared, images), outputs(alone, images)) < 1e-4  # measured 1e-6
        errors.append(first[0].output_error)
    assert errors[2] < errors[0]


@pytest.mark.wide
@pytest.mark.parametrize("size", [3, 30])
def test_a_bias_that_is_tied_is_not_fitted_into_the_weight(size):
    teacher = build("vit")
    with torch.no_grad():
        for name, parameter in teacher.named_parameters():
            if name.startswith("blocks.") and name.endswith(("qkv.bias", "proj.bias", "fc1.bias", "fc2.bias")):
                parameter.mul_(size)
    images, unseen = images_for(teacher, 48), images_for(teacher, 32, seed=2)
    errors = []
    for sequential in (False, True):
        steps = [Multiplex(share=2, head_mixing=False), LORS(rank=8, sequential=sequential)]
        student = compress(teacher, steps, calibration=images)
        errors.append(relative(student.forward_features(unseen), teacher.forward_features(unseen)))
    assert errors[1] < 0.6 * errors[0], errors  # measured 0.47 and 0.05


@pytest.mark.wide
@pytest.mark.parametrize("share", [1, 2])
@pytest.mark.parametrize("metric", ["inputs", "outputs"])
def test_what_layer_scale_makes_small_does_not_take_the_rank(share, metric):
    teacher = build("dinov2_registers")
    with torch.no_grad():
        for name, parameter in teacher.named_parameters():
            if name.endswith("gamma"):
                parameter.copy_(10 ** (-2.5 * torch.rand(parameter.shape)))
    images, unseen = images_for(teacher, 48), images_for(teacher, 32, seed=2)
    errors = []
    for sequential in (False, True):
        student = compress(teacher, [ranked(share, rank=8, metric=metric, sequential=sequential)], images)
        errors.append(relative(student.forward_features(unseen), teacher.forward_features(unseen)))
    assert errors[1] < 0.9 * errors[0], errors


@pytest.mark.wide_unless(lambda steps: isinstance(steps[1], LORS))
@pytest.mark.parametrize(
    "steps",
    [
        [
            LowRank(rank=2, targets=("attn.*",)),
            LowRank(budget={"parameters": 0.95}, targets=("mlp.*",), metric="inputs"),
        ],
        [LowRank(rank=2, targets=("mlp.*",)), LORS(rank=3, share=2, targets=("attn.*",))],
    ],
    ids=["one stays dense", "two kinds of groups"],
)
def test_two_steps_are_fitted_in_one_walk(steps):
    teacher = build("vit")
    images = images_for(teacher, 32)
    ledger = compression_of(compress(teacher, steps, images)).ledger
    assert all(0 < entry.output_error < 1.5 for entry in ledger if "low rank" in entry.change)
    turned = compress(teacher, steps[::-1], images)
    assert relative(outputs(turned, images), outputs(teacher, images)) < 1


def test_nothing_to_fit():
    with torch.random.fork_rng():
        teacher = timm.create_model("vit_tiny_patch16_224", **{**VIT, "depth": 1})
    student = compress(teacher, [LORS(rank=2)], images_for(teacher, 8))  # one block shares with none: there is no group
    assert torch.equal(outputs(student, images_for(teacher)), outputs(teacher, images_for(teacher)))


@pytest.mark.wide
@pytest.mark.parametrize("first", [Multiplex(share=2, mlp_conv=3), AdaptFormer(width=4)], ids=lambda s: s.name)
@pytest.mark.parametrize("name", ["vit", "swin"])
def test_blocks_with_slots_are_fitted_in_order_too(name, first):
    """A Swin block with slots keeps the grid where timm's folds it into a sequence."""
    teacher = build(name)
    images, unseen = images_for(teacher, 512), images_for(teacher, 32, seed=2)
    errors = []
    for sequential in (False, True):
        share = 2 if first.name == "multiplex" else 1
        student = compress(teacher, [first, ranked(share, rank=8, sequential=sequential)], images)
        errors.append(relative(outputs(student, unseen), outputs(teacher, unseen)))
    assert errors[1] < errors[0], errors  # measured 0.14 to 0.90 of it; on 96 images up to 1.06


def test_no_room_for_the_hidden_states(monkeypatch):
    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("numpy.save", full)
    with pytest.raises(UserError, match=r"No space left on device; point TMPDIR at a folder with room"):
        compress(build("vit"), [LowRank(rank=2)], images_for(build("vit"), 8))
    monkeypatch.undo()
    monkeypatch.setattr(tempfile, "tempdir", "/nowhere/at/all")
    with pytest.raises(UserError, match="point TMPDIR at a folder with room"):
        compress(build("vit"), [LowRank(rank=2)], images_for(build("vit"), 8))


def test_numbers_that_are_not_finite_are_named():
    teacher = build("vit")
    with torch.no_grad():
        teacher.blocks[1].mlp.fc1.weight[0, 0] = float("inf")
    nothing = {path: LayerFit(lambda module, regression: 0.0) for path in paths_of(teacher)}
    with pytest.raises(UserError, match=r"blocks\.1\.mlp\.fc1 sees numbers that are not finite"):
        fit_in_order(copy.deepcopy(teacher), teacher, [images_for(teacher, 4)], nothing)
    with pytest.raises(UserError, match="there is no calibration image"):
        fit_in_order(teacher, teacher, [], nothing)


def test_a_class_token_counts_as_much_as_its_gradient_says():
    teacher = build("headless")
    found = Reference(copy.deepcopy(teacher), images_for(teacher, 32)).moments(["blocks.3.mlp.fc2"], outputs=True)
    patches = teacher.patch_embed.num_patches
    # at the last layer the class token's share of the loss is all that tells it from a patch
    assert patches / 4 < found["blocks.3.mlp.fc2"].prefix_weight <= patches
    swin = build("swin")
    path = "layers.1.blocks.3.mlp.fc2"
    assert Reference(copy.deepcopy(swin), images_for(swin, 8)).moments([path], outputs=True)[path].prefix_weight == 1.0
