"""Overrides of a recipe, `key=value`: they are typed, go where they say, and own the faults they make."""

from __future__ import annotations

import pytest
from helpers.recipes import GOOD, fault, only_row, rows

from compressvit import errors
from compressvit.recipe.recipe import parse_recipe
from compressvit.training.phases.finetune import Finetune
from compressvit.transforms.irpe import IRPE


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


def test_an_override_changes_one_place_of_an_alias():
    text = """
teacher: {model: vit_tiny_patch16_224, weights: train, finetune: &training {epochs: 3, lr: 0.001}}
data: {name: digits}
steps: [finetune: *training]
"""
    recipe = parse_recipe(text, overrides=["steps.0.finetune.lr=0.5"])
    assert (recipe.teacher.finetune.lr, recipe.steps[0].spec.lr) == (0.001, 0.5)


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
        ("data.root=@x", ["not YAML", """begins with @ is quoted, as in 'data.root="@x"'"""]),
        ("data.root=*x", ["undefined alias", """begins with * is quoted, as in 'data.root="*x"'"""]),
        ("seed=2020-13-45", ["'seed=2020-13-45'", "quotes"]),
    ],
)
def test_an_override_into_nothing_is_refused(override, words):
    message = fault(GOOD, [override])
    for word in words:
        assert word in message


def test_faults_of_a_long_override_are_quoted_in_part(monkeypatch):
    """Each fault quoted all of it, which took seconds for hundreds of them."""
    long, shorten = [], errors.shortened
    monkeypatch.setattr(errors, "shortened", lambda text, most: long.append(len(text)) or shorten(text, most))
    message = fault(GOOD, ["steps.0.multiplex.share=" + "- a\n" * 300])
    assert message.startswith("recipes/x.yaml: 300 errors\n  override steps.0.multiplex.share=- a - a")
    assert message.endswith("  … and 200 more")
    assert max(long) < 50_000


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


@pytest.mark.parametrize(
    ("override", "value"),
    [
        ("data.root=/data/set #2", "/data/set #2"),
        ("data.root=#2", "#2"),
        ("data.root= /data/set #2 ", "/data/set #2"),
        ("data.root='/data/set #2'", "/data/set #2"),
        ("data.root='/data/set' # the second", "/data/set"),
        ("data.root=/data/set#2", "/data/set#2"),
        ("data.root=2024", "2024"),
        ("data.root=007", "007"),
        ("data.root=1e3", "1e3"),
        ("data.root=2024-01-02", "2024-01-02"),
        ("data.root=yes", "yes"),
    ],
)
def test_a_text_is_taken_as_it_is_written(override, value):
    assert parse_recipe(GOOD, overrides=[override]).data.root == value


def test_only_the_text_of_an_override_of_that_key_is_taken():
    assert parse_recipe(GOOD, overrides=["data.root=null"]).data.root is None
    for recipe, overrides in (
        (GOOD, ["data={name: digits, root: 2024}"]),
        (GOOD, ["data.root=[2024]"]),
        (GOOD.replace("A test.", "2024"), []),
    ):
        assert "valid string" in fault(recipe, overrides)
    assert 'valid integer, not "3 # three"' in fault(GOOD, ["seed=3 # three"])
    found = rows(fault(GOOD, ["data.root=2024", "seed=x"]))
    assert [(place, path) for place, path, _ in found] == [("override seed=x", "seed")]
