"""Students with prompts, and how their outputs are compared."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from compressvit.transforms import VPT
from compressvit.transforms.applying import compress
from compressvit.transforms.vpt.prompts import Prompts
from helpers.contract import teacher

EXACT = 1e-12  # relative, in float64; measured up to 1.3e-15
FORMS = pytest.mark.parametrize("deep", [True, False], ids=["deep", "shallow"])


def prompted(backbone: str, deep: bool = True, count: int = 3, **options) -> nn.Module:
    """A student in float64 whose prompts are far from zero, in eval mode."""
    torch.manual_seed(3)
    model = compress(teacher(backbone), [VPT(prompts=count, deep=deep, **options)]).double()
    for prompts in prompts_of(model):
        nn.init.normal_(prompts.tokens)
    return model


def prompts_of(model: nn.Module) -> list[Prompts]:
    return [module for module in model.modules() if isinstance(module, Prompts)]


def gap(a: Tensor, b: Tensor) -> float:
    assert a.shape == b.shape
    return ((a - b).abs().max() / b.abs().max()).item()


def shapes(found) -> object:
    if isinstance(found, dict):
        return {key: shapes(value) for key, value in found.items()}
    return [shapes(value) for value in found] if isinstance(found, (list, tuple)) else found.shape
