"""`merge`: fold what the transforms added into timm's own layers, prove that nothing changed, and write a plain timm model."""

from __future__ import annotations

import copy

import torch
from torch import nn

from compressvit.data.input import InputConfig, input_config
from compressvit.data.spec import Data
from compressvit.errors import UserError
from compressvit.transforms.applying import materialise
from compressvit.transforms.record import compression_of

TOLERANCE = 1e-5  # of the largest output, in float32
DENSE_ADAPTERS = (
    "the Kronecker products became dense matrices; the adapters keep their activation, so this is an artifact with dense `adapters`, "
    "not a plain timm model"
)


def merge(model: nn.Module) -> nn.Module:
    """A plain timm model that computes what a compressed one does, compared with it on random images and on some like photographs.

    Args:
        model: of `compress` or `load`, or with an adapter; it is not changed.

    Returns:
        A model of the same class, with the keys of the untouched backbone. Adapters of Kronecker products leave dense ones: then it
        is no plain timm model, but one with `adapters`, which `save` takes.

    Raises:
        UserError: a transform cannot be folded, or the merged model computes something else.

    Example:
        >>> import timm, compressvit
        >>> backbone = timm.create_model("vit_tiny_patch16_224", num_classes=10)
        >>> adapted = compressvit.compress(backbone, [compressvit.LoRA(rank=4)])  # and trained
        >>> compressvit.merge(adapted).state_dict().keys() == backbone.state_dict().keys()
        True
    """
    like = next(model.parameters())
    exact = in_float32(model)
    merged = merged_copy(exact)
    differences(exact, merged, made_up_images(input_config(exact, Data(name="images"))))
    return merged.to(device=like.device, dtype=like.dtype)


def merged_copy(model: nn.Module) -> nn.Module:
    """What `merge` returns, without the comparison; on the meta device it finds what cannot be merged.

    Raises:
        UserError: a transform cannot be folded; the text says which, why, and what to do instead.
    """
    plans = [plan for plan in compression_of(model).plans if not plan.loads_values]
    if not plans:
        raise UserError("there is nothing to merge: no transform has changed the model")
    for plan in plans:
        if not plan.foldable:
            plan.fold(copy.deepcopy(model))  # raises, and says why
    return materialise(model).eval()


def photograph_like(count: int, config: InputConfig, seed: int = 0) -> torch.Tensor:
    """Normalised random images (count, C, H, W) with a 1/f spectrum, like photographs."""
    generator = torch.Generator().manual_seed(seed)
    white = torch.fft.rfft2(torch.randn(count, config.channels, config.height, config.width, generator=generator))
    rows, columns = torch.fft.fftfreq(config.height), torch.fft.rfftfreq(config.width)
    frequency = (rows[:, None] ** 2 + columns**2).sqrt().clamp(min=1 / max(config.height, config.width))
    pink = torch.fft.irfft2(white / frequency, s=(config.height, config.width))
    pink = (pink - pink.mean((2, 3), keepdim=True)) / pink.std((2, 3), keepdim=True)
    images = (0.45 + 0.25 * pink).clamp(0, 1)
    mean, std = (torch.tensor(v).reshape(-1, 1, 1) for v in (config.mean, config.std))
    return (images - mean) / std


@torch.inference_mode()
def relative_difference(model: nn.Module, other: nn.Module, images: torch.Tensor) -> float:
    """Largest difference of the outputs, relative to the largest output."""
    ours, theirs = model(images), other(images)
    return ((ours - theirs).abs().max() / ours.abs().max()).item()


def in_float32(model: nn.Module) -> nn.Module:
    """A copy on the CPU in eval mode, for comparisons."""
    return copy.deepcopy(model).cpu().float().eval()


def made_up_images(config: InputConfig) -> dict[str, torch.Tensor]:
    size = (config.channels, config.height, config.width)
    random = torch.randn(4, *size, generator=torch.Generator().manual_seed(0))
    return {"random": random, "photograph-like": photograph_like(4, config)}


def differences(
    model: nn.Module, other: nn.Module, tests: dict[str, torch.Tensor], what: str = "the merged model"
) -> dict[str, float]:
    """By name of the images, the largest difference of the outputs relative to the largest; a `UserError` where it is too large."""
    found = {name: relative_difference(model, other, images) for name, images in tests.items()}
    for name, difference in found.items():
        if not difference <= TOLERANCE:  # NaN is not
            raise UserError(
                f"{what} differs on {name} images by {difference:.1e} of the largest output, more than {TOLERANCE:g}, so none is made. "
                "In a deep model, or after a large scale, float32 can be too imprecise: use the unmerged artifact"
            )
    return found
