"""The data sets of the adapters' papers, by overriding the recipes that ship; and a classifier that does not fit them."""

from __future__ import annotations

import numpy as np
import pytest
from helpers.recipes import build_teacher
from helpers.runs import done, refused
from PIL import Image

from compressvit.data.opening import open_data
from compressvit.data.spec import known_classes
from compressvit.recipe.recipe import load_recipe
from compressvit.runs.models import build_student

# By paper: its recipe, and the sets that timm and torchvision know, with their classes.
NAMED = [
    ("mimi_swin_t", "torch/cifar10", 10),
    ("mimi_swin_t", "torch/cifar100", 100),
    ("mimi_swin_t", "torch/flowers102", 102),
    ("mimi_swin_t", "torch/svhn", 10),
    ("repadapter_vit_b_vtab", "torch/cifar100", 100),
    ("adaptformer_vit_b", "torch/cifar100", 100),
    ("adaptformer_vit_b", "torch/food101", 101),
    ("adaptformer_vit_b", "torch/svhn", 10),
]
# Sets in lists: the folder's splits, and a path as they have it.
DOMAINNET = ("clipart_train", "clipart_test", "clipart/aircraft_carrier/clipart_001_{i:06}.jpg")
VTAB = ("train800val200", "test", "images/{split}/{i:06}.jpg")
VTAB_TASKS = (
    "caltech101", "cifar", "dtd", "oxford_flowers102", "oxford_iiit_pet", "svhn", "sun397", "patch_camelyon", "eurosat", "resisc45",
    "diabetic_retinopathy", "clevr_count", "clevr_dist", "dmlab", "kitti", "dsprites_loc", "dsprites_ori", "smallnorb_azi", "smallnorb_ele",
)  # fmt: skip


def listed(folder, splits: tuple[str, str, str], classes: int = 3):
    """A few images in the layout of such a set; test splits do not have every class."""
    *names, form = splits
    for split in names:
        lines = []
        for i in range(classes if split == names[0] else classes - 1):
            path = folder / form.format(split=split, i=i)
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(np.full((8, 8, 3), i, dtype=np.uint8)).save(path)
            lines.append(f"{path.relative_to(folder)} {i}\n")
        (folder / f"{split}.txt").write_text("".join(lines))
    return folder


@pytest.mark.wide_unless(lambda recipe: recipe != "mimi_swin_t")
@pytest.mark.parametrize(("recipe", "name", "classes"), NAMED)
def test_a_named_set_sizes_the_new_classifier(recipe, name, classes):
    overridden = load_recipe(recipe, [f"data.name={name}", "data.root=x"])
    assert known_classes(overridden.data) == classes
    student = build_student(overridden, build_teacher(overridden, device="meta"), meta=True)
    assert student.num_classes == classes


@pytest.mark.parametrize("recipe", ["mimi_swin_t", "repadapter_vit_b_vtab", "adaptformer_vit_b", "mimi_dinov2_s"])
@pytest.mark.parametrize(("splits", "task"), [(DOMAINNET, "domainnet"), *((VTAB, task) for task in VTAB_TASKS)])
def test_a_set_in_lists_is_read_as_it_is(recipe, splits, task, tmp_path):
    if recipe != "repadapter_vit_b_vtab" and task in VTAB_TASKS[1:]:
        return  # the tasks differ in their folder alone: one recipe is enough
    root = listed(tmp_path / task, splits)
    names = [f"data.train_split={splits[0]}", f"data.val_split={splits[1]}"]
    data = load_recipe(recipe, ["data.name=lists", f"data.root={root}", *names]).data
    found = open_data(data)
    assert (len(found.train), len(found.validation), found.num_classes) == (3, 2, 3)
    assert [found.train[i][1] for i in range(3)] == [0, 1, 2]


TINY = [
    "teacher.args={img_size: 16, embed_dim: 16, depth: 1, num_heads: 2, patch_size: 8}",
    "teacher.weights=train", "steps.1.finetune={epochs: 1}", "data.batch_size=3", "data.num_workers=0", "teacher.num_classes=7",
]  # fmt: skip


def test_a_task_of_vtab_runs_by_two_words(tmp_path):
    root = listed(tmp_path / "dtd", VTAB)
    words = ["apply", "--no-report", "repadapter_vit_b_vtab", f"data.root={root}", *TINY, "teacher.finetune=null"]
    out = done(*words, "--output", tmp_path / "run")
    assert "trained, in the classifier" in out


def test_a_classifier_of_too_few_classes_is_refused(tmp_path):
    root = listed(tmp_path / "dtd", VTAB, classes=9)
    words = ["apply", "repadapter_vit_b_vtab", f"data.root={root}", *TINY, "student.head=teacher"]
    message = refused(*words, "--output", tmp_path / "run")
    assert "the data has 9 classes, and the teacher's head has only 7; leave teacher.num_classes out" in message
    assert not (tmp_path / "run").exists()
