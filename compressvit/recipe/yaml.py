"""YAML with line numbers, and `key=value` overrides, independent of what a recipe contains."""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from typing import Any

import yaml

from compressvit.errors import UserError, shortened
from compressvit.reading import MAX_DEPTH, parse_yaml

Path = tuple[str | int, ...]
_MARKS = tuple("@`*&!%|>")  # with these a plain value cannot begin
_QUOTED = 200  # characters of an override in a message, which may quote it for every fault in it


@dataclass
class Document:
    """A parsed document: its content, and the line of each value."""

    name: str
    content: Any
    lines: dict[Path, int] = field(default_factory=dict)
    overridden: dict[Path, str] = field(default_factory=dict)

    def place(self, path: Path) -> str:
        """'line 9' for the value at `path` or the closest value that contains it; or the override that set it."""
        for end in range(len(path), -1, -1):
            if path[:end] in self.overridden:
                return f"override {shortened(' '.join(self.overridden[path[:end]].split()), _QUOTED)}"
            if path[:end] in self.lines:
                return f"line {self.lines[path[:end]]}"
        return "line 1"

    def take_text(self, path: Path) -> bool:
        """Make the value at `path` the text that it was written as, if an override of just that key set it to a number, a date or a truth
        value. Whether that changed anything."""
        here = self.content
        for part in path[:-1]:
            here = here[part]
        if path not in self.overridden or isinstance(here[path[-1]], (str, dict, list)) or here[path[-1]] is None:
            return False
        here[path[-1]] = self.overridden[path].partition("=")[2].strip()
        return True


def dumped(content: Any) -> str:
    """Plain content as YAML, its keys in their order."""
    return yaml.safe_dump(content, sort_keys=False, allow_unicode=True)


def parse(text: str, name: str) -> Document:
    """Parse one YAML document.

    Raises:
        UserError: it is not YAML, exceeds a bound of `compressvit.reading`, or has a key twice in a mapping.
    """
    document = Document(name, None)
    document.content = parse_yaml(text, name, lambda node: _walk(node, (), document))
    return document


def _walk(node: yaml.Node, path: Path, document: Document) -> None:
    document.lines.setdefault(path, node.start_mark.line + 1)
    if isinstance(node, yaml.MappingNode):
        seen: dict[str, int] = {}
        for key_node, value_node in node.value:
            key, line = str(key_node.value), key_node.start_mark.line + 1
            if key in seen:
                raise UserError(f"{document.name}, line {line}: key '{key}' appears twice (first on line {seen[key]})")
            seen[key] = line
            place = (*path, key)
            document.lines[place] = line
            _walk(value_node, place, document)
    elif isinstance(node, yaml.SequenceNode):
        for index, item in enumerate(node.value):
            _walk(item, (*path, index), document)


def _unshared(content: Any) -> Any:
    """A copy in which aliases do not share values, so that changing one place does not change another."""
    if isinstance(content, dict):
        return {key: _unshared(value) for key, value in content.items()}
    return [_unshared(value) for value in content] if isinstance(content, list) else content


def override(document: Document, assignments: list[str]) -> None:
    """Apply `a.b.0.c=VALUE` to the content, in place; the value is read as YAML. Missing mappings on the way are made.

    Raises:
        UserError: there is no '=', the key is empty, an index is out of range, or the path leads into neither a list nor a mapping.
    """
    document.content = _unshared(document.content)
    for assignment in assignments:
        key, equals, text = assignment.partition("=")
        if not equals:
            raise UserError(
                f"override '{assignment}' has no '='; write it as key=value, e.g. seed=1 or steps.0.multiplex.share=6"
            )
        parts: list[str] = re.sub(r"\[(\d+)\]", r".\1", key).split(
            "."
        )  # accepts steps[0], as in messages, and steps.0, as in the documentation
        if not all(parts):
            raise UserError(f"override '{assignment}' names no key; write it as key=value, e.g. data.root=FOLDER")
        if len(parts) > MAX_DEPTH:
            raise UserError(f"override '{assignment[:40]}…' names a place {len(parts)} levels deep; a recipe has fewer")
        value = _value(key, text, assignment)
        _assign(document, parts, _as_written(value, text), assignment)


def _value(key: str, text: str, assignment: str) -> Any:
    """The value of an override, read as YAML."""
    try:
        return parse_yaml(text, f"override '{assignment}': its value")
    except UserError as error:
        if not text.startswith(_MARKS) or "'" in text or '"' in text or len(text) > _QUOTED:
            raise
        quoted = f"""'{key}="{text}"'"""
        raise UserError(f"{error}. A value that begins with {text[0]} is quoted, as in {quoted}") from error


def _as_written(value: Any, text: str) -> Any:
    """The value of an override, or its text where YAML takes a part of it for a comment, as in `data.root=/data/set #2`."""
    plain = not isinstance(value, (dict, list)) and not text.lstrip().startswith(("'", '"'))
    return text.strip() if plain and re.search(r"(^|\s)#", text) else value


def _assign(document: Document, parts: list[str], value: Any, assignment: str) -> None:
    path: Path = ()
    here = document.content
    for depth, part in enumerate(parts):
        last = depth == len(parts) - 1
        step: str | int = part
        if isinstance(here, list):
            if not part.isdecimal() or int(part) >= len(here):
                raise UserError(
                    f"override '{assignment}' goes into nothing: {_dotted(path)} is a list of {len(here)} "
                    f"(indices 0 to {len(here) - 1}), and '{part}' is not one of them"
                )
            step = int(part)
        elif not isinstance(here, dict):
            raise UserError(
                f"override '{assignment}' goes into nothing: {_dotted(path)} is {here!r}, which has no '{part}' inside"
            )
        path = (*path, step)
        if last:
            here[step] = value
        else:
            if isinstance(here, dict) and here.get(part) is None:
                if part not in here:
                    document.overridden[path] = assignment
                here[part] = {}
            here = here[step]
    # The old value is replaced, so lines and overrides recorded below it no longer apply.
    for places in (document.lines, document.overridden):
        for inside in [p for p in places if p[: len(path)] == path]:
            del places[inside]
    document.overridden[path] = assignment


def _dotted(path: Path) -> str:
    return ".".join(map(str, path)) or "the recipe"
