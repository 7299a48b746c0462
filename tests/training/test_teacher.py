"""The teacher of a run: it is only looked at, sees images as it knows them, and may be of another kind."""

from __future__ import annotations

import json

import numpy as np
import pytest
import timm
import torch
import torch.nn.functional as F
from helpers.images import side
from helpers.runs import EPOCH, done, metrics, refused
from helpers.training import VIT, fit, largest_difference, random_batches, tiny_vit, values
from timm.layers import DropPath

import compressvit.training.stage
from compressvit.training.pairs import match_layers
from compressvit.training.phases.distill import Distill
from compressvit.training.terms import build_terms
from compressvit.training.terms.section import losses_section
from compressvit.transforms.applying import compress
from compressvit.transforms.multiplex import Multiplex


def distilling(student, teacher, **losses):
    pairs, _ = match_layers(student, teacher, "matched")
    return build_terms(losses_section()(**losses), pairs, classes=student.num_classes)


def test_the_teacher_is_only_looked_at(tmp_path):
    teacher = tiny_vit(seed=1, drop_path_rate=0.5, proj_drop_rate=0.5).train()
    student = compress(tiny_vit(seed=1), [Multiplex(share=2)])
    before, modes, outputs = values(teacher), [], []
    watching = teacher.blocks[1].register_forward_hook(
        lambda module, args, output: modes.append(module.training) or outputs.append(output.requires_grad)
    )
    spec = Distill(epochs=2)
    fit(student, spec, random_batches(3, 4), tmp_path, terms=distilling(student, teacher), teacher=side(teacher))
    watching.remove()
    assert modes == [False] * 6
    assert outputs == [False] * 6
    assert largest_difference(values(teacher), before) == 0
    assert all(p.grad is None for p in teacher.parameters())
    assert largest_difference(values(student), values(compress(tiny_vit(seed=1), [Multiplex(share=2)]))) > 1e-4
    for model in (teacher, student):
        assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())


def test_teacher_accuracy_is_logged_beside_the_students(tmp_path):
    teacher = tiny_vit(seed=1)
    batches = random_batches(1, 8)
    with torch.no_grad():
        right = 100 * (teacher.eval()(batches[0][0]).argmax(1) == batches[0][1]).float().mean().item()
    student = tiny_vit(seed=2)
    spec = Distill(epochs=1, log_every=1)
    heard = fit(student, spec, batches, tmp_path, terms=distilling(student, teacher), teacher=side(teacher))
    line = heard.of("train")[0]
    assert line["teacher_top1"] == pytest.approx(right)
    assert 0 < line["teacher_top1"] < 100
    assert line["top1"] != line["teacher_top1"]


SIZES = [
    "teacher.args={img_size: 16, patch_size: 8, embed_dim: 16, depth: 2, num_heads: 2}",  # 3 channels, mean 0.5
    "student.model=deit_tiny_patch16_224",  # ImageNet's mean
    "student.weights=random",
    f"student.args={json.dumps(VIT)}",
]


def test_the_teacher_sees_the_images_as_it_knows_them(recipe, tmp_path, monkeypatch):
    seen: dict[str, list] = {"teacher": [], "student": [], "trained teacher": []}
    original = compressvit.training.stage.train

    def watch(student, spec, phase, *args, teacher=None, **kwargs):
        mine = "student" if teacher else "trained teacher"
        hooks = [student.model.register_forward_pre_hook(lambda m, images: seen[mine].append(images[0].clone()))]
        if teacher:
            keep = lambda m, images: seen["teacher"].append(images[0].clone())  # noqa: E731
            hooks.append(teacher.model.register_forward_pre_hook(keep))
        report = original(student, spec, phase, *args, teacher=teacher, **kwargs)
        for hook in hooks:
            hook.remove()
        return report

    monkeypatch.setattr(compressvit.training.stage, "train", watch)
    done("apply", "--no-report", recipe, "--output", tmp_path / "run", *SIZES, "steps.1.distill.epochs=1")
    assert seen["trained teacher"][0].shape == (8, 3, 16, 16)
    pairs = [(s, t) for s, t in zip(seen["student"], seen["teacher"], strict=False) if s.shape[0] == t.shape[0]]
    assert len(pairs) >= EPOCH
    mean, std = np.mean([0.485, 0.456, 0.406]), np.mean([0.229, 0.224, 0.225])
    for ours, theirs in pairs[:EPOCH]:
        assert ours.shape == (8, 1, 8, 8)
        assert theirs.shape == (8, 3, 16, 16)
        pixels = ours * std + mean
        assert pixels.min() > -1e-5
        assert pixels.max() < 1 + 1e-5
        pixels = F.interpolate(pixels, (16, 16), mode="bicubic", antialias=True).expand(-1, 3, -1, -1)
        assert (theirs - (pixels - 0.5) / 0.5).abs().max() < 1e-5


def test_a_trained_teacher_leaves_no_stochastic_depth_behind(recipe, tmp_path, monkeypatch):
    rates = {}
    original = compressvit.training.stage.train

    def watch(student, spec, phase, *args, **kwargs):
        report = original(student, spec, phase, *args, **kwargs)
        rates[phase.name] = [m.drop_prob for m in student.model.modules() if isinstance(m, DropPath)]
        return report

    monkeypatch.setattr(compressvit.training.stage, "train", watch)
    overrides = ["teacher.finetune.drop_path=0.3", "steps.1.distill.epochs=1"]
    done("apply", "--no-report", recipe, "--output", tmp_path / "run", *overrides)
    assert rates == {"teacher": [0.3, 0.3], "1_distill": []}


def test_a_teacher_of_another_architecture_teaches_its_prediction(recipe, tmp_path):
    overrides = [
        "teacher={model: test_resnet, weights: train, finetune: {epochs: 1}}",
        "student.model=vit_tiny_patch16_224",
        "student.weights=random",
        f"student.args={json.dumps(VIT)}",
        "data.limit_train=8",
        "data.limit_val=4",
        "steps.1.distill={epochs: 1, log_every: 1}",
    ]
    out = done("apply", "--no-report", recipe, "--output", tmp_path / "run", *overrides)
    for words in ("compressvit knows no blocks of test_resnet", "relations are not distilled"):
        assert words in out
    line = metrics(tmp_path / "run", phase="1_distill", kind="train")[0]
    assert line["loss"] == line["prediction"] > 0
    assert not {"attention_relation", "hidden_relation"} & line.keys()
    manifest = json.loads((tmp_path / "run" / "student" / "compressvit.json").read_text())
    assert manifest["architecture"] == "vit_tiny_patch16_224"


def test_weights_that_cannot_be_had_are_refused_before_anything_runs(recipe, tmp_path, monkeypatch):
    import huggingface_hub

    def unreachable(*args, **kwargs):
        raise ConnectionError("the network is down")

    monkeypatch.setattr(huggingface_hub, "get_hf_file_metadata", unreachable)
    monkeypatch.setattr(huggingface_hub, "try_to_load_from_cache", lambda *args, **kwargs: None)
    monkeypatch.setattr(timm, "create_model", offline(timm.create_model))
    message = refused("apply", recipe, "--output", tmp_path / "run", "teacher={model: deit_tiny_patch16_224.fb_in1k}")
    for words in ("deit_tiny_patch16_224.fb_in1k", "could not be downloaded", "network is down", "model.safetensors"):
        assert words in message
    assert "teacher.weights=PATH" in message
    assert not (tmp_path / "run").exists()


def offline(create_model):
    def create(name, pretrained=False, **kwargs):
        assert not pretrained, "the hub is asked first"
        return create_model(name, pretrained=False, **kwargs)

    return create
