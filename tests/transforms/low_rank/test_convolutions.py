"""Point-wise convolutions are low rank as the linear layers that they equal, and other convolutions are no targets."""

from __future__ import annotations

import pytest
import torch
from helpers.models import build, outputs
from torch import nn

from compressvit.errors import UserError
from compressvit.model import surgery
from compressvit.testing.pairs import compose_or_refuse
from compressvit.transforms import SSF, Adapters, LoRA, LowRank, RepAdapter
from compressvit.transforms.applying import compress, materialise
from compressvit.transforms.low_rank.layer import FactoredConv2d
from compressvit.transforms.record import compression_of


def images() -> torch.Tensor:
    return torch.randn(12, 3, 224, 224, generator=torch.Generator().manual_seed(0))


def same_as(linear: nn.Module) -> nn.Module:
    """The ConvNeXt with convolutional MLPs that computes what one with linear layers does."""
    made = build("convnext_conv_mlp")
    state = made.state_dict()
    made.load_state_dict({name: tensor.reshape(state[name].shape) for name, tensor in linear.state_dict().items()})
    return made


def test_a_convolution_becomes_two():
    made = compress(build("convnext_conv_mlp"), [LowRank(rank=3, metric="weights")])
    layers = [module for module in made.modules() if isinstance(module, FactoredConv2d)]
    assert len(layers) == 2 * 5
    for layer in layers:
        assert type(layer.down) is type(layer.up) is nn.Conv2d
        assert layer.down.weight.shape == (3, layer.in_channels, 1, 1)
        assert layer.down.bias is None
        assert layer.up.weight.shape == (layer.out_channels, 3, 1, 1)
        assert layer.up.bias.shape == (layer.out_channels,)


@pytest.mark.wide_unless(lambda options: options["metric"] == "inputs")
@pytest.mark.parametrize(
    "options",
    [{"metric": "weights"}, {"metric": "inputs", "sequential": False}, {"metric": "outputs"}],
    ids=["weights", "inputs", "in_order"],
)
def test_it_is_fitted_as_the_linear_layer_that_it_equals(options):
    linear = build("convnext")
    spec = LowRank(budget={"parameters": 0.7}, **options)
    expected = compress(linear, [spec], calibration=images())
    made = compress(same_as(linear), [spec], calibration=images())
    ranks = compression_of(expected).plans[0].ranks
    assert compression_of(made).plans[0].ranks == ranks
    assert len(ranks) >= 2
    error = (outputs(made) - outputs(expected)).norm() / (outputs(linear) - outputs(expected)).norm()
    assert error < 1e-3  # measured up to 1.1e-4


def test_it_folds_into_a_convolution():
    made = compress(build("convnext_conv_mlp"), [LowRank(rank=3, metric="weights")])
    plain = materialise(made)
    assert {type(plain.get_submodule(f"stages.0.blocks.0.mlp.{name}")) for name in ("fc1", "fc2")} == {nn.Conv2d}
    assert not surgery.added_modules(plain)
    assert (outputs(plain) - outputs(made)).abs().max() < 1e-5


@pytest.mark.wide_unless(lambda spec: spec.name == "adapters")
@pytest.mark.parametrize(
    "spec",
    [SSF(std=0.1), LoRA(rank=2, targets=("fc1", "fc2")), Adapters(width=2), RepAdapter(width=2)],
    ids=lambda s: s.name,
)
def test_adapters_work_on_it(spec):
    low_rank = LowRank(rank=3, metric="weights")
    for steps in ((low_rank, spec), (spec, low_rank)):
        compose_or_refuse(*steps, "convnext_conv_mlp")
    assert compose_or_refuse(low_rank, spec, "convnext_conv_mlp") is None


def test_another_convolution_is_no_target():
    with pytest.raises(UserError, match=r"low_rank.targets: 'conv_dw' matches no linear layer of stages.0.blocks.0"):
        compress(build("convnext"), [LowRank(rank=2, metric="weights", targets=("conv_dw",))])
