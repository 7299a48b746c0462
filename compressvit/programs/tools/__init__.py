"""The programs of `compressvit tool NAME`: one file per program."""

from __future__ import annotations

import ast
import importlib
import pkgutil
from collections.abc import Sequence
from pathlib import Path

from compressvit.errors import UserError, did_you_mean


def described() -> dict[str, str]:
    """The first line of what each program does, by name; none is imported."""
    found = {}
    for info in pkgutil.iter_modules(__path__):
        text = (Path(__path__[0]) / f"{info.name}.py").read_text(encoding="utf-8")
        found[info.name] = (ast.get_docstring(ast.parse(text)) or "").partition("\n")[0].rstrip(".:")
    return found


def run_tool(name: str, argv: Sequence[str]) -> int:
    """Run the program of that name; returns the exit code.

    Raises:
        UserError: there is none.
    """
    known = described()
    if name not in known:
        raise UserError(f"there is no tool '{name}'; {did_you_mean(name, known)}")
    code: int = importlib.import_module(f"{__name__}.{name}").main(argv)
    return code
