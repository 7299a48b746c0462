"""Archives that readers do not agree about."""

from __future__ import annotations

import io
import struct
import zipfile
from collections.abc import Mapping

_END = 22  # bytes of the record at the end of an archive
_ENTRY = 46  # and of a directory's entry, without name, extra and comment


def two_directories(hidden: Mapping[str, bytes], seen: Mapping[str, bytes]) -> bytes:
    """A file with two archives of the same names. Its end tells where the directory of the first begins, which is what torch goes by;
    Python takes the one that is before the end, the second, and counts places from the difference."""
    second = _archive(seen, b"")
    first = _archive(hidden, b" " * len(second))  # so that no place in the second is negative
    (size, begin), (own_size, own_begin) = (struct.unpack("<II", one[-10:-2]) for one in (first, second))
    assert size == own_size, "the names are not the same"
    moved = begin - own_begin
    directory, entry = bytearray(second[own_begin:-_END]), 0
    while entry < len(directory):
        (place,) = struct.unpack_from("<I", directory, entry + 42)
        struct.pack_into("<I", directory, entry + 42, place + moved)
        entry += _ENTRY + sum(struct.unpack_from("<HHH", directory, entry + 28))
    end = bytearray(second[-_END:])
    struct.pack_into("<I", end, 16, begin)
    return first + second[:own_begin] + bytes(directory) + bytes(end)


def _archive(records: Mapping[str, bytes], before: bytes) -> bytes:
    buffer = io.BytesIO(before)
    with zipfile.ZipFile(buffer, "a") as file:
        for name, content in records.items():
            file.writestr(f"model/{name}", content)
    return buffer.getvalue()
