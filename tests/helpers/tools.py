"""Running the programs of `compressvit tool` in this process."""

from __future__ import annotations

import importlib


def tool(name: str):
    """The module of a program."""
    return importlib.import_module(f"compressvit.programs.tools.{name}")


def ran(capsys, name: str, *words: object) -> str:
    """The output of a program that must succeed; white space is squeezed."""
    code = tool(name).main([str(word) for word in words])
    out, err = capsys.readouterr()
    assert code == 0, err
    return " ".join(out.split())


def refused(capsys, name: str, *words: object) -> str:
    """The one sentence of a program that must refuse, with exit code 2 and nothing else said."""
    assert tool(name).main([str(word) for word in words]) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert len(err.strip().splitlines()) == 1
    assert err.startswith("compressvit: ")
    return err
