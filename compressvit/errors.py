"""The one kind of error a user can cause, and the suggestions that go with it.

`UserError` is for what somebody outside the code can put right: a recipe, a file, a folder, a model's name.
The command line prints its text without a stack trace and exits with code 2. Anything else that escapes is our own fault.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar

_COMMAND_LINE = ContextVar("_COMMAND_LINE", default=False)


class UserError(ValueError):
    """A fault in what was asked for. The text says what was asked, what was given, why it fails and what would work."""


@contextmanager
def command_line() -> Iterator[None]:
    """While it lasts, `option` and `switch` write options as flags: a command is running."""
    token = _COMMAND_LINE.set(True)
    try:
        yield
    finally:
        _COMMAND_LINE.reset(token)


def is_command_line() -> bool:
    """Whether a command is running, and not a call from Python."""
    return _COMMAND_LINE.get()


def option(name: str, value: object = None) -> str:
    """An option as the caller writes it: `--device cpu` on the command line, `device='cpu'` in Python; its name alone without a value."""
    if is_command_line():
        return f"--{name}" if value is None else f"--{name} {value}"
    return name if value is None else f"{name}={str(value)!r}"


def switch(name: str) -> str:
    """An option that is on or off, as the caller turns it on: `--resume` on the command line, `resume=True` in Python."""
    return f"--{name}" if is_command_line() else f"{name}=True"


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
