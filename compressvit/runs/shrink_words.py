"""What the words of `compressvit shrink` mean: sizes, what is kept, and arguments of the model."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from compressvit.errors import UserError, option
from compressvit.recipe.yaml import Document, override

SIZES = "e.g. 0.5 for half of the teacher"


def kept(words: Sequence[str]) -> dict[str, float]:
    """What words such as 'cosine=0.98' ask to be kept, by figure.

    Raises:
        UserError: a word is not NAME=NUMBER, or names a figure that another has named.
    """
    found: dict[str, float] = {}
    for word in words:
        name, _, value = word.partition("=")
        try:
            number = float(value)
        except ValueError:
            raise UserError(f"{option('keep', word)}: give NAME=NUMBER, e.g. {option('keep', 'cosine=0.98')}") from None
        if name in found:
            raise UserError(f"{option('keep', ' '.join(words))}: two limits of {name}; give one of each")
        found[name] = number
    return found


def arguments_of(words: Sequence[str]) -> dict[str, Any]:
    """What words such as 'patch_size=8' give as arguments of timm.create_model; values are read as YAML, as overrides of recipes are.

    Raises:
        UserError: a word is not KEY=VALUE.
    """
    for word in words:
        name, equals, _ = word.partition("=")
        if not (name and equals):
            raise UserError(f"{option('args', word)}: give KEY=VALUE, e.g. {option('args', 'patch_size=8')}")
    document = Document("args", {})
    override(document, list(words))
    return dict(document.content)


def limits(words: Sequence[str], unit: str | None = None) -> dict[str, float]:
    """The limits that words such as '0.5' or 'macs=0.5' give, by unit.

    Args:
        unit: of a word without one; by default parameters.

    Raises:
        UserError: a word is no number, names no unit, or one that has a limit already.
    """
    found: dict[str, float] = {}
    for word in words:
        name, _, value = word.rpartition("=")
        name = name or unit or "parameters"
        try:
            number = float(value)
        except ValueError:
            raise UserError(f"{option('to', word)}: {value!r} is not a number; {SIZES}") from None
        if name in found:
            raise UserError(f"--to {' '.join(words)}: two limits of {name}; give one of each unit")
        found[name] = number
    if unit is not None and all("=" in word for word in words):
        raise UserError(f"--unit {unit}: every limit of --to names its own unit; leave --unit out")
    return found
