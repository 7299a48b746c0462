"""The quickstart, shortened, on a CUDA device in every precision. Run with `pytest -m gpu`."""

from __future__ import annotations

import json

import pytest
import torch

from compressvit.cli import main

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")]


@pytest.mark.parametrize("precision", ["fp32", "bf16", "fp16"])
def test_the_quickstart_on_a_gpu(tmp_path, precision):
    options = ["teacher.finetune.epochs=12", "steps.1.distill.epochs=6", f"steps.1.distill.precision={precision}"]
    assert main(["apply", "quickstart", "--device", "cuda", "--output", str(tmp_path / "run"), *options]) == 0
    results = json.loads((tmp_path / "run" / "results.json").read_text())
    assert results["student"]["top1"] > 50
    assert results["read_back_difference"] < 1e-4
