"""Recipes: every fault is reported at once with its place and a suggestion; YAML and Python say the same thing."""

from __future__ import annotations

import json
import re
from textwrap import dedent

import jsonschema
import pytest
import yaml

from compressvit.data import Data
from compressvit.distill.spec import Distill, Finetune, HiddenRelationTerm, Losses, TorchdistillTerm
from compressvit.errors import UserError
from compressvit.plan import plan_recipe
from compressvit.recipe import (
    Recipe,
    RecipeError,
    Student,
    Teacher,
    find_recipe,
    json_schema,
    load_recipe,
    parse_recipe,
    recipes_folder,
    shipped_recipes,
    step,
)
from compressvit.transforms import TRANSFORMS
from compressvit.transforms.irpe import IRPE
from compressvit.transforms.multiplex import Multiplex

GOOD = """\
description: A test.
seed: 3
teacher:
  model: vit_tiny_patch16_224
  weights: train
  args: {img_size: 8, patch_size: 4}
data:
  name: digits
steps:
  - multiplex: {share: 2}
  - distill:
      epochs: 2
      lr: 1e-3
"""


def fault(text: str, overrides: list[str] | None = None, name: str = "recipes/x.yaml") -> str:
    """The message of a recipe that must be refused."""
    with pytest.raises(UserError) as caught:
        parse_recipe(text, name, overrides)
    return str(caught.value)


def rows(message: str) -> list[tuple[str, str, str]]:
    """The lines of a list of faults as (place, path, sentence), after checking its head."""
    head, *lines = message.splitlines()
    count = len(lines)
    assert head == f"recipes/x.yaml: {count} error{'s' * (count > 1)}"
    found = []
    for line in lines:
        match = re.fullmatch(r"  (line \d+|override .+?) {2,}(\S+): (.+)", line)
        assert match, line
        found.append((match[1].strip(), match[2], match[3]))
    return found


def only_row(text: str, overrides: list[str] | None = None) -> tuple[str, str, str]:
    found = rows(fault(text, overrides))
    assert len(found) == 1, found
    return found[0]


# --- what a list of faults looks like


def test_the_format_of_a_list_of_faults():
    text = """\
teacher:
  model: vit_tiny_patch16_224
data:
  name: digits
steps:
  - multiplex:
      head_mixing: true
      share: 2
      shar: 3
  - distill:
      epochs: 2

      losses:
        prediction: {weight: -1}
"""
    multiplex = ", ".join(Multiplex.model_fields)
    assert fault(text) == (
        "recipes/x.yaml: 2 errors\n"
        f"  line 9   steps[0].multiplex.shar: unknown key; did you mean 'share'? (known: {multiplex})\n"
        "  line 14  steps[1].distill.losses.prediction.weight: should be greater than or equal to 0, not -1"
    )


def test_all_faults_come_at_once_with_place_path_value_and_suggestion():
    text = """\
seed: three
teacher:
  modle: vit_tiny_patch16_224
data:
  name: digitz
  batch_size: 0
  augment: {scale: [1, 2]}
steps:
  - multiplex: {share: 2, mlp_conv: 4}
  - distil: {}
  - distill:
      precision: bf61
      layers: [[1, 2, 3]]
colour: red
"""
    found = {path: (place, sentence) for place, path, sentence in rows(fault(text))}
    expected = {  # path: line, words that must be in the sentence
        "seed": (1, ["integer", '"three"']),
        "teacher.modle": (3, ["unknown key", "'model'"]),
        "teacher.model": (2, ["missing"]),
        "data.name": (5, ["digitz", "'digits'"]),
        "data.batch_size": (6, ["greater than or equal to 1", "not 0"]),
        "data.augment.scale": (7, ["larger than the image"]),
        "steps[0].multiplex.mlp_conv": (9, ["odd", "not 4", "try 5"]),
        "steps[1].distil": (10, ["unknown key", "'distill'"]),
        "steps[2].distill.precision": (12, ["'bf61'", "fp32, bf16, fp16", "'bf16'"]),
        "steps[2].distill.layers[0]": (13, ["at most 2 items"]),
        "colour": (14, ["unknown key", "teacher"]),
    }
    assert found.keys() == expected.keys()
    for path, (line, words) in expected.items():
        place, sentence = found[path]
        assert place == f"line {line}", path
        for word in words:
            assert word in sentence, (path, sentence)


# --- one fault at a time


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("a: b: c", ["is not YAML", "line 1, column 5"]),
        ("a: 1\nb: [1,\nc: 2\n", ["is not YAML", "line 4"]),
        ("a: 1\n\tb: 2\n", ["is not YAML", "line 2, column 1"]),
        ("a: \x00b\n", ["is not YAML", "x0000"]),
        ("---\na: 1\n---\nb: 2\n", ["is not YAML", "line 3", "another document"]),
        ("a: !!python/object:os.system x\n", ["is not YAML", "line 1, column 4", "os.system"]),
        ("a: 2020-13-45\n", ["month", "quotes"]),
        ("a: &a [*a]\n", ["alias"]),
        ("2020-01-01: 1\n", ["key", "date", "quotes"]),
        ("", ["is empty", "teacher, data and steps"]),
        ("# nothing but a remark\n", ["is empty"]),
        ("- multiplex\n", ["list", "not a mapping"]),
        ("quickstart\n", ["str", "not a mapping"]),
        ("seed: 1\nseed: 2\n", ["line 2", "'seed'", "twice", "line 1"]),
        (GOOD.replace("epochs: 2", "lr: 2"), ["line 13", "'lr'", "twice", "line 12"]),
    ],
)
def test_what_is_no_recipe_at_all(text, words):
    message = fault(text)
    assert message.startswith("recipes/x.yaml")
    for word in words:
        assert word in message


def test_a_file_that_is_not_text(tmp_path):
    path = tmp_path / "x.yaml"
    path.write_bytes(b"\xff\xfe\x00")
    with pytest.raises(RecipeError, match="cannot be read as text"):
        load_recipe(path)


@pytest.mark.parametrize(
    ("old", "new", "line", "path", "words"),
    [
        ("seed: 3", "seed: '3'", 2, "seed", ["integer", '"3"']),
        ("seed: 3", "seed: true", 2, "seed", ["integer", "true"]),
        ("seed: 3", "seed: 3.5", 2, "seed", ["integer", "3.5"]),
        ("seed: 3", "seed: -1", 2, "seed", ["greater than or equal to 0", "-1"]),
        ("seed: 3", "seed:", 2, "seed", ["integer", "null"]),
        ("lr: 1e-3", "lr: fast", 13, "steps[1].distill.lr", ["number", '"fast"']),
        ("lr: 1e-3", "lr: '1e-3'", 13, "steps[1].distill.lr", ["number", '"1e-3"']),
        ("lr: 1e-3", "lr: 0", 13, "steps[1].distill.lr", ["greater than 0"]),
        ("lr: 1e-3", "compile: 1", 13, "steps[1].distill.compile", ["boolean", "not 1"]),
        ("model: vit_tiny_patch16_224", "model: 5", 4, "teacher.model", ["string", "not 5"]),
        ("args: {img_size: 8, patch_size: 4}", "args: 8", 6, "teacher.args", ["object", "not 8"]),
        ("{share: 2}", "{}", 10, "steps[0].multiplex.share", ["missing", "no default"]),
        ("{share: 2}", "{share: 0}", 10, "steps[0].multiplex.share", ["at least 1"]),
        ("{share: 2}", "{share: two}", 10, "steps[0].multiplex.share", ["integer", "array", '"two"']),
        ("{share: 2}", "{share: [2, x]}", 10, "steps[0].multiplex.share[1]", ["integer", '"x"']),
        ("multiplex: {share: 2}", "7", 10, "steps[0]", ["object", "not 7"]),
        ("multiplex: {share: 2}", "multiplex: {share: 2}\n    irpe: {}", 10, "steps[0]", ["2", "irpe", "multiplex"]),
        ("multiplex: {share: 2}", "{}", 10, "steps[0]", ["one transform or phase", "empty"]),
        ("multiplex: {share: 2}", "multiplx", 10, "steps[0].multiplx", ["unknown key", "'multiplex'"]),
        ("multiplex: {share: 2}", "multiplex", 10, "steps[0].multiplex.share", ["missing"]),
        ("multiplex: {share: 2}", "multiplex:", 10, "steps[0].multiplex.share", ["missing"]),
        ("  name: digits", "  names: digits", 8, "data.names", ["unknown key", "'name'"]),
    ],
)
def test_one_fault(old, new, line, path, words):
    assert old in GOOD
    found = {p: (place, sentence) for place, p, sentence in rows(fault(GOOD.replace(old, new)))}
    assert path in found
    place, sentence = found[path]
    assert place == f"line {line}"
    for word in words:
        assert word in sentence, sentence


@pytest.mark.parametrize("steps", ["steps: []", "steps: {}", "steps: distill"])
def test_steps_must_be_a_list_with_something_in_it(steps):
    text = GOOD[: GOOD.index("steps:")] + steps
    place, path, sentence = only_row(text)
    assert (place, path) == ("line 9", "steps")
    assert "at least 1 item" in sentence if steps.endswith("[]") else "array" in sentence


def test_missing_sections_are_named():
    found = {path: sentence for _, path, sentence in rows(fault("description: nothing else"))}
    assert found.keys() == {"teacher", "data", "steps"}
    assert all("missing" in sentence for sentence in found.values())


def test_learning_nothing_is_refused():
    losses = "{prediction: {weight: 0}, attention_relation: {weight: 0}, hidden_relation: {weight: 0}}"
    _, path, sentence = only_row(GOOD.replace("lr: 1e-3", f"losses: {losses}"))
    assert path == "steps[1].distill.losses"
    assert "weight 0" in sentence


# --- how values are read


@pytest.mark.parametrize("written", ["1e-3", "1E-3", "1.0e-3", "1.e-3", ".1e-2", "0.001", "+1e-3"])
def test_floats_as_people_write_them(written):
    assert parse_recipe(GOOD.replace("1e-3", written)).steps[1].spec.lr == 0.001
    assert parse_recipe(GOOD, overrides=[f"steps.1.distill.lr={written}"]).steps[1].spec.lr == 0.001


def test_an_integer_is_a_number_too():
    assert parse_recipe(GOOD.replace("lr: 1e-3", "lr: 1")).steps[1].spec.lr == 1.0


@pytest.mark.parametrize("written", ["distill", "distill:", "distill: {}", "{distill: null}"])
def test_a_step_with_nothing_said_has_the_defaults(written):
    text = GOOD[: GOOD.index("  - distill")] + f"  - {written}\n"
    assert parse_recipe(text).steps[1].spec == Distill()
    changed = parse_recipe(text, overrides=["steps.1.distill.epochs=7"])
    assert changed.steps[1].spec == Distill(epochs=7)


# --- overrides


@pytest.mark.parametrize(
    ("override", "read", "value"),
    [
        ("seed=7", lambda r: r.seed, 7),
        ("description=a = b", lambda r: r.description, "a = b"),
        ("description='7'", lambda r: r.description, "7"),
        ("steps.0.multiplex.share=6", lambda r: r.steps[0].spec.share, 6),
        ("steps.0.multiplex.share=[1, 2]", lambda r: r.steps[0].spec.share, (1, 2)),
        ("steps.0.multiplex.head_mixing=false", lambda r: r.steps[0].spec.head_mixing, False),
        ("steps.1.distill.max_steps=null", lambda r: r.steps[1].spec.max_steps, None),
        ("steps.1.distill.losses.hidden_relation.weight=2", lambda r: r.steps[1].spec.losses.hidden_relation.weight, 2),
        ("teacher.finetune.epochs=5", lambda r: r.teacher.finetune, Finetune(epochs=5)),
        ("student.args.class_token=false", lambda r: r.student.args, {"class_token": False}),
        ("data.augment={hflip: 0.5}", lambda r: r.data.augment.hflip, 0.5),
        ("steps=[distill]", lambda r: [s.name for s in r.steps], ["distill"]),
        ("steps.0=irpe", lambda r: r.steps[0].spec, IRPE()),
    ],
)
def test_an_override_is_typed_and_goes_where_it_says(override, read, value):
    before = parse_recipe(GOOD)
    assert read(parse_recipe(GOOD, overrides=[override])) == value
    assert read(before) != value or override.endswith("null")


def test_the_last_override_of_a_key_wins_and_the_rest_of_the_recipe_stays():
    changed = parse_recipe(GOOD, overrides=["seed=7", "data.batch_size=5", "seed=8"])
    before = parse_recipe(GOOD)
    assert (changed.seed, changed.data.batch_size) == (8, 5)
    same = {"seed": before.seed, "data": before.data}
    assert changed.model_copy(update=same) == before


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("seed", ["'seed'", "no '='", "key=value"]),
        ("=7", ["'=7'", "names no key"]),
        ("data..name=x", ["'data..name=x'", "names no key"]),
        ("steps.2.distill.lr=1", ["nothing", "list of 2", "'2'"]),
        ("steps.-1.distill.lr=1", ["nothing", "list of 2", "'-1'"]),
        ("steps.²=1", ["nothing", "list of 2", "'²'"]),
        ("steps.first.distill.lr=1", ["nothing", "'first'"]),
        ("teacher.model.name=x", ["nothing", "teacher.model", "'vit_tiny_patch16_224'", "'name'"]),
        ("seed.x=1", ["nothing", "seed is 3", "'x'"]),
        ("seed=[1", ["'seed=[1'", "not YAML"]),
        ("seed=2020-13-45", ["'seed=2020-13-45'", "quotes"]),
    ],
)
def test_an_override_into_nothing_is_refused(override, words):
    message = fault(GOOD, [override])
    for word in words:
        assert word in message


@pytest.mark.parametrize(
    ("override", "path"),
    [
        ("seed=x", "seed"),
        ("steps.0.multiplex.shar=3", "steps[0].multiplex.shar"),
        ("steps.0.multiplex={shar: 3, share: 2}", "steps[0].multiplex.shar"),  # inside a value that replaced lines
        ("steps.1={distill: {lr: no}}", "steps[1].distill.lr"),
        ("dat.name=digits", "dat"),  # a mapping made on the way
        ("teacher.finetune.epoch=3", "teacher.finetune.epoch"),
        ("steps=[]", "steps"),
    ],
)
def test_a_fault_of_an_override_is_attributed_to_it(override, path):
    place, where, _ = only_row(GOOD, [override])
    assert (place, where) == (f"override {override}", path)


def test_a_fault_beside_an_override_keeps_its_line():
    found = rows(fault(GOOD.replace("seed: 3", "seed: x"), ["data.batch_size=y"]))
    assert [(place, path) for place, path, _ in found] == [
        ("line 2", "seed"),
        ("override data.batch_size=y", "data.batch_size"),
    ]


def test_a_value_that_replaces_an_override_takes_over_its_faults():
    place, path, _ = only_row(GOOD, ["data.name=digits", "data={name: digitz}"])
    assert (place, path) == ("override data={name: digitz}", "data.name")


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
    losses = Losses(
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


def test_every_shipped_recipe_plans_without_conflicts():
    seen = []
    for name in shipped_recipes():
        plan = plan_recipe(load_recipe(name), name)
        assert plan.conflicts == [], name
        assert 0 < plan.student.parameters < plan.teacher.parameters, name
        seen.append(name)
    assert len(seen) >= 9


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
    assert steps.keys() == {*TRANSFORMS, "distill", "finetune"}
    assert all(entry["description"] for entry in steps.values())


# --- finding recipes


def test_a_recipe_is_found_by_name_and_by_path(tmp_path, monkeypatch):
    shipped = shipped_recipes()["quickstart"]
    for name in ("quickstart", "quickstart.yaml", "recipes/quickstart.yaml", str(shipped)):
        assert find_recipe(name).samefile(shipped), name
    own = tmp_path / "own.yml"
    own.write_text(GOOD)
    monkeypatch.chdir(tmp_path)
    assert load_recipe("own.yml") == load_recipe(own) == parse_recipe(GOOD)


def test_a_file_of_ones_own_comes_before_a_shipped_recipe(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "quickstart.yaml").write_text(GOOD)
    assert load_recipe("quickstart.yaml") == parse_recipe(GOOD) != load_recipe("quickstart")


@pytest.mark.parametrize(
    ("name", "word"),
    [
        ("quikstart", "did you mean 'quickstart'"),
        ("mini_swin_bb.yaml", "did you mean 'mini_swin_b'"),
        ("recipes/quckstart.yaml", "did you mean 'quickstart'"),
        ("xyz", "recipes list"),
        ("/somewhere/else/quickstart.yaml", "did you mean 'quickstart'"),
    ],
)
def test_an_unknown_recipe_suggests(name, word):
    with pytest.raises(UserError, match="there is no recipe") as caught:
        find_recipe(name)
    assert repr(name) in str(caught.value)
    assert word in str(caught.value)


def test_a_folder_is_no_recipe(tmp_path):
    with pytest.raises(UserError, match="there is no recipe"):
        load_recipe(tmp_path)


def test_messages_call_a_recipe_what_the_user_called_it(tmp_path):
    path = tmp_path / "mine.yaml"
    path.write_text(dedent("teacher: {model: x}\ndata: {name: digits}\nsteps: [irp]\n"))
    with pytest.raises(RecipeError) as caught:
        load_recipe(path)
    assert str(caught.value).startswith(f"{path}: 1 error\n")
    assert "did you mean 'irpe'" in str(caught.value)


def test_an_override_changes_one_place_of_an_alias():
    text = """
teacher: {model: vit_tiny_patch16_224, weights: train, finetune: &training {epochs: 3, lr: 0.001}}
data: {name: digits}
steps: [finetune: *training]
"""
    recipe = parse_recipe(text, overrides=["steps.0.finetune.lr=0.5"])
    assert (recipe.teacher.finetune.lr, recipe.steps[0].spec.lr) == (0.001, 0.5)
