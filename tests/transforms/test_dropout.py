"""Dropout inside what methods add: there in training with the papers' default, and gone in eval mode."""

from __future__ import annotations

import copy

import pytest
import torch
from helpers.contract import backbones_of, teacher
from helpers.models import images_for, randomise
from torch import nn

from compressvit.model import surgery
from compressvit.transforms import TRANSFORMS, VPT, AdaptFormer, FacT, RepAdapter, Transform
from compressvit.transforms.applying import compress

# As released; VPT's code has none by default.
DEFAULTS = {"adaptformer": 0.1, "fact": 0.1, "repadapter": 0.1, "vpt": 0.0}
CASES: list[Transform] = [
    AdaptFormer(width=8, dropout=0.5),
    AdaptFormer(width=8, dropout=0.5, input="residual"),
    FacT(rank=4, dropout=0.5),
    FacT(rank=4, form="tt", dropout=0.5),
    RepAdapter(width=8, dropout=0.5),
    VPT(prompts=3, dropout=0.5),
]


def test_the_defaults_are_those_of_the_released_code():
    fields = {name: spec.model_fields["dropout"] for name, spec in TRANSFORMS.items() if "dropout" in spec.model_fields}
    assert {name: field.default for name, field in fields.items()} == DEFAULTS
    assert {spec.name for spec in CASES} == DEFAULTS.keys(), "each is tried below"


@pytest.mark.wide_unless(lambda spec, backbone: backbone == backbones_of(spec)[0] and spec.name != "repadapter")
@pytest.mark.parametrize(
    ("spec", "backbone"),
    [(spec, name) for spec in CASES for name in ("vit", "swin", "convnext") if name in backbones_of(spec)],
    ids=lambda value: getattr(value, "name", value),
)
def test_dropout_is_there_in_training_alone(spec, backbone):
    torch.manual_seed(0)
    model = compress(teacher(backbone), [spec])
    added = surgery.added_parameters(model)
    randomise(nn.ParameterList(p for n, p in model.named_parameters() if n in added), 0.2)
    without = compress(teacher(backbone), [spec.model_copy(update={"dropout": 0.0})])
    without.load_state_dict(model.state_dict())
    images = images_for(model)
    with torch.no_grad():
        for chosen, train, same in ((model, True, False), (model, False, True), (without, True, True)):
            chosen = copy.deepcopy(chosen).train(train)
            assert torch.equal(chosen(images), chosen(images)) == same
        assert torch.equal(model.eval()(images), without.eval()(images))


def test_dropout_is_of_the_hidden_neurons():
    """A whole neuron is dropped for a token and the others are scaled, so outputs keep their mean."""
    torch.manual_seed(0)
    branch = compress(teacher("vit"), [AdaptFormer(width=8, scale=1.0, dropout=0.5)]).blocks[0].adaptformer
    term = compress(teacher("vit"), [FacT(rank=4, form="tt", dropout=0.5)]).blocks[0].attn.proj.fact
    for module, last in ((branch, branch.up.weight), (term, term.v)):
        randomise(module, 0.5)
        x = torch.randn(4000, 48)
        with torch.no_grad():
            nn.init.eye_(last)
            if module is branch:
                branch.up.bias.zero_()
            expected, found = module.eval()(x)[:, : last.shape[1]], module.train()(x)[:, : last.shape[1]]
        alive = expected != 0
        dropped = (found == 0) & alive
        assert abs(dropped.sum() / alive.sum() - 0.5) < 0.02
        kept = alive & ~dropped
        torch.testing.assert_close(found[kept], 2 * expected[kept])
