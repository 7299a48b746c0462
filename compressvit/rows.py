"""JSON lines that are written as a run goes on: a row a line, and a run that was killed may have left half of the last one."""

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
    """A row of a run's `metrics.jsonl`: numbers that a phase recorded, which are its other keys.

    Every kind of row has a class. One of a kind that has none is read as this.

    Attributes:
        time: in seconds since 1970.
        step: of the optimiser, counted from the beginning of the phase.
        epoch: how many are done.
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
        """The number of that name, if it is there."""
        return self.__pydantic_extra__.get(name)


class TrainRow(MetricsRow):
    """The last batch before an optimiser step: `loss`, its terms after weighting, what the task measures, `gradient_norm` and `lr`."""

    kind: Literal["train"] = "train"


class EpochRow(MetricsRow):
    """Means over the training batches of an epoch."""

    kind: Literal["epoch"] = "epoch"


class EvaluationRow(MetricsRow):
    """Scores on the evaluation images; before a phase there is no epoch."""

    kind: Literal["evaluate"] = "evaluate"


class WidthsRow(MetricsRow):
    """How many neurons every adapter has after removal number `step`, by its path; 0 is the start."""

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
    """A row of a kind. Raises a `ValidationError` where it is none."""
    return _KINDS.get(kind, MetricsRow).model_validate({"kind": kind, **content})


def parse_metrics(line: str) -> MetricsRow:
    """A line of `metrics.jsonl` as a row of its kind. Raises a `ValidationError` where it is none."""
    row = MetricsRow.model_validate_json(line)
    known = _KINDS.get(row.kind)
    return row if known is None else known.model_construct(row.model_fields_set, **row.model_dump(exclude_unset=True))


def read_metrics(path: Path) -> list[MetricsRow]:
    """The rows of a `metrics.jsonl`, each step once; a last one that is cut short is left out. Raises as `read_rows` does."""
    return each_once(_read(path, parse_metrics))


def each_once(rows: Iterable[MetricsRow]) -> list[MetricsRow]:
    """Of a step that a resumed run took again, the later row, in the place of the first."""
    return list({(row.phase, row.kind, row.step): row for row in rows}.values())


def append_row(path: Path, row: BaseModel) -> None:
    """Add a row to a file, which is made where there is none. Half a row at its end, of a run that was killed, goes."""
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
    """Replace a file by these rows, whole or not at all."""
    write_text(path, "".join(json.dumps(row.model_dump(exclude_none=True)) + "\n" for row in rows))


def read_rows(path: Path, kind: type[Row]) -> list[Row]:
    """The rows of a file; a last one that is cut short is left out.

    Args:
        kind: what every row must be.

    Raises:
        UserError: the file is damaged, or of another version.
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
