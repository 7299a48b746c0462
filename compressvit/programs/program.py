"""Shared by the programs of `compressvit tool`: they take run folders and options, and output tables, charts and TensorBoard files.

A program consists of a docstring (whose last paragraph is an example that runs), a function from runs to tables and findings, and a call
of `program`. Errors that a user can fix are printed as one message, with exit code 2.
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from compressvit.charts.findings import Finding
from compressvit.errors import command_line
from compressvit.exits import answered
from compressvit.files import disk_faults
from compressvit.programs.opened import OpenedModels, open_models
from compressvit.programs.recorded import Run, labelled
from compressvit.runs.folder import find_runs
from compressvit.runs.job import pick_device
from compressvit.runs.owned import refuse_links
from compressvit.terminal import Terminal

Findings = tuple[list[Table], list[Finding]]
Options = Callable[[argparse.ArgumentParser], None]


def program(
    name: str,
    text: str | None,
    look: Callable[[list[Run], argparse.Namespace], Findings],
    argv: Sequence[str] | None = None,
    *,
    options: Options = lambda parser: None,
) -> int:
    """Run a program that reads the records of runs; returns the exit code.

    Args:
        name: of the program.
        text: the module's docstring.
        look: returns tables and findings for the runs.
        options: adds the program's own options.
    """
    parser = _parser(name, text, options)
    parser.add_argument("runs", metavar="RUN", nargs="+", help="run folders, or folders of run folders")
    arguments = parser.parse_args(argv)

    def found() -> tuple[Findings, Path]:
        runs = labelled(find_runs(arguments.runs))
        return look(runs, arguments), runs[0].path if len(runs) == 1 else runs[0].path.parent

    return _answered(arguments, found)


def program_of_models(
    name: str,
    text: str | None,
    look: Callable[[OpenedModels, argparse.Namespace], Findings],
    argv: Sequence[str] | None = None,
    *,
    options: Options = lambda parser: None,
    most: int = 2,
) -> int:
    """Run a program that loads models and images; returns the exit code. Takes the arguments of `program`, and `most`, the
    maximum number of models."""
    parser = _parser(name, text, options)
    several = "one run, or up to two models" if most > 1 else "a run or an artifact"
    parser.add_argument("models", metavar="RUN|ARTIFACT", nargs="+", help=several)
    parser.add_argument("--device", default="auto", help="cpu, cuda, … (default: the best available)")
    parser.epilog = f"key=value after the models changes the data, e.g. data.name=digits\n\n{parser.epilog}"
    # argparse stops collecting positional arguments at the first option
    arguments, rest = parser.parse_known_args(argv)
    if any(word.startswith("-") for word in rest):
        parser.error(f"unrecognized arguments: {' '.join(rest)}")

    def found() -> tuple[Findings, Path]:
        opened = open_models([*arguments.models, *rest], pick_device(arguments.device), most=most)
        return look(opened, arguments), opened.folder

    return _answered(arguments, found)


def _parser(name: str, text: str | None, options: Options) -> argparse.ArgumentParser:
    about, _, example = (text or "").strip().rpartition("\n\n")
    parser = argparse.ArgumentParser(
        prog=f"compressvit tool {name}",
        description=about,
        epilog=example,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    options(parser)
    parser.add_argument(
        "--output",
        metavar="FOLDER",
        type=Path,
        help="for .json, .csv, .png, .svg and TensorBoard (default: tools, in the run or beside the first of several)",
    )
    return parser


def _answered(arguments: argparse.Namespace, found: Callable[[], tuple[Findings, Path]]) -> int:
    def run() -> int:
        (tables, findings), home = found()
        if arguments.output is None:
            refuse_links(home / "tools")
        show(tables, findings, arguments.output or home / "tools")
        return 0

    with command_line():
        return answered("compressvit", run)


def show(tables: Sequence[Table], findings: Sequence[Finding], output: Path, console: Console | None = None) -> None:
    """Print the tables, and write the findings to a folder and to TensorBoard files in it."""
    from torch.utils.tensorboard import SummaryWriter  # takes a second, for which --help should not wait

    console = Terminal(console)
    if console.width < 140:  # a table without its last columns would say less than a broken line
        console = Terminal(file=console.file, width=140)
    for table in tables:
        console.print(table)
    with disk_faults(output):
        output.mkdir(parents=True, exist_ok=True)
        writer = SummaryWriter(str(output / "tensorboard"))
    for finding in findings:
        finding.write(output)
        if finding.records:
            finding.log(writer, output)
        console.print(f"{finding.title}: {output / finding.name}.png", highlight=False, soft_wrap=True)
    writer.close()


def whole(word: str) -> int:
    """argparse type: an integer of at least 1."""
    if not word.isdigit() or int(word) < 1:
        raise argparse.ArgumentTypeError(f"{word!r} is no whole number from 1")
    return int(word)


def above_zero(word: str) -> float:
    """argparse type: a positive number."""
    try:
        value = float(word)
    except ValueError:
        value = math.nan
    if not 0 < value < math.inf:
        raise argparse.ArgumentTypeError(f"{word!r} is no number above 0")
    return value


def table_of(title: str, rows: Sequence[dict[str, Any]]) -> Table:
    """A table of records with the same keys; numbers have four digits and are right-aligned."""
    table = Table(title=title, title_justify="left")
    for key, value in (rows[0] if rows else {}).items():
        table.add_column(key, justify="left" if isinstance(value, str) else "right", overflow="fold")
    for row in rows:
        table.add_row(*("" if v is None else f"{v:.4g}" if isinstance(v, float) else str(v) for v in row.values()))
    return table
