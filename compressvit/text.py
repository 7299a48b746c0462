"""Text that came from a file, a folder's name or a user, made safe to show: on a terminal, in a log, on a page, in a chart, in JSON."""

from __future__ import annotations

import re
import sys
from collections.abc import Mapping
from typing import Any

# What a terminal obeys (C0 and C1 except tab and line feed), what turns the reading direction around or is invisible, what no UTF-8
# file can hold (lone surrogates: `surrogateescape` puts undecodable bytes of file names there), and non-characters.
_UNSAFE = re.compile(
    "[\x00-\x08\x0b-\x1f\x7f-\x9f\u061c\u200b\u200e\u200f\u2028-\u202e\u2060-\u206f\ufeff\ufff9-\ufffb\ufffe\uffff\ud800-\udfff]"
)


def printable(text: str, mark: str | None = None) -> str:
    r"""The text with every character that is obeyed or invisible spelled out: ESC as `\x1b`, the undecodable byte E9 as `\xe9`.

    Args:
        mark: what stands for such a character instead, where a backslash has a meaning.
    """
    return _UNSAFE.sub(_spelled if mark is None else mark, text)


def _spelled(match: re.Match[str]) -> str:
    code = ord(match.group())
    if 0xDC80 <= code <= 0xDCFF:  # a byte of a file name
        code -= 0xDC00
    return f"\\x{code:02x}" if code < 0x100 else f"\\u{code:04x}"


def printable_in(content: Any, mark: str | None = None) -> Any:
    """A copy of JSON-like content (mappings, lists, tuples, plain values) with every text in it, keys too, made `printable`."""
    if isinstance(content, str):
        return printable(content, mark)
    if isinstance(content, Mapping):
        return {printable_in(key, mark): printable_in(value, mark) for key, value in content.items()}
    if isinstance(content, (list, tuple)):
        return type(content)(printable_in(value, mark) for value in content)
    return content


def complain(program: str, text: object) -> None:
    """Print an error of a program for a person, on standard error."""
    print(f"{program}: {printable(str(text))}", file=sys.stderr)
