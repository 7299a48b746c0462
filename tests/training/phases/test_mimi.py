"""MiMi on its kinds of backbones, Swin, ViT and CvT: adapters are trained, pruned and taken out. Counts are in tests/test_published.py."""

from __future__ import annotations

import json

import pytest
import torch
from helpers.runs import done
from safetensors.torch import load_file
from torch import nn

from compressvit.artifacts import artifact
from compressvit.model.backbone import describe, head_names
from compressvit.training.phases.prune.neurons import prunable_plan
from compressvit.transforms.record import trained_names

BACKBONES = {
    "swin": (
        "swin_tiny_patch4_window7_224",
        "img_size: 8, patch_size: 2, window_size: 2, embed_dim: 16, depths: [1, 1], num_heads: [2, 2]",
    ),
    "vit": ("vit_tiny_patch16_224", "img_size: 8, patch_size: 4, embed_dim: 16, depth: 2, num_heads: 2"),
    "cvt": (
        "cvt_13",
        "img_size: 8, patch_sizes: [3, 3], patch_strides: [1, 2], patch_paddings: [1, 1], embed_dims: [16, 32], depths: [1, 1], "
        "num_heads: [2, 2]",
    ),
}
RECIPE = """
teacher: {model: MODEL, weights: train, args: {in_chans: 1, ARGS}, finetune: {epochs: 1, lr: 1.0e-3}}
student: {head: new}
data: {name: digits, batch_size: 8, limit_train: 64, limit_val: 16}
steps:
  - adapters: {ratio: 0.25, init: noise}
  - prune: {epochs: 1, lr: 1.0e-2, target: {neurons: 0.15}}
"""


@pytest.mark.wide_unless(lambda name: name == "cvt")
@pytest.mark.parametrize("name", BACKBONES)
def test_neurons_are_trained_ranked_and_taken_out(name, tmp_path):
    recipe = tmp_path / "recipe.yaml"
    model, args = BACKBONES[name]
    recipe.write_text(RECIPE.replace("MODEL", model).replace("ARGS", args))
    done("apply", "--no-report", recipe, "--output", tmp_path / "run")
    cycles = json.loads((tmp_path / "run" / "results.json").read_text())["phases"]["1_prune"]["widths"]
    counts = [sum(widths.values()) for widths in cycles]
    student = artifact.load(tmp_path / "run" / "student")
    blocks = {info.path: info.width for info in describe(student).blocks}
    start = sum(2 * (width // 4) for width in blocks.values())
    assert counts == [start, start // 2, start // 4, start // 8]
    assert prunable_plan(student).widths == cycles[-1]
    assert len(set(cycles[-1].values())) > 1, "all neurons are ranked together"
    for path, left in cycles[-1].items():
        adapter: nn.Module | None = getattr(student.get_submodule(path), "adapter", None)
        assert (adapter is None) == (left == 0), path
        if adapter is not None:
            width = blocks[path.rpartition(".")[0]]
            assert {n: tuple(p.shape) for n, p in adapter.named_parameters()} == {
                "down.weight": (left, width),
                "up.weight": (width, left),
            }
    names = (trained_names(student) or set()) - head_names(student)
    trained = sum(student.get_parameter(n).numel() for n in names)
    assert trained == sum(2 * blocks[path.rpartition(".")[0]] * left for path, left in cycles[-1].items())
    before, after = (load_file(tmp_path / "run" / part / "model.safetensors") for part in ("teacher", "student"))
    assert after.keys() - before.keys() == names
    assert all(torch.equal(after[n], before[n]) for n in before.keys() & after.keys() if not n.startswith("head."))
