"""Running a model on the meta device without working out again, for every block, which shapes an operation gives."""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch import Tensor
from torch._ops import OpOverload
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

MOST = 20_000  # operations that are remembered
_KNOWN: dict[Any, Any] = {}


class RememberedShapes(TorchDispatchMode):
    """A context in which an operation that was seen before, on meta tensors of these shapes and types, gives empty tensors at once.

    Torch works out shapes on the meta device in Python, which takes most of the time of a plan. Only operations that make new tensors are
    remembered: no views, and nothing in place.
    """

    supports_higher_order_operators = True

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if not isinstance(func, OpOverload) or not _makes_new(func):
            return func(*args, **kwargs)
        try:
            key = func, _key(args), _key(kwargs), torch.get_default_dtype()
            known = _KNOWN.get(key)
        except TypeError:
            return func(*args, **kwargs)
        if known is not None:
            return _empty(known)
        found = func(*args, **kwargs)
        described = _described(found)
        if described is not None and _storages(found).isdisjoint(_storages((args, kwargs))):  # some views do not say so
            if len(_KNOWN) >= MOST:
                _KNOWN.clear()
            _KNOWN[key] = described
        return found


@functools.cache
def _makes_new(func: OpOverload) -> bool:
    schema = func._schema
    return not schema.is_mutable and all(result.alias_info is None for result in schema.returns)


def _key(value: Any) -> Any:
    """What decides on the shapes of results.

    Raises:
        TypeError: it has no hash, or is a tensor that has values.
    """
    if isinstance(value, Tensor):
        if not value.is_meta or type(value) not in (Tensor, torch.nn.Parameter):
            raise TypeError("the tensor has values")
        return value.shape, value.stride(), value.dtype
    if isinstance(value, (list, tuple)):
        return tuple(map(_key, value))
    if isinstance(value, dict):
        return tuple((name, _key(inner)) for name, inner in value.items())
    hash(value)
    return type(value), value  # 1, 1.0 and True are equal, and give other types


def _storages(values: Any) -> set[int]:
    return {value.untyped_storage()._cdata for value in tree_leaves(values) if isinstance(value, Tensor)}


def _described(found: Any) -> Any:
    """How to make such results again; None if they are not meta tensors."""
    if isinstance(found, Tensor):
        whole = found.is_meta and type(found) is Tensor and found.storage_offset() == 0
        return (found.shape, found.stride(), found.dtype) if whole else None
    if isinstance(found, (list, tuple)):
        inner = [_described(part) for part in found]
        return None if None in inner else (type(found), inner)
    return None


def _empty(described: Any) -> Any:
    if len(described) == 3:
        shape, stride, dtype = described
        return torch.empty_strided(shape, stride, dtype=dtype, device="meta")
    kind, inner = described
    return kind(map(_empty, inner))
