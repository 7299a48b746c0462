"""Activation checkpointing changes what is kept, and no weight."""

from __future__ import annotations

import pytest
import timm
import torch
from helpers.images import side
from helpers.training import VIT, fit, largest_difference, random_batches, tiny_vit, values

from compressvit.errors import UserError
from compressvit.tasks.base import Labels, task_of
from compressvit.training.pairs import match_layers
from compressvit.training.phases.distill import Distill
from compressvit.training.phases.finetune import Finetune
from compressvit.training.recompute import Recomputed
from compressvit.training.step import Pass
from compressvit.training.terms import labels_term

SWIN = {
    "img_size": 16,
    "patch_size": 2,
    "window_size": 4,
    "in_chans": 1,
    "embed_dim": 8,
    "depths": (2, 2),
    "num_heads": (2, 2),
}
MODELS = {
    "vit": lambda: tiny_vit(drop_path_rate=0.5, proj_drop_rate=0.2),
    "swin": lambda: timm.create_model("swin_tiny_patch4_window7_224", num_classes=4, drop_path_rate=0.5, **SWIN),
    "convnext": lambda: timm.create_model(
        "convnext_atto", num_classes=4, in_chans=1, depths=(1, 1, 1, 1), dims=(8, 8, 8, 8), drop_path_rate=0.5
    ),
    "eva": lambda: timm.create_model("eva02_tiny_patch14_224", num_classes=4, drop_path_rate=0.5, **VIT),
}


def model_of(name):
    torch.manual_seed(0)
    return MODELS[name]()


def batches_for(name):
    size = {"vit": 8, "eva": 8}.get(name, 16 if name == "swin" else 32)
    return [(torch.nn.functional.interpolate(x, size=size), y) for x, y in random_batches(3, 4)]


@pytest.mark.wide_unless(lambda name: name in ("vit", "swin"))
@pytest.mark.parametrize("name", MODELS)
def test_the_weights_are_the_same_to_the_bit(name, tmp_path):
    kept, again = model_of(name), model_of(name)
    for model, recomputed in ((kept, False), (again, True)):
        spec = Finetune(epochs=2, lr=0.01, drop_path=None, activation_checkpointing=recomputed)
        fit(model, spec, batches_for(name), tmp_path / str(recomputed))
        assert not any("forward" in vars(module) for module in model.modules())
    assert largest_difference(values(model_of(name)), values(again)) > 0
    assert largest_difference(values(kept), values(again)) == 0


def saved_bytes(recomputed: bool) -> int:
    """What the forward pass of a deeper model keeps for the backward pass, without its weights."""
    model, total = tiny_vit(depth=8).train(), 0
    spec = Finetune(activation_checkpointing=recomputed)
    weights = {p.untyped_storage().data_ptr() for p in model.parameters()}
    whole = Pass(side(model), None, [labels_term(1.0, 0.0)], task_of(model), torch.autocast("cpu", enabled=False), spec)
    seen = set()

    def note(tensor):
        nonlocal total
        place = tensor.untyped_storage().data_ptr()
        if place not in weights and place not in seen:
            seen.add(place)
            total += tensor.untyped_storage().nbytes()
        return tensor

    images, targets = random_batches(1, 16)[0]
    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        loss, *_ = whole(images, targets, Labels(16, 3))
    whole.close()
    assert loss.isfinite()
    return total


def test_little_is_kept():
    assert saved_bytes(True) < 0.2 * saved_bytes(False)  # measured 0.083


def test_a_block_that_is_looked_into_keeps_all(tmp_path):
    """The relation losses look into the last block; the others are recomputed, and the result is the same."""
    losses = {"attention_relation": {"weight": 1.0}, "hidden_relation": {"weight": 1.0}}
    results = []
    for recomputed in (False, True):
        student, teacher = tiny_vit(seed=1, depth=3, drop_path_rate=0.3), tiny_vit(seed=2, depth=3)
        spec = Distill(epochs=1, lr=0.01, losses=losses, activation_checkpointing=recomputed)
        pairs, _ = match_layers(student, teacher, "matched")
        terms = spec.terms(student, pairs, None, teacher)
        fit(student, spec, random_batches(3, 4), tmp_path / str(recomputed), terms=terms, teacher=side(teacher))
        results.append(values(student))
    assert largest_difference(*results) == 0
    model = tiny_vit(depth=3)
    model.blocks[1].attn.register_forward_hook(lambda *_: None)
    kept = Recomputed(model)
    assert kept.blocks == ["blocks.0", "blocks.2"]
    kept.close()


def test_a_model_without_known_blocks_is_refused():
    with pytest.raises(UserError, match="activation_checkpointing needs"):
        Recomputed(timm.create_model("resnet10t", num_classes=4))
