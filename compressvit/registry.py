"""Words of recipes and what they name: one registry for each kind of thing that can be added.

Inside the package a file registers what it defines when it is imported, and all files of the registry's room are imported when the
registry is first read: adding a method is adding a file. Outside, an installed package offers an entry point

    [project.entry-points."compressvit.transforms"]
    ia3 = "compressvit_ia3"

whose name is the word and whose module registers it. A recipe names the word alone, never a module: recipes stay data, and only
what is installed is loaded.
"""

from __future__ import annotations

import importlib
import logging
import pkgutil
from collections.abc import Callable, Iterator, Mapping
from importlib.metadata import EntryPoint, entry_points
from typing import TypeVar

T = TypeVar("T")

log = logging.getLogger("compressvit")


class Registry(Mapping[str, T]):
    """What words name, in the order in which it was registered.

    Args:
        kind: what one entry is called in messages, e.g. 'transform'.
        room: the package whose files register entries, e.g. 'compressvit.transforms'. Its last part names the entry points' group:
            'compressvit.transforms'.
    """

    def __init__(self, kind: str, room: str):
        self.kind, self.room = kind, room
        self.group = f"compressvit.{room.rpartition('.')[2]}"
        self._entries: dict[str, T] = {}
        self._packages: dict[str, str] = {}
        self._faults: dict[str, str] = {}
        self._found = False

    def add(self, name: str, entry: T, module: str) -> None:
        """Register an entry that `module` defines.

        Raises:
            TypeError: the word is taken.
        """
        if name in self._entries:
            raise TypeError(f"two {self.kind}s are called {name!r}: {self._packages[name]} and {module}")
        self._entries[name] = entry
        self._packages[name] = module

    def __getitem__(self, name: str) -> T:
        self._find()
        return self._entries[name]

    def __iter__(self) -> Iterator[str]:
        self._find()
        return iter(self._entries)

    def __len__(self) -> int:
        self._find()
        return len(self._entries)

    def package_of(self, name: str) -> str | None:
        """The distribution that provides an entry; None for what compressvit itself has."""
        self._find()
        package = self._packages[name]
        return None if package.partition(".")[0] == "compressvit" else package

    def fault(self, name: str) -> str | None:
        """Why an installed package could not provide the word that it offers; None where nothing went wrong."""
        self._find()
        return self._faults.get(name)

    def _find(self) -> None:
        if self._found:
            return
        self._found = True
        room = importlib.import_module(self.room)
        for info in pkgutil.walk_packages(room.__path__, f"{self.room}."):
            importlib.import_module(info.name)
        for point in entry_points(group=self.group):
            self._load(point)

    def _load(self, point: EntryPoint) -> None:
        package = point.dist.name if point.dist is not None else point.value
        if point.name in self._entries and self.package_of(point.name) is None:
            fault = f"compressvit has a {self.kind} of that name"
        else:
            fault = _failure(point.load)
            if fault is None and point.name not in self._entries:
                fault = f"{point.value} registers no {self.kind} of that name"
        if fault is None:
            self._packages[point.name] = package
        else:
            self._faults[point.name] = (
                f"the {self.kind} {point.name!r} of the package {package} cannot be used: {fault}"
            )
            log.warning("%s", self._faults[point.name])


def _failure(load: Callable[[], object]) -> str | None:
    try:
        load()
    except Exception as error:  # somebody else's code: whatever it raises must not stop recipes that do not use it
        return f"{type(error).__name__}: {error}"
    return None
