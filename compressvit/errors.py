"""The one kind of error a user can cause, and the suggestions that go with it.

`UserError` is for what somebody outside the code can put right: a recipe, a file, a folder, a model's name.
The command line prints its text without a stack trace and exits with code 2. Anything else that escapes is our own fault.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class UserError(ValueError):
    """A fault in what was asked for. The text says what was asked, what was given, why it fails and what would work."""


def nearest(word: str, known: Iterable[str]) -> str | None:
    """The entry of `known` that `word` was probably meant to be, or None if nothing is close."""
    known = list(known)
    by_lower = {k.lower(): k for k in known}
    matches = difflib.get_close_matches(word.lower(), by_lower, n=1, cutoff=0.6)
    return by_lower[matches[0]] if matches else None


def did_you_mean(word: str, known: Iterable[str], *, list_at_most: int = 12) -> str:
    """A clause for the end of a message: the nearest known word, and the known words when there are few of them.

    Returns an empty string when there is neither a near word nor a short list.
    """
    known = list(known)
    close = nearest(word, known)
    parts = []
    if close is not None:
        parts.append(f"did you mean '{close}'?")
    if known and len(known) <= list_at_most:
        parts.append(f"(known: {', '.join(known)})")
    return " ".join(parts)
