"""What a fit depends on and took long to find out: kept while a run lasts, and in a file for one that goes on later."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from compressvit.errors import UserError
from compressvit.files import write_json
from compressvit.reading import read_json


class Choices:
    """Plain data by name.

    Args:
        path: of the JSON file; None to keep them in memory alone.
        known: others, which are taken over.

    Raises:
        UserError: the file is damaged.
    """

    def __init__(self, path: Path | None = None, known: Choices | None = None):
        self._path = path
        self._known: dict[str, Any] = {}
        if path is not None and path.is_file():
            try:
                self._known = dict(read_json(path))
            except (UserError, ValueError, TypeError) as error:
                raise UserError(f"{error}\n  Remove {path}: what it holds is then found out again") from error
        if known is not None:
            self._known |= known._known

    @property
    def folder(self) -> Path | None:
        """For what is no JSON: beside the file."""
        return None if self._path is None else self._path.with_suffix(".fit")

    def get(self, name: str) -> Any:
        """What was put under a name; None if nothing was."""
        return self._known.get(name)

    def put(self, name: str, value: Any) -> None:
        """Keep a value of JSON."""
        self._known[name] = value
        if self._path is not None:
            write_json(self._path, self._known)
