"""JSON lines that are written as a run goes on: a row a line, and a run that was killed may have left half of the last one."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict, ValidationError

from compressvit.errors import UserError
from compressvit.files import disk_faults, write_text
from compressvit.reading import Unreadable, read_text
from compressvit.text import printable_in


class MetricsRow(BaseModel):
    """A row of a run's `metrics.jsonl`; its other keys are numbers."""

    model_config = ConfigDict(extra="allow", strict=True)
    __pydantic_extra__: dict[str, float]

    phase: str
    kind: str  # train, epoch, evaluate, widths, …
    step: int


def append_row(path: Path, row: dict[str, Any]) -> None:
    """Add a row to a file, which is made where there is none. Half a row at its end, of a run that was killed, goes."""
    with disk_faults(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        with path.open("a+b") as file:
            if file.seek(0, os.SEEK_END):
                file.seek(-1, os.SEEK_END)
                if file.read(1) != b"\n":
                    file.seek(0)
                    file.truncate(file.read().rfind(b"\n") + 1)
            file.write(json.dumps(printable_in(row), allow_nan=False).encode() + b"\n")


def rewrite_rows(path: Path, rows: Iterable[dict[str, Any]]) -> None:
    """Replace a file by these rows, whole or not at all."""
    write_text(path, "".join(json.dumps(row) + "\n" for row in rows))


def read_rows(path: Path, kind: type[BaseModel]) -> list[dict[str, Any]]:
    """The rows of a file; a last one that is cut short is left out.

    Args:
        kind: what every row must be.

    Raises:
        UserError: the file is damaged, or of another version.
    """
    try:
        lines = read_text(path).splitlines()
    except Unreadable as error:
        if isinstance(error.__cause__, UnicodeDecodeError):
            raise UserError(f"{path} is damaged: it is not text") from error
        raise
    rows: list[dict[str, Any]] = []
    for number, line in enumerate(lines, start=1):
        try:
            rows.append(kind.model_validate_json(line).model_dump())
        except ValidationError as error:
            fault = error.errors()[0]
            where = ".".join(map(str, fault["loc"]))
            if fault["type"] == "json_invalid":
                if number == len(lines):
                    break
                raise UserError(f"{path} is damaged: line {number} is not JSON") from error
            what = f"has no {where!r}" if fault["type"] == "missing" else f"has another {where or 'form'}"
            raise UserError(
                f"{path} was written by another version of compressvit, or by another program: line {number} {what}"
            ) from error
    return rows
