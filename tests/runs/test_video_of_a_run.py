"""A video model through plan, apply, evaluate, export, report and resume, on folders of frames, and what is refused."""

from __future__ import annotations

import json
import os
import signal

import pytest
import timm
import torch
import yaml
from helpers.moving import with_clips
from helpers.runs import done, refused, run, student_bytes
from PIL import Image
from safetensors.torch import load_file, save_file

import compressvit
from compressvit.recipe.recipe import load_recipe
from compressvit.training import step

INSIDE = {"embed_dim": 32, "depth": 2, "num_heads": 2, "patch_size": 8}
TEACHER = {
    "model": "video",
    "weights": "train",
    "args": {"backbone": "vit_tiny_patch16_224", "backbone_args": INSIDE, "img_size": 32, "frames": 4},
    "finetune": {"epochs": 2, "lr": 3e-3},
}
RECIPE = {
    "teacher": TEACHER,
    "data": {
        "name": "videos",
        "batch_size": 8,
        "clip": {"stride": 2, "views": 2},
        "augment": {"scale": [0.8, 1.0], "color_jitter": 0.2},
    },
    "steps": [
        {"repadapter": {"width": 8, "scale": 1.0}},
        {"distill": {"epochs": 2, "lr": 1e-3, "losses": {"labels": {"weight": 1.0}, "feature": {"weight": 0.1}}}},
    ],
}


@pytest.fixture(scope="module")
def applied(tmp_path_factory):
    folder = tmp_path_factory.mktemp("video")
    done("apply", with_clips(folder, RECIPE, 24, 9), "--output", folder / "run")
    return folder


def results(folder):
    return json.loads((folder / "run" / "results.json").read_text())


def test_a_run_measures_accuracy_with_its_interval(applied):
    for who in ("teacher", "student"):
        found = results(applied)[who]
        low, high = found["intervals"]["top1"]
        assert 0 <= low <= found["top1"] <= high <= 100
        assert round(found["top1"] * 9 / 100, 6) == round(found["top1"] * 9 / 100)  # of 9 videos, whose views are one


def test_it_is_evaluated_as_at_the_end_of_its_run(applied):
    low, high = results(applied)["student"]["intervals"]["top1"]
    assert f"top-1 │ {results(applied)['student']['top1']:.2f} % ({low:.1f}–{high:.1f})" in done(
        "evaluate", applied / "run"
    )


def test_plan_counts_clips(applied):
    out = done("plan", applied / "recipe.yaml")
    assert "images 12×32×32" in out  # a clip is an image of all channels of its frames
    assert "mean 0.5 0.5 0.5, std 0.5 0.5 0.5, of each of 4 frames" in out
    assert "data: 24 images to train on, 9 held out" in out


def test_the_report_shows_frames(applied):
    done("report", applied / "run")
    assert (
        "Channels drawn: those of 4 of the 4 frames of a clip, row by row."
        in (applied / "run" / "report.html").read_text()
    )
    examples = json.loads((applied / "run" / "predictions.json").read_text())["examples"]
    with Image.open(applied / "run" / examples[0]["file"]) as shown:
        assert shown.size == (4 * 32, 32)
        parts = [shown.crop((32 * i, 0, 32 * (i + 1), 32)).tobytes() for i in range(4)]
    assert len(set(parts)) > 1  # the square moves


def test_it_is_merged_and_exported(applied):
    done("merge", applied / "run", "--output", applied / "merged")
    clips = torch.randn(3, 12, 32, 32)
    student, merged = (compressvit.load(applied / name) for name in ("run/student", "merged"))
    assert torch.allclose(merged(clips), student(clips), atol=1e-4)  # measured 7.5e-9
    out = done("export", applied / "run", "--to", "pt2", "--output", applied / "student.pt2")
    assert "compared on 9 held-out images of the run: the same class for 9 of 9" in out
    program = torch.export.load(applied / "student.pt2").module()
    assert torch.allclose(program(clips), student(clips), atol=1e-5)
    shared = f"top-1 │ {results(applied)['student']['top1']:.2f} %"
    words = ["data.name=videos", f"data.root={applied / 'clips'}", "data.clip.stride=2", "data.clip.views=2"]
    assert shared in done("evaluate", applied / "student.pt2", *words)


def test_onnx_gives_what_the_student_gives(applied):
    pytest.importorskip("onnxscript")
    onnxruntime = pytest.importorskip("onnxruntime")
    done("export", applied / "run", "--to", "onnx", "--output", applied / "student.onnx")
    clips = torch.randn(3, 12, 32, 32)
    (logits,) = onnxruntime.InferenceSession(applied / "student.onnx").run(None, {"images": clips.numpy()})
    student = compressvit.load(applied / "run" / "student")
    assert torch.allclose(torch.from_numpy(logits), student(clips), atol=1e-4)  # measured 1.5e-8


def test_a_run_that_stopped_goes_on_to_the_same_student(applied, tmp_path):
    """Stopped in the last phase, amid its second epoch."""
    recipe, seen = applied / "recipe.yaml", []
    with pytest.MonkeyPatch.context() as patch:
        total = step.total_of

        def counted(*args):
            seen.append(args)
            if len(seen) == 3 * 2 + 3 + 2:
                os.kill(os.getpid(), signal.SIGTERM)
            return total(*args)

        patch.setattr(step, "total_of", counted)
        assert run("apply", "--no-report", recipe, "--output", tmp_path / "run")[0] == 128 + signal.SIGTERM
    assert not (tmp_path / "run" / "student").exists()
    done("apply", "--no-report", recipe, "--output", tmp_path / "run", "--resume")
    assert student_bytes(tmp_path / "run") == student_bytes(applied / "run")


def test_weights_of_images_begin_the_backbone(tmp_path):
    images = timm.create_model("vit_tiny_patch16_224", img_size=48, num_classes=3, **INSIDE)
    save_file(images.state_dict(), tmp_path / "images.safetensors")
    teacher = {name: value for name, value in TEACHER.items() if name != "finetune"}
    recipe = {
        **RECIPE,
        "teacher": {**teacher, "weights": "random", "backbone": str(tmp_path / "images.safetensors"), "num_classes": 2},
        "steps": [{"adaptformer": {"width": 4}}],
    }
    done("apply", "--no-report", with_clips(tmp_path, recipe, 2, 2), "--output", tmp_path / "run")
    found = load_file(tmp_path / "run" / "student" / "model.safetensors")
    kernel = images.patch_embed.proj.weight
    assert torch.equal(found["backbone.patch_embed.proj.weight"], torch.stack([kernel / 2] * 2, dim=2))
    assert torch.equal(found["backbone.blocks.1.mlp.fc1.weight"], images.blocks[1].mlp.fc1.weight)


def test_a_video_model_is_refused_images(tmp_path):
    content = {**RECIPE, "data": {"name": "digits", "batch_size": 8}, "teacher": {**TEACHER, "weights": "random"}}
    content["teacher"].pop("finetune")
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(content))
    message = refused("apply", tmp_path / "recipe.yaml", "--output", tmp_path / "run")
    assert (
        "data.name=digits has images, and the student, video, takes clips of 4 frames; give videos: data.name=videos"
        in message
    )


@pytest.mark.parametrize("name", ["adaptformer_video", "repadapter_video"])
def test_recipes_are_plain(name):
    recipe = load_recipe(name)
    assert (recipe.teacher.model, recipe.data.name) == ("video", "videos")
