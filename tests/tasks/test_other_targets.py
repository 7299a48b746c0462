"""A package offers a task whose targets are no classes, and a data set for it; nothing else in compressvit knows of either."""

from __future__ import annotations

import importlib
import json
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers import process
from helpers.runs import TINY, metrics
from helpers.training import tiny_vit
from PIL import Image
from torch.utils.data import DataLoader

import compressvit
from compressvit.data.data_set import SETS
from compressvit.errors import UserError
from compressvit.tasks.base import TASKS

STEPS = """\
steps:
  - adapters: {width: 4}
  - distill: {epochs: 2, log_every: 1, losses: {prediction: {weight: 0}, labels: {weight: 1}}}
  - prune: {target: {neurons: 0.5}, score: gradient, gradient_batches: 1, epochs: 1}
  - finetune: {epochs: 2, keep: best, lr: 0.01}
  - sparsify: {density: 0.5, score: snip, gradient_batches: 1, epochs: 1}
"""
RECIPE = TINY.partition("steps:")[0].replace("name: digits", "name: rectangles") + STEPS
PROGRAM = """
import sys
import vl_convert
from compressvit.cli import main
vl_convert.vegalite_to_svg = lambda spec: "<svg/>"  # two seconds, for charts that nobody looks at
recipe, folder, *more = sys.argv[1:]
for words in (
    ["plan", recipe],
    ["apply", "--no-report", recipe, "--output", folder, "--device", "cpu"],
    ["evaluate", folder, "--json"],
    ["report", folder, "--output", folder + ".html"],
    ["plan", recipe, "steps.1.distill.losses.prediction.weight=1"],
):
    code = main(words)
    print("=====", code)
"""


@pytest.fixture(scope="module")
def offered(tmp_path_factory):
    """A folder with the metadata of an installed package that offers the task and the set."""
    folder = tmp_path_factory.mktemp("site")
    info = folder / "count_and_box-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: count-and-box\nVersion: 1.0\n")
    module = "helpers.count_and_box"
    (info / "entry_points.txt").write_text(
        f"[compressvit.tasks]\ncount_and_box = {module}\n\n[compressvit.sets]\nrectangles = {module}\n"
    )
    return folder


@pytest.fixture(scope="module")
def applied(offered, tmp_path_factory):
    """The run of a recipe that names the set, and what the commands printed, in a process that finds the package by itself."""
    folder = tmp_path_factory.mktemp("boxes")
    (folder / "recipe.yaml").write_text(RECIPE)
    paths = [offered, Path(__file__).parents[1]]
    done = process.python("-c", PROGRAM, folder / "recipe.yaml", folder / "run", path=paths)
    parts = done.out.split("=====")
    assert [part.split()[0] for part in parts[1:]] == ["0", "0", "0", "0", "2"], done.err + done.out
    return folder, parts, done.err


def test_it_trains_in_every_phase(applied):
    run = applied[0] / "run"
    results = json.loads((run / "results.json").read_text())
    assert list(results["phases"]) == ["1_distill", "2_prune", "3_finetune", "4_sparsify"]
    assert results["student"]["count_error"] > 0
    assert "top1" not in results["student"]
    losses = [row["labels"] for row in metrics(run, phase="1_distill", kind="train")]
    assert losses[-1] < losses[0]
    kept = results["phases"]["3_finetune"]["kept_epoch"]
    scores = {row["epoch"]: row["count_error"] for row in metrics(run, phase="3_finetune", kind="evaluate")}
    scores[0] = results["phases"]["3_finetune"]["start"]["count_error"]
    assert scores[kept] == min(scores.values())


def test_it_is_evaluated(applied):
    folder, parts, _ = applied
    found = json.loads(parts[2].partition("\n")[2])
    wanted = json.loads((folder / "run" / "results.json").read_text())["student"]["count_error"]
    assert found["images"] == 32
    assert found["count_error"] == pytest.approx(wanted)


def test_its_answers_are_drawn_and_reported(applied):
    folder, _, _ = applied
    content = json.loads((folder / "run" / "predictions.json").read_text())
    assert content["measure"] == "count"
    example = next(one for one in content["examples"] if one["boxes"])
    picture = Image.open(folder / "run" / example["file"])
    red = {(x, y) for x in range(8) for y in range(8) if picture.getpixel((x, y)) == (255, 0, 0)}
    corners = [(round(8 * left), round(8 * top)) for left, top, _, _ in example["boxes"]]
    assert red == {(left + x, top + y) for left, top in corners for x in range(2) for y in range(2)}
    page = (folder / "run.html").read_text()
    assert example["student"] in page
    assert "The images whose number of rectangles is most wrong." in page


def test_distilling_soft_labels_is_refused(applied):
    text = " ".join(applied[2].split()) + " ".join(applied[1][4].split())
    assert "losses.prediction compares classes, and the outputs of the task 'count_and_box' are none" in text


def test_a_package_that_cannot_be_loaded_is_named(tmp_path):
    info = tmp_path / "poses-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: poses\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text("[compressvit.tasks]\npose = no_such_module_of_poses\n")
    program = "from compressvit.tasks.base import find_task\nfind_task('pose')\n"
    done = process.python("-c", program, path=[tmp_path])
    assert "the task 'pose' of the package poses cannot be used: ModuleNotFoundError" in done.err


@pytest.fixture
def toy():
    """The module of the task in this process; what it registers is taken out again."""
    len(TASKS), len(SETS)
    module = importlib.import_module("helpers.count_and_box")
    yield module
    del TASKS._entries["count_and_box"], SETS._entries["rectangles"], sys.modules["helpers.count_and_box"]


def batches(toy, count, seed):
    def collate(items):
        pixels = [torch.from_numpy(np.array(image))[None] / 127.5 - 1 for image, _ in items]
        return torch.stack(pixels), [target for _, target in items]

    return DataLoader(toy.Rectangles(count, seed), batch_size=8, collate_fn=collate)


def test_distill_takes_the_task(toy, tmp_path):
    teacher, student = tiny_vit(num_classes=5), tiny_vit(num_classes=5)
    options = {"epochs": 2, "losses": {"prediction": {"weight": 0}, "labels": {"weight": 1}}, "device": "cpu"}
    done = compressvit.distill(
        student, teacher, batches(toy, 32, 0), validation=batches(toy, 16, 1), task="count_and_box", **options
    )
    assert set(done.figures) == {"images", "count_error", "teacher_count_error"}
    with pytest.raises(UserError, match="task='count_and_box': the student's outputs cannot be read as those of"):
        compressvit.distill(tiny_vit(), teacher, batches(toy, 32, 0), task="count_and_box", **options)
    with pytest.raises(UserError, match="there is no task 'count_and_boxes'; did you mean 'count_and_box'"):
        compressvit.distill(student, teacher, batches(toy, 32, 0), task="count_and_boxes", **options)
    with pytest.raises(UserError, match=r"gives targets of 8 values .*; targets are class indices"):
        compressvit.distill(student, teacher, batches(toy, 32, 0), **options)
