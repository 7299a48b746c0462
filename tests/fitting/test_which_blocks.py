"""Which layers the fit in order comes to: all that are asked for, in the order they run, wherever in the model they are."""

from __future__ import annotations

import copy
import itertools

import pytest
from helpers.models import build, images_for

from compressvit.fitting.in_order import LayerFit, fit_in_order

LAYERS = ("mlp.fc2", "attn.qkv")  # not in the order they run


@pytest.mark.parametrize("blocks", [c for n in (1, 2) for c in itertools.combinations(range(4), n)], ids=str)
def test_every_layer_is_fitted_once_in_the_order_they_run(blocks):
    teacher = build("vit")
    seen: list[str] = []

    def fit_of(path: str) -> LayerFit:
        return LayerFit(lambda module, regression: seen.append(path) or 0.5)

    asked = [f"blocks.{i}.{layer}" for i in reversed(blocks) for layer in LAYERS]
    errors = fit_in_order(
        copy.deepcopy(teacher), teacher, images_for(teacher, 4).split(2), {p: fit_of(p) for p in asked}
    )
    assert seen == list(errors) == [f"blocks.{i}.{layer}" for i in blocks for layer in reversed(LAYERS)]
    assert set(errors.values()) == {0.5}
