"""A transformed model is captured whole by torch.compile."""

from __future__ import annotations

import pytest
import timm
import torch
from helpers.contract import teacher
from helpers.models import BACKBONES, images_for, outputs

from compressvit.transforms import IRPE, Multiplex
from compressvit.transforms.applying import compress


@pytest.mark.parametrize("backbone", ["vit", "swin"])
def test_compile_captures_the_whole_student(backbone):
    architecture, args = BACKBONES[backbone]
    shallow = timm.create_model(
        architecture, **args | {"vit": {"depth": 2}, "swin": {"depths": (2,), "num_heads": (2,)}}[backbone]
    )
    model = compress(shallow.eval(), [Multiplex(share=2, mixing_bias=True, mlp_conv=3, form="reference")])
    images = images_for(model)
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    difference = (outputs(compiled, images) - outputs(model, images)).abs().max()
    assert difference <= 1e-6  # seen 0.0


@pytest.mark.slow
def test_compiled_student_computes_the_same():
    model = compress(teacher("vit"), [Multiplex(share=2, mixing_bias=True, mlp_conv=3, form="reference"), IRPE()])
    images = images_for(model)
    difference = (outputs(torch.compile(model), images) - outputs(model, images)).abs().max()
    assert difference <= 1e-6  # TOLERANCE
