"""Runs that keep their teacher's answers: what is asked, what is read, what is refused, and what a kill costs."""

from __future__ import annotations

import json
import os
import re
import signal

import pytest
import torch
from helpers.runs import done, refused, run, student_bytes
from helpers.together import together
from helpers.training import VIT, random_batches, tiny_vit

import compressvit
from compressvit.errors import UserError
from compressvit.training import asking, step
from compressvit.training.cache.store import INDEX, Store, read_index

ALL = "{hidden_relation: {weight: 0.5}, feature: {weight: 0.5}, cka: {weight: 0.1}}"
RECIPE = f"""\
teacher: {{model: vit_tiny_patch16_224, weights: random, args: {json.dumps(VIT)}}}
data: {{name: digits, batch_size: 8, limit_train: 26, limit_val: 16, augment: {{translate: 1, random_erasing: 0.25}}}}
steps:
  - multiplex: {{share: 2}}
  - distill: {{epochs: 4, log_every: 1, drop_path: 0.2, cache: {{views: 2}}, losses: {ALL}}}
"""
STEP = "steps.1.distill"
MIXED = [f"{STEP}.mixup=0.5", f"{STEP}.cutmix=0.5", f"{STEP}.losses.labels.weight=0.5"]
PROCESSES = "data.augment.scale=[0.5,1.0]", "data.num_workers=2"


@pytest.fixture
def file(tmp_path):
    (tmp_path / "recipe.yaml").write_text(RECIPE)
    return tmp_path / "recipe.yaml"


@pytest.fixture
def asked(monkeypatch):
    """How many images the teacher was asked about in training, by call; and by a run with an output folder beside the recipe."""
    counts, original = [], asking.Asked.__call__

    def counted(self, images, shown=None):
        counts.append(len(images))
        return original(self, images, shown)

    monkeypatch.setattr(asking.Asked, "__call__", counted)
    return counts


def apply(file, name, *words):
    folder = file.parent / name
    done("apply", file, "--output", folder, "--no-report", "--device", "cpu", *words)
    return folder


def cache_of(file):
    (found,) = (file.parent / "teacher_cache").iterdir()
    return found


@pytest.mark.parametrize("more", [(), MIXED], ids=["plain", "mixed"])
def test_another_run_asks_nothing_and_ends_with_the_same_bits(more, file, asked):
    first = student_bytes(apply(file, "first", *more))
    # views of 26 images are shown in 3 batches of 8, of which the other order of the next epoch leaves out others; mixed ones come again
    assert sum(asked) == (2 * 24 + 1 if more else pytest.approx(2 * 26 + 1, abs=2))
    asked.clear()
    assert student_bytes(apply(file, "again", *more)) == first
    assert asked == []
    other = student_bytes(apply(file, "other", *more, f"{STEP}.lr=0.003"))
    assert other != first
    assert asked == []
    assert "teacher's answers were read from" in (file.parent / "other" / "run.log").read_text()
    assert "it was asked for 0" in " ".join((file.parent / "other" / "run.log").read_text().split())


def test_mixed_images_come_again_with_their_view(file, monkeypatch):
    seen, original = [], step.Step.__call__

    def watched(self, images, targets, labels, backward, *, last, shown):
        seen.append((images.clone(), shown.places))
        return original(self, images, targets, labels, backward, last=last, shown=shown)

    monkeypatch.setattr(step.Step, "__call__", watched)
    apply(file, "run", *MIXED, "data.batch_size=7")  # odd: one of every batch is left out
    first, second, third, fourth = (seen[i : i + 3] for i in range(0, 12, 3))
    for one, again in ((first, third), (second, fourth)):
        for (images, places), (same, also) in zip(one, again, strict=True):
            assert torch.equal(images, same)
            assert torch.equal(places, also)
    assert not any(torch.equal(one, other) for (one, _), (other, _) in zip(first, second, strict=True))


@pytest.mark.wide_unless(lambda more: more == MIXED)
@pytest.mark.parametrize("more", [MIXED, PROCESSES], ids=["mixed", "workers"])
@pytest.mark.parametrize("batch", [2, 8])
def test_a_run_that_is_stopped_while_it_fills_goes_on_to_the_same_bits(more, batch, file, monkeypatch):
    whole = student_bytes(apply(file, "whole", *more, f"{STEP}.cache.folder={file.parent / 'a'}"))
    words = ("apply", file, "--output", file.parent / "run", "--no-report", "--device", "cpu", *more)
    words = (*words, f"{STEP}.cache.folder={file.parent / 'b'}")
    original, calls = step.Step.__call__, []

    def stopped(*args, **kwargs):
        calls.append(1)
        if len(calls) == batch:
            os.kill(os.getpid(), signal.SIGTERM)
        return original(*args, **kwargs)

    with monkeypatch.context() as patch:
        patch.setattr(step.Step, "__call__", stopped)
        assert run(*words)[0] == 128 + signal.SIGTERM
    assert len(calls) == batch
    done(*words, "--resume")
    assert student_bytes(file.parent / "run") == whole
    for path in sorted((file.parent / "a").glob("view-*.bin")):
        assert (file.parent / "b" / path.name).read_bytes() == path.read_bytes()


def test_a_crash_between_steps_costs_nothing(file, monkeypatch):
    """What was kept after the last checkpoint is read by the steps that are done again."""
    whole = student_bytes(apply(file, "whole", *MIXED, f"{STEP}.cache.folder={file.parent / 'a'}"))
    words = ("apply", file, "--output", file.parent / "run", "--no-report", "--device", "cpu", *MIXED)
    original, calls = step.Step.__call__, []

    def crashed(*args, **kwargs):
        calls.append(1)
        if len(calls) == 6:
            raise MemoryError
        return original(*args, **kwargs)

    with monkeypatch.context() as patch:
        patch.setattr(step.Step, "__call__", crashed)
        assert run(*words)[0] != 0
    done(*words, "--resume")
    assert student_bytes(file.parent / "run") == whole


@pytest.fixture(scope="module")
def kept(tmp_path_factory):
    """A recipe, and the folder of the answers to one step of it."""
    file = tmp_path_factory.mktemp("kept") / "recipe.yaml"
    file.write_text(RECIPE.replace("epochs: 4", "epochs: 1, max_steps: 1"))
    apply(file, "run", f"{STEP}.cache.folder={file.parent / 'answers'}")
    return file, file.parent / "answers"


@pytest.mark.parametrize(
    ("word", "told"),
    [
        ("seed=5", "teacher.weights is "),
        ("teacher.args.embed_dim=24", "teacher.modules is "),
        (f"{STEP}.precision=bf16", "teacher.precision is fp32 there and bf16 here"),
        ("data.limit_train=24", "data.images is 26 there and 24 here"),
        ("data.augment.translate=2", "augmentation.translate is 1 there and 2 here"),
        (f"{STEP}.cache.seed=1", "seed is 0 there and 1 here"),
        (
            f"{STEP}.cache.top=5",
            "kept.outputs is the 10 largest of 10 logits, .* at temperature 1 there",
        ),
        (f"{STEP}.losses.prediction.temperature=2", "at temperature 1 there and the 10 largest"),
        (f"{STEP}.cache.dtype=int8", r"kept\..* is 1×5×\d+ in bf16 there and 1×5×\d+ in int8 here"),
        (f"{STEP}.losses.feature.weight=0", r"kept\.norm output is 1×5×16 in bf16 there and absent here"),
        (f"{STEP}.mixup=0.2", "mixing.mixup is absent there and 0.2 here"),
    ],
)
def test_a_cache_of_something_else_is_refused_with_what_differs(word, told, kept):
    file, folder = kept
    words = ("--output", file.parent / "other", "--no-report", "--device", "cpu", f"{STEP}.cache.folder={folder}")
    message = refused("apply", file, *words, "--overwrite", word)
    assert message.startswith(f"cache.folder={folder} holds answers to something else: ")
    assert re.search(told, message)
    assert message.endswith(f"; give another folder, or remove them with `compressvit cache clear {folder}`")


def test_views_and_the_seed_of_a_run_do_not_make_another_cache(file, asked):
    kept = compressvit.save(tiny_vit(num_classes=10), file.parent / "teacher")
    words = (f"teacher.weights={kept}",)
    apply(file, "run", *words)
    cache = cache_of(file)
    asked.clear()
    apply(file, "other", *words, "seed=3", f"{STEP}.cache.views=1", "data.batch_size=13")
    assert cache_of(file) == cache
    assert sum(asked) <= 3


def test_plan_says_what_the_files_take(file):
    plan = json.loads(done("plan", file, "--json"))
    (answers,) = [found["cache"] for found in plan["steps"] if found.get("cache")]
    assert (answers["views"], answers["images"], answers["bytes"]) == (2, None, None)
    run = apply(file, "run")
    (counted,) = [
        found["cache"] for found in json.loads((run / "plan.json").read_text())["steps"] if found.get("cache")
    ]
    assert counted == answers | {"images": 26, "bytes": 2 * 26 * answers["answer_bytes"]}
    files = {path.name: path.stat().st_size for path in cache_of(file).iterdir()}
    assert files.pop(INDEX) < 4096
    assert sum(files.values()) == counted["bytes"]
    assert f"2 views of 26 images in {answers['answer_bytes']:,} bytes each" in (run / "run.log").read_text()


def test_a_damaged_answer_is_told_and_asked_again(file, asked):
    first = student_bytes(apply(file, "first"))
    folder = cache_of(file)
    assert done("cache", "verify", folder.parent).startswith(
        f"{folder}: 52 answers of vit_tiny_patch16_224: 2 views of 26 images"
    )
    row = read_index(folder).bytes + 4
    whole = bytearray((folder / "view-00001.bin").read_bytes())
    whole[3 * row + 2] ^= 255
    (folder / "view-00001.bin").write_bytes(whole)
    message = refused("cache", "verify", folder)
    assert message == f"damaged rows, which the next run computes again: {folder}/view-00001.bin: of images 3"
    asked.clear()
    assert student_bytes(apply(file, "again")) == first
    assert sum(asked) == 1
    done("cache", "verify", folder)
    os.truncate(folder / "view-00000.bin", 10)
    assert "view-00000.bin: its size is another one than its rows have" in refused("cache", "verify", folder)
    assert "removed" in done("cache", "clear", folder.parent)
    assert not folder.exists()
    assert f"{folder.parent} is no cache and has none in it" in refused("cache", "clear", folder.parent)


def test_what_cannot_be_kept_is_refused_before_anything_is_written(file, tmp_path):
    small = refused("apply", file, "--output", tmp_path / "run", "--no-report", f"{STEP}.cache.limit_gb=0.00001")
    assert "2 views of 26 images in" in small
    assert "and cache.limit_gb is 1e-05; set it to" in small
    assert "repeats=2 shows an image several times" in refused(
        "apply", file, "--output", tmp_path / "run", "data.augment.repeats=2"
    )
    assert not (tmp_path / "run").exists()
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "notes.txt").write_text("mine")
    message = refused(
        "apply", file, "--output", tmp_path / "run", "--no-report", f"{STEP}.cache.folder={tmp_path / 'mine'}"
    )
    assert (
        message
        == f"cache.folder={tmp_path / 'mine'} holds something other than a teacher's answers; give an empty folder"
    )
    with pytest.raises(UserError, match="a loader of your own says no places; leave cache out"):
        compressvit.distill(tiny_vit(), tiny_vit(seed=1), random_batches(2, 4), cache={"views": 1})


def test_several_processes_fill_one_cache(file, asked):
    """And one process reads what they have kept."""
    words = ("data.batch_size=4", "data.limit_train=24")

    def filled():
        folder = file.parent / "both"
        return run("apply", file, "--output", folder, "--no-report", "--device", "cpu", *words)[0]

    assert together(2, filled) == [0, 0]
    folder = cache_of(file)
    assert [found.answers for found in Store(folder, read_index(folder)).verify()] == [24, 24]
    asked.clear()
    apply(file, "one", "data.batch_size=8", "data.limit_train=24")
    assert cache_of(file) == folder
    assert asked == []
