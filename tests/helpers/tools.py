"""Running the programs of `tools/` in this process."""

from __future__ import annotations

import importlib.util
from pathlib import Path

TOOLS = Path(__file__).parents[2] / "tools"


def tool(name: str):
    """The module of a program."""
    spec = importlib.util.spec_from_file_location(f"tools_{name}", TOOLS / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


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
    assert err.startswith(f"{name}.py: ")
    return err
