"""The names of a sweep's folders: the values that differ; of a run that is there already, the name that it has."""

from __future__ import annotations

import hashlib
import json
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path

from compressvit.reading import MAX_YAML, Unreadable, read_text
from compressvit.recipe.recipe import Recipe
from compressvit.runs.folder import RESOLVED

_LONGEST = 40  # characters of a value in a folder's name


def names_of(combinations: Sequence[Mapping[str, str]], varying: Sequence[str]) -> list[str]:
    """A name for every combination of values, of the keys that vary: `share-2_seed-0`."""
    short = _short_keys(varying)
    names = ["_".join(f"{tail}-{_in_a_name(one[key])}" for key, tail in short.items()) for one in combinations]
    return _distinct(names, combinations)


def names_here(output: Path, names: Sequence[str], recipes: Sequence[Recipe | None]) -> list[str]:
    """The same names, but for runs that are in `output` already: each is found by its recipe, since its name was made of what varied in the
    sweep that began it. A name that such a run has is no other's."""
    begun = _begun(output)
    found = [None if recipe is None else begun.pop(recipe.to_yaml(), None) for recipe in recipes]
    taken = {name for name in found if name is not None}
    free = (f"{name}_{_mark(name)}" if name in taken else name for name in names)
    return [own or other for own, other in zip(found, free, strict=True)]


def _begun(output: Path) -> dict[str, str]:
    """The names of the runs in a folder, by their recipes with every default written out."""
    found: dict[str, str] = {}
    for file in sorted(output.glob(f"*/{RESOLVED}")):
        try:
            found.setdefault(read_text(file, most=MAX_YAML), file.parent.name)
        except Unreadable:  # what is wrong with it is told where its name is asked for
            continue
    return found


def _short_keys(keys: Sequence[str]) -> dict[str, str]:
    """By key the shortest end of it, at a dot, that no other key has."""
    parts = {key: re.sub(r"\[(\d+)\]", r".\1", key).split(".") for key in keys}
    found = {}
    for key, own in parts.items():
        ends = (own[-length:] for length in range(1, len(own) + 1))
        unlike = (end for end in ends if sum(other[-len(end) :] == end for other in parts.values()) == 1)
        found[key] = _in_a_name(".".join(next(unlike, own)))
    return found


def _in_a_name(text: str) -> str:
    """A text as a part of a folder's name: of a path its last part."""
    last = text.rstrip("/").rpartition("/")[2]
    return re.sub(r"[^A-Za-z0-9.+_]+", "-", last).strip("-.")[:_LONGEST] or "none"


def _distinct(names: list[str], combinations: Sequence[Mapping[str, str]]) -> list[str]:
    """Names that are the same, as those of two folders called alike, with a part of a checksum."""
    count = Counter(names)
    marks = map(_mark, combinations)
    return [name if count[name] == 1 else f"{name}_{mark}" for name, mark in zip(names, marks, strict=True)]


def _mark(what: object) -> str:
    return hashlib.sha256(json.dumps(what).encode()).hexdigest()[:6]
