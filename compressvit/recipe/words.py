"""Entries of a recipe's lists: words, each with its options. The valid words are known once the registries have been read."""

from __future__ import annotations

from collections.abc import Iterable
from functools import cache
from typing import Any, ClassVar

from pydantic import BaseModel, ConfigDict, Field, GetCoreSchemaHandler, create_model, model_validator
from pydantic_core import CoreSchema

from compressvit.diagnostics.base import DIAGNOSTICS
from compressvit.errors import did_you_mean
from compressvit.spec import Spec
from compressvit.training.phases import PHASES, PhaseSpec
from compressvit.transforms.base import TRANSFORMS, Transform


class Merge(Spec):
    """Also write the result as a plain timm model, as `compressvit merge` does; must be the last step."""

    name: ClassVar[str] = "merge"


class Word(Spec):
    """An entry of a list: a word, or a word with its options.

    The words are the keys of registries, which installed packages extend, so a subclass gets its fields when it is first used.
    """

    model_config = ConfigDict(defer_build=True)
    kind: ClassVar[str]
    indefinite: ClassVar[str]  # the name of an entry in messages, e.g. 'a step'

    @classmethod
    def specs(cls) -> dict[str, type[BaseModel]]:
        """The spec classes, by word."""
        raise TypeError(f"{cls.__name__} does not define specs")

    @classmethod
    def completed(cls) -> type[Spec]:
        return cls if cls.model_fields else with_words(cls)

    @classmethod
    def unknown_key(cls, key: str) -> str:
        if why := broken(key):
            return f"unknown key; {why}"
        hint = did_you_mean(key, cls.model_fields, list_at_most=40)
        if not hint.startswith("did"):
            return f"unknown key, which neither compressvit nor an installed package offers {hint}".rstrip()
        return super().unknown_key(key)

    @classmethod
    def __get_pydantic_core_schema__(cls, source: Any, handler: GetCoreSchemaHandler) -> CoreSchema:
        return handler(source) if cls.model_fields else handler.generate_schema(with_words(cls))

    @model_validator(mode="after")
    def _exactly_one(self) -> Any:
        named = [k for k in type(self).model_fields if getattr(self, k) is not None]
        if len(named) != 1:
            what = f"names {len(named)}: {', '.join(named)}" if named else "is empty"
            raise ValueError(f"{self.kind}; this one {what}")
        return self

    @property
    def name(self) -> str:
        """The word in the recipe."""
        return next(k for k in type(self).model_fields if getattr(self, k) is not None)

    @property
    def spec(self) -> Any:
        """The spec of the entry, i.e. its options."""
        return getattr(self, self.name)


@cache
def with_words(base: type[Word]) -> type[Word]:
    """The pydantic model of `base` with a field for every valid word."""
    fields: dict[str, Any] = {
        name: (spec | None, Field(None, description=(spec.__doc__ or "").strip().partition("\n")[0]))
        for name, spec in base.specs().items()
    }
    return create_model(base.__name__, __base__=base, __doc__=base.__doc__, __module__=base.__module__, **fields)


class Step(Word):
    """One entry of a recipe: a transform, a phase, or `merge` at the end."""

    kind = "a step names one transform or phase"
    indefinite = "a step"

    @classmethod
    def specs(cls) -> dict[str, type[BaseModel]]:
        return {**TRANSFORMS, **PHASES, Merge.name: Merge}


class Entry(Word):
    """One diagnostic."""

    kind = "an entry names one diagnostic"
    indefinite = "a diagnostic"

    @classmethod
    def specs(cls) -> dict[str, type[BaseModel]]:
        return dict(DIAGNOSTICS)


# The keys of lists of such entries.
LISTS: dict[str, type[Word]] = {"steps": Step, "diagnostics": Entry}


def step(spec: Transform | PhaseSpec | Merge) -> Step:
    """Make a recipe step from a spec, for recipes built in Python: `Recipe(…, steps=(step(Multiplex(share=2)), step(Distill())))`."""
    made = with_words(Step)(**{spec.name: spec})
    assert isinstance(made, Step)
    return made


def broken(word: str) -> str | None:
    """Why an installed package fails to provide the word of its entry point, if there is one for this word."""
    return TRANSFORMS.fault(word) or PHASES.fault(word) or DIAGNOSTICS.fault(word)


def packages_of(words: Iterable[str]) -> list[str]:
    """The distributions other than compressvit that provide these words."""
    found = {TRANSFORMS.package_of(word) or PHASES.package_of(word) or DIAGNOSTICS.package_of(word) for word in words}
    return sorted(package for package in found if package is not None)
