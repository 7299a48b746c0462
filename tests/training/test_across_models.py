"""Features of a teacher of another width, grid and prefix tokens: a projection that is trained and dropped, a resized grid."""

from __future__ import annotations

import json
import signal
from dataclasses import replace

import pytest
import timm
import torch
from helpers.runs import done, metrics, run, student_bytes

import compressvit
from compressvit.model.taps import Taps
from compressvit.training import step
from compressvit.training.phases.distill import Distill
from compressvit.training.terms import Batch
from compressvit.training.terms.feature import _projection
from compressvit.training.tokens import CLASS, REGISTER, Layout, resized

FEATURES = {"prediction": {"weight": 0}, "feature": {"weight": 1.0, "form": "mse", "prefix": 0.5}}
SMALL = {"img_size": 16, "patch_size": 4, "in_chans": 1, "embed_dim": 16, "depth": 1, "num_heads": 2, "num_classes": 0}
SWIN = {"img_size": 32, "patch_size": 2, "embed_dim": 8, "depths": (1, 1), "num_heads": (2, 2), "window_size": 4}
TEACHERS = {
    "wider": ("vit_tiny_patch16_224", {**SMALL, "embed_dim": 24}),
    "finer": ("vit_tiny_patch16_224", {**SMALL, "patch_size": 2}),
    "registers": ("vit_tiny_patch16_224", {**SMALL, "reg_tokens": 3}),
    "no class token": ("vit_tiny_patch16_224", {**SMALL, "class_token": False, "global_pool": "avg"}),
    "all of it": ("vit_tiny_patch16_224", {**SMALL, "embed_dim": 24, "patch_size": 8, "reg_tokens": 2}),
    "swin": ("swin_tiny_patch4_window7_224", {**SWIN, "in_chans": 1, "num_classes": 0}),
}


def built(name, args):
    torch.manual_seed(len(name))
    return timm.create_model(name, **args).eval()


def student():
    return built("vit_tiny_patch16_224", SMALL)


def term_and_batch(ours, theirs):
    (term,) = Distill(losses=FEATURES).terms(ours, [], teacher=theirs)
    taps = [Taps(ours, term.student_taps), Taps(theirs, term.teacher_taps)]
    images = torch.randn(2, 1, 16, 16, generator=torch.Generator().manual_seed(0))
    size = 32 if "swin" in type(theirs).__module__ else 16
    with torch.no_grad():
        ours(images)
        theirs(torch.nn.functional.interpolate(images, (size, size)))
    seen = [tap.pop() for tap in taps]
    return term, Batch(torch.zeros(2, 0), torch.zeros(2, 0), *seen, torch.zeros(2))


@pytest.mark.parametrize("kind", TEACHERS)
def test_what_stands_for_the_same_is_compared(kind):
    ours, theirs = student(), built(*TEACHERS[kind])
    term, batch = term_and_batch(ours, theirs)
    loss, parts = term.function(batch)
    mine, other = (taps["norm"]["output"] for taps in (batch.student_taps, batch.teacher_taps))
    project = term.module or torch.nn.Identity()
    assert (term.module is None) == (mine.shape[-1] == other.shape[-1])
    if other.ndim == 4:
        whole, patches = other.mean(dim=(1, 2)), other
    else:
        count = theirs.num_prefix_tokens
        side = round((other.shape[1] - count) ** 0.5)
        patches = other[:, count:].unflatten(1, (side, side))
        whole = other[:, 0] if theirs.cls_token is not None else patches.mean(dim=(1, 2))
    expected = (project(mine[:, 0]) - whole).square().mean()
    torch.testing.assert_close(parts["feature_prefix"], expected)
    each = project(mine[:, 1:].unflatten(1, (4, 4))) - resized(patches, (4, 4))
    torch.testing.assert_close(parts["feature_patches"], each.square().mean())
    torch.testing.assert_close(loss, (expected + each.square().mean()) / 2)
    assert term.note


def test_equal_models_need_none_of_it():
    term, _ = term_and_batch(student(), student())
    assert (term.module, term.note) == (None, "")


def test_a_constant_map_is_constant_at_any_size():
    patches = torch.full((1, 5, 7, 2), 3.0)
    for size in ((3, 2), (9, 14), (5, 7)):
        assert resized(patches, size).shape == (1, *size, 2)
        torch.testing.assert_close(resized(patches, size), torch.full((1, *size, 2), 3.0))


def test_rows_stay_rows_at_another_size():
    """A map that rises from the left to the right does so at any size, from the mean of the pixels on that side on."""
    patches = torch.arange(8.0).expand(4, 8)[None, :, :, None]
    smaller = resized(patches, (2, 4))[0, :, :, 0]
    torch.testing.assert_close(smaller, torch.tensor([0.5, 2.5, 4.5, 6.5]).expand(2, 4), atol=0.25, rtol=0)
    assert (smaller[0, 0] - 0.5).abs() > 0.1  # bilinear with antialiasing reaches beyond its two pixels: measured 0.21
    assert resized(patches, (8, 2)).shape == (1, 8, 2, 1)


def test_a_projection_begins_at_right_angles():
    for inputs, outputs in ((16, 24), (24, 16)):
        weight = _projection(inputs, outputs, torch.device("cpu")).weight
        square = weight.mT @ weight if outputs >= inputs else weight @ weight.mT
        torch.testing.assert_close(square, torch.eye(min(inputs, outputs)))


def test_tokens_without_a_known_grid_are_a_square_or_refused():
    layout = Layout(4)
    tokens = torch.arange(9.0)[None, :, None].expand(1, 9, 4)
    assert layout.patches(tokens)[0, :, :, 0].tolist() == [[0, 1, 2], [3, 4, 5], [6, 7, 8]]
    with pytest.raises(compressvit.UserError, match="8 patches are no grid of the shape of a square"):
        layout.patches(torch.zeros(1, 8, 4))


def test_maps_of_other_sizes_are_compared_and_have_no_part_for_the_image():
    ours, theirs = (
        built("swin_tiny_patch4_window7_224", {**SWIN, "img_size": size, "in_chans": 1}) for size in (32, 64)
    )
    (term,) = Distill(losses=FEATURES).terms(ours, [], teacher=theirs)
    maps = [torch.randn(2, size, size, 16) for size in (4, 8)]
    taps = [{"norm": {"output": each}} for each in maps]
    loss, parts = term.function(Batch(torch.zeros(2, 0), torch.zeros(2, 0), *taps, torch.zeros(2)))
    assert parts == {}
    torch.testing.assert_close(loss, (maps[0] - resized(maps[1], (4, 4))).square().mean())
    assert term.module is None


def test_registers_that_both_have_are_compared():
    ours, theirs = (built("vit_tiny_patch16_224", {**SMALL, "reg_tokens": 2, "embed_dim": width}) for width in (16, 24))
    term, batch = term_and_batch(ours, theirs)
    _, parts = term.function(batch)
    mine, other = (taps["norm"]["output"][:, :3] for taps in (batch.student_taps, batch.teacher_taps))
    torch.testing.assert_close(parts["feature_prefix"], (term.module(mine) - other).square().mean())
    assert "register" not in term.note


@pytest.mark.parametrize("whose", ["student", "teacher"])
def test_a_model_without_such_features_is_refused(whose):
    models = {"student": student(), "teacher": student(), whose: built("resnet10t", {"num_classes": 0})}
    with pytest.raises(
        compressvit.UserError, match=f"resnet10t, the {whose}, has no 'norm' whose outputs would be its"
    ):
        Distill(losses=FEATURES).terms(models["student"], [], teacher=models["teacher"])


def test_another_image_size_has_a_grid_of_the_same_shape():
    layout = Layout(4, (CLASS, REGISTER), (2, 4))
    assert layout.patches(torch.zeros(1, 2 + 8 * 16, 4)).shape == (1, 8, 16, 4)
    with pytest.raises(compressvit.UserError, match="11 patches are no grid"):
        layout.patches(torch.zeros(1, 2 + 11, 4))
    assert replace(layout, grid=None).patches(torch.zeros(1, 3, 5, 4)).shape == (1, 3, 5, 4)


RECIPE = f"""\
teacher: {{model: vit_tiny_patch16_224, weights: train, finetune: {{epochs: 1}},
  args: {{img_size: 8, patch_size: 2, in_chans: 1, embed_dim: 24, depth: 1, num_heads: 2, reg_tokens: 1}}}}
student: {{model: vit_tiny_patch16_224, weights: random,
  args: {{img_size: 8, patch_size: 4, in_chans: 1, embed_dim: 16, depth: 1, num_heads: 2}}}}
data: {{name: digits, batch_size: 8, limit_train: 48, limit_val: 16}}
steps:
  - distill: {{epochs: 3, ema: 0.9, log_every: 1, lr: 0.005, losses: {json.dumps(FEATURES)}}}
"""


@pytest.fixture(scope="module")
def recipe(tmp_path_factory):
    path = tmp_path_factory.mktemp("across") / "recipe.yaml"
    path.write_text(RECIPE)
    return path


@pytest.fixture(scope="module")
def whole(recipe):
    folder = recipe.parent / "whole"
    return folder, done("apply", "--no-report", recipe, "--output", folder)


def test_a_run_learns_and_leaves_no_projection_behind(whole):
    folder, told = whole
    assert "a projection 16 → 24 is trained with the student and dropped at the end" in told
    assert "the teacher's 4×4 patches are resized to 2×2" in told
    assert "register tokens are left out" in told
    losses = [line["feature"] for line in metrics(folder, phase="0_distill", kind="train")]
    assert sum(losses[-3:]) < 0.9 * sum(losses[:3])
    made = compressvit.load(folder / "student")
    assert not [name for name in made.state_dict() if "of_terms" in name]
    assert made(torch.zeros(1, 1, 8, 8)).shape == (1, 10)


def test_a_stopped_run_goes_on_to_the_same_bits(recipe, whole, tmp_path, monkeypatch):
    """The projection is in its checkpoint."""
    original, calls = step.total_of, []

    def counted(*args):
        calls.append(1)
        if len(calls) == 6 + 8:  # amid the second epoch of the student
            signal.raise_signal(signal.SIGTERM)
        return original(*args)

    with monkeypatch.context() as patch:
        patch.setattr(step, "total_of", counted)
        assert run("apply", "--no-report", recipe, "--output", tmp_path / "run")[0] == 128 + signal.SIGTERM
    done("apply", "--no-report", recipe, "--output", tmp_path / "run", "--resume")
    assert student_bytes(tmp_path / "run") == student_bytes(whole[0])
