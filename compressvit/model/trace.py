"""One forward pass of a model without values, and what went from module to module in it."""

from __future__ import annotations

import functools
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from itertools import count
from typing import Any

import torch
from torch import nn
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves

from compressvit.errors import UserError
from compressvit.model import surgery
from compressvit.model.calls import called
from compressvit.model.shapes import RememberedShapes

IMAGES = 7  # of the pass: what takes or gives another number of rows is not of the images alone

Key = tuple[int, int]  # of a tensor: identity and version, so that what was changed in place is another one


@dataclass
class Call:
    """One call of a module."""

    path: str
    start: int
    takes: Key | None = None  # the tensor; None where it takes more or other things
    end: int = -1
    gives: Key | None = None
    output: torch.Tensor | None = None
    seen: bool = True  # whether what it gives depends on the images
    first: tuple[int, ...] = ()  # its input's first axis, and its output's
    leaves: tuple[int, ...] = ()
    dimensions: int = 0


@dataclass(frozen=True)
class Sum:
    """A sum of two tensors, or a product of one with a parameter."""

    of: tuple[Key, ...]
    gives: Key
    at: int  # a time, as the start and end of a call
    parameter: str = ""


class _Arithmetic(TorchFunctionMode):
    """A context that notes sums of tensors, products with a parameter, and how often each tensor is read.

    Args:
        names: of the parameters, by identity.
        key: of a tensor.
        clock: of the calls.
    """

    def __init__(self, names: dict[int, str], key: Callable[[torch.Tensor], Key], clock: Iterator[int]):
        super().__init__()
        self.found: list[Sum] = []
        self.reads: Counter[Key] = Counter()
        self._names, self._key, self._clock = names, key, clock

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = getattr(func, "__name__", "").strip("_")
        if name in _NO_READS:
            return func(*args, **(kwargs or {}))
        for tensor in tree_leaves((args, kwargs)):
            if isinstance(tensor, torch.Tensor):
                self.reads[self._key(tensor)] += 1
        tensors = [value for value in args if isinstance(value, torch.Tensor)]
        two = name in _SUMS + _PRODUCTS and len(args) == len(tensors) == 2 and not kwargs
        before = [self._key(tensor) for tensor in tensors] if two else []
        given = func(*args, **(kwargs or {}))
        if before and isinstance(given, torch.Tensor):
            scales = [self._names.get(id(tensor), "") for tensor in tensors]
            if name in _SUMS and tensors[0].shape == tensors[1].shape:
                self.found.append(Sum(tuple(before), self._key(given), next(self._clock)))
            elif name in _PRODUCTS and any(scales) != all(scales):
                whole = before[1] if scales[0] else before[0]
                self.found.append(Sum((whole,), self._key(given), next(self._clock), scales[0] or scales[1]))
        return given


# Not in place: a stream that is changed is no longer what was read of it.
_SUMS = ("add", "radd")
_PRODUCTS = ("mul", "rmul")
# What asks a tensor about itself, and what gives it as it is in evaluation.
_NO_READS = (
    *("get", "size", "dim", "stride", "numel", "is_floating_point", "is_contiguous", "get_device", "len", "repr"),
    *("dropout", "dropout1d", "dropout2d", "stochastic_depth"),
)


class _Read:
    """Mixin for a layer of a copy: notes that its weight is read while it does not run."""

    @property
    def weight(self: Any) -> torch.Tensor:
        if not self.__dict__.get("runs"):
            self.__dict__["read"] = True
        return self._parameters["weight"]


@functools.cache
def _read_class(kind: Any) -> Any:
    return type(kind.__name__, (_Read, kind), {"__module__": kind.__module__})


class Trace:
    """A forward pass of a copy of a model, which may be without values.

    Attributes:
        calls: of modules that are called once, in the order they end.
        sums: and products with a parameter.
        output: what the model gives.
        reads: how often functions read a tensor.
        read: paths of layers whose weight was read while they did not run.

    Raises:
        UserError: the model cannot be run without values, or gives no tensor.
    """

    def __init__(self, model: nn.Module):
        empty = surgery.skeleton(model).eval().requires_grad_(False)
        self.calls: list[Call] = []
        self._running: list[Call] = []
        self._alive: list[torch.Tensor] = []  # no tensor may go, or another could have its identity
        self._clock = count()
        arithmetic = _Arithmetic({id(p): name for name, p in empty.named_parameters()}, self._key, self._clock)
        with ExitStack() as stack:
            for path, module in empty.named_modules():
                if isinstance(module, (nn.Linear, nn.Conv2d)) and "weight" in module._parameters:
                    kind: Any = type(module)
                    module.__class__ = _read_class(kind)
                enters = module.register_forward_pre_hook(partial(self._enter, path), with_kwargs=True)
                leaves = module.register_forward_hook(partial(self._leave, path), always_call=True)
                stack.callback(enters.remove)
                stack.callback(leaves.remove)
            with arithmetic:
                result = _run(model, empty)
        if not isinstance(result, torch.Tensor):
            raise UserError(
                f"{type(model).__name__} gives a {type(result).__name__}; of a model of no family compressvit takes a tensor alone"
            )
        self.sums, self.reads = arithmetic.found, arithmetic.reads
        if not result.requires_grad:  # what depends on the images cannot be told
            for call in self.calls:
                call.seen = True
        self.read = {path for path, module in empty.named_modules() if module.__dict__.get("read")}
        self.output = self._key(result)
        often = Counter(call.path for call in self.calls)
        self.calls = [call for call in self.calls if often[call.path] == 1]

    def _key(self, tensor: torch.Tensor) -> Key:
        self._alive.append(tensor)
        return id(tensor), tensor._version

    def _enter(self, path: str, module: nn.Module, inputs: tuple, options: dict[str, Any]) -> None:
        call = Call(path, next(self._clock))
        others = [leaf for leaf in tree_leaves(options) if isinstance(leaf, torch.Tensor)]
        # the same for all images, as rotary positions are
        alike = not any(other.requires_grad or (other.ndim and other.shape[0] == IMAGES) for other in others)
        if len(inputs) == 1 and isinstance(inputs[0], torch.Tensor) and alike:
            call.takes = self._key(inputs[0])
            call.dimensions, call.first = inputs[0].ndim, tuple(inputs[0].shape[:1])
        self._running.append(call)
        module.__dict__["runs"] = True

    def _leave(self, path: str, module: nn.Module, inputs: tuple, output: Any) -> None:
        call = self._running.pop()
        module.__dict__["runs"] = False
        call.end = next(self._clock)
        if isinstance(output, torch.Tensor):
            call.gives = self._key(output)
            call.output, call.seen, call.leaves = output, output.requires_grad, tuple(output.shape[:1])
        self.calls.append(call)


def _run(model: nn.Module, empty: nn.Module) -> Any:
    """What a model without values gives for images of the size that `model` takes. What depends on them requires a gradient."""
    from compressvit.model.backbone import input_size, model_name

    size = input_size(model)
    dtype = next((p.dtype for p in empty.parameters() if p.is_floating_point()), torch.get_default_dtype())
    images = torch.empty(IMAGES, *size, device="meta", dtype=dtype, requires_grad=True)
    try:
        with called(empty), torch.device("meta"), RememberedShapes(), torch.enable_grad():
            return empty(images.clone())
    except Exception as error:  # whatever a stranger's forward raises where its tensors have no values
        reason = (str(error).strip().splitlines() or ["no reason given"])[0]
        raise UserError(
            f"{model_name(model)} is of no family that compressvit knows, and cannot be run without values, on images of "
            f"{'×'.join(map(str, size))}, to see how it works ({type(error).__name__}: {reason}). If its images have another size, "
            "set model.pretrained_cfg = {'input_size': (channels, height, width)}"
        ) from error
