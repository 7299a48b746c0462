"""Phases that keep the features of what they do not train: the weights of a run that computes them in every step, and what is refused."""

from __future__ import annotations

import json
import os
import re
import signal

import pytest
import torch
import yaml
from helpers.masked_scenes import with_masks
from helpers.moving import with_clips
from helpers.runs import done, metrics, refused, run, student_bytes
from helpers.scenes import with_scenes
from helpers.together import together
from helpers.training import VIT

from compressvit.artifacts import artifact
from compressvit.model.families.adamixer import SMALL
from compressvit.training import step
from compressvit.training.cache import features, held_out
from compressvit.training.cache.store import INDEX, Store, read_index

INSIDE = {"embed_dim": 16, "depth": 2, "num_heads": 2, "patch_size": 8}
WITHIN = {"backbone": "vit_tiny_patch16_224", "backbone_args": INSIDE, "img_size": 32}
TRAINED = {"epochs": 4, "log_every": 1, "lr": 5e-3, "cache": {"views": 2, "dtype": "fp32"}}
PROBE = {
    "teacher": {"model": "vit_tiny_patch16_224", "weights": "random", "args": VIT},
    "student": {"head": "new"},
    "data": {"name": "digits", "batch_size": 8, "limit_train": 26, "limit_val": 16},
    "steps": [{"freeze": {"train": "head"}}, {"finetune": TRAINED}],
}
FROZEN = {"steps": [{"finetune": {**TRAINED, "backbone_lr": 0, "lr": 2e-3}}]}
SEGMENTER = {
    "teacher": {"model": "segmenter", "weights": "random", "args": {**WITHIN, "num_classes": 3}},
    "data": {"name": "segmentation", "num_classes": 3, "batch_size": 8},
    **FROZEN,
}
DETECTOR = {
    "teacher": {"model": "adamixer", "weights": "random", "args": {**SMALL, "stages": 2, "num_classes": 2}},
    "data": {"name": "coco", "batch_size": 8},
    **FROZEN,
}
VIDEO = {
    "teacher": {"model": "video", "weights": "random", "args": {**WITHIN, "frames": 4}},
    "data": {"name": "videos", "batch_size": 8, "clip": {"stride": 2, "views": 1}},
    **FROZEN,
}
RECIPES = {
    "classifier": (PROBE, None, "steps.1.finetune"),
    "segmenter": (SEGMENTER, with_masks, "steps.0.finetune"),
    "detector": (DETECTOR, with_scenes, "steps.0.finetune"),
    "video": (VIDEO, with_clips, "steps.0.finetune"),
}
STEP = RECIPES["classifier"][2]
AUGMENTED = {
    "classifier": ("data.augment.translate=1", "data.augment.random_erasing=0.25"),
    "segmenter": ("data.augment.scale=[0.5,1.0]", "data.augment.hflip=0.5"),
    "detector": ("data.augment.hflip=0.5",),
    "video": ("data.augment.scale=[0.8,1.0]", "data.augment.color_jitter=0.2"),
}


def written(folder, name):
    """The file of a recipe, with data, and the key of its phase."""
    recipe, make, where = RECIPES[name]
    if make is not None:
        return make(folder, recipe, 18, 6), where
    (folder / "recipe.yaml").write_text(yaml.safe_dump(recipe, sort_keys=False))
    return folder / "recipe.yaml", where


@pytest.fixture
def file(tmp_path):
    return written(tmp_path, "classifier")[0]


@pytest.fixture
def computed(monkeypatch):
    """How many images features were computed of, by call."""
    counts, original = [], features._Given._computed

    def counted(self, images, compute):
        counts.append(len(images))
        return original(self, images, compute)

    monkeypatch.setattr(features._Given, "_computed", counted)
    return counts


def apply(file, name, *words):
    folder = file.parent / name
    done("apply", file, "--output", folder, "--no-report", "--device", "cpu", *words)
    return folder


def cache_of(file):
    (found,) = (file.parent / "feature_cache").iterdir()
    return found


@pytest.mark.wide_unless(lambda name, precision: precision == "fp32")
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("name", ["classifier", "segmenter", "detector"])
def test_a_run_ends_with_the_weights_of_one_that_keeps_nothing(name, precision, tmp_path, computed):
    """Bit for bit: batches are the same, as nothing is augmented, and those that are read have the bits of those that were computed."""
    file, where = written(tmp_path, name)
    words = (f"{where}.precision={precision}",)
    plain = apply(file, "plain", *words, f"{where}.cache=null")
    assert computed == []
    first = apply(file, "first", *words)
    images = 26 if name == "classifier" else 18
    whole = images // 8 * 8  # the rest is left out of every epoch
    assert 2 * whole < sum(computed) <= 2 * images + 1
    computed.clear()
    again = apply(file, "again", *words)
    assert computed == []
    assert student_bytes(plain) == student_bytes(first) == student_bytes(again)
    start, end = (artifact.load(folder / "student").state_dict() for folder in (_start(file, where), again))
    moved = {key for key, value in end.items() if not torch.equal(value, start[key])}
    assert moved
    assert not any(key.startswith(("backbone.", "blocks.")) for key in moved)
    log = " ".join((again / "run.log").read_text().split())
    assert f"the features of {4 * whole} images were read from" in log
    assert "and those of 0 were computed" in log


def _start(file, where):
    """A run with the weights before the phase."""
    return apply(file, "start", f"{where}.lr=1e-30", f"{where}.weight_decay=0", f"{where}.cache=null")


@pytest.mark.parametrize("name", ["classifier", "segmenter"])
def test_features_are_those_of_the_images_that_are_shown(name, tmp_path, monkeypatch):
    """Of augmented images, also of those that come again in another order and in other batches."""
    words, off, original = AUGMENTED[name], [], features.FeatureCache.remember

    def compared(self, images, shown, ask):
        found = original(self, images, shown, ask)
        with torch.no_grad():
            off.extend(float((a - b).abs().max()) for a, b in zip(found, ask(images), strict=True))
        return found

    monkeypatch.setattr(features.FeatureCache, "remember", compared)
    file, _ = written(tmp_path, name)
    apply(file, "run", *words)
    apply(file, "again", *words, "seed=7", "data.batch_size=5")
    assert len(off) >= 20
    assert max(off) <= 1e-5  # measured 0, though of batches of another size


@pytest.mark.wide_unless(lambda name, words: name in ("classifier", "segmenter"))
@pytest.mark.parametrize(("name", "words"), AUGMENTED.items(), ids=AUGMENTED)
def test_with_augmentation_a_run_ends_as_one_that_computes_the_features_of_the_same_views(
    name, words, tmp_path, monkeypatch
):
    file, _ = written(tmp_path, name)
    one = artifact.load(apply(file, "kept", *words) / "student").state_dict()
    monkeypatch.setattr(features.FeatureCache, "remember", lambda self, images, shown, ask: ask(images))
    other = artifact.load(apply(file, "computed", *words) / "student").state_dict()
    off = max(float((value - other[key]).abs().max()) for key, value in one.items())
    assert off <= 1e-5  # measured 0, though images come again in other batches


@pytest.mark.parametrize(("dtype", "most"), [("bf16", 2**-8), ("int8", 1 / 127)])
def test_features_are_kept_within_the_stated_error(dtype, most, file, monkeypatch):
    off, original = [], features.FeatureCache.remember

    def compared(self, images, shown, ask):
        found = original(self, images, shown, ask)
        with torch.no_grad():
            (exact,) = ask(images)
        off.append(float(((found[0] - exact).abs().amax(1) / exact.abs().amax(1)).max()))
        return found

    monkeypatch.setattr(features.FeatureCache, "remember", compared)
    apply(file, "run", f"{STEP}.cache.dtype={dtype}")
    assert 0 < max(off) < most


@pytest.mark.parametrize("batch", [2, 8])
def test_a_run_that_is_stopped_goes_on_to_the_same_bits(batch, file, monkeypatch):
    whole = student_bytes(apply(file, "whole", *AUGMENTED["classifier"], f"{STEP}.cache.folder={file.parent / 'a'}"))
    words = ("apply", file, "--output", file.parent / "run", "--no-report", "--device", "cpu", *AUGMENTED["classifier"])
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
    done(*words, "--resume")
    assert student_bytes(file.parent / "run") == whole
    for path in sorted((file.parent / "a").glob("view-*.bin")):
        assert (file.parent / "b" / path.name).read_bytes() == path.read_bytes()


def test_damaged_features_are_told_and_computed_again(file, computed):
    first = student_bytes(apply(file, "first"))
    folder = cache_of(file)
    told = done("cache", "verify", folder.parent)
    assert "features of vit_tiny_patch16_224: 2 views of 26 images" in told
    assert ": 16 features of vit_tiny_patch16_224: 1 view of 16 images" in told
    row = read_index(folder).bytes + 4
    whole = bytearray((folder / "view-00001.bin").read_bytes())
    place = next(i for i in range(26) if any(whole[i * row : i * row + row]))
    whole[place * row + 2] ^= 255
    (folder / "view-00001.bin").write_bytes(whole)
    assert f"view-00001.bin: of images {place}" in refused("cache", "verify", folder)
    computed.clear()
    assert student_bytes(apply(file, "again")) == first
    assert sum(computed) == 1
    assert "removed" in done("cache", "clear", folder.parent)
    assert not folder.exists()


def test_plan_says_what_the_files_take(file):
    (planned,) = [found["cache"] for found in json.loads(done("plan", file, "--json"))["steps"] if found.get("cache")]
    assert planned == {
        "of": "the features of what is before the classifier",
        "views": 2,
        "answer_bytes": 4 * 16 + 4,
        "held_out_bytes": 4 * 16 + 16 + 4,
        "images": None,
        "held_out": None,
        "bytes": None,
    }
    folder = apply(file, "run")
    sizes = [path.stat().st_size for path in cache_of(file).rglob("*") if path.is_file() and path.name != INDEX]
    assert sum(sizes) == 2 * 26 * planned["answer_bytes"] + 16 * planned["held_out_bytes"] == 4880
    told = " ".join((folder / "run.log").read_text().split())
    assert "before the classifier: 2 views of 26 images in 68 bytes each, and 16 held out in 84, 4.9 kB when" in told
    assert not (file.parent / "teacher_cache").exists()


def test_a_teacher_is_trained_on_kept_features(tmp_path, computed):
    """And its students, whose backbones are trained, keep none."""
    training = SEGMENTER["steps"][0]["finetune"]
    content = {**SEGMENTER, "teacher": {**SEGMENTER["teacher"], "weights": "train", "finetune": training}}
    content["teacher"]["args"] = WITHIN
    content["steps"] = [{"repadapter": {"width": 4}}, {"finetune": {"epochs": 1}}]
    file = with_masks(tmp_path, content, 18, 6)
    (planned,) = [found["cache"] for found in json.loads(done("plan", file, "--json"))["steps"] if found.get("cache")]
    assert planned["of"] == "the features of the backbone"
    apply(file, "run")
    assert 32 < sum(computed) <= 37
    assert "cache.limit_gb is 1e-06" in refused(
        "apply", file, "--output", tmp_path / "other", "teacher.finetune.cache.limit_gb=0.000001"
    )


def test_evaluations_read_what_is_held_out(file, monkeypatch):
    """With the figures of features that are computed: they are kept exactly, whatever `dtype` says."""
    seen, original = [], held_out.HeldOut._take

    def counted(self, images, compute):
        before = self.asked
        found = original(self, images, compute)
        seen.append(self.asked - before)
        return found

    monkeypatch.setattr(held_out.HeldOut, "_take", counted)
    words = (f"{STEP}.cache.dtype=int8", f"{STEP}.keep=best", f"{STEP}.ema=0.5", "data.limit_val=20")
    first = apply(file, "first", *words)
    assert seen == [8, 8, 4] + 3 * [0, 0, 0]  # after every epoch
    figures = metrics(first, kind="evaluate")
    with monkeypatch.context() as patch:
        patch.setattr(held_out.HeldOut, "evaluating", lambda self, evaluate: evaluate)
        computed = metrics(apply(file, "computed", *words), kind="evaluate")
    assert [{**line, "time": 0} for line in figures] == [{**line, "time": 0} for line in computed]
    seen.clear()
    apply(file, "other", *words, f"{STEP}.lr=0.1")
    assert set(seen) == {0}
    log = " ".join((file.parent / "other" / "run.log").read_text().split())
    assert "; of held-out images 80 and 0" in log


def test_every_clip_of_a_held_out_video_is_kept(tmp_path):
    file, _ = written(tmp_path, "video")
    words = ("data.clip.views=2", "data.clip.crops=3", "steps.0.finetune.epochs=2", "data.eval_batch_size=4")
    told = " ".join((apply(file, "run", *words) / "run.log").read_text().split())
    assert "of 18 images in 68 bytes each, and 36 held out in 84, 5.5 kB when" in told
    assert "; of held-out images 36 and 36" in told
    (inside,) = cache_of(file).glob("held_out*")
    assert (inside / "view-00000.bin").stat().st_size == 36 * 84


def test_an_image_never_has_the_held_out_features_of_another(file, monkeypatch):
    """What is asked for in another order than before is computed."""
    places, original = [], held_out.HeldOut._places
    first = metrics(apply(file, "first"), kind="evaluate")

    def moved(self, count):
        places.append([(place + 1) % 16 for place in original(self, count)])
        return places[-1]

    monkeypatch.setattr(held_out.HeldOut, "_places", moved)
    again = metrics(apply(file, "again"), kind="evaluate")
    assert places
    assert [line["loss"] for line in again] == [line["loss"] for line in first]


def test_held_out_images_beyond_the_limit_are_computed(file):
    size = 2 * 26 * 68
    folder = apply(file, "run", f"{STEP}.cache.limit_gb={(size + 100) / 1e9}")
    assert not list(cache_of(file).glob("held_out*"))
    log = " ".join((folder / "run.log").read_text().split())
    assert "2 views of 26 images in 68 bytes each, 3.5 kB when" in log
    assert "of held-out images" not in log


@pytest.fixture(scope="module")
def kept(tmp_path_factory):
    """A recipe, and the folder of the features of one step of it."""
    file, _ = written(tmp_path_factory.mktemp("kept"), "classifier")
    apply(file, "run", f"{STEP}.epochs=1", f"{STEP}.max_steps=1", f"{STEP}.cache.folder={file.parent / 'features'}")
    return file, file.parent / "features"


@pytest.mark.parametrize(
    ("word", "told"),
    [
        ("seed=5", "features.weights is "),
        ("teacher.args.num_heads=1", "features.modules is "),
        (f"{STEP}.precision=bf16", "features.precision is fp32 there and bf16 here"),
        ("data.limit_train=24", "data.images is 26 there and 24 here"),
        ("data.augment.translate=2", "augmentation.translate is 0 there and 2 here"),
        (f"{STEP}.cache.seed=1", "seed is 0 there and 1 here"),
        (f"{STEP}.cache.dtype=int8", "kept.tensor 1 is 1×16 in fp32 there and 1×16 in int8 here"),
    ],
)
def test_features_of_something_else_are_refused_with_what_differs(word, told, kept):
    file, folder = kept
    words = ("--output", file.parent / "other", "--no-report", "--device", "cpu", f"{STEP}.cache.folder={folder}")
    message = refused("apply", file, *words, "--overwrite", word)
    assert message.startswith(f"cache.folder={folder} holds features of something else: ")
    assert told in message
    assert message.endswith(f"; give another folder, or remove them with `compressvit cache clear {folder}`")


def test_other_frames_of_the_same_videos_are_something_else(tmp_path):
    """A glimpse of a video is one frame, which is the same."""
    file, where = written(tmp_path, "video")
    words = (f"{where}.epochs=1", f"{where}.cache.folder={tmp_path / 'features'}")
    apply(file, "run", *words)
    again = ("--output", tmp_path / "other", "--no-report", "--device", "cpu", "--overwrite", *words)
    assert "data.clip.stride is 2 there and 1 here" in refused("apply", file, *again, "data.clip.stride=1")
    assert "holds features of something else" in refused("apply", file, *again, "data.clip.sampling=segments")
    done("apply", file, *again, "data.clip.views=2")  # of evaluations


def test_another_head_reads_the_same_features(file, computed):
    apply(file, "run")
    computed.clear()
    apply(file, "other", f"{STEP}.lr=0.1", f"{STEP}.smoothing=0.1", f"{STEP}.epochs=2", f"{STEP}.ema=0.5")
    assert computed == []


HEAD = {"freeze": {"train": "head"}}


@pytest.mark.parametrize(
    ("first", "word", "told"),
    [
        (
            HEAD,
            f"{STEP}.mixup=0.2",
            "keeps the features of an image, and mixup and cutmix mix the pixels of two; set both",
        ),
        (HEAD, f"{STEP}.cutmix=0.2", "set both to 0, or leave cache out"),
        (HEAD, f"{STEP}.compile=true", "compile=true makes one program of the whole model"),
        (HEAD, f"{STEP}.drop_path=0.1", r"drop_path=0\.1 leaves out blocks at random; set drop_path=0"),
        (
            HEAD,
            "teacher.args.drop_path_rate=0.1",
            r"blocks\.1\.drop_path1 leaves something out at random \(with probability 0\.1\); name it in `frozen`",
        ),
        (HEAD, "teacher.args.drop_rate=0.1", "head_drop leaves something out at random"),
        (
            {"bitfit": {}},
            "seed=0",
            r"what is before the classifier, which must be frozen, and patch_embed\.proj\.bias is trained; put `freeze: ",
        ),
        (
            {"adapters": {"width": 2}},
            "seed=0",
            r"and blocks\.0\..* is trained, which an earlier step added there; leave cache out",
        ),
        (HEAD, "data.augment.repeats=2", "repeats=2 shows an image several times"),
    ],
    ids=[
        "mixup",
        "cutmix",
        "compile",
        "drop_path",
        "drop_path_of_the_model",
        "dropout",
        "biases",
        "adapters",
        "repeats",
    ],
)
def test_what_cannot_be_kept_is_refused_before_anything_is_written(first, word, told, file):
    content = yaml.safe_load(file.read_text())
    file.write_text(yaml.safe_dump({**content, "steps": [first, content["steps"][1]]}))
    message = refused("apply", file, "--output", file.parent / "run", "--no-report", word)
    assert re.search(told, message), message
    assert not (file.parent / "run").exists()
    assert not (file.parent / "feature_cache").exists()


def test_drop_path_of_the_recipe_turns_off_that_of_the_model(file):
    apply(file, "run", "teacher.args.drop_path_rate=0.1", f"{STEP}.drop_path=0", f"{STEP}.epochs=1")
    assert cache_of(file).is_dir()


@pytest.mark.wide
def test_several_processes_fill_one_cache(file, computed):
    """And one process reads what they have kept."""
    words = ("data.batch_size=4", "data.limit_train=24", "data.limit_val=20", "data.eval_batch_size=8")

    def filled():
        folder = file.parent / "both"
        return run("apply", file, "--output", folder, "--no-report", "--device", "cpu", *words)[0]

    assert together(2, filled) == [0, 0]
    log = " ".join((file.parent / "both" / "run.log").read_text().split())
    assert "; of held-out images 60 and 20" in log
    folder = cache_of(file)
    assert [found.answers for found in Store(folder, read_index(folder)).verify()] == [24, 24]
    computed.clear()
    one = apply(file, "one", *words, "data.batch_size=8")
    assert cache_of(file) == folder
    assert "; of held-out images 80 and 0" in " ".join((one / "run.log").read_text().split())
    assert computed == []
