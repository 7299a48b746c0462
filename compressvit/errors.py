"""`UserError`, the exception for errors that a user can fix, and helpers for its messages.

`UserError` is for errors whose cause is outside the code: in a recipe, a file, a folder, or the name of a model.
The command line prints its message without a traceback and exits with code 2. Any other exception that escapes is a bug.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar

_COMMAND_LINE = ContextVar("_COMMAND_LINE", default=False)


_LONGEST_WORD, _LONGEST_LINE, _LONGEST = 500, 2_000, 16_000  # characters of a message


class UserError(ValueError):
    """An error that a user can fix. The message says what was asked, what was given, why it fails and what would work.

    What was given can be of any length; a message that quotes too much of it is shortened.
    """

    def __init__(self, message: object):
        text = re.sub(r"\S+", lambda word: shortened(word.group(), _LONGEST_WORD), str(message))
        lines = (shortened(line, _LONGEST_LINE) for line in text.split("\n"))
        super().__init__(shortened("\n".join(lines), _LONGEST))


class UnmetBudget(UserError):
    """A budget is below what a step reaches with the model that it is given; after another step it may not be."""


def shortened(text: str, most: int) -> str:
    """A text, with `…` in place of its middle where it is longer than `most` characters."""
    return text if len(text) <= most else f"{text[: most // 2]}…{text[-most // 2 :]}"


@contextmanager
def command_line() -> Iterator[None]:
    """Context in which `option` and `switch` write options as command-line flags, because a command is running."""
    token = _COMMAND_LINE.set(True)
    try:
        yield
    finally:
        _COMMAND_LINE.reset(token)


def is_command_line() -> bool:
    """Whether a command is running, as opposed to a call from Python."""
    return _COMMAND_LINE.get()


def option(name: str, value: object = None) -> str:
    """An option as the caller writes it: `--device cpu` on the command line, `device='cpu'` in Python; without a value, only its name."""
    if is_command_line():
        flag = f"--{name.replace('_', '-')}"
        return flag if value is None else f"{flag} {value}"
    return name if value is None else f"{name}={str(value)!r}"


def switch(name: str) -> str:
    """A boolean option as the caller enables it: `--resume` on the command line, `resume=True` in Python."""
    return f"--{name.replace('_', '-')}" if is_command_line() else f"{name}=True"


def nearest(word: str, known: Iterable[str]) -> str | None:
    """The entry of `known` that is most similar to `word`; None if none is close."""
    known = list(known)
    by_lower = {k.lower(): k for k in known}
    matches = difflib.get_close_matches(word.lower(), by_lower, n=1, cutoff=0.6)
    return by_lower[matches[0]] if matches else None


def did_you_mean(word: str, known: Iterable[str], *, list_at_most: int = 12) -> str:
    """A clause for the end of a message: the most similar known word, and all known words if there are few.

    Returns an empty string if there is neither a similar word nor a short list.
    """
    known = list(known)
    close = nearest(word, known)
    parts = []
    if close is not None:
        parts.append(f"did you mean '{close}'?")
    if known and len(known) <= list_at_most:
        parts.append(f"(known: {', '.join(known)})")
    return " ".join(parts)
