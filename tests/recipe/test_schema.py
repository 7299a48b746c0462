"""YAML, Python and the JSON schema say the same thing, of every recipe that ships too."""

from __future__ import annotations

import json

import jsonschema
import pytest
import yaml
from helpers.recipes import GOOD, fault

from compressvit.data.spec import Data
from compressvit.recipe.recipe import Recipe, Student, Teacher, load_recipe, parse_recipe
from compressvit.recipe.schema import json_schema
from compressvit.recipe.shipped import recipes_folder, shipped_recipes
from compressvit.recipe.words import step
from compressvit.runs.plan import plan_recipe
from compressvit.training.phases import PHASES
from compressvit.training.phases.distill import Distill
from compressvit.training.phases.finetune import Finetune
from compressvit.training.terms.hidden_relation import HiddenRelationTerm
from compressvit.training.terms.section import losses_section
from compressvit.training.terms.torchdistill import TorchdistillTerm
from compressvit.transforms import TRANSFORMS
from compressvit.transforms.irpe import IRPE
from compressvit.transforms.multiplex import Multiplex

# --- YAML and Python


def test_yaml_and_python_build_equal_objects():
    text = """\
seed: 3
teacher: {model: deit_tiny_patch16_224, weights: train, args: {img_size: 32}, finetune: {epochs: 2}}
student: {args: {class_token: false}}
data: {name: digits, batch_size: 8, mean: [0.5], augment: {scale: [0.5, 1.0], hflip: 0.5}}
steps:
  - multiplex: {share: [2, 3], mlp_conv: 3}
  - irpe
  - distill:
      lr: 1e-4
      betas: [0.9, 0.99]
      layers: [[0, 1], [2, 3]]
      losses:
        hidden_relation: {form: softmax_ce}
        torchdistill:
          - {loss: SPKDLoss, kwargs: {student_output_path: norm, teacher_output_path: norm, reduction: batchmean}}
  - finetune: {epochs: 1}
"""
    kwargs = {"student_output_path": "norm", "teacher_output_path": "norm", "reduction": "batchmean"}
    losses = losses_section()(
        hidden_relation=HiddenRelationTerm(form="softmax_ce"),
        torchdistill=(TorchdistillTerm(loss="SPKDLoss", kwargs=kwargs),),
    )
    built = Recipe(
        seed=3,
        teacher=Teacher(
            model="deit_tiny_patch16_224", weights="train", args={"img_size": 32}, finetune=Finetune(epochs=2)
        ),
        student=Student(args={"class_token": False}),
        data=Data(name="digits", batch_size=8, mean=(0.5,), augment={"scale": (0.5, 1.0), "hflip": 0.5}),
        steps=(
            step(Multiplex(share=(2, 3), mlp_conv=3)),
            step(IRPE()),
            step(Distill(lr=1e-4, betas=(0.9, 0.99), layers=((0, 1), (2, 3)), losses=losses)),
            step(Finetune(epochs=1)),
        ),
    )
    assert parse_recipe(text) == built
    assert parse_recipe(built.to_yaml()) == built
    assert parse_recipe(text.replace("seed: 3", "seed: 4")) != built  # equality can fail


def test_a_recipe_is_frozen_and_refuses_unknown_keys_in_python_too():
    recipe = parse_recipe(GOOD)
    with pytest.raises(ValueError, match="frozen"):
        recipe.seed = 4
    with pytest.raises(ValueError, match="shar"):
        Multiplex(share=2, shar=3)


def test_to_yaml_writes_out_every_default():
    written = yaml.safe_load(parse_recipe(GOOD).to_yaml())
    assert list(written) == list(Recipe.model_fields)
    assert written["steps"][0]["multiplex"].keys() == Multiplex.model_fields.keys()
    assert written["steps"][1]["distill"].keys() == Distill.model_fields.keys()
    assert written["data"].keys() == Data.model_fields.keys()


# --- recipes that ship


def test_every_shipped_recipe_loads_round_trips_and_fits_the_schema():
    schema = json_schema()
    jsonschema.Draft202012Validator.check_schema(schema)
    validator = jsonschema.Draft202012Validator(schema)
    seen = []
    for name, path in shipped_recipes().items():
        recipe = load_recipe(name)
        assert recipe == load_recipe(path)
        assert len(recipe.description) > 20, name
        assert parse_recipe(recipe.to_yaml()) == recipe, name
        for text in (path.read_text(encoding="utf-8"), recipe.to_yaml()):
            validator.validate(yaml.safe_load(text))
        seen.append(name)
    assert len(seen) >= 9
    assert {p.stem for p in recipes_folder().iterdir() if p.suffix in (".yaml", ".yml")} == set(seen)


SOME = {"quickstart", "mini_swin_t", "mimi_digits", "adaptformer_vit_b"}
SOME |= {"lors_deit_ti_cifar100", "adamixer_lors_dinov2_s"}


def test_there_are_shipped_recipes():
    assert len(shipped_recipes()) >= 9
    assert shipped_recipes().keys() > SOME


@pytest.mark.wide_unless(lambda name: name in ("quickstart", "mimi_digits"))
@pytest.mark.parametrize("name", shipped_recipes())
def test_a_shipped_recipe_plans_without_conflicts(name):
    recipe = load_recipe(name)
    plan = plan_recipe(recipe, name)
    assert plan.conflicts == []
    adapted = any("of the classifier; the others are frozen" in note for note in plan.notes)
    assert adapted or recipe.student.head != "new"
    if adapted:  # the backbone grows, by little
        assert plan.student.parameters < 1.07 * plan.teacher.parameters
    elif any(part.transforms for part in recipe.parts()):
        assert 0 < plan.student.bytes < plan.teacher.bytes  # of fewer parameters, or of fewer bits
    else:  # a dense model to compare with
        assert 0 < plan.student.parameters == plan.teacher.parameters


@pytest.mark.wide_unless(lambda new: new in ("shar: 2", "seed: three", "- {}", ""))
@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("share: 2", "shar: 2"),
        ("multiplex:", "multiplx:"),
        ("seed: 3", "sead: 3"),
        ("seed: 3", "seed: three"),
        ("epochs: 2", "epochs: 0"),
        ("- multiplex: {share: 2}", "- {multiplex: {share: 2}, irpe: {}}"),
        ("- multiplex: {share: 2}", "- {}"),
        ("- multiplex: {share: 2}", "- multiplx"),
        ("data:\n  name: digits\n", ""),
    ],
)
def test_the_schema_refuses_what_the_loader_refuses(old, new):
    validator = jsonschema.Draft202012Validator(json_schema())
    validator.validate(yaml.safe_load(GOOD.replace("1e-3", "0.001")))
    bad = GOOD.replace("1e-3", "0.001").replace(old, new)
    assert bad.count(new) > 0
    fault(bad)
    with pytest.raises(jsonschema.ValidationError):
        validator.validate(yaml.safe_load(bad))


@pytest.mark.parametrize("written", ["distill", "{distill: null}", "{distill: {}}"])
def test_the_schema_allows_a_step_with_nothing_said(written):
    text = GOOD[: GOOD.index("steps:")] + f"steps: [{written}]"
    parse_recipe(text)
    jsonschema.Draft202012Validator(json_schema()).validate(yaml.safe_load(text))


def test_the_schema_describes_every_step_and_is_plain_json():
    schema = json.loads(json.dumps(json_schema()))
    steps = schema["$defs"]["Step"]["properties"]
    assert steps.keys() == {*TRANSFORMS, *PHASES, "merge"}
    assert all(entry["description"] for entry in steps.values())
