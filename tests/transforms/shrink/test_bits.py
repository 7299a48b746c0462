"""Bits are a part of the budget: what is removed and how far the rest is rounded are chosen together."""

from __future__ import annotations

import numpy as np
import pytest
import timm
import torch
from helpers.runs import done, run

from compressvit.errors import UserError
from compressvit.fitting.reference import Reference
from compressvit.model import surgery
from compressvit.model.cost import file_bytes
from compressvit.recipe.recipe import parse_recipe
from compressvit.runs.methods import steps_of
from compressvit.runs.plan import plan_recipe
from compressvit.transforms import Quantise, Shrink
from compressvit.transforms.applying import compress, in_context, plan_transforms
from compressvit.transforms.record import compression_of
from compressvit.transforms.shrink import search
from compressvit.transforms.shrink.spec import ShrinkBudget

BITS = (3, 4, 6, 8)


@pytest.fixture(scope="module")
def teacher():
    with torch.random.fork_rng():
        torch.manual_seed(0)
        size = {"img_size": 16, "patch_size": 4, "embed_dim": 48, "depth": 2, "num_heads": 3, "num_classes": 5}
        return timm.create_model("vit_tiny_patch16_224", **size).eval()


@pytest.fixture(scope="module")
def images():
    return torch.randn(32, 3, 16, 16, generator=torch.Generator().manual_seed(1))


def both(limit: int) -> list:
    return [Shrink(budget=ShrinkBudget(bytes=limit), rounded=True), Quantise(budget={"bytes": limit}, choices=BITS)]


def test_the_two_go_below_what_either_reaches_and_within_the_limit(teacher, images):
    limit = int(0.13 * file_bytes(teacher))
    with pytest.raises(UserError, match=r"quantise: a budget of .* cannot be met"):
        compress(teacher, both(limit)[1:], images)
    student = compress(teacher, both(limit), images)
    assert 0.95 * limit < file_bytes(student) <= limit  # measured 0.99
    structure, rounding = compression_of(student).plans
    assert structure.forms
    assert set(rounding.bits.values()) <= set(BITS)
    assert "bits" not in next(iter(structure.model_dump(mode="json")["forms"].values()))


def test_what_is_planned_is_the_file_that_the_step_behind_leaves(teacher, images):
    """With the bits on which the choice of what is removed counted."""
    spec, _ = in_context(both(int(0.2 * file_bytes(teacher))))
    reference = Reference(teacher, images)
    found = spec.places_of(teacher)
    searched = spec._search(teacher, found, reference)
    offered = spec._offers(found, searched.prices, reference)
    bits = {
        f"{path.rpartition('.')[0]}.{layer}": own
        for path, forms in offered.items()
        for layer, own in forms.forms[0].bits.items()
    }
    assert set(bits.values()) <= set(BITS)
    assert len(bits) == 8
    structure = spec.resolved({})
    student = surgery.deep_copy(teacher)
    spec._rounding.with_bits(student, bits, 3).apply(student)
    assert searched.cost(structure, bits)[0] == file_bytes(student)


def test_fewer_bits_cost_less_and_lose_more(teacher, images):
    """Of every form that is as the teacher has it but for its bits."""
    step = Shrink(budget=ShrinkBudget(bytes=0.2), rounded=True, methods=("neurons",))
    spec = step.before([Quantise(budget={"bytes": 1e5}, choices=BITS)])
    reference, found = Reference(teacher, images), spec.places_of(teacher)
    for forms in spec._offers(found, spec._search(teacher, found, reference).prices, reference).values():
        whole = [i for i, offer in enumerate(forms.forms) if not offer.layers() and len(set(offer.bits.values())) == 1]
        by_bits = sorted((max(forms.forms[i].bits.values()), forms.prices[i, 0], forms.errors[i]) for i in whole)
        assert len(by_bits) >= 2
        _, prices, errors = zip(*by_bits, strict=True)
        assert list(prices) == sorted(prices)
        assert list(errors) == sorted(errors, reverse=True)


@pytest.mark.wide
def test_a_limit_of_another_unit_holds_too(teacher, images):
    limit = int(0.2 * file_bytes(teacher))
    step = Shrink(budget=ShrinkBudget(bytes=limit, macs=0.7), rounded=True)
    student = compress(teacher, [step, Quantise(budget={"bytes": limit}, choices=BITS)], images)
    assert file_bytes(student) <= limit
    assert compression_of(student).plans[0].forms


def test_a_limit_below_both_is_refused_before_an_image_is_read(teacher):
    with pytest.raises(
        UserError, match=r"shrink: a budget of 1,000 bytes .* 3 bits a weight reach is .* cannot be met"
    ):
        plan_transforms(teacher, both(1000))


def test_one_limit_is_one_conflict():
    """The step behind is not judged by a model that is not shrunk; other faults of it are told."""
    text = (
        "teacher: {model: vit_tiny_patch16_224, weights: random, args: {img_size: 32, embed_dim: 48, depth: 2}}\n"
        "data: {name: digits}\nsteps:\n"
    )
    shrink, quantise = (
        "  - shrink: {budget: {bytes: 1000}, rounded: true}\n",
        "  - quantise: {budget: {bytes: 1000}%s}\n",
    )
    (conflict,) = plan_recipe(parse_recipe(text + shrink + quantise % "")).conflicts
    assert conflict.startswith("steps[0].shrink: shrink: a budget of 1,000 bytes")
    alone = plan_recipe(parse_recipe(text + quantise % "")).conflicts
    assert "or put `shrink` before" in alone[0]
    two = plan_recipe(parse_recipe(text + shrink + quantise % ", skip: [nothing]")).conflicts
    assert len(two) == 2
    assert "nothing" in two[1]


def test_two_limits_of_one_file_are_refused(teacher):
    whole = file_bytes(teacher)
    half = both(int(0.2 * whole))
    plan_transforms(teacher, [Shrink(budget=ShrinkBudget(bytes=0.2), rounded=True), half[1]])
    with pytest.raises(UserError, match=rf"limits of one file; give both the same, .* \{{bytes: {int(0.3 * whole)}\}}"):
        plan_transforms(teacher, [Shrink(budget=ShrinkBudget(bytes=0.3), rounded=True), half[1]])


def test_a_correction_of_a_budget_does_not_go_below_what_forms_reach(monkeypatch):
    """Where prices are far below what a student costs; else the cheapest forms of all would be left."""
    for name, fake in {
        "choose": lambda _, wanted: wanted[0] if wanted[0] >= 10 else None,
        "least": lambda _: np.array([10.0]),
        "_together": lambda chosen: chosen,
    }.items():
        monkeypatch.setattr(search, name, fake)
    found = object.__new__(search.Search)
    found.limits, found._fixed = np.array([100.0]), np.array([0.0])
    found._cost_of = lambda chosen: np.array([chosen + 95 * (chosen > 12)])
    found._plan, found._cheapest = (lambda chosen: chosen), (lambda _: 0.0)
    assert 10 < found.within({}) <= 12


def test_a_frontier_gives_both_steps_the_limit(teacher):
    """A fraction is one of the teacher's file; another method takes the place of both."""
    limit = int(0.3 * file_bytes(teacher))
    shrink, quantise = steps_of(in_context(both(10_000)), None, teacher, "bytes", 0.3)
    assert shrink.budget.bytes == quantise.budget.bytes == limit
    plan_transforms(teacher, [shrink, quantise])
    (alone,) = steps_of(in_context(both(10_000)), "shrink", teacher, "bytes", 0.3)
    assert (alone.budget.bytes, alone.rounded) == (0.3, False)


def test_what_does_not_fit_together_is_refused(teacher):
    with pytest.raises(UserError, match="rounded is for a budget of bytes"):
        Shrink(budget=ShrinkBudget(macs=0.5), rounded=True)
    step = Shrink(budget=ShrinkBudget(bytes=0.2), rounded=True)
    assert not step.with_budget("macs", 0.5).rounded
    with pytest.raises(UserError, match="counts on a quantise step behind it, and there is none"):
        plan_transforms(teacher, [step])
    with pytest.raises(UserError, match=r"0.2, is a fraction of what shrink leaves; give the bytes of the file there"):
        plan_transforms(teacher, [step, Quantise(budget={"bytes": 0.2})])


@pytest.mark.wide
@pytest.mark.parametrize(
    "step", [Quantise(bits=8), Quantise(bits=6, group=8, skip=("patch_embed.proj",), outside=5)], ids=["plain", "other"]
)
def test_the_step_behind_says_what_rounding_costs(teacher, images, step):
    """Its group, its bits, and what it leaves alone."""
    limit = int(0.25 * file_bytes(teacher))
    student = compress(teacher, [Shrink(budget=ShrinkBudget(bytes=limit), rounded=True), step], images)
    assert 0.7 * limit < file_bytes(student) <= limit  # measured 0.99 and 0.81


def test_the_price_of_bits_is_what_they_add_to_a_file(teacher):
    few, many = Quantise(bits=3), Quantise(bits=8)
    sizes = []
    for step in (few, many):
        student = surgery.deep_copy(teacher)
        step.with_bits(student, {}, step.bits).apply(student)
        sizes.append(file_bytes(student))
    spec = Shrink(budget=ShrinkBudget(bytes=0.9), rounded=True).before(
        [Quantise(choices=(3, 8), budget={"bytes": 1e5})]
    )
    prices = spec._prices(teacher, spec.places_of(teacher), ("bytes",))
    added = sum(
        prices.rounded(prices.dense(block, name, *shape), shape[0] * shape[1])[1][1][0]
        - prices.dense(block, name, *shape)[0]
        for block, own in prices.shapes.items()
        for name, shape in own.layers.items()
    )
    assert added == pytest.approx(sizes[1] - sizes[0], rel=0.01)  # measured 0.001


def test_validate_knows_it_too(tmp_path):
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(
        "teacher: {model: vit_tiny_patch16_224}\ndata: {name: digits}\nsteps:\n  - shrink: {budget: {bytes: 0.2}, rounded: true}\n"
    )
    code, _, err = run("validate", recipe)
    assert code == 2
    assert "counts on a quantise step behind it" in err
    recipe.write_text(recipe.read_text() + "  - quantise: {budget: {bytes: 1.0e+6}}\n")
    assert "valid" in done("validate", recipe)
