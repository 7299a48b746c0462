"""What several verbs share: their arguments, and the end of a run that a signal stops."""

from __future__ import annotations

import argparse
import gc
from collections.abc import Callable
from functools import wraps

from compressvit.processes import leads
from compressvit.text import complain

Verb = Callable[[str, Callable[[argparse.Namespace], int], str], argparse.ArgumentParser]


def short(run: Callable[[argparse.Namespace], int]) -> Callable[[argparse.Namespace], int]:
    """For a verb that ends within seconds: without the garbage collector, which would look at a million objects of torch again and again
    while modules are imported, a tenth of the time."""

    @wraps(run)
    def without_collector(arguments: argparse.Namespace) -> int:
        enabled = gc.isenabled()
        gc.disable()
        try:
            return run(arguments)
        finally:
            if enabled:
                gc.enable()

    return without_collector


def add_recipe(to: argparse.ArgumentParser) -> None:
    to.add_argument("recipe", metavar="RECIPE", help="a shipped recipe's name, or the path of a YAML file")
    add_overrides(to, "overrides, e.g. data.root=FOLDER steps.0.multiplex.share=6")


def add_overrides(to: argparse.ArgumentParser, text: str) -> None:
    to.add_argument("overrides", metavar="key=value", nargs="*", default=[], help=text)


def add_device(to: argparse.ArgumentParser, text: str = "cpu, cuda, … (default: the best available)") -> None:
    to.add_argument("--device", default="auto", help=text)


def add_run(to: argparse.ArgumentParser, name: str) -> None:
    """The run folder, and how a run begins and ends.

    Args:
        name: of the folder in `runs/` by default, as the help writes it.
    """
    to.add_argument("--output", metavar="FOLDER", help=f"the run folder (default: runs/{name})")
    to.add_argument("--resume", action="store_true", help="continue the run in the folder")
    to.add_argument("--overwrite", action="store_true", help="delete the run in the folder and start again")
    add_device(to, "cpu, cuda, cuda:1, mps, … (default: the best available)")
    to.add_argument("--no-report", action="store_true", help="do not write report.html at the end")
    add_log_to(to)


def add_log_to(to: argparse.ArgumentParser) -> None:
    to.add_argument(
        "--log-to",
        metavar="BOARD",
        action="append",
        default=[],
        help="show the run there too, beside TensorBoard: wandb (pip install 'compressvit[wandb]'); may be repeated",
    )


def exit_code_of(run: Callable[[], object]) -> int:
    """Run to the end: 0, or 128 + N where signal N stops it, which is told."""
    from compressvit.training.loop import Interrupted

    try:
        run()
    except Interrupted as stop:
        if leads():
            complain("compressvit", stop)
        return 128 + stop.signum
    return 0
