"""The ground truth of a batch: a tensor, a list with an entry for each image, or several of these by name.

An image without a label has the number `NO_LABEL` in its place, and the stand-in of a broken file `NO_IMAGE`.
"""

from __future__ import annotations

from collections.abc import Mapping
from itertools import compress
from numbers import Real
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch
    from torch import Tensor

NO_LABEL = -1  # the target of an image that has no label
NO_IMAGE = -2  # the target of a stand-in for a broken file; loaders leave it out


def at_least(targets: Any, least: int) -> Tensor:
    """Which images have a target that is not a number below `least`, bool (B,).

    Args:
        targets: of B images.
        least: 0 for images with a label, −1 for images at all.
    """
    import torch

    if isinstance(targets, Mapping):
        targets = next(iter(targets.values()))
    if not isinstance(targets, torch.Tensor):
        return torch.tensor([not (isinstance(target, Real) and target < least) for target in targets], dtype=torch.bool)
    if targets.ndim == 1:
        return targets >= least
    return torch.ones(len(targets), dtype=torch.bool, device=targets.device)


def take(targets: Any, kept: Tensor) -> Any:
    """The targets of the images where `kept`, bool (B,), is true."""
    import torch

    if isinstance(targets, torch.Tensor):
        return targets[kept.to(targets.device)]
    if isinstance(targets, Mapping):
        return {name: take(value, kept) for name, value in targets.items()}
    return list(compress(targets, kept.tolist()))


def moved(targets: Any, device: torch.device) -> Any:
    """The targets, or outputs of a model, with every tensor in them on a device."""
    import torch

    if isinstance(targets, torch.Tensor):
        return targets.to(
            device, non_blocking=device.type != "cpu"
        )  # what comes from a device is there when it is read
    if isinstance(targets, Mapping):
        return {name: moved(value, device) for name, value in targets.items()}
    if isinstance(targets, list):
        return [moved(value, device) for value in targets]
    if isinstance(targets, tuple):
        values = [moved(value, device) for value in targets]
        return type(targets)(*values) if hasattr(targets, "_fields") else tuple(values)
    return targets
