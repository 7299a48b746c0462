"""Taps: tensors read out of a model by module path, through torchdistill's ForwardHookManager."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import nn

from compressvit.errors import UserError, did_you_mean

Tap = tuple[str, str]  # module path, 'input' or 'output'


class Taps:
    """Records the input or output of modules at every forward pass, until `close`.

    Args:
        model: the tapped model; a shared tensor does not matter, every block has its own path.
        taps: (module path, 'input' or 'output') each.
        device: where the model runs.

    Raises:
        UserError: a path is not a module of the model; near names are suggested.
    """

    def __init__(self, model: nn.Module, taps: Iterable[Tap], device: torch.device):
        from torchdistill.core.forward_hook import ForwardHookManager

        known = [name for name, _ in model.named_modules() if name]
        wanted: dict[str, set[str]] = {}
        for path, io in taps:
            if path not in known:
                raise UserError(f"tap '{path}' is no module of {type(model).__name__}; {did_you_mean(path, known)}")
            if io not in ("input", "output"):
                raise UserError(f"tap '{path}' asks for the {io!r} of the module; it has an 'input' and an 'output'")
            wanted.setdefault(path, set()).add(io)
        self._manager = ForwardHookManager(device)
        for path, ios in wanted.items():
            self._manager.add_hook(model, path, requires_input="input" in ios, requires_output="output" in ios)

    def pop(self) -> dict[str, dict[str, Any]]:
        """What the last forward pass left, as {path: {'input' | 'output': tensor}}; forgotten here."""
        return self._manager.pop_io_dict()

    def close(self) -> None:
        """Remove the hooks."""
        self._manager.clear()
