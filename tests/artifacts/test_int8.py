"""`export --to onnx --precision int8`: what onnxruntime rounds, and what it does not see."""

from __future__ import annotations

import pytest
import timm
import torch
from helpers.models import VIT, randomise

from compressvit import LORS, Multiplex, compress
from compressvit.artifacts.formats.base import FORMATS, Source
from compressvit.data.input import input_config
from compressvit.data.spec import Data
from compressvit.errors import UserError
from compressvit.tasks.base import task_of

pytestmark = pytest.mark.wide
onnx = pytest.importorskip("onnx")
pytest.importorskip("onnxruntime")


def size_of(folder, step, precision: str) -> int:
    torch.manual_seed(0)
    model = compress(timm.create_model("vit_tiny_patch16_224", **{**VIT, "depth": 2}), [step])
    randomise(model, 0.05)
    source = Source(model.eval(), task_of(model), input_config(model, Data(name="images")), precision)
    FORMATS["onnx"].write(source, folder / f"{precision}.onnx")
    return (folder / f"{precision}.onnx").stat().st_size


def test_a_shared_weight_is_rounded_once(tmp_path):
    """Layers use its transpose, and what rounds weights takes stored ones alone."""
    whole, rounded = (size_of(tmp_path, Multiplex(share=2, mlp_conv=3), precision) for precision in ("fp32", "int8"))
    assert rounded < 0.5 * whole  # measured 0.42; 0.85 where shared weights were left as they are


def test_weights_that_are_not_stored_are_not_left_in_silence(tmp_path):
    with pytest.raises(UserError, match=r"precision='int8': onnxruntime finds few weights to round in this model"):
        size_of(tmp_path, LORS(share=2, rank=4, init="scratch"), "int8")
