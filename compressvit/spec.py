"""The base classes of recipes' parts and of stored records: frozen pydantic models that reject unknown keys, with readable errors."""

from __future__ import annotations

import json
from typing import Any, ClassVar, get_args

from pydantic import BaseModel, ConfigDict, ValidationError, field_validator
from pydantic.config import JsonDict
from pydantic.fields import FieldInfo

from compressvit.errors import UserError, did_you_mean, nearest

Path = tuple[str | int, ...]  # of a value in nested mappings and lists
_FEW = 12  # keys that a message lists
_LARGEST = 3.4e38  # of 32-bit floats, in which torch computes


class Frozen(BaseModel):
    """Frozen values that are written to a file and validated when they are read; unknown keys are rejected."""

    model_config = ConfigDict(defer_build=True, frozen=True, extra="forbid", validate_default=True, allow_inf_nan=False)


class Spec(Frozen):
    """A frozen set of options. YAML and Python build the same object, and report the same errors.

    Raises:
        UserError: at construction, if an option is unknown, missing or invalid; the message lists every error.
    """

    # Keys of earlier versions with their current names, for the error message.
    renamed: ClassVar[dict[str, str]] = {}

    def __init__(self, /, **options: Any):
        __tracebackhide__ = True
        try:
            super().__init__(**options)
        except ValidationError as error:
            lines = [f"{written(path)}: {text}" if path else text for path, text in faults(type(self), error, options)]
            if len(lines) > 1:
                lines = [f"{len(lines)} errors", *lines]
            raise UserError(f"{type(self).__name__}: " + "\n  ".join(lines)) from None

    # As in pydantic's RootModel: sections within a recipe are not built by `__init__`, so their errors keep their place in the recipe.
    __init__.__pydantic_base_init__ = True  # type: ignore[attr-defined]

    @field_validator("*")
    @classmethod
    def _fits_in_32_bits(cls, value: Any) -> Any:
        if isinstance(value, float) and abs(value) > _LARGEST:
            raise ValueError(f"{value:g} is too large for 32-bit floats, which end at {_LARGEST:g}")
        return value

    @classmethod
    def completed(cls) -> type[Spec]:
        """The class with all its fields, for one whose fields are the entries of a registry."""
        return cls

    @classmethod
    def unknown_key(cls, key: str) -> str:
        """The error message for an unknown key."""
        if key in cls.renamed:
            return f"is called {cls.renamed[key]} now; use {cls.renamed[key]}"
        hint = did_you_mean(key, cls.model_fields, list_at_most=40)
        return f"unknown key{'' if hint.startswith('(') or not hint else ';'} {hint}".rstrip()


def faults(root: type[Spec], error: ValidationError, content: Any) -> list[tuple[Path, str]]:
    """The errors in `content` that pydantic reports for `root`: the path of each, () for the whole, and what is wrong there."""
    found: dict[Path, list[str]] = {}
    for fault in error.errors(include_url=False):
        path = existing(fault["loc"], content, missing=fault["type"] in ("missing", "extra_forbidden"))
        found.setdefault(path, []).append(_sentence(root, fault, path))
    # One branch of a union rejects the whole value while another one found the error inside it.
    around = {path[:end] for path in found for end in range(1, len(path))}
    found = {path: texts for path, texts in found.items() if path not in around}
    return [(path, " or ".join(dict.fromkeys(texts))) for path, texts in found.items()]


def existing(loc: Path, content: Any, *, missing: bool) -> Path:
    """The part of pydantic's location that is a path in `content`; the location also contains branches of unions.

    Args:
        missing: its last part is a key that `content` lacks, or that the model does.
    """
    path: list[str | int] = []
    for i, part in enumerate(loc):
        if _has(content, part):
            content = content[part]
        elif not (missing and i == len(loc) - 1):
            continue
        path.append(part)
    return tuple(path)


def _has(content: Any, part: str | int) -> bool:
    if isinstance(content, dict):
        return part in content
    return isinstance(content, (list, tuple)) and isinstance(part, int) and part < len(content)


def _sentence(root: type[Spec], fault: Any, path: Path) -> str:
    given = fault["input"]
    section = spec_at(root, path[:-1])
    if fault["type"] == "extra_forbidden":
        return (section or Spec).unknown_key(str(fault["loc"][-1]))
    if fault["type"] == "missing":
        field = section.model_fields.get(str(path[-1])) if section else None
        about = meaning(field).rstrip(".") if field else ""
        return "missing, and it has no default" + (f"; it is {about[0].lower()}{about[1:]}" if about else "")
    if fault["type"] == "too_short":
        return f"should have at least {fault['ctx']['min_length']} item, not {fault['ctx']['actual_length']}"
    if fault["type"] == "literal_error":
        known = fault["ctx"]["expected"].replace("'", "").replace(" or ", ", ").split(", ")
        close = nearest(str(given), known)
        return f"{_cut(repr(given))} is none of {', '.join(known)}" + (f"; did you mean '{close}'?" if close else "")
    if fault["type"] == "model_type" and (inner := spec_at(root, path)) is not None and len(inner.model_fields) <= _FEW:
        keys = ", ".join(inner.model_fields)
        return f"is a section with keys, not {_cut(json.dumps(given, default=str, ensure_ascii=False))}; its keys are {keys}"
    text = fault["msg"].removeprefix("Value error, ").removeprefix("Input ").removeprefix("input ")
    if fault["type"] == "value_error":
        return text
    return f"{text}, not {_cut(json.dumps(given, default=str, ensure_ascii=False))}"


def _cut(text: str) -> str:
    return text if len(text) <= 300 else f"{text[:300]}…"


def meaning(field: FieldInfo) -> str:
    """The documentation of a key."""
    spec = spec_in(field.annotation)
    text = field.description or (spec.__doc__ if spec else None) or ""
    if callable(field.json_schema_extra):  # known only from a registry
        schema: JsonDict = {"description": text}
        field.json_schema_extra(schema)
        text = str(schema["description"])
    return text.splitlines()[0] if text else ""


def spec_at(root: type[Spec], path: Path) -> type[Spec] | None:
    """The class of the section at a path below `root`; None if there is no section."""
    spec: type[Spec] | None = root.completed()
    for part in path:
        if isinstance(part, int) or spec is None:
            continue
        field = spec.model_fields.get(part)
        spec = spec_in(field.annotation) if field else None
    return spec


def spec_in(annotation: Any) -> type[Spec] | None:
    """The section in an annotation, possibly inside a list or union."""
    if isinstance(annotation, type) and issubclass(annotation, Spec):
        return annotation.completed()
    return next((spec for a in get_args(annotation) if (spec := spec_in(a)) is not None), None)


def written(path: Path) -> str:
    """A path as messages show it, e.g. 'steps[0].multiplex.share'."""
    return "".join(f"[{p}]" if isinstance(p, int) else f".{p}" for p in path).removeprefix(".")


def first_fault(error: ValidationError) -> str:
    """Where and what the first fault of a file's content is, e.g. 'student.parameters: input should be a valid integer'."""
    fault = error.errors(include_url=False)[0]
    where = ".".join(map(str, fault["loc"]))
    what = fault["msg"].removeprefix("Value error, ")
    return f"{where}: {what[:1].lower()}{what[1:]}" if where else what
