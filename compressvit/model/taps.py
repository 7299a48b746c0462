"""Taps: recording the inputs and outputs of modules by path."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from contextlib import ExitStack
from typing import Any

import torch
from torch import nn

from compressvit.errors import UserError, did_you_mean
from compressvit.model.calls import called
from compressvit.model.family import BlockInfo

Tap = tuple[str, str]  # module path, 'input' or 'output'


class Taps:
    """Records the input or output of modules at every forward pass, until `close`.

    Of a `qkv` to which timm's attention adds biases in place, what is recorded has them.

    Args:
        model: the model to record. Blocks that share parameters still have paths of their own.
        taps: (module path, 'input' or 'output') each.

    Raises:
        UserError: a path is not a module of the model; near names are suggested.
    """

    def __init__(self, model: nn.Module, taps: Iterable[Tap]):
        known = [name for name, _ in model.named_modules() if name]
        wanted: dict[str, set[str]] = {}
        for path, io in taps:
            if path not in known:
                raise UserError(f"tap '{path}' is no module of {type(model).__name__}; {did_you_mean(path, known)}")
            if io not in ("input", "output"):
                raise UserError(f"tap '{path}' asks for the {io!r} of the module; it has an 'input' and an 'output'")
            wanted.setdefault(path, set()).add(io)
        self._seen: dict[str, dict[str, Any]] = {path: {} for path in wanted}
        self._called = ExitStack()
        self._called.enter_context(called(model))
        self._hooks = [
            model.get_submodule(path).register_forward_hook(_recording(self._seen[path], frozenset(ios)))
            for path, ios in wanted.items()
        ]

    def pop(self) -> dict[str, dict[str, Any]]:
        """The tensors of the last forward pass, as {path: {'input' | 'output': tensor}}; they are released here."""
        popped = {path: dict(seen) for path, seen in self._seen.items()}
        for seen in self._seen.values():
            seen.clear()
        return popped

    def close(self) -> None:
        """Remove the hooks."""
        for hook in self._hooks:
            hook.remove()
        self._called.close()


def qkv_taps(block: BlockInfo) -> tuple[Tap, ...]:
    """What `tapped_qkv` reads of a block."""
    return tuple((f"{block.path}.{name}", "output") for name in block.projections)


def tapped_qkv(taps: Mapping[str, Mapping[str, Any]], block: BlockInfo) -> tuple[torch.Tensor, ...]:
    """Queries, keys and values of a block, (B, N, ·) each, as its projections give them: with biases, and before they are normed and
    turned by rotary positions, which are the same for every image and learn nothing."""
    found = [taps[path]["output"] for path, _ in qkv_taps(block)]
    if len(found) == 1:
        return found[0].chunk(3, dim=-1)
    width = found[0].shape[-1]  # keys and values that several queries share count as often
    return tuple(part.repeat(1, 1, width // part.shape[-1]) for part in found)


def _recording(into: dict[str, Any], wanted: frozenset[str]) -> Callable[[nn.Module, Any, Any], None]:
    """A forward hook that keeps what goes into a module and what comes out, a single tensor without its tuple."""

    def hook(module: nn.Module, inputs: Any, outputs: Any) -> None:
        for io, value in (("input", inputs), ("output", outputs)):
            if io in wanted:
                into[io] = value[0] if isinstance(value, tuple) and len(value) == 1 else value

    return hook
