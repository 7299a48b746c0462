"""Options given in Python are refused in the words of a recipe."""

from __future__ import annotations

import pytest
from pydantic import ValidationError

from compressvit import LORS, LowRank, Multiplex, Recipe
from compressvit.data.spec import Data
from compressvit.diagnostics.base import DIAGNOSTICS
from compressvit.errors import UserError
from compressvit.recipe.recipe import RecipeError, parse_recipe
from compressvit.training.phases import PHASES
from compressvit.training.phases.distill import Distill
from compressvit.training.phases.prune.spec import Prune
from compressvit.training.terms.base import TERMS
from compressvit.transforms import TRANSFORMS

RECIPE = """
teacher: {model: vit_tiny_patch16_224}
data: {name: digits}
steps: [%s]
"""


@pytest.mark.parametrize("registry", [TRANSFORMS, PHASES, TERMS, DIAGNOSTICS], ids=lambda r: r.kind)
def test_every_entry_refuses_an_unknown_option_by_name(registry):
    assert len(registry) > 4 - (registry is PHASES)
    for entry in registry.values():
        with pytest.raises(UserError, match=r"surprise: unknown key") as refusal:
            entry(surprise=1)
        assert str(refusal.value).startswith(f"{entry.__name__}: ")
        assert not isinstance(refusal.value, ValidationError)


@pytest.mark.parametrize(
    ("make", "options", "step"),
    [
        (Multiplex, {"share": 2, "shar": 3}, "multiplex: {share: 2, shar: 3}"),
        (Multiplex, {"share": 2, "form": "identiy"}, "multiplex: {share: 2, form: identiy}"),
        (Multiplex, {"share": 2, "mlp_conv": 4}, "multiplex: {share: 2, mlp_conv: 4}"),
        (LowRank, {"budget": {"parameter": 0.5}}, "low_rank: {budget: {parameter: 0.5}}"),
        (LORS, {"rank": 2, "share": 2, "groups": 2}, "lors: {rank: 2, share: 2, groups: 2}"),
        (Distill, {"epoch": 3}, "distill: {epoch: 3}"),
        (Distill, {"losses": {"predction": {}}}, "distill: {losses: {predction: {}}}"),
        (Distill, {"losses": {"prediction": {"weight": -1}}}, "distill: {losses: {prediction: {weight: -1}}}"),
        (Prune, {"target": {"neuron": 0.5}}, "prune: {target: {neuron: 0.5}}"),
    ],
)  # fmt: skip
def test_python_and_a_recipe_say_the_same(make, options, step):
    with pytest.raises(UserError) as ours:
        make(**options)
    with pytest.raises(RecipeError) as theirs:
        parse_recipe(RECIPE % f"{{{step}}}")
    name = step.partition(":")[0]
    text = str(ours.value).removeprefix(f"{make.__name__}: ")
    assert "\n" not in text
    said = str(theirs.value).partition(f"steps[0].{name}")[2].removeprefix(": ").removeprefix(".")
    assert text == said


def test_several_faults_are_all_listed():
    with pytest.raises(UserError) as refusal:
        Multiplex(shar=2)
    first, missing, unknown = str(refusal.value).splitlines()
    assert first == "Multiplex: 2 errors"
    assert missing.startswith("  share: missing, and it has no default; it is blocks in a share group")
    assert unknown.startswith("  shar: unknown key; did you mean 'share'?")


def test_a_section_inside_another_is_named_by_its_path():
    with pytest.raises(UserError) as refusal:
        Recipe(
            teacher={"model": "vit_tiny_patch16_224"}, data=Data(name="digits"), steps=({"multiplex": {"share": 0}},)
        )
    assert "steps[0].multiplex.share" in str(refusal.value)
    assert "at least 1" in str(refusal.value)


FIT = "low_rank: {budget: {parameters: 0.5}}"


@pytest.mark.parametrize(
    ("steps", "lr", "keep"),
    [
        (f"[{FIT}, distill: {{}}]", 1e-5, "best"),
        (f"[{FIT}, finetune: {{}}]", 1e-5, "best"),
        (f"[{FIT}, distill: {{lr: 0.001, keep: last}}]", 1e-3, "last"),  # also where it is what it would be elsewhere
        (f"[{FIT}, distill: {{lr: 0.01}}]", 1e-2, "best"),
        ("[low_rank: {budget: {parameters: 0.5}, metric: weights}, distill: {}]", 1e-3, "last"),
        ("[multiplex: {share: 2}, distill: {}]", 1e-3, "last"),
        ("[distill: {}]", 1e-3, "last"),
        (f"[{FIT}, lora: {{}}, finetune: {{}}]", 1e-3, "last"),  # which trains what was not fitted
    ],
)
def test_a_student_that_was_fitted_is_trained_gently(steps, lr, keep):
    recipe = parse_recipe(f"teacher: {{model: vit_tiny_patch16_224}}\ndata: {{name: digits}}\nsteps: {steps}\n")
    phase = list(recipe.phases().values())[-1]
    assert (phase.lr, phase.keep) == (lr, keep)
    assert f"lr: {lr:g}".replace("1e-05", "1.0e-05") in recipe.to_yaml()
    assert parse_recipe(recipe.to_yaml()).phases() == recipe.phases()
