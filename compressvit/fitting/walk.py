"""One model on its way through its blocks with many batches, whose hidden states wait in temporary files between two blocks."""

from __future__ import annotations

from collections.abc import Container, Iterator, Mapping
from contextlib import ExitStack, contextmanager, suppress
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn

from compressvit.fitting.lowrank import Tensor
from compressvit.fitting.spool import Spool
from compressvit.model.backbone import describe
from compressvit.model.calls import adds_in_place
from compressvit.model.family import BlockInfo


class _Reached(Exception):
    """A forward pass came to the module it was run for."""


class Side:
    """Teacher or student on its way through the blocks, with the hidden states of every batch before the present one."""

    def __init__(self, model: nn.Module, folder: Path, name: str):
        self.model = model
        blocks = describe(model).blocks
        self.info = blocks[0]
        self._folder = folder
        self._hidden = Spool(folder, name)
        self._fixed: dict[str, _Fixed] = {}
        self._others: dict[str, dict[str, Any]] = {}
        self._giving = [
            model.get_submodule(info.path).register_forward_pre_hook(partial(self._give, info.path), with_kwargs=True)
            for info in blocks
        ]

    @property
    def block(self) -> nn.Module:
        return self.model.get_submodule(self.info.path)

    def enter(self, images: Tensor) -> None:
        """Append a batch."""
        path = self.info.path
        first = not self._others
        self._hidden.append(look(self.model, images, {path: "input"}, path)[path])
        if first and self._others[path]:  # every block may get others of its own
            self.model(images[:1])

    def _give(self, path: str, block: nn.Module, inputs: tuple, others: dict[str, Any]) -> tuple[tuple, dict[str, Any]]:
        """Note what a block gets from its model besides its input, the same for all images (as rotary positions), and give it to the block
        when that runs alone."""
        known = self._others.setdefault(path, others)
        return inputs, {**known, **others}

    def advance(self, following: BlockInfo, device: torch.device) -> None:
        """Take every batch through the present block, up to the following one."""
        for i in range(len(self._hidden)):
            for fixed in self._fixed.values():
                fixed.index = i
            self.leave(i, self.block(self.hidden(i, device)), following)
        self.release()
        self.info = following

    def seen(
        self, wanted: Mapping[str, str], until: str, device: torch.device
    ) -> Iterator[tuple[Tensor, dict[str, Tensor]]]:
        """Of every batch, what it is before the present block, and the inputs or outputs of the modules in `wanted` up to `until`.

        A residual branch that runs before `until` has its values for good. What it gives is kept, and it does not run again.
        """
        branches = {branch.branch for branch in describe(self.model).family.branches.values()}
        before = [
            name
            for name, _ in self.block.named_children()
            if name in branches and not until.startswith(f"{name}.") and name not in self._fixed
        ]
        kept: dict[str, Spool] = {}
        for i in range(len(self._hidden)):
            for fixed in self._fixed.values():
                fixed.index = i
            hidden = self.hidden(i, device)
            found = look(self.block, hidden, {**wanted, **dict.fromkeys(before, "output")}, until)
            for name in before:
                if name in found:
                    kept.setdefault(name, Spool(self._folder, f"{name}_given")).append(found[name])
            yield hidden, found
        for name, spool in kept.items():
            self._fixed[name] = _Fixed(self.block.get_submodule(name), spool, device)

    def release(self) -> None:
        """Let all modules of the present block run again."""
        for fixed in self._fixed.values():
            fixed.release()
        self._fixed = {}

    def close(self) -> None:
        """Leave the model as it was."""
        self.release()
        for hook in self._giving:
            hook.remove()

    def leave(self, index: int, output: Tensor, following: BlockInfo) -> None:
        """Replace what a batch is before the present block by what it is before the following one.

        Args:
            output: of the present block.
        """
        stage = following.stage_path if following.stage != self.info.stage else ""
        if stage:  # what stands between two stages
            name = following.path.removeprefix(f"{stage}.")
            output = look(self.model.get_submodule(stage), output, {name: "input"}, name)[name]
        self._hidden.replace(index, output)

    def hidden(self, index: int, device: torch.device) -> Tensor:
        return self._hidden.read(index, device)

    def __len__(self) -> int:
        return len(self._hidden)


class _Fixed:
    """A module that no longer runs, but gives what it gave before.

    Attributes:
        index: of the present batch.
    """

    def __init__(self, module: nn.Module, outputs: Spool, device: torch.device):
        self.index = 0
        self._module = module
        self._own = vars(module).get("forward")  # of this module alone, not of its class
        module.forward = lambda *inputs, **options: outputs.read(self.index, device)

    def release(self) -> None:
        del self._module.forward
        if self._own is not None:
            self._module.forward = self._own


@contextmanager
def watched(
    block: nn.Module,
    wanted: Mapping[str, str],
    found: dict[str, Tensor],
    until: str = "",
    changed: Container[str] = (),
) -> Iterator[None]:
    """Within, a run of the block puts the inputs or outputs of the modules in `wanted` into `found`, and ends at the module `until`.

    Args:
        changed: modules whose outputs something changes in place, besides those that `adds_in_place` knows.
    """
    with ExitStack() as stack:
        for name, io in wanted.items():

            def see(module: nn.Module, inputs: tuple, output: Tensor | None = None, name: str = name) -> None:
                if output is None:
                    found[name] = inputs[0]
                else:
                    found[name] = output.clone() if name in changed or adds_in_place(block, name) else output
                if name == until:
                    raise _Reached

            module = block.get_submodule(name)
            hook = module.register_forward_pre_hook if io == "input" else module.register_forward_hook
            stack.callback(hook(see).remove)
        with suppress(_Reached):
            yield


def look(block: nn.Module, hidden: Tensor, wanted: dict[str, str], until: str) -> dict[str, Tensor]:
    """Run a block up to its module `until`, and return the inputs or outputs of the modules in `wanted`."""
    found: dict[str, Tensor] = {}
    with watched(block, wanted, found, until):
        block(hidden)
    return found
