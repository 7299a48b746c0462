"""`tool`: programs that look at runs and models."""

from __future__ import annotations

import argparse

from compressvit.cli.common import Verb


def add_tool(verb: Verb) -> None:
    tool = verb("tool", _tool, "look at runs and models: gradients, curves, CKA, …; alone, list the tools")
    tool.usage = "%(prog)s NAME [options]; `compressvit tool NAME --help` explains one"
    tool.add_argument("name", metavar="NAME", nargs="?", help="of the tool")
    tool.add_argument("rest", nargs=argparse.REMAINDER, help=argparse.SUPPRESS)


def _tool(arguments: argparse.Namespace) -> int:
    from compressvit.programs.tools import described, run_tool

    if arguments.name is not None:
        return run_tool(arguments.name, arguments.rest)
    from rich.table import Table

    from compressvit.terminal import Terminal

    table = Table(box=None, pad_edge=False)
    table.add_column("name")
    table.add_column("what it shows")
    for name, text in described().items():
        table.add_row(name, text)
    Terminal().print(table)
    return 0
