"""What an archive of `torch.export` may hold to be read without the user's trust: numbers, and a graph of torch's own operators.

torch reads pickles in such an archive, compiled libraries, expressions that Python evaluates, and the names of any functions of its own. It
also writes a program of Python with the names in the graph, in which a quote would end a text.
"""

from __future__ import annotations

import io
import json
import re
import zipfile
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

_RECORDS = re.compile(
    r"(archive_format|archive_version|byteorder|\.data/(version|serialization_id|alignment)|\.format_version|\.storage_alignment"
    r"|models/model\.json|data/weights/(weight_\d+|model_weights_config\.json)"
    r"|data/constants/(tensor_\d+|model_constants_config\.json)|data/sample_inputs/model\.pt|extra/compressvit\.json)"
)
_OPERATORS = re.compile(
    r"torch\.ops\.(?:aten|torchvision)\.(?!from_file\b|__)[A-Za-z_]\w*(?:\.(?!__)\w+)?"
    r"|_operator\.(?:add|sub|mul|floordiv|truediv|mod|neg|pow|getitem|eq|ne|lt|le|gt|ge|and_|or_)"
)
_TEXT = re.compile(  # no quote, bracket or line, but in what a check of a detector's says
    r"[\w.,:;+\-> ]*|Runtime assertion failed for expression [\w.,()<>=*/+\- ]* on node '\w+'", re.ASCII
)
# The shape of what goes in and comes out: lists, tuples and dictionaries, without classes that are imported by name
_SPEC = re.compile(
    r'(?:"(?:type|context|children_spec|null|\[\]|builtins\.(?:tuple|list|dict))"|null|[\[\]{}:, 1])*', re.ASCII
)
# Arithmetic of sympy with numbers and symbols. Nothing in lower case is called, nothing is looked up with a dot, and the only texts are
# names of symbols: some classes evaluate texts, and others take memory or time without end. A token is never the beginning of another
_FUNCTIONS = (
    "Integer|Rational|Add|Mul|Pow|PowByNatural|Min|Max|Mod|PythonMod|FloorDiv|CleanDiv|CeilDiv|ModularIndexing|IntTrueDiv|FloatTrueDiv"
    "|TruncToInt|TruncToFloat|FloorToInt|CeilToInt|RoundToInt|ToFloat|Where|Identity|And|Or|Not|Eq|Ne|Lt|Le|Gt|Ge|Equality|Unequality"
    "|StrictLessThan|StrictGreaterThan|LessThan|GreaterThan"
)
_TOKEN = re.compile(
    rf"(?P<call>(?:{_FUNCTIONS})?\()|(?P<close>\))|(?P<comma>, ?)"
    r"|Symbol\('[a-z]\w{0,40}'(?:, [a-z]+=(?:True|False)){0,9}\)|true\b|false\b"
    r"|Float\(-?\d{1,12}(?:\.\d{1,20})?\)|-?\d{1,12}(?![\w.])",
    re.ASCII,
)
_EXPONENT = re.compile(r"Integer\((?:\d{1,2}|-1)\)|\d{1,2}|-1", re.ASCII)
_LONGEST = 2_000  # characters of an expression
_REFUSED = ("as_custom_obj", "as_operator", "as_graph")


class NotInspected(ValueError):
    """An archive holds what could run code when torch reads it, or cannot be judged. Its text says what, as a clause."""


def inspected(content: bytes) -> bytes:
    """The records of an archive, none of which runs code, in a new one, so that torch gets what was looked at: of a file with two
    directories its reader and Python's find different records.

    Raises:
        NotInspected: a record could run code, or cannot be judged.
    """
    try:
        with zipfile.ZipFile(io.BytesIO(content)) as archive:
            records = _records(archive, len(content))
    except NotInspected:
        raise
    except (
        zipfile.BadZipFile,
        RuntimeError,  # encrypted; a method of compression that is unknown; too deep
        EOFError,
        ValueError,
        LookupError,
        AttributeError,
        TypeError,
        OSError,
    ) as error:
        raise NotInspected(
            f"it is no archive that can be looked into ({type(error).__name__}: {str(error)[:100]})"
        ) from error
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", zipfile.ZIP_STORED) as again:
        for name, record in records.items():
            again.writestr(f"model/{name}", record)
    return buffer.getvalue()


def _records(archive: zipfile.ZipFile, size: int) -> dict[str, bytes]:
    """The records by name, without the folder that all are in."""
    entries = archive.infolist()
    names = [entry.filename for entry in entries]
    if len({name.casefold() for name in names}) != len(names) or len({name.partition("/")[0] for name in names}) != 1:
        raise NotInspected("two records in it have one name, or it is several archives")
    if sum(entry.file_size for entry in entries) > size:
        raise NotInspected("its records are larger together than the file")
    found = {}
    for entry in entries:
        inner = entry.filename.partition("/")[2]
        if entry.compress_type != zipfile.ZIP_STORED or not _RECORDS.fullmatch(inner):
            raise NotInspected(f"it holds {inner or entry.filename}")
        found[inner] = archive.read(entry)
        if fault := _fault(inner, found[inner]):
            raise NotInspected(fault)
    return found


def _fault(name: str, record: bytes) -> str | None:
    if name == "data/sample_inputs/model.pt" and record:
        return f"it holds a pickle, {name}"
    if name.endswith("_config.json"):
        config = json.loads(record.decode())
        if any(found["use_pickle"] for found in config["config"].values()):
            return f"{name} says that values are pickled"
        return _fault_of_graph(config)
    if name == "models/model.json":
        return _fault_of_graph(json.loads(record.decode()))
    return None


def _fault_of_graph(graph: Any) -> str | None:
    for key, value in _pairs(graph):
        if key in _REFUSED and value:
            return f"its graph has {key}"
        if key == "target" and not (isinstance(value, str) and _OPERATORS.fullmatch(value)):
            return f"its graph calls {str(value)[:100]!r}"
        if key == "expr_str":
            if not (isinstance(value, str) and _is_arithmetic(value)):
                return f"its graph has the expression {str(value)[:100]!r}"
        elif isinstance(value, str) and not (_SPEC if key in ("in_spec", "out_spec") else _TEXT).fullmatch(value):
            return f"its graph has the text {value[:100]!r}"
        if not _TEXT.fullmatch(key):
            return f"its graph has the name {key[:100]!r}"
    return None


def _pairs(content: Any) -> Iterator[tuple[str, Any]]:
    """Every key with its value, at any depth; of a list also with each of its parts."""
    left = [("", content)]
    while left:
        key, value = left.pop()
        yield key, value
        if isinstance(value, dict):
            left += value.items()
        elif isinstance(value, list):
            left += ((key, part) for part in value)


@dataclass
class _Call:
    """A bracket that is open in an expression: whether it is that of a power, where its last argument begins, and whether it has powers."""

    is_power: bool
    last: int
    has_powers: bool = False


def _is_arithmetic(text: str) -> bool:
    """Whether an expression has only what is allowed, and no power that takes memory without end: exponents are small numbers, and no power
    is in the base of another."""
    place, calls = 0, [_Call(False, 0)]
    while len(text) <= _LONGEST and place < len(text) and (token := _TOKEN.match(text, place)):
        inner = calls[-1]
        if token["call"]:
            calls.append(_Call(token["call"].startswith("Pow"), token.end()))
        elif token["comma"]:
            inner.last = token.end()
        elif token["close"]:
            if len(calls) == 1 or (inner.is_power and not _is_small_power(inner, text[inner.last : place])):
                return False
            calls.pop()
            calls[-1].has_powers |= inner.is_power or inner.has_powers
        place = token.end()
    return place == len(text) and len(calls) == 1


def _is_small_power(call: _Call, exponent: str) -> bool:
    return not call.has_powers and _EXPONENT.fullmatch(exponent) is not None
