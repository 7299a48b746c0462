"""Shared parameters: tie them, find them, check them, count them once.

Blocks share by holding the same `nn.Parameter` object under their own paths. A tie survives `deepcopy` and `.to(dtype)`;
it is lost by `.to("meta")`, `to_empty`, `load_state_dict(assign=True)` and Swin's `set_input_size`. `check` detects this, and
`retie` restores the tie. Weights that are no parameters any more, since they were rounded, are shared by holding one module under several
paths: its buffers are then one under all of these names.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import TYPE_CHECKING

import torch
from torch import nn

from compressvit.errors import UserError

if TYPE_CHECKING:
    from typing import TypeGuard

    class Stand(nn.Module):
        """A module whose buffers have the place of a parameter."""

        stands_for: int  # of how many numbers


def tie(model: nn.Module, groups: Iterable[Sequence[str]]) -> None:
    """Replace every parameter of a group by the first one, so that all names hold the same `nn.Parameter`.

    Args:
        model: changed in place.
        groups: names of parameters; the first of each group is kept, the others are replaced by it.

    Raises:
        UserError: the shapes in a group differ. Nothing is tied then.
    """
    groups, tensors = [list(group) for group in groups], dict(_tensors(model))
    for group in groups:
        shapes = {name: tuple(tensors[name].shape) for name in group}
        first, shape = next(iter(shapes.items()))
        for name, other in shapes.items():
            if other != shape:
                raise UserError(
                    f"{first} {shape} and {name} {other} are of different shapes and cannot be one tensor; share among blocks of one shape "
                    "(another `share`), or leave such layers out"
                )
    for canonical, *aliases in groups:
        for alias in aliases:
            path, _, name = alias.rpartition(".")
            setattr(model.get_submodule(path), name, tensors[canonical])


def tied_groups(model: nn.Module) -> list[list[str]]:
    """Groups of names that hold one tensor, each in the order of the model; the first name is the canonical one."""
    names: dict[int, list[str]] = {}
    for name, tensor in _tensors(model):
        names.setdefault(id(tensor), []).append(name)
    return [group for group in names.values() if len(group) > 1]


def _tensors(model: nn.Module) -> Iterator[tuple[str, torch.Tensor]]:
    """Every parameter under all its names, and the persistent buffers of modules that stand for parameters (`stands_for`)."""
    standing = []
    for path, module in model.named_modules(remove_duplicate=False):
        for name, parameter in module._parameters.items():
            if parameter is not None:
                yield f"{path}.{name}" if path else name, parameter
        if _stands(module):
            standing.append((path, module))
    for path, module in standing:
        yield from module.state_dict(prefix=f"{path}.", keep_vars=True).items()


def check(model: nn.Module, declared: Iterable[Sequence[str]]) -> None:
    """Check that every declared group is still one tensor.

    Raises:
        UserError: names the first broken group and what usually breaks it, or a shared tensor that is gone.
    """
    tensors = dict(_tensors(model))
    for canonical, *aliases in declared:
        for alias in aliases:
            gone = next((name for name in (canonical, alias) if name not in tensors), None)
            if gone is not None:
                raise UserError(
                    f"{gone}, which is shared, is gone from the model; remove blocks before compressing, not after"
                )
            if tensors[alias] is not tensors[canonical]:
                raise UserError(
                    f"{alias} no longer shares its tensor with {canonical}. Ties are lost by .to('meta'), to_empty(), "
                    "load_state_dict(assign=True) and Swin's set_input_size(); call compressvit.ties.retie(model) after them"
                )


def retie(model: nn.Module) -> None:
    """Restore the ties that the model's compression declares; each group takes the value of its first name."""
    compression = getattr(model, "_compression", None)
    if compression is not None:
        tie(model, compression.ties)


def count_parameters(model: nn.Module) -> int:
    """Number of parameters, each shared tensor counted once (a state dict would count it once per path). A rounded weight counts as the
    numbers that it has, however many bits they take."""
    return sum(size for _, size in named_sizes(model))


def named_sizes(model: nn.Module) -> Iterator[tuple[str, int]]:
    """What `count_parameters` counts, by name: of every parameter, and of every module that stands for one."""
    yield from ((name, parameter.numel()) for name, parameter in model.named_parameters())
    yield from ((path, module.stands_for) for path, module in model.named_modules() if _stands(module))


def count_at_paths(model: nn.Module, paths: Iterable[str]) -> dict[str, int]:
    """Number of parameters under each path, a shared tensor at the first of the paths only."""
    seen: set[int] = set()
    counts = {}
    for path in paths:
        found = {key: size for key, size in sizes(model.get_submodule(path)).items() if key not in seen}
        seen.update(found)
        counts[path] = sum(found.values())
    return counts


def sizes(module: nn.Module) -> dict[int, int]:
    """The number of elements of every parameter, by its identity, and of what stands for one by that of its module."""
    found: dict[int, int] = {}
    for part in module.modules():
        found.update((id(p), p.numel()) for p in part._parameters.values() if p is not None)
        if _stands(part):
            found[id(part)] = part.stands_for
    return found


def _stands(module: nn.Module) -> TypeGuard[Stand]:
    return isinstance(vars(module).get("stands_for"), int)


def unique_state(model: nn.Module) -> dict[str, torch.Tensor]:
    """The state dict with each shared tensor once, under its canonical name, and the persistent buffers."""
    aliases = {name for group in tied_groups(model) for name in group[1:]}
    return {name: tensor for name, tensor in model.state_dict().items() if name not in aliases}
