"""Small timm models of every family, and the properties that the laws compare."""

from __future__ import annotations

import functools

import timm
import torch
from torch import Tensor, nn

from compressvit.model import ties
from compressvit.model.backbone import input_size
from compressvit.model.family import FAMILIES, NEEDS, Example, Family
from compressvit.model.outputs import in_one
from compressvit.model.surgery import deep_copy


def examples() -> dict[str, Example]:
    """The small models of every family, by name: those with token sequences first, then others with attention, then the rest; of each those
    of families that lack least first."""

    def key(family: Family) -> tuple[bool, bool, int]:
        lacking = [need for need in NEEDS if family.lacks(need) is not None]
        return family.layout != "sequence", family.attention is None, len(lacking)

    families = sorted(FAMILIES.values(), key=key)
    return {name: example for family in families for name, example in family.examples.items()}


def build(name: str, seed: int = 0) -> nn.Module:
    """Build a small model of `examples` in eval mode, with random values in place of what is initially 0 or 1."""
    model, state = _built(name, seed)
    torch.set_rng_state(state)
    return deep_copy(model)


@functools.cache
def _built(name: str, seed: int) -> tuple[nn.Module, Tensor]:
    """A model to copy, and the state of torch's generator after its values were drawn."""
    torch.manual_seed(seed)
    example = examples()[name]
    model = timm.create_model(example.model, **example.args)
    with torch.no_grad():  # initial biases are 0 and norm weights 1, which would hide errors
        for parameter in model.parameters():
            parameter.add_(0.02 * torch.randn_like(parameter))
        for module in model.modules():
            if isinstance(module, nn.BatchNorm2d):  # its statistics are 0 and 1
                statistics = dict(module.named_buffers())
                statistics["running_mean"].normal_(std=0.1)
                statistics["running_var"].uniform_(0.8, 1.25)
    return model.eval(), torch.get_rng_state()


@functools.cache
def teacher(name: str) -> nn.Module:
    """`build(name)`, cached; it must not be changed, and the laws report a transform that does."""
    return build(name)


def family_of(name: str) -> Family:
    """The family of a small model."""
    return next(family for family in FAMILIES.values() if name in family.examples)


def images_for(model: nn.Module, batch: int = 2, seed: int = 1) -> Tensor:
    """Random images of the model's size; 32 × 32 if the model takes any size and its default is larger."""
    height, width = input_size(model)[1:]
    size = (height, width) if hasattr(model, "patch_embed") else (min(height, 32), min(width, 32))
    return torch.randn(batch, 3, *size, generator=torch.Generator().manual_seed(seed))


@torch.no_grad()
def outputs(model: nn.Module, images: Tensor | None = None) -> Tensor:
    """The output of a model for images; by default for `images_for(model)` in the model's precision."""
    return forward(model, images_for(model).to(next(model.parameters()).dtype) if images is None else images)


def forward(model: nn.Module, images: Tensor) -> Tensor:
    """The output of a model as one tensor (B, …): of a detector its logits and boxes of every stage, in rows."""
    return in_one(model(images))


def is_detector(model: nn.Module) -> bool:
    """Whether a model has no features and classifier, as `forward_features` and `forward_head` give them."""
    return not hasattr(model, "forward_head")


def structure(model: nn.Module) -> dict[str, object]:
    """Everything about a model except its values."""
    return {
        "modules": [(path, type(module)) for path, module in model.named_modules()],
        "tensors": {name: (tuple(t.shape), t.dtype) for name, t in model.state_dict().items()},
        "ties": ties.tied_groups(model),
    }


def values(model: nn.Module) -> dict[str, Tensor]:
    """A copy of every tensor, by name."""
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


def same_values(a: dict[str, Tensor], b: dict[str, Tensor]) -> bool:
    """Whether two sets of tensors are equal bit for bit."""
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)
