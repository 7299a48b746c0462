"""`export --to peft`: the terms of `lora` and the classifier, in PEFT's words (with PEFT itself: `test_formats`)."""

from __future__ import annotations

import json

import pytest
import torch
from helpers.models import build, images_for, outputs, randomise
from torch import nn

from compressvit import Adapters, LoRA, compress
from compressvit.artifacts.formats.base import FORMATS, Source
from compressvit.data.input import input_config
from compressvit.data.spec import Data
from compressvit.errors import UserError
from compressvit.model.peft import merge_peft_, read_peft
from compressvit.tasks.base import task_of
from compressvit.transforms.record import trained_names


def source_of(model: nn.Module) -> Source:
    return Source(model.eval(), task_of(model), input_config(model, Data(name="images")))


@pytest.mark.parametrize("name", ["vit", "convnext"])
def test_what_is_written_merges_into_the_teacher_to_the_student(name, tmp_path):
    targets = ("q", "v", "fc1", "fc2") if name == "vit" else ("fc1", "fc2")
    student = compress(build(name), [LoRA(rank=2, alpha=3.0, targets=targets)])
    trained = trained_names(student)
    assert trained is not None
    randomise(nn.ParameterList(p for n, p in student.named_parameters() if n in trained), 0.05)
    FORMATS["peft"].write(source_of(student), tmp_path / "adapter")
    found = build(name)
    before = outputs(found, images_for(name))
    merge_peft_(found, tmp_path / "adapter", "teacher.adapter")
    after, expected = outputs(found, images_for(name)), outputs(student, images_for(name))
    assert torch.allclose(after, expected, rtol=1e-4, atol=1e-5)
    assert not torch.allclose(before, expected, rtol=1e-2, atol=1e-2)
    config = json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())
    if name == "vit":  # q and v are terms of their own in one layer
        assert config["rank_pattern"]["blocks.0.attn.qkv"] == 4
        assert config["alpha_pattern"]["blocks.0.attn.qkv"] == 6.0
        assert "blocks.0.mlp.fc1" not in config["rank_pattern"]
        assert config["modules_to_save"] == ["head"]
    assert read_peft(tmp_path / "adapter", "teacher.adapter").classes == found.num_classes


@pytest.mark.parametrize("steps", [[], [Adapters(width=4)], [LoRA(), Adapters(width=4)]])
def test_of_other_students_peft_has_no_form(steps):
    with pytest.raises(UserError, match="takes the terms of a student with lora alone, and the steps of this one are "):
        FORMATS["peft"].refuse(source_of(compress(build("vit"), steps) if steps else build("vit")))
