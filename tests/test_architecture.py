"""The house: which rooms there are, that imports go down only, and that no file or function is too long to read in one sitting."""

from __future__ import annotations

import ast
import functools
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "compressvit"

# From the ground up. A room may import from itself and from those before it. docs/architecture.md quotes this list.
GROUND = (
    "errors",
    "processes",
    "text",
    "spec",
    "registry",
    "notes",
    "reading",
    "files",
    "rows",
    "terminal",
    "log",
    "exits",
)
ROOMS = (
    "charts",
    "model",
    "tasks",
    "data",
    "fitting",
    "transforms",
    "training",
    "artifacts",
    "diagnostics",
    "recipe",
    "runs",
    "programs",
    "report",
    "testing",
)
TOP = ("cli", "__main__")
ORDER = ("", *GROUND, *ROOMS, *TOP)  # "" is compressvit/__init__.py, which knows names of modules alone

TOO_LONG = {  # to become shorter
}


def module_of(file: Path) -> str:
    parts = file.relative_to(PACKAGE).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


MODULES = {module_of(file): file for file in sorted(PACKAGE.rglob("*.py"))}


@functools.cache
def tree_of(module: str) -> ast.Module:
    return ast.parse(MODULES[module].read_text(encoding="utf-8"))


def room_of(module: str) -> str:
    return module.partition(".")[0]


def imports(module: str) -> Iterator[tuple[str, int]]:
    """Modules of the package that a module imports, anywhere in it (under TYPE_CHECKING and inside functions too), with the line."""
    for node in ast.walk(tree_of(module)):
        if isinstance(node, ast.Import):
            found = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{module}: line {node.lineno}: a relative import"
            found = [f"{node.module}.{alias.name}" for alias in node.names]
        else:
            continue
        for name in found:
            head, _, inner = name.partition(".")
            if head == "compressvit":
                yield (inner if inner in MODULES else inner.rpartition(".")[0]), node.lineno


def test_the_rooms_are_those_of_the_list():
    assert len(MODULES) > 100, "the walk saw no package"
    assert {room_of(module) for module in MODULES} == set(ORDER)
    folders = {path.name for path in PACKAGE.iterdir() if path.is_dir() and any(path.glob("*.py"))}
    assert folders == {*ROOMS, "cli"}


@pytest.mark.parametrize("module", MODULES)
def test_imports_go_down_only(module):
    for name, line in imports(module):
        if name:  # `from compressvit import __version__`
            assert ORDER.index(room_of(name)) <= ORDER.index(room_of(module)), f"{module}:{line} imports {name}"


def test_there_is_no_circle_of_imports():
    graph = {module: {name for name, _ in imports(module)} - {module} for module in MODULES}
    done: set[str] = set()

    def visit(module: str, path: tuple[str, ...]) -> None:
        assert module not in path, " → ".join([*path[path.index(module) :], module])
        if module in done:
            return
        for name in graph[module]:
            if name:
                visit(name, (*path, module))
        done.add(module)

    for module in MODULES:
        visit(module, ())


@pytest.mark.parametrize("module", MODULES)
def test_no_file_is_over_400_lines_and_no_function_over_60(module):
    assert len(MODULES[module].read_text(encoding="utf-8").splitlines()) <= 400
    for node in ast.walk(tree_of(module)):
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
            lines = (node.end_lineno or 0) - node.lineno + 1
            if f"{module}.{node.name}" in TOO_LONG:
                assert lines > 60, f"{module}.{node.name} is short enough now"
                continue
            assert lines <= 60, f"{module}.{node.name} has {lines} lines"


def test_the_documentation_quotes_the_rooms_in_order():
    """A row a room, with the first sentence of the room's docstring."""
    text = (ROOT / "docs" / "architecture.md").read_text(encoding="utf-8")
    rows = [line for line in text.splitlines() if line.startswith("| `")]
    assert [row.split("`")[1].rstrip("/") for row in rows if "/`" in row] == list(ROOMS)
    for room in ROOMS:
        sentence = (ast.get_docstring(tree_of(room)) or "").splitlines()[0]
        row = next(row for row in rows if row.startswith(f"| `{room}/`"))
        assert sentence.rstrip(".") in row, f"{room}: {sentence}"


def test_the_tests_stand_in_the_rooms_they_are_about():
    folders = {path.name for path in (ROOT / "tests").iterdir() if path.is_dir() and any(path.rglob("test_*.py"))}
    assert folders <= {*ROOMS, "cli", "contract"}
    assert set(ROOMS) - {"charts", "testing"} <= folders  # the contract is the test of testing
