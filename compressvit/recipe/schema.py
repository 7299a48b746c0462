"""The documentation of recipe keys for people, and the JSON schema of recipes for editors."""

from __future__ import annotations

import json
from typing import Any

from pydantic import BaseModel
from pydantic.fields import FieldInfo

from compressvit.errors import UserError, did_you_mean
from compressvit.recipe.recipe import Recipe
from compressvit.recipe.words import LISTS, with_words
from compressvit.spec import meaning, spec_in


def documentation(key: str) -> list[tuple[str, str, str]]:
    """Name, default and meaning of the keys below `key` (a section, a step, or a path such as distill.losses).

    Raises:
        UserError: there is no such key.
    """
    parts = key.split(".")
    known: dict[str, FieldInfo] = dict(Recipe.model_fields)
    for base in LISTS.values():
        known |= with_words(base).model_fields
    rows: dict[str, FieldInfo] = {}
    for i, part in enumerate(parts):
        if part not in known:
            hint = did_you_mean(part, known, list_at_most=60) or "`compressvit schema teacher` lists those of a section"
            raise UserError(f"there is no key {'.'.join(parts[: i + 1])!r} in a recipe; {hint}")
        spec = spec_in(known[part].annotation)
        rows = {part: known[part]} if spec is None else dict(spec.model_fields)
        known = {} if spec is None else rows
    return [(name, _default(field), meaning(field)) for name, field in rows.items()]


def json_schema() -> dict[str, Any]:
    """JSON schema of recipes, for editors that complete and check YAML."""
    schema = Recipe.model_json_schema()
    schema["$schema"] = "https://json-schema.org/draft/2020-12/schema"
    for key, model in LISTS.items():
        entry = schema["$defs"][model.__name__]
        entry.update(minProperties=1, maxProperties=1)
        for name, field in entry["properties"].items():
            reference = next(option for option in field.pop("anyOf") if "$ref" in option)
            # `- distill:` without a value is null in YAML, and means default options
            entry["properties"][name] = {
                "anyOf": [reference, {"type": "null"}],
                "description": field.get("description", ""),
            }
        words = {"enum": list(entry["properties"])}
        schema["properties"][key]["items"] = {"anyOf": [{"$ref": f"#/$defs/{model.__name__}"}, words]}
    return schema


def _default(field: FieldInfo) -> str:
    if field.is_required():
        return "required"
    value = field.get_default(call_default_factory=True)
    return "…" if isinstance(value, BaseModel) else json.dumps(value, default=str)
