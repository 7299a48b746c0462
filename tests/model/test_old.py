"""What earlier versions wrote is read in today's words."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
import yaml
from helpers.models import build, images_for, outputs
from safetensors.torch import save_file

from compressvit import LORS, BitFit, LowRank, UserError, compress, load, save
from compressvit.model import old
from compressvit.model.stored import read_manifest, read_safetensors
from compressvit.recipe.recipe import load_recipe
from compressvit.transforms.record import compression_of

RECIPE = {
    "teacher": {"model": "vit_tiny_patch16_224", "weights": "train"},
    "data": {"name": "digits"},
    "steps": [{"lors": {"share": 1, "rank": 4}}, {"distill": {"epochs": 1}}],
}


def test_a_fraction_that_meant_nothing_is_taken_for_none():
    def data(**options):
        return old.current_recipe({**RECIPE, "data": options})["data"].get("val_fraction")

    assert data(name="folder", val_fraction=0.1) is None
    assert data(name="images", val_fraction=0.2) == 0.2
    assert data(name="folder", val_fraction=0.1, test_fraction=None) == 0.1  # of this version


@pytest.mark.parametrize(
    ("before", "now"),
    [
        (
            {"lors": {"share": 1, "budget": {"parameters": 0.5}}},
            {"low_rank": {"pivoted": False, "budget": {"parameters": 0.5}}},
        ),
        (
            {"lors": {"share": [1, 1], "rank": 4, "groups": 2, "metric": "auto", "init": "first", "rounds": 4}},
            {"low_rank": {"pivoted": False, "rank": 8, "metric": "outputs", "init": "fit"}},
        ),
        (
            {"lors": {"share": 1, "rank": 3, "groups": [1, 2], "group_by": "consecutive", "metric": "inputs"}},
            {"low_rank": {"pivoted": False, "rank": [3, 6], "metric": "inputs"}},
        ),
        ({"lors": {"share": 1, "rank": [3, 4], "groups": [1, 2]}}, {"low_rank": {"pivoted": False, "rank": [3, 8]}}),
        ({"lors": {"share": 2, "rank": 3, "groups": 2}}, {"lors": {"share": 2, "rank": 3, "terms": 2}}),
        ({"lors": {"share": [1, 2], "rank": 3}}, {"lors": {"share": [1, 2], "rank": 3}}),
        ({"lors": {"share": "auto", "budget": {"macs": 0.5}}}, {"lors": {"share": "auto", "budget": {"macs": 0.5}}}),
        ({"lors": {"rank": 3}}, {"lors": {"rank": 3}}),
        ({"low_rank": {"rank": 3}}, {"low_rank": {"pivoted": False, "rank": 3}}),
        ({"low_rank": {"rank": 3, "pivoted": True}}, {"low_rank": {"rank": 3, "pivoted": True}}),
        ({"multiplex": {"share": 1}}, {"multiplex": {"share": 1}}),
        ({"sparsify": {"keep": 0.1, "score": "snip"}}, {"sparsify": {"density": 0.1, "score": "snip"}}),
        ({"sparsify": {"keep": 1}}, {"sparsify": {"density": 1}}),
        ({"sparsify": {"density": 0.1, "keep": "best"}}, {"sparsify": {"density": 0.1, "keep": "best"}}),
        ({"sparsify": None}, {"sparsify": None}),
        ("bitfit", "bitfit"),
    ],
)
def test_steps(before, now):
    content = {"seed": 1, "steps": [before, {"distill": {}}]}
    assert old.current_recipe(content) == {"seed": 1, "steps": [now, {"distill": {}}]}
    assert old.current_recipe(old.current_recipe(content)) == old.current_recipe(content)
    assert content["steps"][0] == before, "what it was given changed"


@pytest.mark.parametrize("content", [None, "text", [1], {}, {"steps": 3}, {"steps": [{"lors": None}, 5]}])
def test_what_is_no_recipe_stays_as_it_is(content):
    assert old.current_recipe(content) == content


def test_only_a_recipe_that_a_run_keeps_is_translated(tmp_path):
    run = tmp_path / "run"
    run.mkdir()
    for file in (run / "recipe.yaml", run / "resolved.yaml", tmp_path / "mine.yaml"):
        file.write_text(yaml.safe_dump(RECIPE))
    for file in (run / "recipe.yaml", run / "resolved.yaml"):
        assert [step.name for step in load_recipe(file).steps] == ["low_rank", "distill"]
    with pytest.raises(UserError, match="use `low_rank`"):
        load_recipe(tmp_path / "mine.yaml")
    (run / "resolved.yaml").unlink()
    with pytest.raises(UserError, match="use `low_rank`"):
        load_recipe(run / "recipe.yaml")


def test_texts_of_a_run_folder():
    text = '{"step": "steps[0].lors", "ledger": [{"step": "lors"}], "phase": "0_lors"}'
    assert old.current_text(text, RECIPE) == text.replace("lors", "low_rank")
    shared = {**RECIPE, "steps": [{"lors": {"share": 2, "rank": 4}}]}
    assert old.current_text(text, shared) == text
    assert old.current_text(text, None) == text


def test_words_of_a_ledger():
    assert old.current_word("lors", ["align", "low_rank"]) == "low_rank"
    assert old.current_word("lors", ["lors", "low_rank"]) == "lors"
    assert old.current_word("multiplex", ["low_rank"]) == "multiplex"


def test_where_a_run_kept_its_student(tmp_path):
    assert old.stored_step(tmp_path, "0_low_rank") == "0_low_rank"
    (tmp_path / "0_lors").mkdir()
    assert old.stored_step(tmp_path, "0_low_rank") == "0_lors"
    assert old.stored_step(tmp_path, "0_multiplex") == "0_multiplex"
    (tmp_path / "0_low_rank").mkdir()
    assert old.stored_step(tmp_path, "0_low_rank") == "0_low_rank"


def as_format_1(folder: Path, rounds: int = 4) -> None:
    """Write an artifact of this version as version 0.1.0 wrote it."""
    manifest = json.loads((folder / "compressvit.json").read_text())
    alone: list[str] = []
    for step in manifest["transforms"]:
        plan = step["plan"]
        if step["transform"] == "low_rank":
            alone += plan["ranks"]
            step["transform"], step["plan"] = "lors", {"groups": [[p] for p in plan["ranks"]], **plan, "rounds": rounds}
        elif step["transform"] == "lors":
            alone += [group[0] for group in plan["groups"] if len(group) == 1]
    names = {f"{p}.{new}": f"{p}.{before}" for p in alone for before, new in NAMES.items()}
    for step in manifest["transforms"]:
        if "names" in step["plan"]:
            step["plan"]["names"] = [names.get(name, name) for name in step["plan"]["names"]]
    manifest["format"] = 1
    del manifest["tensors"], manifest["checksum"]
    (folder / "compressvit.json").write_text(json.dumps(manifest))
    tensors = read_safetensors(folder / "model.safetensors")
    save_file({names.get(n, n): t for n, t in tensors.items()}, folder / "model.safetensors")


NAMES = {"low_rank.down": "down.weight", "low_rank.up": "up.weight", "bias": "up.bias"}
MADE = {
    "alone": [LowRank(rank=3, metric="weights")],
    "shared": [LORS(rank=3, share=2, metric="weights")],
    "some alone": [LORS(rank=3, share=(1, 2), metric="weights")],
    "then adapted": [LowRank(rank=3, metric="weights", targets=("mlp.*",)), BitFit()],
}


@pytest.mark.wide_unless(lambda name: name in ("shared", "then adapted"))
@pytest.mark.parametrize("name", MADE)
def test_an_artifact_of_format_1_is_the_model_that_it_was(name, tmp_path):
    student = compress(build("swin"), MADE[name])
    images = images_for(student)
    folder = save(student, tmp_path / "student")
    now = read_manifest(folder)
    assert now.format == 2
    as_format_1(folder)
    before = json.loads((folder / "compressvit.json").read_text())
    assert before["format"] == 1
    assert read_manifest(folder) == now.model_copy(update={"tensors": None, "checksum": None})
    loaded = load(folder)
    assert torch.equal(outputs(loaded, images), outputs(student, images))
    assert compression_of(loaded).plans == compression_of(student).plans
    assert {n for n, p in loaded.named_parameters() if p.requires_grad} == {
        n for n, p in student.named_parameters() if p.requires_grad
    }
    assert json.loads((save(loaded, tmp_path / "again") / "compressvit.json").read_text())["format"] == 2


@pytest.mark.parametrize("number", [0, 3, "1", None])
def test_another_format_is_refused(number, tmp_path):
    folder = save(build("vit"), tmp_path / "student")
    content = {**json.loads((folder / "compressvit.json").read_text()), "format": number}
    (folder / "compressvit.json").write_text(json.dumps(content))
    with pytest.raises(UserError, match=rf"is of format {number!r}; .* reads formats 1 to 2"):
        load(folder)


@pytest.mark.wide_unless(lambda groups: groups in (3, None))
@pytest.mark.parametrize("groups", [3, [3], None, [["blocks.0.mlp.fc1"], []]])
def test_a_damaged_plan_is_refused_in_words(groups, tmp_path):
    folder = save(compress(build("vit"), [LowRank(rank=3, metric="weights")]), tmp_path / "student")
    as_format_1(folder)
    content = json.loads((folder / "compressvit.json").read_text())
    content["transforms"][0]["plan"]["groups"] = groups
    (folder / "compressvit.json").write_text(json.dumps(content))
    with pytest.raises(UserError, match=r"compressvit\.json|does not fit its manifest"):
        load(folder)


def test_a_checkpoint_takes_the_models_names():
    student = compress(build("vit"), [LowRank(rank=3, metric="weights", targets=("mlp.fc1",))])
    state = student.state_dict()
    back = {
        f"blocks.{i}.mlp.fc1.{new}": f"blocks.{i}.mlp.fc1.{before}" for i in range(4) for before, new in NAMES.items()
    }
    saved = {back.get(name, name): tensor for name, tensor in state.items()}
    content = {
        "model": saved,
        "average": saved,
        "best": {"score": 1.0, "model": saved},
        "optimizer": {"state": {}},
        "done": False,
    }
    now = old.current_checkpoint(content, state.keys())
    for found in (now["model"], now["average"], now["best"]["model"]):
        assert found.keys() == state.keys()
        assert all(found[name] is state[name] for name in state)
    assert (now["optimizer"], now["done"], now["best"]["score"]) == ({"state": {}}, False, 1.0)
    assert old.current_checkpoint(now, state.keys()) is now
    shared = compress(build("vit"), [LORS(rank=3, share=2, metric="weights")]).state_dict()
    kept = {"model": dict(shared), "best": None}
    assert old.current_checkpoint(kept, shared.keys()) is kept
    assert old.current_checkpoint(None, shared.keys()) is None


def test_a_resolved_recipe_without_dropout_had_none():
    before = {
        "steps": [{"adaptformer": {"width": 4}}, {"fact": {"rank": 2}}, {"repadapter": {"dropout": 0.1}}, "bitfit"]
    }
    steps = old.current_recipe(before)["steps"]
    assert steps[0] == {"adaptformer": {"width": 4, "dropout": 0.0}}
    assert steps[1] == {"fact": {"rank": 2, "dropout": 0.0}}
    assert steps[2:] == before["steps"][2:]
    assert old.current_recipe(before, complete=False) == before, "a recipe as it was given leaves defaults out"
    new = {"steps": [{"adaptformer": {"width": 4, "dropout": 0.3}}]}
    assert old.current_recipe(new) == new


def test_a_gradient_score_of_an_old_run_was_taylors():
    def score(**options: object) -> str:
        recipe = {"steps": [{"prune": {"target": {"neurons": 0.5}, "score": "gradient", **options}}]}
        return old.current_recipe(recipe)["steps"][0]["prune"]["score"]

    assert score() == "taylor"
    assert score(milestones=None) == "gradient", "a run of now, which has that word, too"
    assert score(score="magnitude") == "magnitude"
    folder = Path(__file__).parents[1] / "old_runs" / "adapted_pruned"
    for file in (old.RESOLVED, "recipe.yaml"):
        assert load_recipe(str(folder / file)).steps[1].spec.score == "taylor"


def test_what_a_run_of_now_was_given_means_what_it_says(tmp_path):
    recipe = {**RECIPE, "steps": [{"adapters": {}}, {"prune": {"target": {"neurons": 0.5}, "score": "gradient"}}]}
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    given = load_recipe(str(tmp_path / "recipe.yaml"))
    (tmp_path / old.RESOLVED).write_text(given.to_yaml())
    for file in (old.RESOLVED, "recipe.yaml"):
        assert load_recipe(str(tmp_path / file)).steps[1].spec.score == "gradient"
