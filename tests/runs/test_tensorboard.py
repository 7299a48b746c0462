"""TensorBoard: names that are alike in all runs, and the recipe beside the result in the HParams tab, read back from event files."""

from __future__ import annotations

import json

import pytest
from helpers.recipes import GOOD
from helpers.runs import EPOCH, done
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tensorboard.plugins.hparams.plugin_data_pb2 import HParamsPluginData

from compressvit.recipe.recipe import parse_recipe
from compressvit.runs.tags import hyper_parameters, scalar_tags, step_names

LONGER = GOOD.split("steps:")[0] + "steps: [multiplex: {share: 2}, distill, bitfit, lora, distill, irpe]\n"


def board_of(folder) -> EventAccumulator:
    board = EventAccumulator(str(folder / "tensorboard"))
    board.Reload()
    return board


def hparams_of(board: EventAccumulator, part: str):
    content = HParamsPluginData.FromString(board.SummaryMetadata(f"_hparams_/{part}").plugin_data.content)
    return getattr(content, part)


def test_a_name_does_not_say_where_a_step_stands():
    recipe = parse_recipe(LONGER)
    assert step_names(recipe) == ["multiplex", "distill", "bitfit", "lora", "distill_2", "irpe"]
    assert scalar_tags(recipe) == {
        "0_multiplex": "distill",  # what comes before a phase is its step 0
        "1_distill": "distill",
        "2_bitfit": "distill_2",
        "3_lora": "distill_2",
        "4_distill": "distill_2",
        "5_irpe": "irpe",  # no phase follows
    }


def test_hyper_parameters_are_plain_and_named_alike():
    found = hyper_parameters(parse_recipe(GOOD))
    assert found["multiplex.share"] == 2
    assert found["distill.lr"] == 1e-3
    assert found["distill.losses.hidden_relation.form"] == "cosine_mse"
    assert found["data.name"] == "digits"
    assert found["teacher.args.img_size"] == 8
    assert not [key for key in found if key.startswith(("steps", "description", "diagnostics"))]
    assert "data.root" not in found  # null
    assert all(type(value) in (bool, int, float, str) for value in found.values())


def test_curves_of_a_run_with_one_transform_and_with_two_have_the_same_names(finished, recipe, tmp_path):
    done(
        "apply",
        "--no-report",
        recipe,
        "--output",
        tmp_path / "run",
        "steps=[align: {share: 2}, multiplex: {share: 2}, distill: {epochs: 1}]",
    )
    first, second = (set(board_of(folder).Tags()["scalars"]) for folder in (finished, tmp_path / "run"))
    assert {"distill/evaluate/top1", "distill/train/loss", "teacher/epoch/loss", "final/top1"} <= second <= first
    assert [event.step for event in board_of(finished).Scalars("distill/evaluate/top1")] == [0, EPOCH, 2 * EPOCH]


def test_the_hparams_tab_has_the_recipe_and_the_result_of_this_run_alone(finished):
    assert len(list((finished / "tensorboard").iterdir())) == 1  # no run below the run
    board = board_of(finished)
    results = json.loads((finished / "results.json").read_text())
    start = hparams_of(board, "session_start_info").hparams
    assert start["seed"].number_value == 3
    assert start["distill.epochs"].number_value == 2
    assert start["data.name"].string_value == "digits"
    metrics = {info.name.tag for info in hparams_of(board, "experiment").metric_infos}
    assert {"final/top1", "final/agreement", "final/parameters", "final/teacher_top1"} <= metrics
    for tag in metrics:
        (event,) = board.Scalars(tag)
        key = tag.removeprefix("final/")
        side = "teacher" if key.startswith("teacher_") else "student"
        assert event.value == pytest.approx(results[side][key.removeprefix("teacher_")], rel=1e-6), tag
