"""Which images decide how small a student becomes, and what is measured on them."""

from __future__ import annotations

import copy

import pytest
import torch
from helpers.images import CPU, jpeg, side
from helpers.training import tiny_vit

from compressvit.data.loaders import eval_loader
from compressvit.data.opening import open_data
from compressvit.data.spec import Data
from compressvit.errors import UserError
from compressvit.recipe.recipe import parse_recipe
from compressvit.runs.deciding import LEAST, set_aside
from compressvit.runs.keep import OnHeldOut, _Classes

RECIPE = """\
teacher: {model: vit_tiny_patch16_224}
data: {name: digits, batch_size: 64, limit_val: %d}
steps: [{shrink: {%s}}]
"""


def recipe(limit=200, step="keep: {cosine: 0.9}"):
    return parse_recipe(RECIPE % (limit, step))


def identities(part):
    return set(part.indices)


def test_every_second_photograph_decides_and_the_others_are_the_evidence():
    opened = open_data(recipe().data)
    found = set_aside(opened, recipe())
    assert (len(found.deciding), len(found.validation)) == (100, 100)
    assert identities(found.deciding).isdisjoint(identities(found.validation))
    assert identities(found.deciding) | identities(found.validation) == identities(opened.validation)
    assert found.notes()[-1].text == (
        "100 images held out decide how small the student becomes; 100 images of other photographs are the evidence"
    )
    assert set_aside(found, recipe()) is found
    assert set_aside(opened, recipe(step="budget: {macs: 0.5}")) is opened


def test_a_photograph_is_on_one_side(tmp_path):
    for photograph in range(20):
        folder = tmp_path / ("train" if photograph < 2 else "val")
        folder.mkdir(exist_ok=True)
        for crop in range(5):
            (folder / f"{photograph:02d}_{crop}.jpg").write_bytes(jpeg(photograph))
    data = Data(name="images", root=str(tmp_path))
    found = set_aside(open_data(data), recipe())
    sides = [{part.name(i).rpartition("_")[0] for i in range(len(part))} for part in (found.deciding, found.validation)]
    assert sides[0].isdisjoint(sides[1])
    assert all(len(of) >= 8 for of in sides)


def test_where_images_are_few_all_decide_and_that_is_said():
    found = set_aside(open_data(recipe(LEAST - 1).data), recipe(LEAST - 1))
    assert found.deciding is found.validation
    assert "are the evidence too, which is therefore a little too good" in found.notes()[-1].text


def judge(found, data, model=None):
    teacher = model or tiny_vit(num_classes=10)
    return OnHeldOut(found, data, CPU, side(teacher.eval()), side(copy.deepcopy(teacher).eval()))


def test_figures_are_those_of_the_images_that_decide():
    asked = recipe()
    found = set_aside(open_data(asked.data), asked)
    judging, student = judge(found, asked.data), tiny_vit(seed=1, num_classes=10).eval()
    figures = judging.figures(student, ["worst_class_drop", "cosine", "top1_drop"])
    assert list(figures) == ["worst_class_drop", "cosine", "top1_drop"]
    part = copy.copy(found)
    part.validation = found.deciding
    batches = list(eval_loader(part, asked.data, judging.like.input, CPU))
    images, targets = torch.cat([b[0] for b in batches]), torch.cat([b[1] for b in batches])
    with torch.no_grad():
        ours, theirs = student(images), judging.teacher.model(images)
    right = [(outputs.argmax(1) == targets).float() for outputs in (ours, theirs)]
    assert figures["cosine"] == pytest.approx(torch.cosine_similarity(ours, theirs).mean().item(), abs=1e-5)
    assert figures["top1_drop"] == pytest.approx(100 * (right[1] - right[0]).mean().item(), abs=1e-4)
    worst = max(100 * (right[1] - right[0])[targets == c].mean().item() for c in targets.unique())
    assert figures["worst_class_drop"] == pytest.approx(worst, abs=1e-4)
    assert judging.images == "100 images held out"


def test_the_worst_class_is_the_one_that_loses_most():
    classes, targets = _Classes(), torch.tensor([0, 0, 1, 1, 2])
    theirs, ours = torch.tensor([0, 0, 1, 1, 0]), torch.tensor([0, 0, 1, 0, 2])
    classes.add(torch.empty(5), targets, torch.eye(3)[ours], torch.eye(3)[theirs])
    assert classes.worst() == 50


def test_domains_are_the_folders_within_those_of_classes(tmp_path):
    for split in ("train", "val"):
        for c, name in enumerate(("cat", "dog")):
            for d, domain in enumerate(("drawn", "photographed")):
                folder = tmp_path / split / name / domain
                folder.mkdir(parents=True)
                for i in range(3):
                    (folder / f"{i}.jpg").write_bytes(jpeg(100 * c + 10 * d + i))
    data = Data(name="folder", root=str(tmp_path), batch_size=4)
    found = set_aside(open_data(data), recipe())
    judging = judge(found, data, tiny_vit(num_classes=2, img_size=8))
    assert {name: len(places) for name, places in judging._domains().items()} == {"drawn": 6, "photographed": 6}
    judging.refuse(["worst_domain_drop"])
    student = tiny_vit(seed=3, num_classes=2).eval()
    drops = [judging._drop(student, places) for places in judging._domains().values()]
    assert judging.figures(student, ["worst_domain_drop"]) == {"worst_domain_drop": max(drops)}


def test_a_domain_is_the_folder_directly_in_that_of_a_class_whatever_it_is_called(tmp_path):
    root = tmp_path / "cat"  # no class folder, though it is called like one; nor is the split
    domains = [
        ("cat", "sun/day1"),
        ("cat", "sun/day2"),
        ("cat", "val"),
        ("val", "sun"),
        ("val", "val/cat"),
        ("cat", "."),
    ]
    for n, (name, domain) in enumerate(domains):
        for split in ("train", "val"):
            folder = root / split / name / domain
            folder.mkdir(parents=True, exist_ok=True)
            (folder / f"{n}.jpg").write_bytes(jpeg(n))
    data = Data(name="folder", root=str(root), batch_size=4)
    judging = judge(set_aside(open_data(data), recipe()), data, tiny_vit(num_classes=2, img_size=8))
    assert {name: len(places) for name, places in judging._domains().items()} == {"sun": 3, "val": 2}


def test_a_student_with_another_task_cannot_be_compared():
    asked = recipe()
    judging = judge(set_aside(open_data(asked.data), asked), asked.data)
    judging.comparable = False
    with pytest.raises(UserError, match="compares the student with its teacher"):
        judging.refuse(["cosine"])
