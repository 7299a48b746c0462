"""What the programs in `tools/` share: run folders and options in; a table, pictures and TensorBoard out.

A program is a docstring (its last paragraph is an example that runs), a function from runs to tables and findings, and one call of
`program`. Whatever a user can put right is one sentence and exit code 2.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from compressvit.diagnostics.findings import Finding
from compressvit.errors import UserError
from compressvit.files import disk_faults
from compressvit.recipe import Recipe, parse_recipe
from compressvit.runfolder import RESOLVED, run_folders


@dataclass(frozen=True)
class Run:
    """A run folder, finished or not, under a name that tells it from the others given."""

    path: Path
    label: str

    @property
    def recipe(self) -> Recipe:
        """What it was asked to do.

        Raises:
            UserError: it is damaged, or of another version.
        """
        file = self.path / RESOLVED
        try:
            return parse_recipe(file.read_text(encoding="utf-8"), str(file))
        except (UserError, UnicodeDecodeError) as error:
            raise UserError(
                f"{self.path} is damaged, or was written by another version of compressvit: {error}"
            ) from error


Findings = tuple[list[Table], list[Finding]]


def program(
    name: str,
    text: str | None,
    look: Callable[[list[Run], argparse.Namespace], Findings],
    argv: Sequence[str] | None = None,
    *,
    options: Callable[[argparse.ArgumentParser], None] = lambda parser: None,
) -> int:
    """Run a program of `tools/`; returns its exit code.

    Args:
        name: of the file, without suffix, and of the default output folder.
        text: the module's docstring.
        look: makes tables and findings of the runs.
        options: adds options of its own.
    """
    about, _, example = (text or "").strip().rpartition("\n\n")
    parser = argparse.ArgumentParser(
        prog=f"{name}.py",
        description=about,
        epilog=example,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("runs", metavar="RUN", nargs="+", help="run folders, or folders of run folders")
    options(parser)
    parser.add_argument(
        "--output",
        metavar="FOLDER",
        type=Path,
        help=f"for .json, .csv, .png, .svg and TensorBoard (default: RUN/tools, of several runs {name} beside the first)",
    )
    arguments = parser.parse_args(argv)
    try:
        runs = labelled(run_folders(arguments.runs))
        tables, findings = look(runs, arguments)
        output = arguments.output or (runs[0].path / "tools" if len(runs) == 1 else runs[0].path.parent / name)
        show(tables, findings, output)
    except UserError as error:
        print(f"{name}.py: {error}", file=sys.stderr)
        return 2
    return 0


def show(tables: Sequence[Table], findings: Sequence[Finding], output: Path, console: Console | None = None) -> None:
    """Print the tables, and write the findings into a folder and into TensorBoard's files in it."""
    from torch.utils.tensorboard import SummaryWriter  # a second, which --help should not wait for

    console = console or Console()
    if console.width < 140:  # a table without its last columns would say less than a broken line
        console = Console(file=console.file, width=140)
    for table in tables:
        console.print(table)
    with disk_faults(output):
        output.mkdir(parents=True, exist_ok=True)
        writer = SummaryWriter(str(output / "tensorboard"))
    for finding in findings:
        finding.write(output)
        if finding.records:
            finding.log(writer, output, 0)
        console.print(f"{finding.title}: {output / finding.name}.png", highlight=False, soft_wrap=True)
    writer.close()


def labelled(folders: Sequence[Path]) -> list[Run]:
    """Runs named by as much of the end of their paths as tells them apart."""
    for depth in range(1, max(len(folder.parts) for folder in folders) + 1):
        labels = ["/".join(folder.parts[-depth:]) for folder in folders]
        if len(set(labels)) == len(labels):
            break
    return [Run(folder, label) for folder, label in zip(folders, labels, strict=True)]


def not_recorded(run: Run, what: str, how: str) -> UserError:
    """For a run without what a program shows."""
    return UserError(f"{run.path} has no {what}; {how}")


def table_of(title: str, rows: Sequence[dict[str, Any]]) -> Table:
    """A table of records with the same keys; numbers to four digits, at the right."""
    table = Table(title=title, title_justify="left")
    for key, value in rows[0].items():
        table.add_column(key, justify="left" if isinstance(value, str) else "right", overflow="fold")
    for row in rows:
        table.add_row(*("" if v is None else f"{v:.4g}" if isinstance(v, float) else str(v) for v in row.values()))
    return table
