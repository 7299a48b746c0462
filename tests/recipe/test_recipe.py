"""Reading recipes: every fault is reported at once with its place and a suggestion; recipes are found by name and path."""

from __future__ import annotations

from textwrap import dedent

import pytest
from helpers.recipes import GOOD, fault, only_row, rows

from compressvit.errors import UserError
from compressvit.recipe.recipe import RecipeError, load_recipe, parse_recipe
from compressvit.recipe.shipped import find_recipe, shipped_recipes
from compressvit.training.phases.distill import Distill
from compressvit.transforms.multiplex import Multiplex

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
        "teacher.model": (2, ["missing", "a timm name"]),
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
        ("lr: 1e-3", "lr: 1e+300", 13, "steps[1].distill.lr", ["1e+300 is too large for 32-bit floats"]),
        (
            "lr: 1e-3",
            "lr: 1e-3\n      losses: {labels: {weight: 1e99}}",
            14,
            "steps[1].distill.losses.labels.weight",
            ["too large"],
        ),
        ("lr: 1e-3", "compile: 1", 13, "steps[1].distill.compile", ["boolean", "not 1"]),
        ("model: vit_tiny_patch16_224", "model: 5", 4, "teacher.model", ["string", "not 5"]),
        (
            "args: {img_size: 8, patch_size: 4, embed_dim: 48, depth: 2}",
            "args: 8",
            6,
            "teacher.args",
            ["object", "not 8"],
        ),
        ("{share: 2}", "{}", 10, "steps[0].multiplex.share", ["missing", "no default", "blocks in a share group"]),
        ("{share: 2}", "{share: 0}", 10, "steps[0].multiplex.share", ["at least 1"]),
        ("{share: 2}", "{share: two}", 10, "steps[0].multiplex.share", ["integer", "array", '"two"']),
        ("{share: 2}", "{share: [2, x]}", 10, "steps[0].multiplex.share[1]", ["integer", '"x"']),
        ("multiplex: {share: 2}", "7", 10, "steps[0]", ["object", "not 7"]),
        (
            "multiplex: {share: 2}",
            "low_rank: {budget: 0.5}",
            10,
            "steps[0].low_rank.budget",
            ["a section", "keys are parameters, bytes, macs"],
        ),
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
    (tmp_path / "resolved.yaml").touch()
    with pytest.raises(
        UserError, match=f"^{tmp_path} is a run folder, not a recipe; resume=True goes on with the run in it"
    ):
        load_recipe(tmp_path)


def test_a_misspelt_file_suggests_the_one_beside_it(tmp_path):
    (tmp_path / "pets.yaml").touch()
    with pytest.raises(UserError, match=r"did you mean 'pets\.yaml'\?$"):
        load_recipe(tmp_path / "pest.yaml")


def test_messages_call_a_recipe_what_the_user_called_it(tmp_path):
    path = tmp_path / "mine.yaml"
    path.write_text(dedent("teacher: {model: x}\ndata: {name: digits}\nsteps: [irp]\n"))
    with pytest.raises(RecipeError) as caught:
        load_recipe(path)
    assert str(caught.value).startswith(f"{path}: 1 error\n")
    assert "did you mean 'irpe'" in str(caught.value)


def test_anchors_may_stand_at_the_top():
    text = "x-anchors:\n  seed: &seed 7\n" + GOOD.replace("seed: 3", "seed: *seed")
    recipe = parse_recipe(text)
    assert recipe.seed == 7
    assert "x-anchors" not in recipe.to_yaml()
    with pytest.raises(RecipeError, match="anchors: unknown key"):
        parse_recipe(text.replace("x-anchors", "anchors"))
