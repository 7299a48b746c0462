"""JSON lines that are written as a run goes on: a row a line, and a run that was killed may have left half of the last one."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from compressvit.errors import UserError
from compressvit.files import disk_faults, write_text


def append_row(path: Path, row: dict[str, Any]) -> None:
    """Add a row to a file, which is made where there is none."""
    with disk_faults(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        with path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(row, allow_nan=False) + "\n")


def rewrite_rows(path: Path, rows: Iterable[dict[str, Any]]) -> None:
    """Replace a file by these rows, whole or not at all."""
    write_text(path, "".join(json.dumps(row) + "\n" for row in rows))


def read_rows(path: Path, keys: Sequence[str] = ()) -> list[dict[str, Any]]:
    """The rows of a file; a last one that is cut short is left out.

    Args:
        keys: what every row must have.

    Raises:
        UserError: the file is damaged, or of another version.
    """
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except UnicodeDecodeError as error:
        raise UserError(f"{path} is damaged: it is not text") from error
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error.strerror}") from error
    rows: list[dict[str, Any]] = []
    for number, line in enumerate(lines, start=1):
        try:
            row = json.loads(line)
        except json.JSONDecodeError as error:
            if number == len(lines):
                break
            raise UserError(f"{path} is damaged: line {number} is not JSON ({error.msg})") from error
        missing = [key for key in keys if not isinstance(row, dict) or key not in row]
        if missing:
            raise UserError(
                f"{path} was written by another version of compressvit, or by another program: line {number} has no {missing[0]!r}"
            )
        rows.append(row)
    return rows
