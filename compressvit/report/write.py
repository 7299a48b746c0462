"""`report`: read run folders and write the page."""

from __future__ import annotations

from pathlib import Path

from compressvit.errors import UserError, option
from compressvit.files import write_text
from compressvit.log import warn_and_continue
from compressvit.report import sections
from compressvit.report.record import Run, read_run
from compressvit.runs.folder import find_runs

FILE = "report.html"


def report_after_run(folder: Path) -> None:
    """Write the report of a run that has just finished; an error is only a warning, because the run is complete without it."""
    again = f"the run is complete, and `compressvit report {folder}` tries again"
    with warn_and_continue(f"warning: the report could not be written; {again}"):
        report([folder])


def report(
    paths: list[str] | list[Path], output: str | Path | None = None, *, images: bool = True
) -> tuple[Path, list[Run]]:
    """Write the report of one or several runs.

    Args:
        paths: run folders, or folders of run folders.
        output: the HTML file; by default `report.html` in the given folder, if it is only one.
        images: whether the page shows pictures of the data.

    Returns:
        The file, and the runs, whose `notes` say what is missing or damaged.

    Raises:
        UserError: a path is not a run folder, or several are given and no `output`.
    """
    folders = find_runs(paths)
    if output is None and len(paths) > 1:
        raise UserError(
            f"the report of several folders needs a file name: add {option('output')}, e.g. {option('output', 'report.html')}"
        )
    file = Path(output) if output is not None else Path(paths[0]) / FILE
    if file.is_dir():
        raise UserError(f"{option('output', file)} is a folder; name a file, e.g. {option('output', file / FILE)}")
    from compressvit.report.page import Page  # late, with what draws: a run ends with its report, and begins without

    page = Page(images)
    runs = [read_run(folder) for folder in folders]
    if len(runs) == 1:
        html = page.html(sections.title(runs[0]), sections.facts(runs[0]), runs, None)
    else:
        from compressvit.report.comparison import comparison  # late, because labels need recipes, which import torch

        html = page.html(f"{len(runs)} runs", [str(path) for path in paths], runs, comparison(runs, page))
    write_text(file, html)
    return file, runs
