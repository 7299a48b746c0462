"""What a merge is checked by: that every step folds, and the difference on made-up images."""

from __future__ import annotations

import copy

import pytest
import timm
import torch
from helpers.models import VIT, build, images_for, outputs, randomise
from torch import nn

from compressvit.artifacts.merge import differences, merge, merged_copy, photograph_like, relative_difference
from compressvit.data.input import InputConfig
from compressvit.errors import UserError
from compressvit.model import surgery
from compressvit.transforms import AdaptFormer, HeadNorm, LoRA, Multiplex, RepAdapter
from compressvit.transforms.applying import compress

SIZE = 64
MEAN, STD = (0.1, 0.45, 0.8), (0.5, 0.25, 0.1)


@pytest.fixture(scope="module")
def pixels() -> torch.Tensor:
    """Of images normalised for a model, back in 0..1."""
    images = photograph_like(64, InputConfig(3, SIZE, SIZE, MEAN, STD, "bicubic", 1.0))
    return images * torch.tensor(STD).reshape(-1, 1, 1) + torch.tensor(MEAN).reshape(-1, 1, 1)


def test_they_are_normalised_per_channel(pixels):
    assert pixels.shape == (64, 3, SIZE, SIZE)
    assert pixels.min() == pytest.approx(0, abs=1e-5)
    assert pixels.max() == pytest.approx(1, abs=1e-5)
    assert pixels.mean((0, 2, 3)).tolist() == pytest.approx([0.45] * 3, abs=0.01)
    assert pixels.std((0, 2, 3)).tolist() == pytest.approx([0.25] * 3, abs=0.02)


def test_the_spectrum_falls_with_the_frequency_in_every_direction(pixels):
    """Amplitudes as 1/f, so that f · amplitude is the same everywhere (but where pixels were cut off at 0 and 1)."""
    amplitude = torch.fft.rfft2(pixels).abs().square().mean((0, 1)).sqrt()
    rows, columns = torch.fft.fftfreq(SIZE)[:, None], torch.fft.rfftfreq(SIZE)
    frequency = (rows**2 + columns**2).sqrt()
    flat = (frequency * amplitude)[(frequency > 0.05) & (frequency < 0.4)]
    assert flat.std() / flat.mean() < 0.12  # measured 0.08
    along = [(frequency * amplitude)[i, j] for i, j in ((10, 0), (-10, 0), (0, 10), (7, 7), (-7, 7))]
    assert min(along) > 0.75 * max(along)


def test_the_difference_is_the_largest_in_parts_of_the_largest_output():
    class Constant(nn.Module):
        def __init__(self, *values: float):
            super().__init__()
            self.values = torch.tensor([values], dtype=torch.float32)

        def forward(self, images: torch.Tensor) -> torch.Tensor:
            return self.values

    images = torch.zeros(1)
    assert relative_difference(Constant(1, -8), Constant(1, -6), images) == pytest.approx(0.25)
    assert relative_difference(Constant(1, -8), Constant(1, -10), images) == pytest.approx(0.25)
    assert relative_difference(Constant(1, 8), Constant(5, 8), images) == pytest.approx(0.5)


def test_models_that_compute_zero_do_not_differ():
    """As with a classifier that starts at zero and was not trained."""
    model = build("vit")
    nn.init.zeros_(model.head.weight)
    nn.init.zeros_(model.head.bias)
    images = images_for(model)
    assert relative_difference(model, copy.deepcopy(model), images) == 0
    assert relative_difference(model, build("vit"), images) > 1


def test_a_large_scale_on_large_weights_is_merged():
    """RepAdapter's s = 10, from the paper's grid: in float32 the outputs differ by 7e-5, of which the merge has 5e-6."""
    torch.manual_seed(0)
    model = compress(timm.create_model("vit_tiny_patch16_224", **{**VIT, "depth": 12}), [RepAdapter(scale=10.0)])
    added = surgery.added_parameters(model)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name in added:
                parameter.add_(0.3 * torch.randn_like(parameter))
            elif parameter.ndim == 2:
                parameter.mul_(3)
    merged, images = merge(model), images_for(model)
    before, after = (outputs(copy.deepcopy(m).double(), images.double()) for m in (model.eval(), merged.eval()))
    assert ((after - before).abs().max() / before.abs().max()) < 1e-5  # measured 5e-6


def test_a_model_of_four_channels_is_merged():
    torch.manual_seed(0)
    model = compress(timm.create_model("vit_tiny_patch16_224", **VIT, in_chans=4), [LoRA(rank=2)]).eval()
    added = surgery.added_parameters(model)
    randomise(nn.ParameterList(p for n, p in model.named_parameters() if n in added))
    images = torch.randn(2, 4, VIT["img_size"], VIT["img_size"])
    assert (outputs(merge(model), images) - outputs(model, images)).abs().max() < 1e-5


def test_what_is_computed_in_float64_is_not_changed_for_it():
    model = build("vit")
    assert differences(model, model, {"random": images_for(model)}) == {"random": 0.0}
    assert {p.dtype for p in model.parameters()} == {torch.float32}
    with pytest.raises(UserError, match=r"differs on random images by .* of the largest output, more than 1e-05"):
        differences(model, build("vit", seed=1), {"random": images_for(model)})


@pytest.mark.parametrize("other", [AdaptFormer(width=2), Multiplex(share=2)], ids=lambda spec: spec.name)
@pytest.mark.parametrize("first", [False, True])
def test_one_step_that_cannot_be_folded_is_enough(other, first):
    """Not a model in which only the other step is folded."""
    steps = [other, LoRA(rank=2)] if first else [LoRA(rank=2), other]
    if isinstance(other, Multiplex) and not first:
        steps = [HeadNorm(), other]
    with pytest.raises(UserError, match=f"{other.name} cannot be folded"):
        merged_copy(compress(build("vit"), steps))
