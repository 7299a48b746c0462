"""The gradient of a shared tensor, one block's use at a time.

`.grad` of a tensor that several blocks hold is a sum. autograd's graph still knows its terms: every operation that reads the tensor is
a node of it, and what the node passes on to the tensor is the gradient of that use alone. So nothing is recomputed and the graph is left
as it is: hooks read what flows by.
"""

from __future__ import annotations

from collections.abc import Iterable
from functools import partial
from typing import Any

import torch
from torch import nn

from compressvit.model import ties

_CAST = "ToCopyBackward0"  # autocast casts a weight once, and all its uses read the copy


class Uses:
    """Records the gradient that each block's use contributes to the tensors it shares with others, while `recording`.

    Exact under autocast (a term has the precision of the backward pass), accumulation (batches add up until `clear`) and any layer,
    because no formula of a layer is repeated. Not under `torch.compile`, whose graph is one node.

    Args:
        model: hooks are put on its blocks; `close` takes them off.
        blocks: their paths.

    Attributes:
        names: by block, what it shares: the model's first name of a tensor, and its first name in the block.
        gradients: by the name the tensor has in the block (its first one there), float32, of the tensor's shape. As large as the gradient
            of a model that shares nothing would be.
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
        """Forget what was recorded."""
        self.gradients = {}

    def close(self) -> None:
        """Take the hooks off the model."""
        for hook in self._hooks:
            hook.remove()

    def _enter(self, names: dict[torch.Tensor, str], block: nn.Module, inputs: tuple, output: torch.Tensor) -> None:
        """Walk the graph from a block's output back to its input, and hook every node that reads one of the tensors."""
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
            # a copy: autograd may go on adding to its own tensor in place
            self.gradients[name] = term.detach().to(torch.float32, copy=True)


def _leaf(node: Any) -> torch.Tensor | None:
    """The parameter that a node of the graph stands for, also through autocast's cast of it."""
    if node is not None and node.name() == _CAST:
        node = node.next_functions[0][0]
    return getattr(node, "variable", None)
