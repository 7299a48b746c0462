"""The gradient of a shared tensor, separately for each block that uses it.

`.grad` of a shared tensor is a sum over all uses. The terms of the sum can be read from autograd's graph: every operation that uses the
tensor is a node, and the gradient that this node passes on to the tensor belongs to that use alone. Hooks on these nodes record it, so
nothing is recomputed and the graph does not change.
"""

from __future__ import annotations

from collections.abc import Iterable
from functools import partial
from typing import Any

import torch
from torch import nn

from compressvit.model import ties

_CAST = "ToCopyBackward0"  # autocast casts a weight once, and all uses read the cast copy


class Uses:
    """Records the gradient that each block's use contributes to the tensors it shares with others, while `recording`.

    Exact under autocast (in the precision of the backward pass), with gradient accumulation (batches are summed until `clear`), and for
    any layer, because no layer's formula is duplicated. Does not work under `torch.compile`, whose graph is a single node.

    Args:
        model: hooks are registered on its blocks; `close` removes them.
        blocks: paths of the blocks.

    Attributes:
        names: by block, the tensors that it shares: the first name of each in the model, and its first name in the block.
        gradients: by the tensor's first name in the block, float32, in the tensor's shape. In total as large as the gradient of a model
            without sharing.
    """

    def __init__(self, model: nn.Module, blocks: Iterable[str]):
        blocks = list(blocks)
        self.recording = False
        self.gradients: dict[str, torch.Tensor] = {}
        self.names: dict[str, dict[str, str]] = {path: {} for path in blocks}
        for group in ties.tied_groups(model):
            parameter = model.get_parameter(group[0])
            if not parameter.requires_grad:
                continue
            for name in group:
                owner = next((path for path in blocks if name.startswith(f"{path}.")), None)
                if owner is not None:
                    self.names[owner].setdefault(group[0], name)
        self._hooks = [
            model.get_submodule(path).register_forward_hook(
                partial(self._enter, {model.get_parameter(first): name for first, name in names.items()})
            )
            for path, names in self.names.items()
            if names
        ]

    def clear(self) -> None:
        """Discard the recorded gradients."""
        self.gradients = {}

    def close(self) -> None:
        """Remove the hooks from the model."""
        for hook in self._hooks:
            hook.remove()

    def _enter(self, names: dict[torch.Tensor, str], block: nn.Module, inputs: tuple, output: torch.Tensor) -> None:
        """Walk the graph from a block's output back to its input, and hook every node that uses one of the tensors."""
        if not self.recording or output.grad_fn is None:
            return
        seen: set[Any] = {value.grad_fn for value in inputs if isinstance(value, torch.Tensor)}
        waiting: list[Any] = [output.grad_fn]
        while waiting:
            node = waiting.pop()
            if node is None or node in seen:
                continue
            seen.add(node)
            for index, (child, _) in enumerate(node.next_functions):
                leaf = _leaf(child)
                name = names.get(leaf) if leaf is not None else None
                if name is None:
                    waiting.append(child)
                else:
                    node.register_hook(partial(self._add, name, index))

    def _add(self, name: str, index: int, contributions: tuple, _: tuple) -> None:
        term = contributions[index]
        if term is None:
            return
        if name in self.gradients:
            self.gradients[name] += term
        else:
            # a copy, because autograd may still accumulate into its own tensor in place
            self.gradients[name] = term.detach().to(torch.float32, copy=True)


def _leaf(node: Any) -> torch.Tensor | None:
    """The parameter that a node accumulates into, looking through autocast's cast."""
    if node is not None and node.name() == _CAST:
        node = node.next_functions[0][0]
    return getattr(node, "variable", None)
