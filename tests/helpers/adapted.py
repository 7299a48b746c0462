"""Models with adapters that do something, for the tests of pruning."""

from __future__ import annotations

import copy
import functools

from torch import nn

from compressvit.training.phases.prune.neurons import (
    prunable_plan,
)
from compressvit.transforms import Adapters, AdaptFormer
from compressvit.transforms.applying import compress
from helpers.models import build, randomise

SPECS = {
    "adapters": Adapters(ratio=0.25),
    "biased": Adapters(width=6, bias=True),
    "adaptformer": AdaptFormer(width=6, scale="learnable"),
    "serial": AdaptFormer(width=6, form="serial", dropout=0.0),
}
FAMILIES = ("vit", "swin", "convnext", "dinov2_registers")


@functools.cache
def _made(family: str, specs: tuple) -> nn.Module:
    model = compress(build(family), specs)
    for seed, bottleneck in enumerate(prunable_plan(model).bottlenecks(model).values()):
        randomise(bottleneck, 0.2, seed)
    return model


def adapted(family: str, *specs) -> nn.Module:
    """A model whose adapters do something; a copy."""
    return copy.deepcopy(_made(family, specs or (SPECS["adapters"],)))
