"""Pages of the site that are made from the package: recipes from their JSON schema, verbs from their help, Python from docstrings."""

from __future__ import annotations

import argparse
import inspect
import json
import os
import sys
import typing
from collections.abc import Iterable, Iterator, Mapping
from types import MappingProxyType
from typing import Any

Schema = Mapping[str, Any]
LIMITS = {"minimum": "≥", "exclusiveMinimum": ">", "maximum": "≤", "exclusiveMaximum": "<"}
TYPES = {"integer": "whole number", "boolean": "true or false", "string": "text", "object": "mapping"}


def cell(text: str) -> str:
    """A text within a cell of a table, as one line."""
    return " ".join(text.split()).replace("|", "\\|")


def code(value: Any) -> str:
    return f"`{cell(json.dumps(value, ensure_ascii=False))}`"


# ------------------------------------------------------------------------------------------------------------- recipes


class Sections:
    """The sections of recipes, each with a table of its keys, spread over pages.

    Args:
        schema: of recipes.
        places: page and anchor of the sections that have a place of their own, by the name of their definition.
    """

    def __init__(self, schema: Schema, places: Mapping[str, str]):
        self.definitions: Schema = schema["$defs"]
        self.places = dict(places)

    def table(self, schema: Schema, page: str) -> str:
        """The keys of a section, and those of its sections that have no place yet, which get it here."""
        properties: Schema = schema.get("properties", {})
        if not properties:
            return "No settings.\n"
        inner = [name for field in properties.values() for name in references(field) if name not in self.places]
        inner = list(dict.fromkeys(inner))
        self.places |= {name: f"{page}#{name.lower()}" for name in inner}
        rows = ["| key | value | |", "| --- | --- | --- |"]
        for key, field in properties.items():
            default = "; required" if key in schema.get("required", ()) else self.default(field)
            rows.append(f"| `{key}` | {self.value(field, page)}{default} | {cell(self.meaning(field))} |")
        parts = ["\n".join(rows) + "\n"]
        for name in inner:
            section = self.definitions[name]
            parts.append(f"#### {name} {{#{name.lower()}}}\n\n{section.get('description', '')}\n")
            parts.append(self.table(section, page))
        return "\n".join(parts)

    def default(self, field: Schema) -> str:
        if "$ref" in field or isinstance(field.get("default"), dict):
            return ""  # those of the section
        return f"; default\N{NO-BREAK SPACE}{code(field.get('default'))}"

    def meaning(self, field: Schema) -> str:
        if "description" in field:
            return str(field["description"])
        return " ".join(str(self.definitions[name].get("description", "")) for name in references(field))

    def value(self, field: Schema, page: str) -> str:
        """What a key may be, in words."""
        if "$ref" in field:
            name = field["$ref"].rpartition("/")[2]
            place, _, anchor = self.places[name].partition("#")
            return f"[{name}]({'' if place == page else place}#{anchor})"
        if "enum" in field or "const" in field:
            return " · ".join(f"`{word}`" for word in field.get("enum", [field.get("const")]))
        if "anyOf" in field:
            listed = any("$ref" in option for option in field["anyOf"])  # then words are listed there
            options = [
                self.value(option, page)
                for option in field["anyOf"]
                if option.get("type") != "null" and not (listed and "enum" in option)
            ]
            return ", or ".join(dict.fromkeys(options))
        if field.get("type") == "array":
            items = field.get("prefixItems") or [field.get("items", {})]
            return "list: " + ", ".join(dict.fromkeys(self.value(item, page) or "any values" for item in items))
        kind = str(field.get("type", ""))
        limits = ", ".join(f"{sign}\N{NO-BREAK SPACE}{field[key]}" for key, sign in LIMITS.items() if key in field)
        pattern = f"like `{cell(field['pattern'])}`" if "pattern" in field else ""
        return " ".join(filter(None, [TYPES.get(kind, kind), limits, pattern]))


def references(field: Any) -> Iterator[str]:
    """The names of the definitions that a field refers to, anywhere in it."""
    if isinstance(field, dict):
        if "$ref" in field:
            yield field["$ref"].rpartition("/")[2]
        for key, inner in field.items():
            if key != "default":
                yield from references(inner)
    elif isinstance(field, list):
        for inner in field:
            yield from references(inner)


def recipe_pages() -> dict[str, str]:
    """The reference of recipes: sections, transforms, phases and diagnostics with all their keys, and the data sets."""
    from compressvit.diagnostics.base import DIAGNOSTICS
    from compressvit.recipe.schema import json_schema
    from compressvit.recipe.words import Merge
    from compressvit.training.phases import PHASES
    from compressvit.transforms.base import TRANSFORMS

    schema = json_schema()
    words: dict[str, tuple[str, Mapping[str, type]]] = {
        "reference/transforms.md": ("Transforms", {w: s for w, s in TRANSFORMS.items() if TRANSFORMS.is_own(w)}),
        "reference/phases.md": ("Phases", {**{w: s for w, s in PHASES.items() if PHASES.is_own(w)}, "merge": Merge}),
        "reference/diagnostics.md": (
            "Diagnostics",
            {w: s for w, s in DIAGNOSTICS.items() if DIAGNOSTICS.is_own(w)},
        ),
    }
    top = {
        name: key
        for key in ("teacher", "student", "data", "calibration")
        for name in references(schema["properties"][key])
    }
    places = {name: f"recipe.md#{key}" for name, key in top.items()}
    places |= {"Step": "recipe.md#steps", "Entry": "recipe.md#diagnostics"}
    for page, (_, specs) in words.items():
        places |= {spec.__name__: f"{page.rpartition('/')[2]}#{word}" for word, spec in specs.items()}
    sections = Sections(schema, places)
    return {
        "reference/recipe.md": _recipe(schema, sections, top, words),
        **{page: _words(page, heading, specs, sections) for page, (heading, specs) in words.items()},
        "reference/sets.md": _sets(),
    }


def _recipe(schema: Schema, sections: Sections, top: Mapping[str, str], words: Mapping[str, Any]) -> str:
    parts = [
        "# Recipes, key by key\n",
        "Made from the JSON schema: `compressvit schema` prints it, and `compressvit schema KEY` explains one section. "
        "[Recipes](../recipes.md) tells how to write one.\n",
        sections.table(schema, "recipe.md"),
    ]
    for name, key in top.items():
        section = schema["$defs"][name]
        parts += [f"## `{key}` {{#{key}}}\n", section["description"] + "\n", sections.table(section, "recipe.md")]
    parts.append("## `steps` {#steps}\n\nA step is a word, or a word with its settings: `- multiplex: {share: 2}`.\n")
    for page, (heading, specs) in words.items():
        place = page.rpartition("/")[2]
        if heading == "Diagnostics":
            parts.append("## `diagnostics` {#diagnostics}\n")
        rows = [f"| [`{word}`]({place}#{word}) | {cell(first_line(spec))} |" for word, spec in specs.items()]
        parts.append("\n".join([f"| {heading.lower()} | |", "| --- | --- |", *rows]) + "\n")
    return "\n".join(parts)


def _words(page: str, heading: str, specs: Mapping[str, type], sections: Sections) -> str:
    parts = [f"# {heading}\n"]
    for word, spec in specs.items():
        parts += [f"## {word} {{#{word}}}\n", f"{first_line(spec)}\n", method(spec)]
        parts.append(sections.table(sections.definitions[spec.__name__], page.rpartition("/")[2]))
    return "\n".join(parts)


def first_line(spec: type) -> str:
    return (inspect.getdoc(spec) or "").partition("\n")[0]


def method(spec: type) -> str:
    """What the file of a method says of it below its first line: the paper and the formula."""
    text = inspect.getdoc(sys.modules[spec.__module__]) or ""
    return text.partition("\n")[2].strip() + "\n" if spec.__name__ != "Merge" else ""


def needs(entry: Any) -> str:
    return f"{'; ' * bool(entry.note)}needs the package `{entry.package}`" if entry.package else ""


def _sets() -> str:
    from compressvit.data.data_set import SETS

    rows = [
        f"| `{entry.name}` | {entry.classes or ''} | {entry.truth or 'none'} | {cell(entry.note)}{needs(entry)} |"
        for word, entry in sorted(SETS.items(), key=lambda item: "/" in item[0])
        if SETS.is_own(word)
    ]
    return "\n".join(
        [
            "# Data sets\n",
            "What `data.name` may be; [the keys of `data`](recipe.md#data), and [how they are read](../data.md).\n",
            "| name | classes | ground truth | |",
            "| --- | --- | --- | --- |",
            *rows,
        ]
    )


# --------------------------------------------------------------------------------------------------------------- verbs


def verbs_page() -> str:
    """The help of every verb, as a terminal of 80 columns prints it."""
    from compressvit.cli import _parser

    parts = ["# The command line\n", "What `--help` says.\n"]
    before, os.environ["COLUMNS"] = os.environ.get("COLUMNS"), "80"
    try:
        for parser in parsers(_parser()[0]):
            parts += [f"## {parser.prog}\n", f"```text\n{parser.format_help()}```\n"]
    finally:
        os.environ.pop("COLUMNS")
        if before is not None:
            os.environ["COLUMNS"] = before
    return "\n".join(parts)


def parsers(parser: argparse.ArgumentParser) -> Iterator[argparse.ArgumentParser]:
    """A parser and those of its verbs, in order."""
    yield parser
    for action in parser._actions:
        if isinstance(action, argparse._SubParsersAction):
            for inner in dict.fromkeys(action.choices.values()):
                yield from parsers(inner)


# -------------------------------------------------------------------------------------------------------------- Python


def entry(thing: Any, name: str, **options: Any) -> str:
    """The directive for a class or function, at the module where it is defined, under the name that users import."""
    settings = {"heading": name, "toc_label": name.rpartition(".")[2], **options}
    lines = [f"      {key}: {json.dumps(value)}" for key, value in settings.items()]
    return "\n".join([f"::: {thing.__module__}.{thing.__qualname__}", "    options:", *lines, ""])


def returned(things: Iterable[Any]) -> list[type]:
    """The package's own classes that functions return."""
    found = [typing.get_type_hints(thing).get("return") for thing in things if inspect.isfunction(thing)]
    return list(dict.fromkeys(t for t in found if inspect.isclass(t) and t.__module__.startswith("compressvit.")))


def python_pages() -> dict[str, str]:
    import compressvit
    from compressvit import diagnostics, losses, testing, ties
    from compressvit.transforms.base import TRANSFORMS

    public = {name: getattr(compressvit, name) for name in compressvit._PUBLIC}
    results = [thing for thing in returned(public.values()) if thing not in public.values()]
    classes = {word: spec for word, spec in TRANSFORMS.items() if TRANSFORMS.is_own(word)}
    return {
        "reference/python.md": "\n".join(
            [
                "# Functions\n",
                "What `import compressvit` gives; [how they go together](../python.md).\n",
                *(entry(thing, f"compressvit.{name}", **_few(thing)) for name, thing in public.items()),
                *(entry(thing, thing.__name__) for thing in results),
            ]
        ),
        "reference/classes.md": "\n".join(
            [
                "# Classes of transforms\n",
                "For `compressvit.compress(model, [...])`. Arguments are given by name: those of the step in "
                "[recipes](transforms.md), which also tells the papers and formulas.\n",
                *(
                    f"{entry(spec, f'compressvit.{spec.__name__}', members=False, show_signature=False, separate_signature=False)}\n"
                    f"Arguments: [`{word}`](transforms.md#{word})\n"
                    for word, spec in classes.items()
                ),
            ]
        ),
        "reference/losses.md": _module("Losses", "compressvit.losses", losses, functions_of(losses)),
        "reference/measures.md": "\n".join(
            [
                _module("Diagnostics and ties", "compressvit.diagnostics", diagnostics, members_of(diagnostics)),
                "## compressvit.ties\n",
                f"{inspect.getdoc(ties)}\n",
                *(entry(thing, f"compressvit.ties.{name}") for name, thing in functions_of(ties).items()),
            ]
        ),
        "reference/testing.md": _module("Testing a transform", "compressvit.testing", testing, members_of(testing)),
        "reference/detectors.md": "# Detectors\n\n" + "\n".join(_detectors()),
    }


def _few(thing: Any) -> dict[str, Any]:
    """Of settings the recipe reference tells; what is inherited from pydantic is not ours."""
    return {"members": False, "show_signature": False, "separate_signature": False} if inspect.isclass(thing) else {}


def functions_of(module: Any) -> dict[str, Any]:
    """The public functions that a module defines."""
    return {
        name: thing
        for name, thing in vars(module).items()
        if inspect.isfunction(thing) and thing.__module__ == module.__name__ and not name.startswith("_")
    }


def members_of(module: Any) -> dict[str, Any]:
    """The classes and functions that a module lists."""
    found = {name: getattr(module, name) for name in module.__all__}
    return {name: thing for name, thing in found.items() if inspect.isclass(thing) or inspect.isfunction(thing)}


def _module(heading: str, name: str, module: Any, members: Mapping[str, Any]) -> str:
    text = inspect.getdoc(module) or ""
    return "\n".join([f"# {heading}\n", f"{text}\n", *(entry(thing, f"{name}.{n}") for n, thing in members.items())])


def _detectors() -> Iterator[str]:
    from importlib import import_module

    for name in ("adamixer", "faster_rcnn", "mask_rcnn"):
        module = import_module(f"compressvit.model.detectors.{name}")
        yield f"::: {module.__name__}\n    options: {{heading: {name}, filters: ['!^_', '!^[a-z]']}}\n"


# ----------------------------------------------------------------------------------------------- called by mkdocs


def all_pages() -> Mapping[str, str]:
    return MappingProxyType({**recipe_pages(), "reference/verbs.md": verbs_page(), **python_pages()})


def on_files(files: Any, config: Any) -> Any:
    from mkdocs.structure.files import File

    for place, content in all_pages().items():
        files.append(File.generated(config, place, content=content))
    return files
