"""What a teacher's answers and a frozen part's features depend on, and in what two caches differ."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping
from typing import Any

from torch import nn

from compressvit.model.backbone import model_name
from compressvit.model.checksums import content_checksum, tensor_checksums

_OF_NO_MATTER = ("training", "fused_attn", "grad_checkpointing")  # to what a teacher answers


def of_teacher(model: nn.Module) -> dict[str, str]:
    """Its name, and hashes of its modules with their settings, and of its values."""
    state = {name: value.detach() for name, value in model.state_dict().items()}
    values = json.dumps(tensor_checksums(state), sort_keys=True)
    settings = json.dumps({path: _settings(module) for path, module in model.named_modules()}, sort_keys=True)
    return {"model": model_name(model), "modules": _short(str(model) + settings), "weights": _short(values)}


def of_part(model: nn.Module, modules: Mapping[str, nn.Module]) -> dict[str, str]:
    """The same of a part of a model: modules by their paths in it."""
    state = {name: value.detach() for name, value in model.state_dict().items() if name.rpartition(".")[0] in modules}
    values = json.dumps(tensor_checksums(state), sort_keys=True)
    settings = {path: [type(m).__name__, m.extra_repr(), _settings(m)] for path, m in modules.items()}
    return {"modules": _short(json.dumps(settings, sort_keys=True)), "weights": _short(values)}


def _settings(module: nn.Module) -> dict[str, Any]:
    """Plain attributes, many of which a module does not print, as a number of heads."""
    plain = {key: value for key, value in vars(module).items() if isinstance(value, (bool, int, float, str, tuple))}
    return {key: str(value) for key, value in plain.items() if key not in _OF_NO_MATTER and not key.startswith("_")}


def name_of(identity: Mapping[str, Any]) -> str:
    """A name for the folder of the answers."""
    return content_checksum(identity)[:16]


def difference(there: Mapping[str, Any], here: Mapping[str, Any]) -> str | None:
    """The first thing in which two identities differ, as words; None where they are alike."""
    theirs, ours = dict(_leaves(there)), dict(_leaves(here))
    for key in dict.fromkeys([*ours, *theirs]):
        if theirs.get(key) != ours.get(key):
            return f"{key} is {theirs.get(key, 'absent')} there and {ours.get(key, 'absent')} here"
    return None


def _leaves(content: Any, path: str = "") -> Iterator[tuple[str, Any]]:
    if isinstance(content, Mapping) and content:
        for key, value in content.items():
            yield from _leaves(value, f"{path}.{key}" if path else str(key))
    else:
        yield path, list(content) if isinstance(content, tuple) else content


def _short(text: str) -> str:
    return hashlib.blake2b(text.encode(), digest_size=8).hexdigest()
