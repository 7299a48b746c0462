"""The memory of inference, against counting by hand."""

from __future__ import annotations

import copy

import torch
from helpers.models import build
from torch import nn

from compressvit.model.backbone import input_size
from compressvit.model.memory import inference_memory

CPU = torch.device("cpu")


class Steps(nn.Module):
    """Holds three images at once in the end: its input is not counted, and what is freed is counted no longer."""

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(1000))
        self.tied = self.weight

    def forward(self, images):
        a = images + 1  # 1 image
        b = a * 2  # 2
        del a
        c = b.flatten(1)  # a view, so 1
        for _ in range(5):
            c = c.exp()  # the old one is freed when the new one is there: b, the old one and the new one
        return c + b.flatten(1)


def test_it_is_what_is_held_at_once():
    image = 4 * 3 * 32 * 32
    assert inference_memory(Steps(), (3, 32, 32), CPU) == 4 * 1000 + 3 * image


def test_a_deeper_model_needs_more_weights_and_a_wider_image_more_of_the_rest():
    model = build("vit").eval()
    size = input_size(model)
    whole = inference_memory(model, size, CPU)
    assert inference_memory(model, size, CPU) == whole  # nothing is left of the first time
    shallow = copy.deepcopy(model)
    removed = shallow.blocks.pop(-1)
    freed = sum(4 * p.numel() for p in removed.parameters())
    assert inference_memory(shallow, size, CPU) == whole - freed
    assert whole > sum(4 * p.numel() for p in model.parameters())
