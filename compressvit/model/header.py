"""What a safetensors file says of its tensors, read without torch and without its tensors; and what the files of an artifact are called."""

from __future__ import annotations

import math
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from compressvit.reading import Unreadable, open_regular, parse_json

MANIFEST = "compressvit.json"
TENSORS = "model.safetensors"
TYPES = {  # what a file calls torch's types
    "float64": "F64",
    "float32": "F32",
    "float16": "F16",
    "bfloat16": "BF16",
    "int64": "I64",
    "int32": "I32",
    "int16": "I16",
    "int8": "I8",
    "uint8": "U8",
    "bool": "BOOL",
}
MAX_HEADER = 32 * 2**20  # a tensor takes about 100 bytes

_SIZES = {
    **dict.fromkeys(("F64", "I64", "U64", "C64"), 8),
    **dict.fromkeys(("F32", "I32", "U32"), 4),
    **dict.fromkeys(("F16", "BF16", "I16", "U16"), 2),
    **dict.fromkeys(("I8", "U8", "BOOL", "F8_E5M2", "F8_E4M3"), 1),
}


@dataclass(frozen=True)
class Slot:
    """A tensor of a file: its type in the words of safetensors ('F32'), and its shape."""

    dtype: str
    shape: tuple[int, ...]

    @property
    def elements(self) -> int:
        """How many numbers it holds."""
        return math.prod(self.shape)


def read_header(file: Path, root: Path | None = None) -> dict[str, Slot]:
    """The tensors of a safetensors file by name, in the order of the file.

    Args:
        root: a folder around it inside which no link is followed.

    Raises:
        Unreadable: it is missing, truncated, or no safetensors file.
    """
    with open_regular(file, root) as opened:
        size = os.fstat(opened.fileno()).st_size
        length = int.from_bytes(opened.read(8), "little")
        if size < 8 or length > min(size - 8, MAX_HEADER):
            raise Unreadable(file, "it is no complete safetensors file: its header is longer than the file")
        text = opened.read(length)
    try:
        content = parse_json(text.decode("utf-8"), file)
        slots = {name: _slot(entry) for name, entry in content.items() if name != "__metadata__"}
        ends = [entry["data_offsets"][1] for name, entry in content.items() if name != "__metadata__"]
    except Unreadable:
        raise
    except (AttributeError, KeyError, IndexError, TypeError, ValueError) as error:
        raise Unreadable(file, f"it is no safetensors file: its header is damaged ({error})") from error
    if max(ends, default=0) != size - 8 - length:
        raise Unreadable(
            file,
            f"it is truncated or was added to: {max(ends, default=0):,} bytes of tensors, {size - 8 - length:,} are there",
        )
    return slots


def _slot(entry: Any) -> Slot:
    slot = Slot(entry["dtype"], tuple(entry["shape"]))
    begin, end = entry["data_offsets"]
    if not all(type(number) is int and number >= 0 for number in (*slot.shape, begin, end)):
        raise ValueError("a shape that is none")
    known = _SIZES.get(slot.dtype)
    if known is not None and end - begin != known * slot.elements:
        raise ValueError(f"{end - begin} bytes for {slot.dtype} of shape {list(slot.shape)}")
    return slot
