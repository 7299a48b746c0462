"""Cells that are JSON files in a folder: each is made once, the most that fit in the hours given, and tables are written after each."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

from compressvit.errors import UserError
from compressvit.files import write_json

Contents = Mapping[str, Mapping[str, Any]]
SETTINGS = "settings.json"


class Benchmark(Protocol):
    """What makes cells. A cell's content has the `minutes` that it took, how many `crops` its student was fitted to, and in `fit` the
    `minutes` of that."""

    output: Path

    def crops_of(self, name: str) -> int:
        """How many crops the student of a cell is fitted to."""

    def run(self, name: str) -> dict[str, Any]:
        """The content of a cell."""

    def words(self, content: Mapping[str, Any]) -> str:
        """It in a few words."""

    def write_tables(self) -> None:
        """Of what is finished."""


def require_same(output: Path, settings: Mapping[str, Any]) -> None:
    """Refuse a folder with cells of something else: a table must not mix the two."""
    kept = output / SETTINGS
    if kept.is_file() and (found := json.loads(kept.read_text(encoding="utf-8"))) != settings:
        different = [name for name, value in settings.items() if found.get(name) != value]
        raise SystemExit(f"{output} holds cells of other {', '.join(different)}; remove it, or give another --output")
    output.mkdir(parents=True, exist_ok=True)
    write_json(kept, settings)


def finished(output: Path, names: Iterable[str]) -> dict[str, dict[str, Any]]:
    """The content of all finished cells, in the order of the names."""
    files = {name: output / f"{name}.json" for name in names}
    return {name: json.loads(file.read_text(encoding="utf-8")) for name, file in files.items() if file.is_file()}


def expected_minutes(crops: int, done: Contents) -> float:
    """What a cell with so many crops takes, as the slowest of the finished ones: the fit in proportion to the crops, the rest alike."""
    each = [
        content["minutes"] + content["fit"]["minutes"] * (max(1.0, crops / content["crops"]) - 1)
        for content in done.values()
    ]
    return max(each, default=0.0)


def seconds_of(function: Callable[[], object]) -> float:
    """The seconds that one call takes."""
    started = time.perf_counter()
    function()
    return time.perf_counter() - started


def run(benchmark: Benchmark, cells: Sequence[str], hours: float) -> None:
    """Make the cells that are not finished, in their order, and write the tables after each. A cell that cannot be made is told of and
    passed over."""
    end = time.perf_counter() + 3600 * hours
    waiting = [name for name in cells if name not in finished(benchmark.output, cells)]
    print(f"{len(waiting)} of {len(cells)} cells are to be run, {hours:g} hours allowed", flush=True)
    for name in waiting:
        minutes = expected_minutes(benchmark.crops_of(name), finished(benchmark.output, cells))
        if time.perf_counter() + 60 * minutes > end:
            print(f"{name} would exceed the {hours:g} hours; run the same command again to go on")
            return
        started = time.perf_counter()
        try:
            content = benchmark.run(name)
        except UserError as error:
            print(f"{name} is passed over: {error}", flush=True)
            continue
        content["minutes"] = (time.perf_counter() - started) / 60
        write_json(benchmark.output / f"{name}.json", content)
        print(f"{name}: {benchmark.words(content)}, {content['minutes']:.1f} minutes", flush=True)
        benchmark.write_tables()
