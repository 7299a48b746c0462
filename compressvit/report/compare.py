"""`compare`: runs of several recipes side by side, with seeds of one recipe grouped, as a table and a plot."""

from __future__ import annotations

import csv
import hashlib
import io
import json
import statistics
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from compressvit.errors import UserError
from compressvit.files import disk_faults, write_json, write_text
from compressvit.recipe.recipe import Recipe, load_recipe
from compressvit.report.trade_off import compare_findings
from compressvit.runs.files import PhaseReport, Results, read_results
from compressvit.runs.folder import RESOLVED, find_runs, flat
from compressvit.runs.listed import other_than_written
from compressvit.runs.tables import megabytes, ratio_text
from compressvit.tasks.qualities import qualities, ranking
from compressvit.terminal import Terminal, print_table
from compressvit.training.phases import PhaseSpec
from compressvit.transforms import Transform

LATENCY = (
    "latency is relative to the teacher's, which was measured in turns with it in the same run; in brackets from the lowest to the highest "
    "end of the runs' intervals"
)
_QUARTILES = ", which in runs of earlier versions are from quartile to quartile"
_COSTS: dict[str, tuple[str, Callable[[float], str]]] = {
    "trained_adapter": ("trained", lambda v: f"{v:,.0f}"),
    "trained_head": ("+ head", lambda v: f"{v:,.0f}"),
    "adapter_bytes": ("stored kB", lambda v: f"{v / 1e3:,.1f}"),
    "parameters": ("parameters", lambda v: f"{v:,.0f}"),
    "bytes": ("file", megabytes),
    "epochs": ("epochs", lambda v: f"{v:.0f}"),
    "macs": ("MACs", lambda v: f"{v / 1e6:,.2f} M"),
    "latency": ("latency / teacher", lambda v: f"{v:.2f}"),  # with its interval, see `_cells`
}


def _columns() -> dict[str, tuple[str, Callable[[float], str]]]:
    """The heading and the number format of every column, by key."""
    known = qualities()
    return {**{key: (known[key].heading, known[key].number) for key in ranking()}, **_COSTS}


@dataclass
class Row:
    """Runs that differ only in their seed."""

    recipe: Recipe
    runs: list[Path]
    results: list[Results]
    seeds: list[int]
    label: str = ""
    taught_here: bool = False  # its teacher is a file that another one of the compared runs trained

    @property
    def task(self) -> str:
        """Data, number of evaluated images, and teacher; only rows that agree in these are compared."""
        data, teacher = self.recipe.data, self.recipe.teacher
        known = teacher.weights in ("pretrained", "train", "random") or self.taught_here
        weights = "" if known else f" ({teacher.weights})"
        weights += f" (adapter {teacher.adapter})" if teacher.adapter else ""
        images = self.results[0].teacher.images
        of_test = self.results[0].reported_on == "test"
        split = (data.test_split or "test" if of_test else data.val_split) + (f" ({images:,} images)" if images else "")
        return f"{data.name}{f' {data.root}' if data.root else ''}, {split}; {teacher.model}{weights}"

    def values(self, key: str) -> list[float]:
        """The values of all runs that have the key; latency is relative to the teacher's, measured in turns with it."""
        if key == "latency":
            return [ratio for r in self.results if (ratio := r.slowdown) is not None]
        if key == "epochs":
            return [float(self._epochs(r)) for r in self.results]
        if key.startswith("trained") and not self.recipe.phases():
            return []
        if key == "trained_adapter":
            return [float(count) for r in self.results if (count := r.student.trained_body) is not None]
        return [value for r in self.results if (value := r.student.value(key)) is not None]

    def _epochs(self, results: Results) -> int:
        """Epochs of all phases together; `prune` trains in every cycle."""
        total = 0
        for i, step in enumerate(self.recipe.steps):
            report = results.phases.get(f"{i}_{step.name}", PhaseReport())
            trainings = report.trainings or len(report.widths) or 1  # runs of earlier versions do not record how many
            total += getattr(step.spec, "epochs", 0) * trainings
        return total

    def as_dict(self) -> dict[str, Any]:
        """As plain values for JSON: mean and standard deviation over the seeds (None for a single seed)."""
        content: dict[str, Any] = {"label": self.label, "task": self.task, "runs": [str(run) for run in self.runs]}

        for key in _columns():
            found = self.values(key)
            content[key] = statistics.mean(found) if found else None
            content[f"{key}_std"] = statistics.stdev(found) if len(found) > 1 else None
        content["latency_interval"] = self._latency_interval()
        known = [r.student.latency_confidence for r in self.results]
        content["latency_quartiles"] = content["latency_interval"] is not None and None in known
        return content

    def _latency_interval(self) -> list[float] | None:
        """From the lower end of the lowest interval to the upper end of the highest, of all runs; None where earlier versions gave none."""
        found = [r.student.latency_ratio for r in self.results]
        if None in found:
            return None
        low, _, high = zip(*(ratio for ratio in found if ratio), strict=True)
        return [min(low), max(high)]


def latency_text(rows: Sequence[Mapping[str, Any]]) -> str:
    """What the latencies of rows are, for the line below their tables."""
    return LATENCY + _QUARTILES * any(row["latency_quartiles"] for row in rows)


def compare(
    runs: Sequence[str | Path], *, output: Path | None = None, console: Console | None = None
) -> list[dict[str, Any]]:
    """Read run folders and print a table for every pair of data and teacher.

    Args:
        runs: run folders, or folders of run folders.
        output: a folder for `compare.md`, `compare.csv`, `compare.json` and `compare.png`.

    Returns:
        A dictionary per row, as in `compare.json`.

    Raises:
        UserError: there is no finished run, or a run is damaged.
    """
    console = Terminal(console)
    content = gather(runs, lambda text: console.print(text, highlight=False))
    for task in dict.fromkeys(row["task"] for row in content):
        print_table(_table(task, [row for row in content if row["task"] == task]), console)
    console.print(
        f"mean ± standard deviation over seeds; {latency_text(content)}"
        + ("; trained: in the end, without the classifier" if any(row["adapter_bytes"] for row in content) else ""),
        highlight=False,
    )
    if output is not None:
        from compressvit.charts import drawing  # late: most comparisons draw nothing

        with disk_faults(output):
            output.mkdir(parents=True, exist_ok=True)
            write_json(output / "compare.json", content)
            write_text(output / "compare.md", _markdown(content))
            table = io.StringIO()
            writer = csv.DictWriter(table, fieldnames=list(content[0]), lineterminator="\n")
            writer.writeheader()
            writer.writerows(content)
            write_text(output / "compare.csv", table.getvalue())
            if findings := compare_findings(content):
                panels = [finding.draw().properties(title=finding.title) for finding in findings]
                drawing.save(drawing.column(panels), output / "compare.png")
        console.print(f"written to {output}", highlight=False)
    return content


def gather(runs: Sequence[str | Path], tell: Callable[[str], Any]) -> list[dict[str, Any]]:
    """The rows that `compare` prints; `tell` is called with a message for everything that is left out.

    Raises:
        UserError: as `compare`.
    """
    return [row.as_dict() for row in _rows(_finished(runs, tell), tell)]


def _finished(given: Sequence[str | Path], tell: Callable[[str], Any]) -> list[tuple[Path, Recipe, Results]]:
    found = []
    for folder in (path.resolve() for path in find_runs(given)):
        if not (folder / "results.json").is_file():
            tell(f"left out, not finished: {folder}")
            continue
        recipe = load_recipe(folder / RESOLVED)
        results = read_results(folder)
        if others := other_than_written(folder, (RESOLVED, "results.json")):
            tell(f"{folder}: {others}; the table has what is there now")
        found.append((folder, recipe, results))
    if not found:
        raise UserError("there is no finished run to compare; finish one with `compressvit apply … --resume`")
    return found


def _rows(found: list[tuple[Path, Recipe, Results]], tell: Callable[[str], Any]) -> list[Row]:
    rows: dict[str, Row] = {}
    for folder, recipe, results in found:
        key = recipe.model_copy(update={"seed": 0, "description": "", "diagnostics": ()}).to_yaml()
        row = rows.setdefault(key, Row(recipe, [], [], []))
        if recipe.seed in row.seeds:  # a duplicate would make the deviation too small
            tell(f"left out, a second run of the same recipe and seed: {folder}")
            continue
        row.seeds.append(recipe.seed)
        row.runs.append(folder)
        row.results.append(results)
    trained = {_digest(run / "teacher") for row in rows.values() for run in row.runs} - {None}
    for row in rows.values():
        row.taught_here = _digest(Path(row.recipe.teacher.weights)) in trained
    by_label: dict[tuple[str, str], list[Row]] = {}
    for row in rows.values():
        row.label = label(row.recipe)
        by_label.setdefault((row.task, row.label), []).append(row)
    for alike in by_label.values():
        if len(alike) > 1:
            _tell_apart(alike)
    return list(rows.values())


def _digest(artifact: Path) -> str | None:
    """Hash of the tensors of an artifact, if there is one, since the path of the same teacher can be written in many ways."""
    file = artifact / "model.safetensors"
    return hashlib.sha256(file.read_bytes()).hexdigest() if file.is_file() else None


def label(recipe: Recipe) -> str:
    """The transforms of a recipe with their non-default settings, and what was pruned or masked; 'finetune' if there are none."""
    words = []
    for step in recipe.steps:
        kind: type[Any] = type(step.spec)
        if issubclass(kind, Transform):
            fields: Iterable[str] = kind.model_fields
        elif issubclass(kind, PhaseSpec) and kind.label_fields is not None:
            fields = kind.label_fields
        else:
            continue
        options = []
        for name in fields:
            value = getattr(step.spec, name)
            if kind.model_fields[name].is_required() or value != kind.model_fields[name].get_default():
                options.append(f"{name} {_short(value)}")
        words.append(" ".join([step.name, ", ".join(options)]).strip())
    return " + ".join(words) or "finetune"


def _short(value: Any) -> str:
    if hasattr(value, "model_dump"):
        return " ".join(f"{k} {v:g}" for k, v in value.model_dump(exclude_none=True).items())
    return ", ".join(map(str, value)) if isinstance(value, tuple) else str(value)


def _tell_apart(rows: list[Row]) -> None:
    """Make equal labels distinct by adding the settings in which the recipes differ."""
    unlike = {"description", "seed", "diagnostics"}
    each = [flat(row.recipe.model_dump(mode="json", exclude=unlike)) for row in rows]
    differing = sorted({k for one in each for k in one if len({json.dumps(other.get(k)) for other in each}) > 1})
    for row, values in zip(rows, each, strict=True):
        difference = ", ".join(
            f"{key.rsplit('.', 1)[-1]} {values[key]}" for key in differing if values.get(key) not in (None, {}, [])
        )
        row.label = f"{row.label} ({difference})" if difference else row.label


def _folders(rows: Sequence[Mapping[str, Any]]) -> dict[str, str]:
    """The names of the run folders by their paths, with as many parents as tell all of them apart."""
    paths = [Path(run) for row in rows for run in row["runs"]]
    for count in range(1, max((len(path.parts) for path in paths), default=1) + 1):
        names = {str(path): str(Path(*path.parts[-count:])) for path in paths}
        if len(set(names.values())) == len(names):
            break
    return names


def _cells(row: Mapping[str, Any], keys: Sequence[str], folders: Mapping[str, str]) -> list[str]:
    columns = _columns()
    cells = []
    for key in keys:
        value, deviation = row[key], row[f"{key}_std"]
        text = "" if value is None else columns[key][1](value)
        if value is not None and deviation and key in ranking():
            text += f" ± {qualities()[key].number(deviation)}"
        if key == "latency" and row["latency_interval"] is not None:
            text = ratio_text((row["latency_interval"][0], value, row["latency_interval"][1]))
        cells.append(text)
    return [row["label"], ", ".join(folders[run] for run in row["runs"]), str(len(row["runs"])), *cells]


def _keys(rows: Sequence[Mapping[str, Any]]) -> list[str]:
    """The informative columns: those of adapters only if something was frozen, of the whole model only if nothing was."""
    frozen = any(row["adapter_bytes"] is not None for row in rows)
    adapters, whole = ("trained_adapter", "trained_head", "adapter_bytes"), ("parameters", "bytes")
    columns = _columns()
    return [
        key
        for key in columns
        if any(row[key] is not None for row in rows)
        and (frozen or key not in adapters)
        and not (frozen and key in whole)
    ]


def cells(rows: Sequence[Mapping[str, Any]]) -> tuple[list[str], list[list[str]]]:
    """Headings and rows of the table of one task, as text."""
    keys, columns, folders = _keys(rows), _columns(), _folders(rows)
    return ["student", "run", "seeds", *(columns[key][0] for key in keys)], [_cells(row, keys, folders) for row in rows]


def _table(task: str, rows: Sequence[Mapping[str, Any]]) -> Table:
    heads, written = cells(rows)
    table = Table(title=task, title_justify="left")
    for column in heads:
        table.add_column(
            column,
            justify="left" if column in ("student", "run") else "right",
            overflow="fold",
            min_width=14 if column == "student" else None,
        )
    for row in written:
        table.add_row(*row)
    return table


def _markdown(rows: Sequence[Mapping[str, Any]]) -> str:
    text = []
    for task in dict.fromkeys(row["task"] for row in rows):
        own = [row for row in rows if row["task"] == task]
        heads, written = cells(own)
        text += [f"{task}\n", f"| {' | '.join(heads)} |", f"| {' | '.join(['---'] * len(heads))} |"]
        cells_of = ([cell.replace("|", r"\|") for cell in row] for row in written)  # a folder may be called anything
        text += [f"| {' | '.join(row)} |" for row in cells_of] + [""]
    return "\n".join(text)
