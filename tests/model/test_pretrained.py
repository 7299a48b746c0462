"""timm's pretrained weights: what is asked for, and what is said where they cannot be had."""

from __future__ import annotations

from typing import Any

import pytest
import timm
import torch
from helpers.models import SWIN, build, outputs

from compressvit.errors import UserError
from compressvit.model import weights

WHERE = "teacher.weights"


def refuse(*args: Any, **kwargs: Any) -> None:
    raise OSError("Name or service not known")


def test_pretrained_without_a_network_says_how_to_supply(monkeypatch):
    model = weights.build("vit_tiny_patch16_224.augreg_in21k_ft_in1k", device="meta")
    for module, name in ((weights, "_require_reachable"), (timm, "create_model")):
        with monkeypatch.context() as patch:
            patch.setattr(weights, "_require_reachable", lambda config: None)
            patch.setattr(module, name, refuse)
            with pytest.raises(UserError) as refusal:
                weights.load_pretrained(model, WHERE)
        for part in (
            "teacher.weights: pretrained: the weights of vit_tiny_patch16_224.augreg_in21k_ft_in1k are not in the local cache",
            "could not be downloaded (OSError: Name or service not known)",
            "model.safetensors of the repository timm/vit_tiny_patch16_224.augreg_in21k_ft_in1k of the Hugging Face Hub",
            "Supply weights as a file: teacher.weights=PATH",
        ):
            assert part in str(refusal.value)


def test_a_model_that_timm_has_no_weights_for():
    model = build("vit")
    model.pretrained_cfg = {"architecture": "vit_tiny_patch16_224"}
    with pytest.raises(
        UserError,
        match=r"student\.weights: pretrained: timm has no .* weights for vit_tiny_.*student\.weights=PATH",
    ):
        weights.load_pretrained(model, "student.weights")


def test_pretrained_values_are_copied(monkeypatch):
    source, model = build("swin", seed=5), build("swin")
    asked = {}
    monkeypatch.setattr(weights, "_require_reachable", lambda config: None)
    monkeypatch.setattr(timm, "create_model", lambda name, **args: (asked.update(args, name=name), source)[1])
    with pytest.raises(UserError, match=r"1000 classes and the model's head 5.*teacher\.finetune"):
        weights.load_pretrained(model, WHERE)
    assert not asked
    weights.load_pretrained(model, WHERE, new_head=True)
    assert torch.equal(outputs(model), outputs(source))
    assert asked == {**SWIN, "name": "swin_tiny_patch4_window7_224.ms_in1k", "pretrained": True}


def test_the_cache_is_asked_before_the_network(monkeypatch):
    import huggingface_hub

    config = {"hf_hub_id": "timm/a_model"}
    monkeypatch.setattr(huggingface_hub, "get_hf_file_metadata", refuse)
    monkeypatch.setattr(huggingface_hub, "try_to_load_from_cache", lambda repository, name: None)
    with pytest.raises(OSError, match="Name or service"):
        weights._require_reachable(config)
    monkeypatch.setattr(huggingface_hub, "try_to_load_from_cache", lambda repository, name: f"/cache/{name}")
    weights._require_reachable(config)
    weights._require_reachable({"url": "https://somewhere"})
