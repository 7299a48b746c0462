"""Relations and CKA of blocks of two models with other widths, grids of patches and prefix tokens, or of other architectures."""

from __future__ import annotations

import functools
import itertools

import pytest
import timm
import torch
from helpers.models import VIT, build, family_of
from helpers.runs import done, metrics
from torch import nn
from torch.nn import functional as F

import compressvit
from compressvit import diagnostics
from compressvit.model.family import FAMILIES
from compressvit.model.taps import Taps, tapped_qkv
from compressvit.training import losses
from compressvit.training.pairs import match_layers
from compressvit.training.phases.distill import Distill
from compressvit.training.terms import Batch
from compressvit.training.tokens import CLASS, DISTILLATION, REGISTER, Layout, aligned, resized
from compressvit.transforms import VPT
from compressvit.transforms.applying import compress

RELATIONS = {"prediction": {"weight": 0}, "hidden_relation": {"weight": 0}, "cka": {"weight": 1.0}}
# One of each family but for those of detectors, and one of none.
PAIRED = [next(iter(family.examples)) for family in FAMILIES.values() if family.examples and family.body is None]


def vit(**args) -> nn.Module:
    torch.manual_seed(0)
    return timm.create_model("vit_tiny_patch16_224", **{**VIT, **args}).eval()


def terms_and_batch(student, teacher, layers="auto", spec=RELATIONS, size=32):
    """The loss terms of two models, and what they see of the same images."""
    pairs, _ = match_layers(student, teacher, layers)
    terms = Distill(losses=spec).terms(student, pairs, teacher=teacher)
    seen = []
    for model, wanted in (
        (student, [tap for term in terms for tap in term.student_taps]),
        (teacher, [tap for term in terms for tap in term.teacher_taps]),
    ):
        taps = Taps(model, wanted)
        sizes = model.pretrained_cfg["input_size"][1:] if hasattr(model, "pretrained_cfg") else (size, size)
        known = getattr(getattr(model, "patch_embed", None), "img_size", None) or (min(sizes[0], size),) * 2
        model(F.interpolate(torch.randn(2, 3, size, size, generator=torch.Generator().manual_seed(0)), known))
        seen.append(taps.pop())
        taps.close()
    return pairs, {term.name: term for term in terms}, Batch(torch.zeros(2, 5), torch.zeros(2, 5), *seen, None)


# ------------------------------------------------------------------------------------------------------------- tokens


@pytest.mark.parametrize(
    ("ours", "theirs", "places"),
    [
        ((CLASS, REGISTER), (CLASS, REGISTER), ([0, 1], [0, 1])),
        ((CLASS,), (CLASS, REGISTER), ([0], [0])),
        ((CLASS, DISTILLATION), (REGISTER, CLASS), ([0], [1])),
        ((CLASS, DISTILLATION), (CLASS, DISTILLATION, REGISTER), ([0, 1], [0, 1])),
        ((), (CLASS,), ([], [])),
        ((REGISTER,), (REGISTER, REGISTER), ([], [])),
    ],
)
def test_tokens_that_mean_the_same_stand_beside_each_other(ours, theirs, places):
    one, other = Layout(4, ours, (2, 3)), Layout(8, theirs, (4, 4))
    assert one.shared_prefix(other) == places
    tokens = torch.arange(len(ours) + 6.0)[None, :, None].expand(1, -1, 4)
    others = torch.arange(len(theirs) + 16.0)[None, :, None].expand(1, -1, 8)
    mine, wanted = aligned(tokens, others, one, other, "losses.cka")
    assert mine.shape == (1, len(places[0]) + 6, 4)
    assert mine[0, :, 0].tolist() == [*places[0], *range(len(ours), len(ours) + 6)]  # the smaller grid stays
    assert wanted[0, : len(places[1]), 0].tolist() == places[1]
    smaller = resized(others[:, len(theirs) :].unflatten(1, (4, 4)), (2, 3)).flatten(1, 2)
    torch.testing.assert_close(wanted[:, len(places[1]) :], smaller)


def test_the_smaller_side_counts_along_each_axis():
    tall, wide = torch.randn(1, 6, 2, 4), torch.randn(1, 4, 3, 5)
    mine, other = aligned(tall, wide, Layout(4), Layout(5), "losses.cka")
    assert mine.shape == (1, 4 * 2, 4)
    assert other.shape == (1, 4 * 2, 5)


def test_maps_with_channels_first_are_read_as_such():
    maps = torch.randn(2, 6, 3, 5)
    mine, other = aligned(maps, maps.movedim(1, -1), Layout(6, (), None, True), Layout(6), "losses.cka")
    torch.testing.assert_close(mine, other)
    assert mine.shape == (2, 15, 6)


# ------------------------------------------------------------------------------------------------------------- relations


def test_relations_of_a_finer_teacher_are_those_of_its_resized_tokens():
    student, teacher = vit(), vit(patch_size=4, reg_tokens=2, embed_dim=96)
    spec = {**RELATIONS, "attention_relation": {"weight": 1.0}, "hidden_relation": {"weight": 1.0}}
    pairs, terms, batch = terms_and_batch(student, teacher, ((1, 2),), spec)
    (pair,) = pairs
    ours = batch.student_taps["blocks.1"]["output"]
    theirs = batch.teacher_taps["blocks.2"]["output"]
    assert (ours.shape[1], theirs.shape[1]) == (1 + 16, 3 + 64)

    def coarse(tokens):
        maps = tokens[:, 3:].mT.unflatten(2, (8, 8))
        smaller = F.interpolate(maps, (4, 4), mode="bilinear", antialias=True).flatten(2).mT
        return torch.cat([tokens[:, :1], smaller], dim=1)

    torch.testing.assert_close(
        terms["hidden_relation"].function(batch)[0], losses.hidden_relation(ours, coarse(theirs))
    )
    torch.testing.assert_close(terms["cka"].function(batch)[0], losses.cka(ours, coarse(theirs)))
    mine = tapped_qkv(batch.student_taps, pair.student)
    other = [coarse(x) for x in tapped_qkv(batch.teacher_taps, pair.teacher)]
    torch.testing.assert_close(terms["attention_relation"].function(batch)[0], losses.attention_relation(mine, other))


def test_a_coarser_teacher_makes_the_student_coarser():
    student, teacher = vit(patch_size=4), vit()
    _, terms, batch = terms_and_batch(student, teacher, ((1, 2),))
    loss = terms["cka"].function(batch)[0]
    ours = batch.student_taps["blocks.1"]["output"]
    maps = F.interpolate(ours[:, 1:].mT.unflatten(2, (8, 8)), (4, 4), mode="bilinear", antialias=True)
    coarse = torch.cat([ours[:, :1], maps.flatten(2).mT], dim=1)
    torch.testing.assert_close(loss, losses.cka(coarse, batch.teacher_taps["blocks.2"]["output"]))


def test_prompts_among_the_tokens_are_no_patches():
    prompted = compress(build("vit"), [VPT(prompts=4, deep=False)])
    for other in (vit(patch_size=4), build("swin"), vit()):
        _, terms, batch = terms_and_batch(prompted, other, "auto")
        with pytest.raises(compressvit.UserError, match=r"losses.cka: prompts \(vpt\) stand among the tokens"):
            terms["cka"].function(batch)
    _, terms, batch = terms_and_batch(compress(build("vit"), [VPT(prompts=4)]), vit(patch_size=4), "auto")
    assert terms["cka"].function(batch)[0].isfinite()


def test_grids_are_those_of_the_images():
    """A model that takes images of any size has another grid than it was built for."""
    _, terms, batch = terms_and_batch(vit(dynamic_img_size=True, img_size=64), vit(), ((1, 2),), size=64)
    ours, theirs = batch.student_taps["blocks.1"]["output"], batch.teacher_taps["blocks.2"]["output"]
    assert (ours.shape[1], theirs.shape[1]) == (65, 17)
    _, terms, batch = terms_and_batch(vit(dynamic_img_size=True), vit(dynamic_img_size=True), ((1, 2),))
    batch.student_taps["blocks.1"]["output"] = ours
    assert terms["cka"].function(batch)[0].isfinite()


def test_attention_in_windows_has_no_relations_with_attention_over_the_image():
    swin = build("swin")
    spec = {**RELATIONS, "attention_relation": {"weight": 1.0}}
    pairs, terms, _ = terms_and_batch(vit(), swin, "auto", spec)
    assert pairs
    assert set(terms) == {"cka"}
    only = {"prediction": {"weight": 0}, "hidden_relation": {"weight": 0}, "attention_relation": {"weight": 1.0}}
    with pytest.raises(
        compressvit.UserError, match="only losses of layer pairs have a weight, and there are none that"
    ):
        terms_and_batch(vit(), swin, "auto", only)


@pytest.mark.parametrize(("ours", "theirs"), itertools.permutations(PAIRED, 2))
@pytest.mark.wide_unless(lambda ours, theirs: {ours, theirs} <= {"vit", "swin", "convnext"})
def test_any_two_architectures_have_relations_or_a_sentence(ours, theirs):
    student, teacher = build(ours), build(theirs)
    spec = {**RELATIONS, "hidden_relation": {"weight": 1.0}, "attention_relation": {"weight": 1.0}}
    pairs, how = match_layers(student, teacher, "auto")
    if not pairs:
        assert how.endswith("no layer pairs, so relations are not distilled")
        assert any(family is FAMILIES["generic"] or not family.in_rows for family in map(family_of, (ours, theirs)))
        return
    pairs, terms, batch = terms_and_batch(student, teacher, "auto", spec)
    assert ("attention_relation" in terms) == any(pair.attends_alike for pair in pairs)
    for name, term in terms.items():
        student.zero_grad()
        loss = term.function(batch)[0]
        assert loss.isfinite(), name
        loss.backward(retain_graph=True)
        gradient = student.get_submodule(pairs[0].student.path).get_submodule("mlp")
        assert any(p.grad is not None and p.grad.abs().sum() > 0 for p in gradient.parameters()), name


# ------------------------------------------------------------------------------------------------------------------- CKA


@pytest.mark.parametrize("tokens", [3, 40])  # fewer than the widths, and more
def test_cka_is_that_of_all_tokens(tokens):
    generator = torch.Generator().manual_seed(0)
    ours, theirs = (torch.randn(2, tokens, width, generator=generator).double() for width in (12, 20))
    theirs[..., :12] += ours
    expected = 1 - diagnostics.cka(ours.flatten(0, 1), theirs.flatten(0, 1))
    assert losses.cka(ours, theirs).item() == pytest.approx(expected, abs=1e-12)  # measured 1e-16
    assert losses.cka(ours.float(), theirs.float()).item() == pytest.approx(expected, abs=1e-5)  # measured 1e-7


def test_rotated_and_scaled_tokens_are_alike():
    generator = torch.Generator().manual_seed(0)
    ours = torch.randn(2, 30, 8, generator=generator, dtype=torch.float64)
    rotation = torch.linalg.qr(torch.randn(16, 8, generator=generator, dtype=torch.float64))[0].mT
    assert losses.cka(ours, 1e3 * ours @ rotation + 5).item() == pytest.approx(0, abs=1e-12)  # measured 2e-16
    assert losses.cka(ours, ours**2).item() > 0.5


def test_gradients_of_cka_agree_with_finite_differences():
    generator = torch.Generator().manual_seed(0)
    for tokens in (3, 20):
        ours = torch.randn(2, tokens, 7, generator=generator, dtype=torch.float64, requires_grad=True)
        theirs = torch.randn(2, tokens, 9, generator=generator, dtype=torch.float64)
        torch.autograd.gradcheck(functools.partial(losses.cka, teacher=theirs), (ours,))


def test_what_cka_does_not_compare():
    with pytest.raises(compressvit.UserError, match=r"cka: student must be \(B, N, C\), got \(2, 3, 4, 5\)"):
        losses.cka(torch.zeros(2, 3, 4, 5), torch.zeros(2, 3, 5))
    with pytest.raises(compressvit.UserError, match=r"cka: student and teacher must agree in batch and tokens"):
        losses.cka(torch.zeros(2, 3, 5), torch.zeros(2, 4, 5))
    alike = torch.ones(2, 3, 5, requires_grad=True)  # less their mean nothing is left
    loss = losses.cka(alike, alike.detach())
    loss.backward()
    assert loss == 1
    assert alike.grad.isfinite().all()


# ------------------------------------------------------------------------------------------------------------------ runs

RECIPE = """\
teacher: {{model: swin_tiny_patch4_window7_224, weights: train, finetune: {{epochs: 1}},
  args: {{img_size: 8, patch_size: 1, in_chans: 1, embed_dim: 16, depths: [1, 2], num_heads: [2, 2], window_size: 4}}}}
student: {{model: vit_tiny_patch16_224, weights: random,
  args: {{img_size: 8, patch_size: 2, in_chans: 1, embed_dim: 24, depth: 2, num_heads: 2}}}}
data: {{name: digits, batch_size: 8, limit_train: 48, limit_val: 16}}
calibration: {{images: 16}}
steps:
  - distill:
      {{epochs: 2, log_every: 1, lr: 0.005, layers: {layers}, losses: {{hidden_relation: {{weight: 1}}, cka: {{weight: 1}}}}}}
"""


def test_a_vit_learns_the_relations_of_a_swin(tmp_path):
    path = tmp_path / "recipe.yaml"
    path.write_text(RECIPE.format(layers="auto"))
    planned = done("plan", path)
    assert "by depth until then; prefix tokens are left out" in " ".join(planned.split())
    told = done("apply", "--no-report", path, "--output", tmp_path / "run")
    assert "attention relations of all pairs are left out" in " ".join(told.split())
    lines = metrics(tmp_path / "run", phase="0_distill", kind="train")
    for name in ("hidden_relation", "cka"):
        values = [line[name] for line in lines]
        assert sum(values[-3:]) < 0.95 * sum(values[:3])
    assert not any(name.startswith("attention") for name in lines[0])
