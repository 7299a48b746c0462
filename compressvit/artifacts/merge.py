"""`merge`: fold what transforms added into timm's own layers, and check that the plain timm model computes the same."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

import torch
from timm.models import save_for_hf
from torch import nn

from compressvit.data.input import InputConfig, input_config
from compressvit.data.spec import Data
from compressvit.errors import UserError, switch
from compressvit.files import usual_mode
from compressvit.model import stored, surgery, ties
from compressvit.model.cost import file_bytes
from compressvit.model.outputs import in_one
from compressvit.transforms import TRANSFORMS
from compressvit.transforms.applying import materialise
from compressvit.transforms.record import compression_of

GROWN = 1.05  # from so many times the unmerged parameters on, a merge has undone a compression
TOLERANCE = 1e-5  # of the largest output; weights are rounded to float32, and what is computed with them is not


def merge(model: nn.Module) -> nn.Module:
    """Return a plain timm model that computes the same as a compressed one; both are compared on random and photograph-like images.

    Args:
        model: from `compress` or `load`, or with a loaded adapter; it is not changed.

    Returns:
        A model of the same class, with the keys of the original backbone. Adapters made of Kronecker products become dense `adapters`: the
        result is then not a plain timm model, but `save` accepts it. Blocks that are narrower stay so.

    Raises:
        UserError: a transform cannot be folded, or the outputs of the merged model differ.

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
    """The merged model of `merge` without the comparison; also works on the meta device, to check whether a model can be merged.

    Raises:
        UserError: a transform cannot be folded; the message says which, why, and what to do instead.
    """
    plans = [plan for plan in compression_of(model).plans if not plan.loads_values]
    if not plans:
        raise UserError("there is nothing to merge: no transform has changed the model")
    for plan in plans:
        if not plan.foldable:
            plan.fold(surgery.deep_copy(model))  # raises a UserError with the reason
    merged = materialise(model).eval()
    if compression_of(merged).plans == plans:
        names = ", ".join(plan.transform for plan in plans)
        raise UserError(
            f"there is nothing to merge: {plans[-1].left}; the student that {names} made is what a merge would write"
        )
    return merged


def left_by_merge(words: Iterable[str]) -> str:
    """What a merged model is, if steps of these words have left a plan; "" for a plain timm model."""
    return "; ".join(dict.fromkeys(TRANSFORMS[word].plan_class.left for word in words))


def refuse_growth(model: nn.Module, merged: nn.Module) -> None:
    """Raise a `UserError` where merging undoes a compression: where plain layers have clearly more parameters than what they replace, or
    take clearly more bytes."""
    if (found := growth(model, merged)) is not None:
        unit, before, after = found
        raise UserError(
            f"the student has {before:,} {unit}, and with plain layers in the place of its own {after:,}: that undoes its "
            f"compression. Give {switch('dense')} for that all the same"
        )


def growth(model: nn.Module, merged: nn.Module) -> tuple[str, int, int] | None:
    """Of what a merged model has clearly more, parameters or bytes, and how many both have; None where it has not."""
    for count, unit in ((ties.count_parameters, "parameters"), (file_bytes, "bytes")):
        before, after = count(model), count(merged)
        if after > GROWN * before:
            return unit, before, after
    return None


def save_for_timm(model: nn.Module, folder: Path) -> None:
    """Write a plain timm model into an empty folder, for `timm.create_model("local-dir:FOLDER", pretrained=True)`."""
    names = stored.class_names(model)
    save_for_hf(
        model, str(folder), model_config={stored.LABEL_NAMES: names} if names else None, safe_serialization=True
    )
    for file in folder.iterdir():
        if file.name not in ("config.json", stored.TENSORS):
            file.unlink()
    stored.write_checked(stored.read_safetensors(folder / stored.TENSORS), folder / stored.TENSORS)
    usual_mode(folder / stored.TENSORS)


def photograph_like(count: int, config: InputConfig, seed: int = 0) -> torch.Tensor:
    """Normalised random images (count, C, H, W) with a 1/f spectrum like that of photographs."""
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
    """Largest absolute difference of the outputs, relative to the largest output."""
    ours, theirs = in_one(model(images)), in_one(other(images))
    largest = ours.abs().max().clamp(min=torch.finfo(ours.dtype).tiny)  # a classifier may start at zero
    return ((ours - theirs).abs().max() / largest).item()


def in_float32(model: nn.Module) -> nn.Module:
    """A copy on the CPU in eval mode, for comparisons."""
    return surgery.deep_copy(model).cpu().float().eval()


def made_up_images(config: InputConfig) -> dict[str, torch.Tensor]:
    size = (config.channels, config.height, config.width)
    random = torch.randn(4, *size, generator=torch.Generator().manual_seed(0))
    return {"random": random, "photograph-like": photograph_like(4, config)}


def differences(
    model: nn.Module, other: nn.Module, tests: dict[str, torch.Tensor], what: str = "the merged model"
) -> dict[str, float]:
    """By name of the images, the largest difference of the outputs relative to the largest; a `UserError` where it is too large.

    Both models compute in float64: in float32 either is off by more than the merge where a large scale cancels out.
    """
    model, other = (surgery.deep_copy(m).double() for m in (model, other))
    found = {name: relative_difference(model, other, images.double()) for name, images in tests.items()}
    for name, difference in found.items():
        if not difference <= TOLERANCE:  # NaN is not
            raise UserError(
                f"{what} differs on {name} images by {difference:.1e} of the largest output, more than {TOLERANCE:g}, so none is made. "
                "After a very large scale, weights in float32 can be too imprecise: use the unmerged artifact"
            )
    return found
