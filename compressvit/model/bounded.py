"""Building a model from a name and arguments that a file gives: on the meta device, within bounds, and never over the network."""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from typing import Any

import torch
from torch import nn
from torch.overrides import TorchFunctionMode

MAX_NUMBER = 2**20  # of an argument: above any size, depth or number of classes there is
MAX_CALLS = 60_000  # of torch functions while a model is built; timm's largest ViT takes 5,000
_SIZE = re.compile(r"(dim|depth|head|size|chan|channel|ratio|stride|width|layer|class|token)(s|es|els)?$")
_COUNTED = re.compile(
    r"(num_(heads|classes|features)|depths?|embed_dim|in_chans|patch_size|img_size|window_size|width|rank)$"
)
# What makes `timm.create_model` read another file or ask a server.
_REACHING = ("pretrained", "checkpoint_path", "cache_dir", "url", "file", "hf_hub_id")


def require_sound(args: Mapping[str, Any]) -> None:
    """Check arguments for `timm.create_model` that it would not check itself.

    Raises:
        ValueError: a number that is not finite or no size there is, a negative size (which timm takes, for a model that computes nothing),
            a truth value in place of a size, or an argument that reads another file.
    """
    for key, value in args.items():
        if key == "device":
            raise ValueError("device is no argument of the architecture, and would have the model built elsewhere")
        if key.startswith(_REACHING):
            raise ValueError(f"{key} is no argument of the architecture, and would read another file")
        for number in _numbers(value):
            if isinstance(number, bool) and _COUNTED.match(key):  # timm takes them for 1 and 0, and torch does not
                raise ValueError(f"{key} is {str(number).lower()}, and is to be a number")
            if not math.isfinite(number):
                raise ValueError(f"{key} is {number}, which is no number")
            if abs(number) > MAX_NUMBER:
                raise ValueError(f"{key} is {number:,}, and at most {MAX_NUMBER:,} is taken")
            if number < 0 and _SIZE.search(key):
                raise ValueError(f"{key} is {number:,}, and no size is negative")


def _numbers(value: Any) -> Iterator[float]:
    if isinstance(value, Mapping):
        value = list(value.values())
    if isinstance(value, (list, tuple)):
        for inner in value:
            yield from _numbers(inner)
    elif isinstance(value, (int, float)):
        yield value


@contextmanager
def on_meta(calls: int = MAX_CALLS) -> Iterator[None]:
    """Tensors made inside have no values and take no memory; and no more than `calls` torch functions are called.

    Raises:
        TooMany: in the block, where more are called: a model of a hundred thousand blocks takes hours, also without values.
    """
    with torch.device("meta"), _Unfilled(calls):
        yield


def counted(calls: int) -> AbstractContextManager[object]:
    """A context in which more than `calls` calls of torch functions are a `TooMany`."""
    return _Counted(calls)


class TooMany(ValueError):
    """More calls than a model or a loss needs."""


class _Counted(TorchFunctionMode):
    def __init__(self, calls: int):
        super().__init__()
        self.calls, self.left = calls, calls

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.left -= 1
        if self.left < 0:
            raise TooMany(f"it has far more parts than any model: more than {self.calls:,} calls to build it")
        return func(*args, **(kwargs or {}))


_FILLS = {
    *(torch.Tensor.uniform_, torch.Tensor.normal_, torch.Tensor.erfinv_, torch.Tensor.clamp_),
    *(torch.Tensor.mul_, torch.Tensor.add_, torch.Tensor.fill_, torch.Tensor.zero_),
    *(nn.init.uniform_, nn.init.normal_, nn.init.constant_, nn.init.kaiming_uniform_, nn.init.kaiming_normal_),
}


class _Unfilled(_Counted):
    """Skips the calls that draw a model's first values: on the meta device they have no effect, and take most of the time."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func in _FILLS:
            given = [*args, *(kwargs or {}).values()]
            if given[0].is_meta and not any(isinstance(value, torch.Tensor) for value in given[1:]):
                func = _filled
        return super().__torch_function__(func, types, args, kwargs)


def _filled(*args: Any, **kwargs: Any) -> Any:
    """The tensor that an in-place function returns: its first argument."""
    return [*args, *kwargs.values()][0]
