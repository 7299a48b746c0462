"""What an archive of `torch.export` may hold to be read without the user's trust: numbers, and a graph of torch's own operators.

torch reads pickles in such an archive, compiled libraries, expressions that Python evaluates, and the names of any functions of its own.
"""

from __future__ import annotations

import io
import json
import re
import zipfile
from collections.abc import Iterator
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
# Classes of sympy with numbers and symbols. Nothing in lower case is called, nothing is looked up with a dot, and the only texts are
# names of symbols: some classes evaluate texts
_EXPRESSION = re.compile(
    r"(?:[A-Z][A-Za-z]*\(|Symbol\('[a-z]\w*'|[a-z]+=(?:True|False)|true|false|-?\d+(?:\.\d+)?|[(), ])*"
)
_REFUSED = ("as_custom_obj", "as_operator", "as_graph")


def fault_of_archive(content: bytes) -> str | None:
    """What an archive holds that could run code when torch reads it, or that cannot be judged; None of one that holds nothing such."""
    try:
        with zipfile.ZipFile(io.BytesIO(content)) as archive:
            return _fault(archive)
    except (
        zipfile.BadZipFile,
        NotImplementedError,
        EOFError,
        ValueError,
        RecursionError,
        LookupError,
        TypeError,
        OSError,
    ) as error:
        return f"it is no archive that can be looked into ({type(error).__name__}: {str(error)[:100]})"


def _fault(archive: zipfile.ZipFile) -> str | None:
    entries = archive.infolist()
    names = [entry.filename for entry in entries]
    if len({name.casefold() for name in names}) != len(names) or len({name.partition("/")[0] for name in names}) != 1:
        return "two records in it have one name, or it is several archives"
    for entry in entries:
        inner = entry.filename.partition("/")[2]
        if entry.compress_type != zipfile.ZIP_STORED or not _RECORDS.fullmatch(inner):
            return f"it holds {inner or entry.filename}"
        if inner == "data/sample_inputs/model.pt" and entry.file_size:
            return f"it holds a pickle, {inner}"
        if inner.endswith("_config.json") and any(found["use_pickle"] for found in _config(archive, entry)):
            return f"{inner} says that values are pickled"
        if inner == "models/model.json" and (fault := _fault_of_graph(json.loads(archive.read(entry)))):
            return fault
    return None


def _config(archive: zipfile.ZipFile, entry: zipfile.ZipInfo) -> list[dict[str, Any]]:
    return list(json.loads(archive.read(entry))["config"].values())


def _fault_of_graph(graph: Any) -> str | None:
    for key, value in _pairs(graph):
        if key in _REFUSED and value:
            return f"its graph has {key}"
        if key == "target" and not (isinstance(value, str) and _OPERATORS.fullmatch(value)):
            return f"its graph calls {str(value)[:100]!r}"
        if key == "expr_str" and not (isinstance(value, str) and _EXPRESSION.fullmatch(value)):
            return f"its graph has the expression {str(value)[:100]!r}"
    return None


def _pairs(content: Any) -> Iterator[tuple[str, Any]]:
    """Every key with its value, at any depth."""
    left = [content]
    while left:
        value = left.pop()
        if isinstance(value, dict):
            yield from value.items()
            left += value.values()
        elif isinstance(value, list):
            left += value
