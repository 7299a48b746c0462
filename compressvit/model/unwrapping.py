"""A state dict inside what training programs save: around it dictionaries, before its names prefixes. Whatever is taken off is reported."""

from __future__ import annotations

import argparse
from collections import Counter
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

import torch

from compressvit.errors import UserError
from compressvit.notes import Note

# Where timm, DeiT, MAE, DINO and Lightning keep the weights; an average before the weights it is of.
WRAPPERS = ("state_dict_ema", "model_ema", "state_dict", "model", "teacher")
_DEEPEST = 4


def load_plain(path: Path) -> Any:
    """A torch file of tensors and plain values, on the CPU.

    The arguments of a training program, an `argparse.Namespace`, are plain values too: timm, DeiT and MAE save them beside the weights.

    Raises:
        Exception: whatever torch raises of a damaged file, or of one that holds anything else.
    """
    with torch.serialization.safe_globals([argparse.Namespace]):
        return torch.load(path, map_location="cpu", weights_only=True)


def named_in(path: Path) -> str | None:
    """timm's name of the model that a checkpoint of its `train.py` is of, which stands in the file (`arch`); None where nothing does."""
    try:
        content = load_plain(path)
    except Exception:  # whatever is amiss with the file is told by who reads it for its weights
        return None
    import timm  # only here: reading a file does not need it

    found = content.get("arch") if isinstance(content, dict) else None
    return found if isinstance(found, str) and timm.is_model(found) else None


def unwrapped(content: Any, path: Path, where: str) -> tuple[dict[str, torch.Tensor], list[Note]]:
    """The state dict in a file's content, and notes on what is around it: a dictionary of an unknown name, or other weights.

    Args:
        where: the recipe path to speak of in a message.

    Raises:
        UserError: there is none, or more than one that it could be.
    """
    notes: list[Note] = []
    for _ in range(_DEEPEST):
        if _is_state(content) or content == {}:
            return dict(content), notes
        if not isinstance(content, dict):
            break
        key = next((key for key in WRAPPERS if isinstance(content.get(key), dict)), None)
        inside = [str(other) for other, value in content.items() if _is_state(value)]
        if key is not None and (others := [repr(other) for other in inside if other != key]):
            text = f"the weights are those under {key!r}, not those under {' or '.join(others)}"
            notes.append(Note("other_weights", len(others), text))
        if key is None:
            if len(inside) > 1:
                raise UserError(
                    f"{where}: {path} holds more than one state dict ({', '.join(inside)}), and none under a name that is known "
                    f"({', '.join(WRAPPERS)}); save the one that is meant in a file of its own"
                )
            key = next(iter(inside), None)
            if key is None:
                break
            notes.append(Note("wrapper", len(content[key]), f"the weights are those under {key!r}"))
        content = content[key]
    keys = f"; its keys are {_first(content)}" if isinstance(content, dict) and content else ""
    raise UserError(f"{where}: {path} holds a {type(content).__name__}, not a state dict of tensors{keys}")


def _is_state(content: Any) -> bool:
    return (
        isinstance(content, dict)
        and bool(content)
        and all(isinstance(key, str) and isinstance(value, torch.Tensor) for key, value in content.items())
    )


def without_prefix(
    tensors: Mapping[str, torch.Tensor], own: Collection[str]
) -> tuple[dict[str, torch.Tensor], list[Note]]:
    """Tensors under a model's own names, where the file has a prefix before them such as `module.` or `backbone.`, and a note on it.

    A prefix is taken off where none of the names is the model's as it stands, and those after one prefix are. What does not have the
    prefix is left out, as DINO's projection head is.

    Args:
        own: names of the model's tensors.
    """
    names, taken = dict(zip(tensors, tensors, strict=True)), ""  # names in the file, by those of the model
    for _ in range(_DEEPEST):
        if names.keys() & set(own):
            break
        gains = {
            prefix: len({n.removeprefix(prefix) for n in names if n.startswith(prefix)} & set(own))
            for prefix in _heads(names)
        }
        everywhere = [prefix for prefix in gains if all(n.startswith(prefix) for n in names)]
        better = [prefix for prefix, count in gains.items() if count]
        chosen = better if better else everywhere
        if len(chosen) != 1:
            break
        names = {n.removeprefix(chosen[0]): full for n, full in names.items() if n.startswith(chosen[0])}
        taken += chosen[0]
    if not taken or not names.keys() & set(own):
        return dict(tensors), []
    left = [name for name in tensors if name not in names.values()]
    text = f"the prefix '{taken}' was taken off {len(names)} tensors"
    if left:
        text += f", and {len(left)} without it were left out ({_first(left)})"
    return {name: tensors[full] for name, full in names.items()}, [Note("prefix", len(names), text)]


def _heads(names: Collection[str]) -> list[str]:
    """First parts of names, the most common first."""
    counted = Counter(name.partition(".")[0] for name in names if "." in name)
    return [f"{head}." for head, _ in counted.most_common(20)]


def _first(names: Collection[Any]) -> str:
    """The first few of names, for a message."""
    shown = ", ".join(str(name)[:80] for name in list(names)[:4])
    return f"{shown}, …" if len(names) > 4 else shown


def _fitting(names: Collection[str], own: Collection[str]) -> list[str]:
    """The prefixes after which at least half of a model's names are found, as in MoCo's files of an encoder and its momentum average."""
    found: Counter[str] = Counter()
    for name in names:
        parts = name.split(".")
        found.update(
            f"{'.'.join(parts[:depth])}."
            for depth in range(1, min(_DEEPEST + 1, len(parts)))
            if ".".join(parts[depth:]) in own
        )
    return [prefix for prefix, count in found.items() if 2 * count >= len(own)]


def contents(tensors: Collection[str], own: Collection[str]) -> str:
    """What a file holds, for a message about a file that does not fit; `own` are names of the model's tensors."""
    text = f"The file's first tensors are {_first(tensors)}"
    if len(fitting := _fitting(tensors, set(own))) < 2:
        return text
    after = " and ".join(f"after '{prefix}'" for prefix in fitting)
    return f"{text}; they fit {after}: save those that are meant, without the prefix, in a file of their own"
