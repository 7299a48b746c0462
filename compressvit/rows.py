"""Files of JSON lines that grow during a run, one row per line; the last row is incomplete if the run was killed."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar

from pydantic import BaseModel, ConfigDict, PlainValidator, ValidationError

from compressvit.errors import UserError
from compressvit.files import disk_faults, write_text
from compressvit.reading import Unreadable, read_text
from compressvit.text import printable_in

Row = TypeVar("Row", bound=BaseModel)


def _number(value: Any) -> int | float:
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise ValueError("not a number")
    return value


class MetricsRow(BaseModel):
    """A row of a run's `metrics.jsonl`: the numbers that a phase recorded are its further keys.

    Every kind of row has a subclass. A row of an unknown kind is read as this class.

    Attributes:
        time: seconds since 1970.
        step: optimiser step, counted from the start of the phase.
        epoch: number of completed epochs.
    """

    model_config = ConfigDict(extra="allow", strict=True)
    __pydantic_extra__: dict[str, Annotated[int | float, PlainValidator(_number)]]

    time: float | None = None
    phase: str
    kind: str
    step: int
    epoch: int | None = None

    @property
    def values(self) -> dict[str, float]:
        """The numbers by name."""
        return {name: float(value) for name, value in self.__pydantic_extra__.items()}

    def value(self, name: str) -> float | None:
        """The number of that name; None if there is none."""
        return self.__pydantic_extra__.get(name)


class TrainRow(MetricsRow):
    """The last batch before an optimiser step: `loss`, its weighted terms, the metrics of the task, `gradient_norm` and `lr`."""

    kind: Literal["train"] = "train"


class EpochRow(MetricsRow):
    """Means over the training batches of an epoch."""

    kind: Literal["epoch"] = "epoch"


class EvaluationRow(MetricsRow):
    """Scores on the evaluation images; without an epoch if evaluated before the phase."""

    kind: Literal["evaluate"] = "evaluate"


class WidthsRow(MetricsRow):
    """Number of neurons by adapter path after removal number `step`; step 0 is before any removal."""

    kind: Literal["widths"] = "widths"

    @property
    def widths(self) -> dict[str, int]:
        return {path: int(width) for path, width in self.__pydantic_extra__.items()}


_KINDS: dict[str, type[MetricsRow]] = {
    "train": TrainRow,
    "epoch": EpochRow,
    "evaluate": EvaluationRow,
    "widths": WidthsRow,
}


def metrics_row(kind: str, content: dict[str, Any]) -> MetricsRow:
    """Parse a row according to its kind. Raises a `ValidationError` if it is invalid."""
    return _KINDS.get(kind, MetricsRow).model_validate({"kind": kind, **content})


def parse_metrics(line: str) -> MetricsRow:
    """Parse a line of `metrics.jsonl` as a row of its kind. Raises a `ValidationError` if it is invalid."""
    row = MetricsRow.model_validate_json(line)
    known = _KINDS.get(row.kind)
    return row if known is None else known.model_construct(row.model_fields_set, **row.model_dump(exclude_unset=True))


def read_metrics(path: Path) -> list[MetricsRow]:
    """The rows of a `metrics.jsonl`, each step once, without an incomplete last row. Raises as `read_rows` does."""
    return each_once(_read(path, parse_metrics))


def each_once(rows: Iterable[MetricsRow]) -> list[MetricsRow]:
    """Keep only the later row of a step that a resumed run repeated, at the position of the first."""
    return list({(row.phase, row.kind, row.step): row for row in rows}.values())


def append_row(path: Path, row: BaseModel) -> None:
    """Append a row to a file, which is created if necessary. An incomplete last row of a killed run is removed first."""
    with disk_faults(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        with path.open("a+b") as file:
            if file.seek(0, os.SEEK_END):
                file.seek(-1, os.SEEK_END)
                if file.read(1) != b"\n":
                    file.seek(0)
                    file.truncate(file.read().rfind(b"\n") + 1)
            file.write(json.dumps(printable_in(row.model_dump(exclude_none=True)), allow_nan=False).encode() + b"\n")


def rewrite_rows(path: Path, rows: Iterable[BaseModel]) -> None:
    """Replace the content of a file by these rows, atomically."""
    write_text(path, "".join(json.dumps(row.model_dump(exclude_none=True)) + "\n" for row in rows))


def keep_metrics(path: Path, wanted: Callable[[MetricsRow], bool]) -> None:
    """Remove other rows than the wanted ones, and those that a later one repeats, from a `metrics.jsonl`. Raises as `read_rows` does."""
    rows = _read(path, parse_metrics)
    kept = each_once(row for row in rows if wanted(row))
    if len(kept) < len(rows):
        rewrite_rows(path, kept)


def read_rows(path: Path, kind: type[Row]) -> list[Row]:
    """The rows of a file, without an incomplete last row.

    Args:
        kind: the class of every row.

    Raises:
        UserError: the file is damaged, or was written by another version.
    """
    return _read(path, kind.model_validate_json)


def _read(path: Path, parse: Callable[[str], Row]) -> list[Row]:
    try:
        lines = read_text(path).splitlines()
    except Unreadable as error:
        if isinstance(error.__cause__, UnicodeDecodeError):
            raise UserError(f"{path} is damaged: it is not text") from error
        raise
    rows: list[Row] = []
    for number, line in enumerate(lines, start=1):
        try:
            rows.append(parse(line))
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
