"""Shared parameters: tie them, find them, check them, count them once.

Blocks share by holding the same `nn.Parameter` object under their own paths. A tie survives `deepcopy` and `.to(dtype)`;
it is lost by `.to("meta")`, `to_empty`, `load_state_dict(assign=True)` and Swin's `set_input_size`. `check` detects this, and
`retie` restores the tie.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch
from torch import nn

from compressvit.errors import UserError


def tie(model: nn.Module, groups: Iterable[Sequence[str]]) -> None:
    """Replace every parameter of a group by the first one, so that all names hold the same `nn.Parameter`.

    Args:
        model: changed in place.
        groups: names of parameters; the first of each group is kept, the others are replaced by it.

    Raises:
        UserError: the shapes in a group differ. Nothing is tied then.
    """
    groups = [list(group) for group in groups]
    for group in groups:
        shapes = {name: tuple(model.get_parameter(name).shape) for name in group}
        first, shape = next(iter(shapes.items()))
        for name, other in shapes.items():
            if other != shape:
                raise UserError(
                    f"{first} {shape} and {name} {other} are of different shapes and cannot be one tensor; share among blocks of one shape "
                    "(another `share`), or leave such layers out"
                )
    for canonical, *aliases in groups:
        parameter = model.get_parameter(canonical)
        for alias in aliases:
            path, _, name = alias.rpartition(".")
            setattr(model.get_submodule(path), name, parameter)


def tied_groups(model: nn.Module) -> list[list[str]]:
    """Groups of names that hold one parameter, each in the order of the model; the first name is the canonical one."""
    names: dict[int, list[str]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        names.setdefault(id(parameter), []).append(name)
    return [group for group in names.values() if len(group) > 1]


def check(model: nn.Module, declared: Iterable[Sequence[str]]) -> None:
    """Check that every declared group is still one parameter.

    Raises:
        UserError: names the first broken group and what usually breaks it, or a shared tensor that is gone.
    """
    parameters = dict(model.named_parameters(remove_duplicate=False))
    for canonical, *aliases in declared:
        for alias in aliases:
            gone = next((name for name in (canonical, alias) if name not in parameters), None)
            if gone is not None:
                raise UserError(
                    f"{gone}, which is shared, is gone from the model; remove blocks before compressing, not after"
                )
            if parameters[alias] is not parameters[canonical]:
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
    """Number of parameters, each shared tensor counted once (a state dict would count it once per path)."""
    return sum(p.numel() for p in model.parameters())


def count_at_paths(model: nn.Module, paths: Iterable[str]) -> dict[str, int]:
    """Number of parameters under each path, a shared tensor at the first of the paths only."""
    seen: set[int] = set()
    counts = {}
    for path in paths:
        sizes = {id(p): p.numel() for p in model.get_submodule(path).parameters() if id(p) not in seen}
        seen.update(sizes)
        counts[path] = sum(sizes.values())
    return counts


def unique_state(model: nn.Module) -> dict[str, torch.Tensor]:
    """The state dict with each shared parameter once, under its canonical name, and the persistent buffers."""
    aliases = {name for group in tied_groups(model) for name in group[1:]}
    return {name: tensor for name, tensor in model.state_dict().items() if name not in aliases}
