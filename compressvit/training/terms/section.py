"""The section `losses` of a recipe, with a key for every registered term."""

from __future__ import annotations

from functools import cache
from typing import Any

from pydantic import ConfigDict, GetCoreSchemaHandler, create_model
from pydantic_core import CoreSchema

from compressvit.spec import Spec
from compressvit.training.terms.base import TERMS, LossTerm

# The order in which terms are listed and summed (the last digits of the sum depend on it); all other terms follow.
_ORDER = ("prediction", "attention_relation", "hidden_relation", "feature", "labels", "torchdistill")


class LossSection(Spec):
    """The terms of the distillation loss. A term with weight 0 is not computed.

    Its keys are the registered terms. Packages and programs can add terms until a section is first validated.
    """

    model_config = ConfigDict(defer_build=True)

    @classmethod
    def completed(cls) -> type[Spec]:
        return cls if cls is not LossSection else losses_section()

    @classmethod
    def unknown_key(cls, key: str) -> str:
        why = TERMS.fault(key)
        return f"unknown key; {why}" if why else super().unknown_key(key)

    @classmethod
    def __get_pydantic_core_schema__(cls, source: Any, handler: GetCoreSchemaHandler) -> CoreSchema:
        return handler(source) if cls is not LossSection else handler.generate_schema(losses_section())

    def terms(self) -> list[LossTerm]:
        """The terms with a positive weight, in order."""
        found: list[LossTerm] = []
        for name in type(self).model_fields:
            value = getattr(self, name)
            found += value if isinstance(value, tuple) else [value]
        return [term for term in found if term.weight]


@cache
def losses_section() -> type[LossSection]:
    """The pydantic model of the section, with the terms that are registered at the first call."""
    names = sorted(TERMS, key=lambda name: _ORDER.index(name) if name in _ORDER else len(_ORDER))
    fields: dict[str, Any] = {}
    for name in names:
        term: Any = TERMS[name]
        fields[name] = (tuple[term, ...], ()) if term.listed else (term, term())
    return create_model(
        "Losses",
        __base__=LossSection,
        __doc__=(LossSection.__doc__ or "").partition("\n")[0],
        __module__=__name__,
        **fields,
    )
