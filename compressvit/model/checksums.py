"""Whether tensors and manifests are what was written: a flipped bit would otherwise be another model, and nobody would know.

The checksums find damage and careless edits. They are no signature: whoever changes a file on purpose can write new ones.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from typing import Any

import torch

_BYTES = 16


def tensor_checksums(tensors: Mapping[str, torch.Tensor]) -> dict[str, str]:
    """By name, BLAKE2b (128 bits, hexadecimal) over type, shape and values."""
    return {name: _of_tensor(tensor) for name, tensor in tensors.items()}


def damaged(tensors: Mapping[str, torch.Tensor], recorded: Mapping[str, str]) -> list[str]:
    """The names of tensors that are not what was recorded. Names that only one of the two has are not looked at."""
    return [n for n, tensor in tensors.items() if n in recorded and _of_tensor(tensor) != recorded[n]]


def content_checksum(content: Mapping[str, Any]) -> str:
    """BLAKE2b (128 bits, hexadecimal) over what is written as JSON, except its key `checksum`; the order of keys does not matter."""
    rest = {key: value for key, value in content.items() if key != "checksum"}
    return hashlib.blake2b(json.dumps(rest, sort_keys=True).encode(), digest_size=_BYTES).hexdigest()


def _of_tensor(tensor: torch.Tensor) -> str:
    digest = hashlib.blake2b(f"{tensor.dtype} {tuple(tensor.shape)} ".encode(), digest_size=_BYTES)
    digest.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()
