"""Reading files that somebody else may have made: regular files only, with bounds on bytes, nesting and aliases, and one sentence for
whatever is wrong with one."""

from __future__ import annotations

import json
import os
import re
import stat
from collections.abc import Callable
from pathlib import Path
from typing import Any, BinaryIO

import yaml

from compressvit.errors import UserError
from compressvit.text import printable_in

MAX_BYTES = 256 * 2**20  # of a log or a file of rows, which grow with a run
MAX_JSON = 64 * 2**20
MAX_YAML = 2**20  # PyYAML reads about 0.2 MB a second; the longest shipped recipe has 3 kB
MAX_DEPTH = 64
MAX_NODES = 20_000  # of YAML, an alias counted as often as it is used
MAX_ALIASES = 1_000
_MAX_DIGITS = 64  # of a number

_KINDS = {
    stat.S_IFDIR: "a folder",
    stat.S_IFIFO: "a named pipe",
    stat.S_IFSOCK: "a socket",
    stat.S_IFCHR: "a device",
    stat.S_IFBLK: "a device",
    stat.S_IFLNK: "a link",
}


class Unreadable(UserError):
    """A file that cannot be read.

    Attributes:
        fault: what is wrong, without the file's name.
        missing: it is not there.
    """

    def __init__(self, path: Path, fault: str, *, missing: bool = False):
        super().__init__(f"{path} cannot be read: {fault}")
        self.fault, self.missing = fault, missing


def kind_of(path: Path) -> str | None:
    """What is at a path if it is neither a regular file nor absent, e.g. 'a link'; links are not followed."""
    try:
        mode = path.lstat().st_mode
    except OSError:
        return None
    return None if stat.S_ISREG(mode) else _KINDS.get(stat.S_IFMT(mode), "no regular file")


def link_on_the_way(path: Path, root: Path) -> Path | None:
    """The first link among `path` and the folders between it and `root`, which itself may be one."""
    parts = path.relative_to(root).parts
    steps = (root.joinpath(*parts[: end + 1]) for end in range(len(parts)))
    return next((step for step in steps if step.is_symlink()), None)


def open_regular(path: Path, root: Path | None = None) -> BinaryIO:
    """Open a regular file for reading; a named pipe would wait for a writer forever.

    Args:
        root: a folder around it inside which no link is followed.

    Raises:
        Unreadable: it is something else, or cannot be opened.
    """
    if root is not None and (link := link_on_the_way(path, root)) is not None:
        what = "it is a link" if link == path else f"{link} is a link"
        raise Unreadable(path, f"{what}, and links inside a run folder are not followed")
    try:
        descriptor = os.open(path, os.O_RDONLY | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_BINARY", 0))
    except FileNotFoundError as error:
        raise Unreadable(path, "there is no such file", missing=True) from error
    except (OSError, ValueError) as error:  # ValueError: a NUL in the name
        raise Unreadable(path, getattr(error, "strerror", None) or str(error)) from error
    mode = os.fstat(descriptor).st_mode
    if not stat.S_ISREG(mode):
        os.close(descriptor)
        raise Unreadable(path, f"it is {_KINDS.get(stat.S_IFMT(mode), 'no regular file')}, not a file")
    return os.fdopen(descriptor, "rb")


def read_bytes(path: Path, *, most: int = MAX_BYTES, root: Path | None = None) -> bytes:
    """The content of a regular file of at most `most` bytes. Raises as `open_regular`, and where it is longer."""
    with open_regular(path, root) as file:
        try:
            size = os.fstat(file.fileno()).st_size
            content = file.read(most + 1) if size <= most else b""  # longer than its size: it grows, or is the kernel's
            size = max(size, len(content))
            if size > most:
                raise Unreadable(path, f"it has {size / 1e6:,.1f} MB, and at most {most / 1e6:,.1f} MB are read")
            return content
        except OSError as error:
            raise Unreadable(path, error.strerror or str(error)) from error


def read_text(path: Path, *, most: int = MAX_BYTES, root: Path | None = None) -> str:
    """The text of a regular file in UTF-8, with `\\n` at the end of lines. Raises as `read_bytes`, and where it is not UTF-8."""
    try:
        text = read_bytes(path, most=most, root=root).decode("utf-8")
    except UnicodeDecodeError as error:
        raise Unreadable(path, str(error)) from error
    return text.replace("\r\n", "\n").replace("\r", "\n")


# ------------------------------------------------------------------------------------------------------------------ JSON


def read_json(path: Path, root: Path | None = None) -> Any:
    """The content of a JSON file. Raises as `read_text` and `parse_json`."""
    return parse_json(read_text(path, most=MAX_JSON, root=root), path)


def parse_json(text: str, path: Path) -> Any:
    """The content of JSON; `path` is what messages call it. Bytes of file names that are not UTF-8 are spelled out.

    Raises:
        Unreadable: it is not JSON, is nested more than `MAX_DEPTH` deep, or has a number of more than 64 digits.
    """
    try:
        content = json.loads(text, parse_int=_whole)
    except json.JSONDecodeError as error:
        raise Unreadable(path, f"it is not JSON: {error}") from error
    except RecursionError:
        raise Unreadable(path, f"it is nested more than {MAX_DEPTH} deep") from None
    except ValueError as error:
        raise Unreadable(path, str(error)) from error
    if _nested_too_deeply(content):
        raise Unreadable(path, f"it is nested more than {MAX_DEPTH} deep")
    return printable_in(content) if "\\ud" in text or "\\uD" in text else content


def _whole(digits: str) -> int:
    if len(digits) > _MAX_DIGITS:
        raise ValueError(f"a number in it has {len(digits):,} digits")
    return int(digits)


def _nested_too_deeply(content: Any) -> bool:
    level = [content]
    for _ in range(MAX_DEPTH + 1):
        inside = (value.values() if isinstance(value, dict) else value for value in level)
        level = [value for values in inside for value in values if isinstance(value, (dict, list))]
        if not level:
            return False
    return True


# ------------------------------------------------------------------------------------------------------------------ YAML


def read_yaml(path: Path, root: Path | None = None) -> Any:
    """The content of a YAML file. Raises as `read_text` and `parse_yaml`."""
    return parse_yaml(read_text(path, most=MAX_YAML, root=root), str(path))


def parse_yaml(text: str, name: str, see: Callable[[yaml.Node], object] = lambda node: None) -> Any:
    """The content of one YAML document; None of an empty one.

    Args:
        name: what messages call it.
        see: is shown the document's nodes before values are built from them.

    Raises:
        UserError: it is not YAML, is too long, nested too deeply, holds too many aliases, or a value that cannot be built.
    """
    if len(text) > MAX_YAML:
        raise UserError(f"{name} has {len(text) / 1e6:,.1f} MB, and at most {MAX_YAML / 1e6:,.1f} MB of YAML are read")
    loader = None
    try:
        loader = _Loader(text)
        node = loader.get_single_node()
        if node is None:
            return None
        see(node)
        return loader.construct_document(node)
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        where = f"line {mark.line + 1}, column {mark.column + 1}: " if mark else ""
        raise UserError(f"{name} is not YAML: {where}{_short(getattr(error, 'problem', None) or error)}") from error
    except _Excess as error:
        raise UserError(f"{name} {error}") from error
    except UserError:
        raise
    except RecursionError as error:
        raise UserError(f"{name} is nested too deeply, or holds an alias of something around it") from error
    except (ValueError, TypeError, LookupError, AttributeError, ArithmeticError) as error:
        # 2020-13-45 is read as a date, and PyYAML trusts its tags: `!!int ""` is an IndexError, `!!bool x` a KeyError
        raise UserError(f"{name} holds a value that YAML cannot build: {_short(error)}; put text in quotes") from error
    finally:
        if loader is not None:
            loader.dispose()


def _short(fault: object) -> str:
    text = str(fault)
    return text if len(text) <= 300 else text[:300] + "…"


class _Excess(Exception):
    """A bound that a YAML document exceeds."""


class _Loader(yaml.SafeLoader):
    """The safe loader with bounds, and with the floats of YAML 1.2: PyYAML reads `1e-3` as text."""

    def __init__(self, text: str):
        super().__init__(text)
        self._depth = self._aliases = self._nodes = 0
        self._sizes: dict[int, int] = {}  # of what is composed, by the node's id: nodes with aliases spelled out

    def compose_node(self, parent: yaml.Node | None, index: Any) -> yaml.Node | None:
        alias = self.check_event(yaml.AliasEvent)
        before = self._nodes
        self._nodes += 1
        self._depth += 1
        self._aliases += alias
        if self._depth > MAX_DEPTH:
            raise _Excess(f"is nested too deeply, more than {MAX_DEPTH} levels")
        if self._aliases > MAX_ALIASES:
            raise _Excess(f"holds more than {MAX_ALIASES:,} aliases")
        node = super().compose_node(parent, index)
        if alias:
            if id(node) not in self._sizes:
                raise _Excess("is nested too deeply, or holds an alias of something around it")
            self._nodes += self._sizes[id(node)]
        self._sizes.setdefault(id(node), self._nodes - before)
        self._depth -= 1
        if self._nodes > MAX_NODES:
            raise _Excess(f"holds more than {MAX_NODES:,} values, aliases spelled out")
        return node

    def number(self, node: yaml.ScalarNode) -> Any:
        """A number of bounded length: in base 60, which YAML 1.1 has, a long one takes hours."""
        if len(node.value) > _MAX_DIGITS:
            raise ValueError(f"a number of {len(node.value):,} characters")
        as_float = node.tag.endswith("float")
        return self.construct_yaml_float(node) if as_float else self.construct_yaml_int(node)


_Loader.yaml_implicit_resolvers = {k: list(v) for k, v in yaml.SafeLoader.yaml_implicit_resolvers.items()}
_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float", re.compile(r"^[-+]?(\d+(\.\d*)?|\.\d+)[eE][-+]?\d+$"), list("-+.0123456789")
)
for _tag in ("int", "float"):
    _Loader.add_constructor(f"tag:yaml.org,2002:{_tag}", _Loader.number)
